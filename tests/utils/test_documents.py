"""Untrusted YAML and JSON: what it means, and one sentence for what is refused."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from trainer.utils import documents
from trainer.utils.documents import MAX_DEPTH, check_data, dump_yaml, parse_document, parse_json, read_document
from trainer.utils.errors import BadInput, cut, shorten


@pytest.fixture(params=["libyaml", "pure Python"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module as it is, and as it is where PyYAML was built without libyaml."""
    if request.param == "libyaml":
        yield documents
        return
    monkeypatch.setitem(sys.modules, "yaml.cyaml", None)
    spec = importlib.util.spec_from_file_location("trainer.utils.documents_pure", documents.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._Events.__module__ == module.__name__
    yield module


VALUES = {
    "no": "no",
    "on": "on",
    "12:30": "12:30",
    "2020-01-01": "2020-01-01",
    "1_000": "1_000",
    "true": True,
    "": None,
    "~": None,
    "null": None,
    "010": 10,
    "0o10": 8,
    "0x1F": 31,
    "-5": -5,
    "1e-4": 1e-4,
    "1.": 1.0,
    ".5": 0.5,
    "{a: 1, b: [x, y z]}": {"a": 1, "b": ["x", "y z"]},
    "a: &x 1\nb: 2": {"a": 1, "b": 2},
    '"a \\ud83e\\udd8a fox"': "a 🦊 fox",
    '{"a": "\\ud83e\\udd8a", "b": [1, 2.5, null, false]}': {"a": "🦊", "b": [1, 2.5, None, False]},
    "<<: {a: 1}": {"<<": {"a": 1}},
}


@pytest.mark.parametrize("text", VALUES)
def test_values(reader: ModuleType, text: str) -> None:
    value = reader.parse_document(text, "it")
    assert value == VALUES[text]
    assert type(value) is type(VALUES[text])


REFUSED = {
    "a: &x [lol]\nb: *x": "uses a YAML alias in line 2, *x",
    "[&a [lol, lol], &b [*a, *a], [*b, *b]]": "uses a YAML alias in line 1, *a",
    "!!python/object/apply:os.system [ls]": "uses a YAML tag in line 1, 'tag:yaml.org,2002:python/object",
    "a: !!timestamp 2020-01-01": "uses a YAML tag in line 1",
    "a: 1\nb: 2\na: 3": "has the key 'a' twice, again in line 3",
    '{"a": 1, "b": {"c": 1, "c": 2}}': "has the key 'c' twice",
    "1: 2": "has the key 1 in line 1, which is not text",
    "[1]: 2": "has the key [1] in line 1",
    "9" * 5000: "contains a number of 5000 digits",
    "0x" + "f" * 5000: "contains a number of 5002 digits",
    '{"a": ' + "9" * 5000 + "}": "contains a number of 5000 digits",
    "1e999": "contains 1e999, which is too large for a number",
    '{"a": -1e999}': "contains -1e999, which is too large",
    '{"a": NaN}': "contains NaN, which is not a number",
    "[" * 100_000: f"nests lists and mappings more than {MAX_DEPTH} deep",
    '{"a":' * 100_000: f"nests lists and mappings more than {MAX_DEPTH} deep",
    "- " * 200 + "a": f"nests lists and mappings more than {MAX_DEPTH} deep",
    "[" * 51 + "]" * 51: f"nests lists and mappings more than {MAX_DEPTH} deep",
    '["a \\ud83e"]': "contains 'a \\ud83e', which has an unpaired Unicode surrogate",
    '{"\\udd8a": 1}': "contains '\\udd8a', which has an unpaired Unicode surrogate",
    "a: [1": "is neither YAML nor JSON",
    "a: b: c": "is neither YAML nor JSON: mapping values are not allowed",
    "a\0b": "is neither YAML nor JSON",
    "a: 1\n---\nb: 2": "is neither YAML nor JSON",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_refused_in_one_short_sentence(reader: ModuleType, text: str) -> None:
    with pytest.raises(BadInput) as raised:
        reader.parse_document(text, "the settings")
    sentence = str(raised.value)
    assert sentence.startswith(f"the settings {REFUSED[text]}"), sentence
    assert len(sentence) < 300
    assert "\n" not in sentence


@pytest.mark.parametrize("text", ['- "a \\ud83e"', "a \udcff"])
def test_no_unpaired_surrogate_gets_through(reader: ModuleType, text: str) -> None:
    with pytest.raises(BadInput):
        reader.parse_document(text, "it")


def test_the_depth_allowed(reader: ModuleType) -> None:
    for text in ("[" * 50 + "]" * 50, "- " * 49 + "[a]"):
        reader.parse_document(text, "it")


ODD = ["yes", "on", "1e-4", "12:30", "2020-01-01", "0o10", "0x1f", "1_000", "null", "~", "", "=", "<<", "*a", "!a"]
ODD += [
    "!a",
    "🦊",
    "a\nb",
    "a\tb\0",
    "a\x85b",
    "a\u2028b",
    "\ufeff",
    ".inf",
    "1.",
    " a ",
    "- a",
    "a: b",
    "#",
    "'",
    '"',
    "%",
]


def test_what_is_written_is_read_back(reader: ModuleType) -> None:
    data = {"texts": ODD, **{text or "empty": text for text in ODD}}
    data["numbers"] = [0, -5, 10**18, 1e-5, 1e22, 1e300, 0.1, 5.0, 1.5e-300]
    written = reader.dump_yaml(data)
    assert reader.parse_document(written, "it") == data
    assert yaml.safe_load(written) == data, "a reader of YAML 1.1 sees the same"
    twice = [1, 2]
    assert reader.parse_document(dump_yaml([twice, twice]), "it") == [twice, twice]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(BadInput, match=r"^the file cannot be read: No such file"):
        read_document(file, "the file")
    file.write_bytes(b"\xef\xbb\xbfa: \xc3\xbc\n")
    assert read_document(file, "the file") == {"a": "ü"}, "without its byte order mark"
    file.write_bytes(b"a: \xc3")
    with pytest.raises(BadInput, match=r"^the file is not UTF-8 text: byte 4 is not valid; save it as UTF-8$"):
        read_document(file, "the file")
    file = tmp_path / "a.json"
    file.write_text("a: 1")
    with pytest.raises(BadInput, match=r"^the file is not JSON: Expecting value, line 1 column 1$"):
        read_document(file, "the file")
    with pytest.raises(BadInput, match=r"^line 7 is not UTF-8 text: byte 3 is not valid$"):
        parse_json(b'["\xff"]', "line 7")


def test_data_from_elsewhere() -> None:
    check_data({"a": ["🦊", 1, None, {"b": 2.5}]}, "it")
    with pytest.raises(BadInput, match=r"^it contains 'a \\udd8a', which has an unpaired Unicode surrogate"):
        check_data({"a": [{"b": "a \udd8a"}]}, "it")
    with pytest.raises(BadInput, match=r"^it contains '\\udd8a'"):
        check_data({"\udd8a": 1}, "it")


def test_values_in_messages_are_short_whatever_they_are() -> None:
    assert shorten("a b") == "'a b'"
    assert shorten([1, "b", None]) == "[1, 'b', None]"
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**7, ["x" * 10**6] * 10**4, {i: i for i in range(10**5)}, 10**10_000, -(10**10_000), deep):
        text = shorten(value)
        assert len(text) <= 103
        assert "\n" not in text
    assert shorten("x" * 1000) == f"'{'x' * 99}..."
    assert cut("a\n  b", 10) == "a b"
    assert cut("word " * 10**6, 12) == "word word wo..."
    assert parse_document(json.dumps(shorten("\ud83e")), "it") == "'\\ud83e'"
