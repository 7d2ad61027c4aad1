"""Reads YAML and JSON from users; any fault is reported in one sentence.

YAML is read with the scalar types of YAML 1.2 (core schema), so `no`, `12:30` and `2020-01-01` are text and `1e-4` is a
number. Aliases, tags and repeated keys are refused.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode
from yaml.resolver import BaseResolver

from .errors import BadInput, cut, shorten

MAX_DEPTH = 50
"""Largest nesting depth of lists and mappings."""
MAX_DIGITS = 100
"""Largest number of characters of an integer."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile("[\x85\u2028\u2029]")

try:  # libyaml's scanner is several times faster than Python's, and its parser does not recurse
    from yaml.cyaml import CParser as _Events
except ImportError:
    from yaml.parser import Parser
    from yaml.reader import Reader
    from yaml.scanner import Scanner

    class _Events(Reader, Scanner, Parser):
        def __init__(self, stream: str) -> None:
            Reader.__init__(self, stream)
            Scanner.__init__(self)
            Parser.__init__(self)


class _Refused(yaml.YAMLError):
    """Valid YAML or JSON that is not accepted; its text is the end of an error message."""


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file without its byte order mark.

    Args:
        what: the subject of the sentence, such as `run description run.yaml`.

    Raises:
        BadInput: the file cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{what} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{what} is not UTF-8 text: byte {error.start + 1} is not valid; save it as UTF-8") from error


def read_document(path: Path, what: str) -> Any:
    """A file's content as plain data: JSON where its name ends in .json, else YAML or JSON.

    Raises:
        BadInput: as `read_text` and `parse_document`.
    """
    text = read_text(path, what)
    return parse_json(text, what) if Path(path).suffix.lower() == ".json" else parse_document(text, what)


def parse_document(text: str, what: str) -> Any:
    """Parse JSON if possible, else YAML, because their escape sequences differ.

    Raises:
        BadInput: it is neither, or contains something that `parse_yaml` or `parse_json` refuses.
    """
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            return parse_json(text, what)
        except _NotJson:  # {a: 1} and [a, b] are YAML
            pass
    return parse_yaml(text, what)


def parse_json(text: str | bytes, what: str) -> Any:
    """Plain data of a JSON text.

    Raises:
        BadInput: it is not JSON (RFC 8259), a key is repeated, a number is out of range, a text holds an unpaired
            surrogate, or lists and mappings are nested more than MAX_DEPTH deep.
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=_json_mapping,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        _check(data)
    except json.JSONDecodeError as error:
        raise _NotJson(f"{what} is not JSON: {error.msg}, line {error.lineno} column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise _NotJson(f"{what} is not UTF-8 text: byte {error.start + 1} is not valid") from error
    except RecursionError as error:
        raise BadInput(f"{what} {_TOO_DEEP}") from error
    except _Refused as error:
        raise BadInput(f"{what} {error}") from error
    return data


class _NotJson(BadInput):
    """Not JSON at all."""


def parse_yaml(text: str, what: str) -> Any:
    """Plain data of a YAML text: mappings with text keys, lists, texts, numbers, true, false and null.

    Raises:
        BadInput: it is not YAML, or it holds an alias, a tag, a repeated key, a key that is not text, a number out of
            range, an unpaired surrogate, or lists and mappings nested more than MAX_DEPTH deep.
    """
    try:
        loader = _Loader(text)
        data = loader.get_single_data()
        _check(data)
    except _Refused as error:
        raise BadInput(f"{what} {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{what} is neither YAML nor JSON: {_reason(error)}") from error
    except UnicodeEncodeError as error:
        raise BadInput(f"{what} {_unpaired(text)}") from error
    except RecursionError as error:
        raise BadInput(f"{what} {_TOO_DEEP}") from error
    return data


def try_json(text: str | bytes) -> Any:
    """Plain data of JSON that this program wrote; None where it has been damaged (or is null).

    NaN and infinities, which are no JSON, are None. Numbers beyond what readers can compute with are damage.
    """
    try:
        return json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=lambda name: None)
    except (ValueError, RecursionError, _Refused):
        return None


def is_number(value: object) -> bool:
    """Whether it is a finite number that fits a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def check_data(data: Any, what: str) -> None:
    """Check plain data that did not come through this module, such as a graph's widgets.

    Raises:
        BadInput: a text holds an unpaired surrogate, so it cannot be written as UTF-8, or lists and mappings are nested
            more than MAX_DEPTH deep.
    """
    try:
        _check(data)
    except _Refused as error:
        raise BadInput(f"{what} {error}") from error


def dump_yaml(data: Any) -> str:
    """YAML that this module and YAML 1.1 readers read back as the same data, without aliases."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------------------------------- values of both


_TOO_DEEP = f"nests lists and mappings more than {MAX_DEPTH} deep"


def _check(data: Any) -> None:
    """Raise _Refused for a text that is not Unicode, or for deep nesting."""
    pending = [(data, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            if _SURROGATE.search(value):
                raise _Refused(_unpaired(value))
        elif isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                raise _Refused(_TOO_DEEP)
            pending += [(inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value)]
            if isinstance(value, dict):
                pending += [(key, depth + 1) for key in value]


def _unpaired(text: str) -> str:
    return f"contains {shorten(text)}, which has an unpaired Unicode surrogate: type the character itself"


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Refused(f"contains a number of {len(text)} digits; at most {MAX_DIGITS} are accepted")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"contains {shorten(text)[1:-1]}, which is too large for a number")
    return value


def _constant(text: str) -> None:
    raise _Refused(f"contains {text}, which is not a number in JSON")


def _json_mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _Refused(f"has the key {shorten(repeated)} twice")
    return mapping


# --------------------------------------------------------------------------------------------------------------- YAML


_CORE = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
]
"""YAML 1.2 core schema: tag, pattern, first characters."""
_PREFIX = "tag:yaml.org,2002:"


def _add_core_schema(resolver: type[BaseResolver]) -> None:
    for tag, pattern, first in _CORE:
        resolver.add_implicit_resolver(f"{_PREFIX}{tag}", re.compile(f"(?:{pattern})\\Z"), list(first))


class _CoreResolver(BaseResolver):
    """Resolves plain scalars that are not strings, by the YAML 1.2 core schema."""


_add_core_schema(_CoreResolver)


class _Loader(Composer, SafeConstructor, _CoreResolver, _Events):
    def __init__(self, text: str) -> None:
        _Events.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        _CoreResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"uses a YAML alias in line {line}, {cut('*' + event.anchor, 40)}: write the value out")
        if event.tag is not None:
            raise _Refused(f"uses a YAML tag in line {line}, {shorten(event.tag)}: remove the tag")
        if self.depth > MAX_DEPTH:
            raise _Refused(_TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Node, deep: bool = False) -> dict[str, Any]:
        if not isinstance(node, MappingNode):
            raise ConstructorError(None, None, "expected a mapping", node.start_mark)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _Refused(f"has the key {shorten(key)} in line {line}, which is not text: put it in quotes")
            if key in mapping:
                raise _Refused(f"has the key {shorten(key)} twice, again in line {line}")
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_integer(self, node: ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0x", "0o") and len(text) <= MAX_DIGITS else _integer(text)

    def construct_number(self, node: ScalarNode) -> float:
        text = self.construct_scalar(node)
        return _number(text) if text[-1].isdigit() or text[-1] == "." else super().construct_yaml_float(node)


_Loader.add_constructor(f"{_PREFIX}int", _Loader.construct_integer)
_Loader.add_constructor(f"{_PREFIX}float", _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that YAML 1.1 or YAML 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # Other styles would fold the line breaks of Unicode; double quotes escape them.
    style = '"' if _LINE_BREAK.search(text) else None
    return dumper.represent_scalar(f"{_PREFIX}str", text, style)


_add_core_schema(_Dumper)
_Dumper.add_representer(str, _represent_text)


def _reason(error: yaml.YAMLError) -> str:
    """The parser's error in one line, without quoting the document."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return cut(str(error), 200)
    return cut(f"{error.problem}, line {mark.line + 1} column {mark.column + 1}", 200)
