"""Names that people give to things on disk: runs, collections of votes."""

import re

from .errors import BadInput, shorten

LONGEST_NAME = 64
MOST_BYTES = 200
"""File systems allow 255 bytes per name; a LoRA's file name adds a number and an ending."""
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}


def check_name(name: object, field: str = "name") -> str:
    """Return `name` unchanged if it can be the name of one folder on Linux, macOS and Windows.

    Args:
        name: what the user gave.
        field: what the messages call it.

    Raises:
        BadInput: it is not text, too long, or holds a separator, `..`, a control or format character, or is the name
            of a Windows device.
    """
    accepted = (
        f"a name has 1 to {LONGEST_NAME} letters, digits, spaces, '-', '_' and '.', and starts and ends with a letter "
        "or digit"
    )
    if not isinstance(name, str):
        raise BadInput(f"{field} is {shorten(name)}, which is not text: {accepted}")
    if len(name) > LONGEST_NAME or len(name.encode("utf-8", "replace")) > MOST_BYTES:
        raise BadInput(f"{field} {name[:LONGEST_NAME]!r}... is too long: {accepted}")
    if not re.fullmatch(r"\w[\w .-]*", name) or ".." in name or not name[-1].isalnum() or not name[0].isalnum():
        raise BadInput(f"{field} {name!r} cannot be used: {accepted}")
    if name.split(".")[0].strip().upper() in _DEVICES:
        raise BadInput(f"{field} {name!r} cannot be used: it is the name of a device on Windows")
    return name
