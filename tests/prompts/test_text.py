"""One prompt per line, equal prompts, and ComfyUI's prompt weights."""

import pytest

from trainer.prompts.text import (
    MAX_NESTING,
    check_prompts,
    check_text,
    clean,
    first_repeated,
    numbered_lines,
    prompt_lines,
    same_text,
    without_weights,
)
from trainer.utils.errors import BadInput


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_prompt_per_line(end: str) -> None:
    text = end.join(["\ufeffa fox ", "", "  # a comment", "\ta dog", "   ", "#another", "a # in the middle"])
    assert prompt_lines(text) == ["a fox", "a dog", "a # in the middle"]
    assert [number for number, _ in numbered_lines(text)] == [1, 4, 7]


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_only_line_feeds_and_carriage_returns_end_a_line(mark: str) -> None:
    assert prompt_lines(f"a fox{mark}in snow\na dog") == [f"a fox{mark}in snow", "a dog"]
    assert prompt_lines(f"a fox{mark}\na dog") == ["a fox", "a dog"]


def test_white_space_does_not_make_another_prompt() -> None:
    texts = ["a red fox", " a red fox", "a red fox\u2028", "a  red\tfox", "\ufeffa red\u00a0fox", "a red\nfox"]
    assert {same_text(text) for text in texts} == {"a red fox"}
    assert same_text("A red fox") != "a red fox"
    assert same_text("cafe\u0301") == same_text("caf\u00e9")
    assert clean(" \ufeff a\n b \x85") == "a\n b"


@pytest.mark.parametrize("text", ["a \ud83e fox", "\udd8a", "\udd8a\ud83e"])
def test_half_a_character_is_refused_and_named(text: str) -> None:
    for check in (lambda: check_text(text, "prompts"), lambda: check_prompts(["a", text], "prompts")):
        with pytest.raises(BadInput) as raised:
            check()
        assert str(raised.value).startswith(f"prompts contains {text!r}, which has an unpaired Unicode surrogate")
        str(raised.value).encode()  # it can be printed
    check_text("a \U0001f98a fox", "prompts")


def test_empty_and_repeated_prompts_are_refused() -> None:
    with pytest.raises(BadInput, match="texts contains an empty prompt"):
        check_prompts(["a", ""], "texts")
    with pytest.raises(BadInput, match="texts contains 'a b' more than once"):
        check_prompts(["a b", "c", "a  b"], "texts")
    check_prompts(["a", "b"], "texts")
    assert first_repeated("abcb") == (1, 3)
    assert first_repeated("abc") is None


def test_many_prompts_are_checked_in_linear_time() -> None:
    class Counted(str):
        """Counts comparisons: a quadratic check of 32,000 different texts makes half a billion."""

        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

    texts = [Counted(f"prompt {number}") for number in range(32_000)]
    assert first_repeated(texts) is None
    assert Counted.compared < 32_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red fox", "a red fox"),
        ("a (red:1.5) fox", "a red fox"),
        ("a (red) fox", "a red fox"),
        ("a ((red)) fox", "a red fox"),
        ("a ((red:1.2) fox:0.8)", "a red fox"),
        ("(a (red) fox:1.1), snow", "a red fox, snow"),
        (r"a \(red\) fox", "a (red) fox"),
        (r"(a \(red\) fox:1.2)", "a (red) fox"),
        ("ratio 16:9", "ratio 16:9"),
        ("(ratio 16:9)", "ratio 16"),
        ("(at 9:30 sharp)", "at 9:30 sharp"),
        ("(:1.5)", ":1.5"),
        ("(a:b)", "a:b"),
        ("(a: 1e-1 )", "a"),
        ("()", ""),
        ("a (red fox", "a (red fox"),
        ("a red) (fox)", "a red) (fox)"),
    ],
)
def test_weights_are_taken_out_as_comfyui_does(text: str, words: str) -> None:
    assert without_weights(text) == words


def test_nesting_has_a_limit() -> None:
    deep = MAX_NESTING
    assert without_weights("(" * deep + "fox" + ")" * deep) == "fox"
    with pytest.raises(BadInput, match=r"prompt '\(+\.\.\. has parentheses nested more than 100 deep"):
        without_weights("(" * 5000 + "fox" + ")" * 5000)
    assert without_weights("(" * 100_000) == "(" * 100_000
    assert without_weights("(a:1.1) " * 20_000) == "a " * 20_000
