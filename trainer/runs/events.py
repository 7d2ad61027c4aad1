"""The event log of a run, events.jsonl: a line of JSON per iteration, appended while the run goes on."""

import json
from pathlib import Path
from typing import Any, BinaryIO

from ..utils.documents import is_number, try_json
from ..utils.files import write_atomically

Event = dict[str, Any]

LONGEST_EVENT = 4096
"""Bytes within which an event usually lies."""


class EventReader:
    """Follows an event log: every call reads what was appended since the last one.

    Args:
        path: the log; it need not exist yet.
        offset: where an earlier reader stopped, in bytes.

    Attributes:
        offset: bytes read so far, which end with a whole line.
        restarted: whether the last call began again at the start of the file, because a resumed run had rewritten it.
        damaged: lines left out so far because they are not events.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset = Path(path), offset
        self.restarted, self.damaged = False, 0

    def new(self) -> list[Event]:
        """Events appended since the last call, oldest first; a line that is still being written waits for the next."""
        self.restarted = False
        try:
            with self.path.open("rb") as file:
                if not _is_line_start(file, self.offset):
                    self.offset, self.restarted = 0, True
                file.seek(self.offset)
                content = file.read()
        except (FileNotFoundError, IsADirectoryError):
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        events = [try_json(line) for line in whole.split(b"\n")[:-1]]
        sound = [event for event in events if is_event(event)]
        self.damaged += len(events) - len(sound)
        return sound


def _is_line_start(file: BinaryIO, offset: int) -> bool:
    """Whether a line begins at the offset; false where the file was cut or rewritten."""
    if offset == 0:
        return True
    if not 0 < offset <= file.seek(0, 2):
        return False
    file.seek(offset - 1)
    return file.read(1) == b"\n"


def is_event(value: object) -> bool:
    """Whether a line of the log has what every reader of events needs."""
    if not isinstance(value, dict):
        return False
    iteration, rewards, seconds = value.get("iteration"), value.get("rewards"), value.get("seconds")
    if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration < 1:
        return False
    if not isinstance(rewards, dict) or not all(map(_are_figures, rewards.values())):
        return False
    if not isinstance(value.get("objective", {}), dict) or not _is_figure(value.get("forwards_per_image")):
        return False
    return isinstance(seconds, dict) and is_number(seconds.get("total"))


def _is_figure(value: object) -> bool:
    return value is None or is_number(value)


def _are_figures(value: object) -> bool:
    """Whether it is a mapping to numbers and None."""
    return isinstance(value, dict) and all(map(_is_figure, value.values()))


def is_score(value: object) -> bool:
    """Whether the record of a held-out evaluation has what its readers need."""
    if (
        not isinstance(value, dict)
        or not _are_figures(value.get("rewards"))
        or not _are_figures(value.get("spread", {}))
    ):
        return False
    categories, iteration = value.get("categories", {}), value.get("iteration", 0)
    is_count = isinstance(iteration, int) and not isinstance(iteration, bool) and iteration >= 0
    return is_count and isinstance(categories, dict) and all(map(_are_figures, categories.values()))


def last_events(path: Path, count: int) -> list[Event]:
    """The last `count` events, without reading the rest of the log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - count * LONGEST_EVENT)
            file.seek(start)
            lines = file.read().split(b"\n")
    except (FileNotFoundError, IsADirectoryError):
        return []
    events = [try_json(line) for line in (lines[1:] if start else lines)]
    return [event for event in events if is_event(event)][-count:]


def append_event(path: Path, event: Event) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event, allow_nan=False) + "\n")


def keep_events(path: Path, iterations: int) -> int:
    """Drop events after a checkpoint; the resumed run writes them again. Damaged lines go too.

    Args:
        iterations: up to which events are kept.

    Returns:
        how many damaged lines were dropped.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    kept, damaged = [], 0
    for line in lines:
        event = try_json(line)
        if not is_event(event):
            damaged += 1
        elif event["iteration"] <= iterations:
            kept.append(line)
    if len(kept) < len(lines) or rest:
        write_atomically(path, b"".join(line + b"\n" for line in kept))
    return damaged


def add_evaluation(path: Path, record: dict[str, Any]) -> None:
    """Add the record of a held-out evaluation to evaluations.jsonl, so that it can be shown while the run goes on.

    Records of this iteration and later ones, which a resumed run makes again, are dropped.
    """
    earlier = [one for one in read_evaluations(path) if one["iteration"] < record["iteration"]]
    write_atomically(path, "".join(json.dumps(one) + "\n" for one in [*earlier, record]))


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Records of held-out evaluations, oldest first; damaged lines are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError):
        return []
    records = [try_json(line) for line in lines]
    return [one for one in records if is_score(one) and "iteration" in one]
