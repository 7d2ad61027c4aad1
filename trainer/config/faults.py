"""Turns the errors that pydantic finds in settings into sentences."""

from typing import Any

from pydantic import ValidationError

from ..utils.errors import cut, shorten

_ACCEPTED = {
    "bool_for_number": "a number, not true or false",
    "bool": "true or false",
    "dict": "a section with settings of its own",
    "finite_number": "a finite number",
    "float": "a number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "int": "a whole number",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "list": "a list",
    "literal_error": "one of {expected}",
    "model": "a section with settings of its own",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_long": "at most {max_length} characters long",
    "string_type": "text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple": "a list",
}
"""What is accepted, by an error's type, or by the first word of its type: `int_parsing`, `int_from_float`."""


def describe(error: ValidationError, section: str = "") -> str:
    """The first few faults as sentences that name the field, the value and what is accepted.

    Args:
        section: prefix of the fields' names.
    """
    return "; ".join(_sentence(fault, section) for fault in error.errors()[:5])


def _sentence(fault: dict[str, Any], section: str) -> str:
    location = [section, *fault["loc"]] if section else fault["loc"]
    field = cut(".".join(str(part)[:100] for part in location), 200) or "run description"
    kind, message = fault["type"], cut(fault["msg"].removeprefix("Value error, "), 400)
    if kind == "extra_forbidden":
        return f"{field} is not a setting; check the spelling (docs/configuration.md lists them all)"
    if kind == "missing":
        return f"{field} is missing"
    if kind == "value_error":
        return _with_field(message, field, str(location[-1]) if location else "")
    accepted = _ACCEPTED.get(kind) or _ACCEPTED.get(kind.partition("_")[0])
    if accepted is None:
        return f"{field} is {shorten(fault['input'])}: {message[0].lower()}{message[1:]}"
    return f"{field} is {shorten(fault['input'])}: it must be {accepted.format(**fault.get('ctx', {}))}"


def _with_field(message: str, field: str, last: str) -> str:
    """Prefix a validator's message with the full name of the field, unless it begins with the name already."""
    if message.startswith((f"{field} ", f"{field}.")):
        return message
    if last and message.startswith(f"{last} "):
        return f"{field}{message[len(last) :]}"
    return f"{field}: {message}"
