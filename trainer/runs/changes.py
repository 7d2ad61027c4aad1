"""The settings in which two run descriptions differ."""

from typing import Any

from ..config import RunConfig
from ..utils.errors import shorten

RAISABLE = "runtime.iterations"
"""The only setting of an existing run that may change: raising it extends the run."""


def setting_changes(old: RunConfig, new: RunConfig) -> list[str]:
    """A sentence for each changed setting with which the run cannot be resumed."""
    changed = _changed_fields(old.model_dump(mode="json"), new.model_dump(mode="json"))
    if RAISABLE in changed and changed[RAISABLE][1] > changed[RAISABLE][0]:
        del changed[RAISABLE]
    return [
        f"{name} was {shorten(before)} and is now {shorten(after)}{', but can only be raised' * (name == RAISABLE)}"
        for name, (before, after) in changed.items()
    ]


def _changed_fields(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings in which two descriptions differ: old and new value by dotted name."""
    changes = {}
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= _changed_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[f"{prefix}{key}"] = before, after
    return changes
