"""Data about runs for the panel and other HTTP clients, read from the files in the run directories."""

import os
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.events import EventReader, last_events, read_evaluations
from ...trainer.runs.sample_grids import read_samples
from ...trainer.utils.errors import BadInput
from ...trainer.utils.media import check_image
from ...trainer.utils.names import check_name
from .folders import newest_loras, published_loras, run_folder, runs_folder

MOST_EVENTS = 1000
"""Most events in one answer; if there are more, an evenly spaced subset is sent."""
LOG_BYTES = 200_000
_SAMPLES_FILE = re.compile(r"(rollout|evaluation)_(\d{6})\.(png|mp4)")
_REMEMBERED = 64


@dataclass
class _Followed:
    """The events of one run; new ones are read when the file has grown."""

    reader: EventReader
    events: list[dict[str, Any]] = field(default_factory=list)
    generation: int = field(default_factory=lambda: int(time.time() * 1000))  # another one after a restart
    lock: threading.Lock = field(default_factory=threading.Lock)


class EventCache:
    """Caches the event logs that clients request, so that each line is read once."""

    def __init__(self) -> None:
        self._followed: dict[str, _Followed] = {}
        self._lock = threading.Lock()

    def _of(self, run: RunDirectory) -> _Followed:
        with self._lock:
            key = str(run.path)
            followed = self._followed.pop(key, None) or _Followed(EventReader(run.path / "events.jsonl"))
            self._followed[key] = followed  # the most recently used is last
            while len(self._followed) > _REMEMBERED:
                del self._followed[next(iter(self._followed))]
            return followed

    def events(self, run: RunDirectory, after: int = 0, generation: int | None = None) -> dict[str, Any]:
        """Events after an iteration.

        Args:
            after: the last iteration that the client already has.
            generation: generation of the client's events; if it is not the current one, all events are sent.

        Returns:
            `generation`, which changes when a resumed run has rewritten the log, and `events`, at most MOST_EVENTS.
        """
        followed = self._of(run)
        with followed.lock:
            self._update(followed)
            if generation != followed.generation:
                after = 0
            first = _first_after(followed.events, after)
            return {"generation": followed.generation, "events": thinned(followed.events[first:], MOST_EVENTS)}

    @staticmethod
    def _update(followed: _Followed) -> None:
        new = followed.reader.new()
        if followed.reader.restarted:
            followed.events.clear()
            followed.generation += 1
        followed.events += new


def _first_after(events: list[dict], iteration: int) -> int:
    """Index of the first event after an iteration, searched from the end because clients need the newest."""
    index = len(events)
    while index and events[index - 1]["iteration"] > iteration:
        index -= 1
    return index


def thinned(events: list, most: int) -> list:
    """An evenly spaced subset of `most` events, including the last."""
    if len(events) <= most:
        return events
    return [events[round(i * (len(events) - 1) / (most - 1))] for i in range(most)]


# --------------------------------------------------------------------------------------------------------- one run


def find(name: str) -> RunDirectory:
    """
    Raises:
        BadInput: the name is invalid, or there is no such run.
    """
    folder = run_folder(name)
    if not (folder / "run.yaml").is_file():
        raise BadInput(f"there is no run named {name!r}")
    return RunDirectory(folder)


def brief(run: RunDirectory) -> dict[str, Any]:
    """A summary of a run for the list of runs."""
    status, live = run.status(), launch.is_running(run)
    recent = last_events(run.path / "events.jsonl", 20)
    state = status.get("state", "starting")
    if not live and state in ("starting", "running", "stopping"):
        state = "interrupted"
    iteration, iterations = status.get("iteration") or 0, status.get("iterations") or 0
    pace = sum(event["seconds"]["total"] for event in recent) / len(recent) if recent else None
    means = [value.get("mean") for value in recent[-1]["rewards"].values()] if recent else []
    return {
        "name": run.path.name,
        "state": state,
        "live": live,
        "iteration": iteration,
        "iterations": iterations,
        "phase": _phase(status.get("progress")),
        "seconds_left": _seconds_left(status, pace, iterations - iteration) if state == "running" else None,
        "reward": means[0] if means else None,
        "time": status.get("time"),
        "error": status.get("error"),
    }


def _seconds_left(status: dict[str, Any], pace: float | None, iterations: int) -> float | None:
    """Seconds to the end: from the newest iterations, or before there are any, from the run's own estimate."""
    if pace is not None:
        return pace * iterations
    estimate = status.get("estimate")
    left = estimate.get("left") if isinstance(estimate, dict) else None
    return left if isinstance(left, int | float) else None


def _phase(progress: object) -> str | None:
    """The current phase of an iteration, such as "rollout 3 of 10"."""
    if not isinstance(progress, dict) or "phase" not in progress:
        return None
    return f"{progress['phase']} {progress.get('done')} of {progress.get('total')}"


def detail(run: RunDirectory) -> dict[str, Any]:
    """`brief`, and evaluations, memory and the names of the newest LoRA of a run."""
    recent = last_events(run.path / "events.jsonl", 1)
    return {
        **brief(run),
        "evaluations": read_evaluations(run.path / "evaluations.jsonl"),
        "memory_mb": recent[-1].get("memory_mb") if recent else None,
        "lora_names": newest_loras(run.path.name),
        "can_publish": not launch.is_running(run) and _is_unpublished(run),
    }


def _is_unpublished(run: RunDirectory) -> bool:
    """Whether the run has a LoRA that is newer than those in ComfyUI's list."""
    made, published = _stamp(run.lora_file), published_loras(run.path.name)
    return made is not None and all(path.stat().st_mtime_ns < made[0] for path in published)


def list_runs() -> list[dict[str, Any]]:
    """All runs, the most recently changed first."""
    found = [RunDirectory(path.parent) for path in runs_folder().glob("*/run.yaml")]
    return sorted((_listed(run) for run in found), key=lambda run: run["time"] or 0, reverse=True)


_ended: dict[Path, tuple[tuple, dict[str, Any]]] = {}
"""Summaries of runs that have ended, with the times and sizes of their files: most of a long list never changes."""


def _listed(run: RunDirectory) -> dict[str, Any]:
    """`brief`, read again only if the run is in progress or its files have changed."""
    stamp = tuple(_stamp(run.path / name) for name in ("status.json", "events.jsonl", "run.yaml"))
    known = _ended.get(run.path)
    if known is not None and known[0] == stamp:
        return known[1]
    line = brief(run)
    if line["state"] in launch.ENDED and not line["live"]:
        _ended[run.path] = (stamp, line)
    return line


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def description(run: RunDirectory) -> str:
    """The run description as YAML."""
    return (run.path / "run.yaml").read_text(encoding="utf-8", errors="replace")


def log(run: RunDirectory, offset: int) -> dict[str, Any]:
    """The run's output from an offset in bytes on, at most the last LOG_BYTES."""
    path = run.log_file
    size = path.stat().st_size if path.is_file() else 0
    start = offset if 0 <= offset <= size else 0
    start = max(start, size - LOG_BYTES)
    if not size:
        return {"text": "", "offset": 0}
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(size - start)
    return {"text": content.decode("utf-8", "replace"), "offset": size}


# --------------------------------------------------------------------------------------------------------- samples


def samples(run: RunDirectory) -> list[dict[str, Any]]:
    """Sample grids, oldest first, each with the prompt, seed, scores and box of its cells."""
    found = []
    for path in sorted((run.path / "samples").glob("*.png")):
        match = _SAMPLES_FILE.fullmatch(path.name)
        if match:
            record = _cells(path)
            found.append({"file": path.name, "kind": match[1], "iteration": int(match[2]), **record})
    return sorted(found, key=lambda one: (one["kind"], one["iteration"]))


def _cells(grid: Path) -> dict[str, Any]:
    """The cells of a grid, with the box as left, top, width and height in pixels, and the size of the grid."""
    try:
        size = list(check_image(grid))
    except BadInput:
        return {"cells": [], "size": None}
    cells = []
    for sample in read_samples(grid):
        left, top, right, bottom = sample.box
        box = [left, top, right - left, bottom - top]
        cells.append({"prompt": sample.prompt, "seed": sample.seed, "scores": sample.scores, "box": box})
    return {"cells": cells, "size": size}


def sample_file(run: RunDirectory, name: str) -> Path:
    """A sample grid or video of a run.

    Raises:
        BadInput: it has no file of this name.
    """
    path = run.path / "samples" / name
    if not _SAMPLES_FILE.fullmatch(name) or path.is_symlink() or not path.is_file():
        raise BadInput(f"there is no sample image named {name[:80]!r}")
    return path


# ---------------------------------------------------------------------------------------------------- delete, restore


def deleted_folder() -> Path:
    return runs_folder().parent / "deleted"


def deleted() -> list[str]:
    """Names of deleted runs that can be restored."""
    return sorted(path.parent.name for path in deleted_folder().glob("*/run.yaml"))


def delete(run: RunDirectory) -> str:
    """Move a run that is not running to `deleted_folder`; returns its name there.

    Raises:
        BadInput: it is running.
    """
    if launch.is_running(run):
        raise BadInput(f"run {run.path.name!r} is running: stop it before you delete it")
    target = deleted_folder() / run.path.name
    if target.exists():
        target = deleted_folder() / f"{run.path.name[:40]} {time.strftime('%Y-%m-%d %H.%M.%S')}"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(run.path, target)
    return target.name


def restore(name: str) -> str:
    """Move a deleted run back.

    Raises:
        BadInput: there is no deleted run of this name, or another run uses the name now.
    """
    source, target = deleted_folder() / check_name(name), run_folder(name)
    if not (source / "run.yaml").is_file():
        raise BadInput(f"there is no deleted run named {name!r}")
    if target.exists():
        raise BadInput(f"there is already a run named {name!r}: delete or rename it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    return target.name
