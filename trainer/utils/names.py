"""Checks the names of runs and collections of votes, which are used as folder names."""

import re

from .errors import BadInput, shorten

LONGEST_NAME = 64
MOST_BYTES = 200
"""File systems allow 255 bytes per name; the name of a LoRA file adds a number and an extension."""
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}


def check_name(name: object, field: str = "name") -> str:
    """Return `name` unchanged if it can be the name of one folder on Linux, macOS and Windows.

    Args:
        name: input of the user.
        field: its name in messages.

    Raises:
        BadInput: it is not a string, is too long, contains a separator, `..`, a control or format character, or is the
            name of a Windows device.
    """
    accepted = (
        f"use 1 to {LONGEST_NAME} letters, digits, spaces, '-', '_' and '.', and start and end with a letter or digit"
    )
    if not isinstance(name, str):
        raise BadInput(f"{field} is {shorten(name)}, which is not text: {accepted}")
    if len(name) > LONGEST_NAME or len(name.encode("utf-8", "replace")) > MOST_BYTES:
        raise BadInput(f"{field} {name[:LONGEST_NAME]!r}... is too long: {accepted}")
    if not re.fullmatch(r"\w[\w .-]*", name) or ".." in name or not name[-1].isalnum() or not name[0].isalnum():
        raise BadInput(f"{field} {name!r} cannot be used: {accepted}")
    if name.split(".")[0].strip().upper() in _DEVICES:
        raise BadInput(f"{field} {name!r} cannot be used: it is a device name on Windows; choose another")
    return name
