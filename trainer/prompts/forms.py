"""Recognises texts that are not one prompt per line, so that their brackets and keys do not become prompts."""

import re

from ..utils.documents import parse_json
from ..utils.errors import BadInput, cut
from .text import numbered_lines

COLUMNS = {"prompt", "category", "image"}
"""Columns of a CSV file, and keys of a JSON object."""


def other_form(text: str) -> tuple[str, str] | None:
    """What a text has that is not one prompt per line, as a clause, and what helps if it is a file; else None."""
    lines = [line for _, line in numbered_lines(text)]
    if not lines:
        return None
    first = lines[0]
    if "\0" in text:
        return "contains NUL characters", "save it as UTF-8"
    if first.lower().startswith(("<!doctype", "<html", "<?xml", "{\\rtf")):
        return f"contains markup ({cut(first, 20)})", "save it as plain text"
    if first in ("[", "{") or is_json(text) or all(is_json(line) for line in lines[:10]):
        return "contains JSON", "rename it to .json, or to .jsonl if it has one object per line"
    if len(lines) == 1:
        return None
    columns = [column.strip(' "').lower() for column in re.split("[,;\t]", first)]
    if "prompt" in columns and set(columns) <= COLUMNS:
        return "begins with a CSV header", "rename it to .csv, with commas between the columns"
    if first.lower() in ("prompt:", "prompts:", "texts:"):
        return "contains YAML", "remove its keys and dashes"
    if all(line.startswith(("- ", "* ")) for line in lines):
        return "is a list with bullets", "remove the bullets"
    return None


def check_lines(text: str, field: str) -> None:
    """Raise BadInput for a text that is not one prompt per line.

    Args:
        field: name of the text's source for messages.
    """
    if found := other_form(text):
        raise BadInput(f"{field} {found[0]}: enter one prompt per line")


def is_json(text: str) -> bool:
    """Whether a text is a JSON list or object."""
    if text.strip()[:1] not in ("[", "{"):
        return False
    try:
        parse_json(text, "it")
    except BadInput:
        return False
    return True
