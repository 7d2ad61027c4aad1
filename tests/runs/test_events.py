"""The event log: followed from an offset, and one bad line costs that line alone."""

import json
from pathlib import Path

import pytest

from trainer.runs import events
from trainer.runs.events import EventReader, append_event, is_event, keep_events


def event(iteration: int, **more: object) -> dict:
    return {"iteration": iteration, "rewards": {"r": {"mean": 0.5}}, "seconds": {"total": 1.0}, **more}


def iterations(found: list[dict]) -> list[int]:
    return [event["iteration"] for event in found]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "events.jsonl"
    for iteration in (1, 2, 3):
        append_event(path, event(iteration))
    return path


DAMAGED = {
    "null": b"null",
    "a number": b"5",
    "a list": b"[]",
    "an empty mapping": b"{}",
    "not JSON": b'{"iteration": 2, "rew',
    "not UTF-8": b'{"iteration": 2, "a": "\xff"}',
    "zeros": b"\0\0\0\0",
    "a blank line": b"",
    "deep nesting": b"[" * 100_000,
    "a huge number": b'{"iteration": ' + b"9" * 5000 + b"}",
    "no rewards": b'{"iteration": 2, "seconds": {"total": 1}}',
    "rewards of another type": b'{"iteration": 2, "rewards": {"r": 5}, "seconds": {"total": 1}}',
    "iteration of another type": b'{"iteration": "2", "rewards": {}, "seconds": {"total": 1}}',
    "no time": b'{"iteration": 2, "rewards": {}, "seconds": {}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_costs_that_line_alone(log: Path, damage: str) -> None:
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([lines[0], DAMAGED[damage], *lines[2:]]))
    reader = EventReader(log)
    assert iterations(reader.new()) == [1, 3]
    assert reader.damaged == 1
    # A resumed run leaves it out for good, and keeps the bytes of the others.
    assert keep_events(log, 3) == 1
    assert log.read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert keep_events(log, 3) == 0


@pytest.mark.parametrize(
    "half", [b'{"iteration": 3, "rew', b'{"iteration"', b"\0\0\0\0", json.dumps(event(4)).encode()]
)
def test_a_half_written_last_line_waits_for_its_end(log: Path, half: bytes) -> None:
    reader = EventReader(log)
    with log.open("ab") as file:
        file.write(half)
    assert iterations(reader.new()) == [1, 2, 3]
    assert (reader.new(), reader.damaged) == ([], 0)
    assert keep_events(log, 2) == 0
    append_event(log, event(3, again=True))
    assert EventReader(log).new() == [event(1), event(2), event(3, again=True)]


def test_only_what_was_appended_is_read_again(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(events, "try_json", lambda line: parsed.append(line) or json.loads(line))
    reader = EventReader(log)
    assert iterations(reader.new()) == [1, 2, 3]
    assert reader.new() == []
    append_event(log, event(4))
    assert iterations(reader.new()) == [4]
    assert len(parsed) == 4, "each line once"
    assert reader.offset == log.stat().st_size
    append_event(log, event(5))
    assert iterations(EventReader(log, reader.offset).new()) == [5], "another reader goes on from there"
    assert not reader.restarted


def test_a_rewritten_log_is_read_from_its_start(log: Path) -> None:
    reader = EventReader(log)
    reader.new()
    keep_events(log, 1)
    assert iterations(reader.new()) == [1], "shorter than what was read"
    assert reader.restarted
    append_event(log, event(2, again=True))
    assert (iterations(reader.new()), reader.restarted) == ([2], False)
    # Rewritten between two looks, and longer than before: the offset is not the start of a line.
    keep_events(log, 1)
    append_event(log, event(2, again="and much longer than it was at first"))
    assert (iterations(reader.new()), reader.restarted) == ([1, 2], True)
    for offset in (-1, 1, 10**9):
        other = EventReader(log, offset)
        assert (iterations(other.new()), other.restarted) == ([1, 2], True)


def test_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    reader = EventReader(tmp_path / "events.jsonl")
    assert reader.new() == []
    assert keep_events(reader.path, 3) == 0
    assert list(tmp_path.iterdir()) == []
    append_event(reader.path, event(1))
    assert iterations(reader.new()) == [1]


def test_events_after_the_checkpoint_are_dropped_and_the_others_untouched(log: Path) -> None:
    before = log.stat().st_mtime_ns, log.read_bytes()
    assert keep_events(log, 3) == 0
    assert (log.stat().st_mtime_ns, log.read_bytes()) == before, "nothing to drop, nothing written"
    assert keep_events(log, 0) == 0
    assert log.read_bytes() == b""


def test_what_is_an_event() -> None:
    assert is_event(event(1))
    assert is_event({"iteration": 7, "rewards": {}, "seconds": {"total": 0}})
    for value in (None, True, [], {"iteration": True, "rewards": {}, "seconds": {"total": 0}}, event(0), event(-1)):
        assert not is_event(value)
