"""Prompt texts: splitting into lines, comparing, and removing ComfyUI's prompt weights."""

import re
import unicodedata
from collections.abc import Hashable, Iterable

from ..utils.errors import BadInput, shorten

Key = tuple[str, str]
"""Identifies a prompt: its text, and the digest of its image, or ''."""
COMMENT = "#"
"""Start of a comment line."""
MAX_NESTING = 100
"""Largest nesting depth of parentheses. ComfyUI's tokenizers recurse, and fail at about ten times this depth."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Strip white space, and remove byte order marks, which some editors and web pages insert."""
    return text.replace("\ufeff", "").strip()


def same_text(text: str) -> str:
    """Normalise white space and composed characters, so that prompts that look the same compare equal."""
    return " ".join(unicodedata.normalize("NFC", clean(text)).split())


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """The prompts of a text with one per line, each with the number of its line, counted from 1.

    A line ends with a line feed, a carriage return, or both; U+0085 and U+2028 do not end it. Blank lines and comments,
    which begin with `#`, are ignored.
    """
    lines = [(number, clean(line)) for number, line in enumerate(_LINE_END.split(text), start=1)]
    return [(number, line) for number, line in lines if line and not line.startswith(COMMENT)]


def prompt_lines(text: str) -> list[str]:
    """The prompts of a text with one per line; see `numbered_lines`."""
    return [line for _, line in numbered_lines(text)]


def check_text(text: str, field: str) -> None:
    """Raise BadInput for a text with an unpaired surrogate, which is not valid Unicode, or with a NUL character.

    Args:
        field: name of the text's source for messages, such as `prompts.negative`.
    """
    if _SURROGATE.search(text):
        raise BadInput(
            f"{field} contains {shorten(text)}, which has an unpaired Unicode surrogate: type the character itself"
        )
    if "\0" in text:
        raise BadInput(f"{field} contains {shorten(text)}, which has a NUL character: remove it")


def check_prompts(texts: list[str], field: str, digests: list[str] | None = None) -> None:
    """Check the prompts of one source, after `clean`.

    Args:
        digests: of what belongs to each prompt beside its text, if anything does.

    Raises:
        BadInput: a prompt is empty, repeated with the same digest, or not valid Unicode; or there are not as many
            digests.
    """
    digests = digests or [""] * len(texts)
    if len(digests) != len(texts):
        raise BadInput(f"digests has {len(digests)} values for {len(texts)} {field}: give one for each, or none")
    for text in texts:
        if not text:
            raise BadInput(f"{field} contains an empty prompt")
        check_text(text, field)
    if pair := first_repeated(zip(map(same_text, texts), digests, strict=True)):
        raise BadInput(f"{field} contains {shorten(texts[pair[0]])} more than once")


def first_repeated(values: Iterable[Hashable]) -> tuple[int, int] | None:
    """Positions of the first and second occurrence of the first value that is repeated; None if all differ."""
    seen: dict[Hashable, int] = {}
    for position, value in enumerate(values):
        if seen.setdefault(value, position) != position:
            return seen[value], position
    return None


# ------------------------------------------------------------------------------------------------------ prompt weights


def without_weights(text: str) -> str:
    r"""Remove ComfyUI's prompt weights: `a (red:1.5) \(old\) fox` becomes `a red (old) fox`.

    The result is the text that ComfyUI's tokenizers encode: `(word:1.5)` sets the weight of a word, `(word)` sets it to
    1.1, and a parenthesis after a backslash is part of the text.

    Raises:
        BadInput: parentheses are nested more than MAX_NESTING deep.
    """
    if text.count("(") == 0:
        return text.replace("\\)", ")")
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    return _words(hidden, text, 0).replace("\0\1", ")").replace("\0\2", "(")


def _words(part: str, whole: str, depth: int) -> str:
    if depth > MAX_NESTING:
        raise BadInput(f"prompt {shorten(whole)} has parentheses nested more than {MAX_NESTING} deep: remove some")
    return "".join(
        _words(_unweighted(group), whole, depth + 1) if _is_weighted(group) else group for group in _groups(part)
    )


def _is_weighted(group: str) -> bool:
    return len(group) > 1 and group[0] == "(" and group[-1] == ")"


def _unweighted(group: str) -> str:
    """The inside of `(inside)` or `(inside:weight)`."""
    inside = group[1:-1]
    words, colon, weight = inside.rpartition(":")
    if not (words and colon):
        return inside
    try:
        float(weight)
    except ValueError:
        return inside
    return words


def _groups(text: str) -> list[str]:
    """Split a text into its outermost parenthesised groups and the text between them."""
    parts, start, level = [], 0, 0
    for position, character in enumerate(text):
        if character == "(":
            if level == 0 and position > start:
                parts.append(text[start:position])
                start = position
            level += 1
        elif character == ")":
            level -= 1
            if level == 0:
                parts.append(text[start : position + 1])
                start = position + 1
    return [*parts, text[start:]] if start < len(text) else parts
