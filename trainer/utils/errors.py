"""Errors for users, whose messages are single sentences, and functions that shorten values for messages."""

import reprlib


class BadInput(ValueError):
    """An input of the user is invalid; nothing has been changed. Exit code 2."""


class RunFailed(RuntimeError):
    """A run failed; its newest checkpoint and LoRA are kept. Exit code 1."""


class StoppedByWatchdog(RunFailed):
    """The watchdog stopped the run; raised in every process of the run."""


class StopRequested(Exception):
    """The user requested the run to stop."""


SHOWN = 100
"""Largest number of characters of a value in a message."""


class _Short(reprlib.Repr):
    """A bounded repr that never builds the full text of a large value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        for kind in ("dict", "list", "tuple", "set", "frozenset", "deque", "array"):
            setattr(self, f"max{kind}", 8)

    def repr_str(self, value: str, level: int) -> str:
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}..."

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to print integers of more than 4,300 digits, and is slow below that.
        return repr(value) if abs(value) < 10**40 else f"an integer of {value.bit_length()} bits"

    def repr_instance(self, value: object, level: int) -> str:
        text = repr(value)
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_SHORT = _Short()


def shorten(value: object, limit: int = SHOWN) -> str:
    """`repr` of a value for a message: one line of at most `limit` characters, then an ellipsis."""
    return cut(_SHORT.repr(value), limit)


def cut(text: str, limit: int) -> str:
    """The text itself for a message: one line of at most `limit` characters, then an ellipsis."""
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else f"{text[:limit].rstrip('.')}..."
