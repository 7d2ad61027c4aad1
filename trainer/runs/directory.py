"""The run directory: the one contract between a run and those who watch it."""

import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config import RunConfig, parse_config
from ..utils.documents import dump_yaml, is_number, read_document, try_json
from ..utils.errors import BadInput, RunFailed, shorten
from ..utils.files import remove_leftovers, write_atomically, write_json
from . import checkpoints, events
from .checkpoints import Checkpoint
from .events import Event

STATES = ("starting", "running", "stopping", "finished", "stopped", "failed")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
RAISABLE = "runtime.iterations"
"""The one setting of a run that may change: it may be raised, which extends the run."""


def description_hash(config: RunConfig) -> str:
    """Twelve hex digits that identify a description."""
    return _hash(config.model_dump(mode="json"))


def _hash(description: dict[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_fields(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings in which two descriptions differ: old and new value by dotted name."""
    changes = {}
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= changed_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[f"{prefix}{key}"] = before, after
    return changes


def _changes(old: RunConfig, new: RunConfig) -> list[str]:
    """A sentence for each setting that keeps a run from going on with another description."""
    changed = changed_fields(old.model_dump(mode="json"), new.model_dump(mode="json"))
    if RAISABLE in changed and changed[RAISABLE][1] > changed[RAISABLE][0]:
        del changed[RAISABLE]
    return [f"{name} was {shorten(before)} and is now {shorten(after)}" for name, (before, after) in changed.items()]


class RunDirectory:
    """A run on disk. Every file in it is complete at any moment, and only the process that holds its lock writes.

    A process that calls `claim` also notices when the directory is deleted or replaced while it works: from then on
    every write raises RunFailed and changes nothing.

    Attributes:
        extended_from: `runtime.iterations` before `open` raised it; None where it did not.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.extended_from: int | None = None
        self._lock = FileLock(self.path / ".lock", thread_local=False)
        self._token: str | None = None

    # ---------------------------------------------------------------------------------------------- identity

    @classmethod
    def open(cls, path: Path, config: RunConfig, command: list[str]) -> "RunDirectory":
        """Make the directory, or attach to the one that holds the same description; takes its lock.

        A description that only raises `runtime.iterations` extends the run.

        Args:
            command: the command line, for the record.

        Raises:
            BadInput: it belongs to another description or a live process, or holds something else.
        """
        run = cls(path)
        run.take(config, command)
        return run

    def take(self, config: RunConfig, command: list[str]) -> None:
        """`open` for an object that exists already."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise BadInput(f"run directory {path} is a file")
        if path.is_dir() and any(path.iterdir()) and not (path / "run.yaml").exists() and not (path / ".lock").exists():
            raise BadInput(f"run directory {path} is not empty and holds no run; choose another")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"run directory {path} cannot be made: {error.strerror}") from error
        self.acquire()
        try:
            self._attach(config, command)
        except BaseException:
            self.release()
            raise

    def _attach(self, config: RunConfig, command: list[str]) -> None:
        if not (self.path / "run.yaml").exists():
            self._write_description(config, command)
        try:
            stored = self.config()
        except BadInput:
            if self._stored_hash() != description_hash(config):
                raise
            self._write_description(config, command)  # it was damaged or edited, and this is what it held
            stored = config
        if changes := _changes(stored, config):
            raise BadInput(f"run directory {self.path} belongs to another description: {'; '.join(changes[:5])}")
        if config != stored:
            self.extended_from = stored.runtime.iterations
            (self.path / "report" / "summary.json").unlink(missing_ok=True)  # it says that the run is finished
            self._write_description(config, command)
        remove_leftovers(self.path)
        for report in self.path.glob("error-*.txt"):  # of an earlier start
            report.unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)  # an old request; from here on every request is for this process

    def _stored_hash(self) -> str | None:
        """The hash of the run's description, also where the description itself is damaged."""
        try:
            return self._record()["hash"]
        except BadInput:
            return self.status().get("description")

    @classmethod
    def attach(cls, path: Path) -> "RunDirectory":
        """An existing run.

        Raises:
            BadInput: there is none.
        """
        if not (Path(path) / "run.yaml").is_file():
            raise BadInput(f"{path} is not a run directory: run.yaml is missing")
        return cls(path)

    def acquire(self, timeout: float = 0.5) -> None:
        """Take the lock; the system releases it when this process ends, however it ends.

        Raises:
            BadInput: another process holds it, or the directory cannot be written.
        """
        try:
            # A process that only asks whether the run is live holds the lock for an instant.
            self._lock.acquire(timeout=timeout, poll_interval=0.01)
        except Timeout as error:
            pid = self.status().get("pid", "unknown")
            raise BadInput(f"run directory {self.path} is in use by process {pid}") from error
        except OSError as error:
            raise BadInput(f"run directory {self.path} cannot be written: {error.strerror or error}") from error

    def release(self) -> None:
        self._token = None
        self._lock.release()

    @property
    def holds_lock(self) -> bool:
        return self._lock.is_locked

    def is_locked_elsewhere(self) -> bool | None:
        """Whether another process, or another object of this one, holds the lock; None where the disk is read-only."""
        if self.holds_lock or not (self.path / ".lock").exists():  # asking must not make the folder
            return False
        probe = FileLock(self.path / ".lock")
        try:
            probe.acquire(timeout=0)
        except Timeout:
            return True
        except OSError:
            return None
        probe.release()
        return False

    def claim(self) -> None:
        """Mark the directory as this process's own; the caller holds its lock."""
        token = uuid.uuid4().hex
        write_json(self._owner_file, {"token": token, "pid": os.getpid()})
        self._token = token

    @property
    def _owner_file(self) -> Path:
        return self.path / ".owner"

    def require_ownership(self) -> None:
        """
        Raises:
            RunFailed: the directory that this process claimed was deleted, or another process has claimed it.
        """
        if self._token is None:
            return
        owner = _read_mapping(self._owner_file)
        if owner.get("token") == self._token:
            return
        what = "was replaced by another run" if owner else "was deleted"
        raise RunFailed(f"run directory {self.path} {what} while this run was going on; it stops and writes no more")

    # ------------------------------------------------------------------------------------------- description

    def _write_description(self, config: RunConfig, command: list[str]) -> None:
        versions = {name: metadata.version(name) for name in PACKAGES}
        record = {
            "description": config.model_dump(mode="json"),
            "hash": description_hash(config),
            "command": command,
            "versions": {"python": sys.version.split()[0], **versions},
        }
        write_atomically(self.path / "run.yaml", dump_yaml(record))

    def _record(self) -> dict[str, Any]:
        """run.yaml, with a mapping `description` and a text `hash` at least.

        Raises:
            BadInput: it is damaged.
        """
        path = self.path / "run.yaml"
        record = read_document(path, f"{path}")
        kinds = {"description": dict, "hash": str}
        if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
            raise BadInput(f"{path} holds no run description")
        return record

    def config(self) -> RunConfig:
        """The run's description.

        Raises:
            BadInput: run.yaml is damaged, or was edited after the run had started.
        """
        record = self._record()
        if _hash(record["description"]) != record["hash"]:
            raise BadInput(
                f"{self.path / 'run.yaml'} was edited: its settings do not match its hash. Undo that (`train` with the "
                "original description does), or start another run with these settings"
            )
        return parse_config(record["description"])

    def changes(self, config: RunConfig) -> list[str]:
        """In what another description differs from this run's, a sentence each; empty where this run can go on with it.

        Raises:
            BadInput: run.yaml is damaged, or was edited.
        """
        return _changes(self.config(), config)

    # ------------------------------------------------------------------------------------------------ status

    def status(self) -> dict[str, Any]:
        """The newest status; empty before the first and where the file is damaged."""
        status = _read_mapping(self.path / "status.json")
        return {name: value for name, value in status.items() if name not in _STATUS or _STATUS[name](value)}

    def write_status(self, state: str, **fields: Any) -> None:
        """Replace the status; fields that are not named keep their values.

        Args:
            state: one of STATES.

        Raises:
            RunFailed: the directory is not this process's own any more.
        """
        assert state in STATES, state
        self.require_ownership()
        status = {**self.status(), "state": state, "pid": os.getpid(), "time": time.time(), **fields}
        write_json(self.path / "status.json", status)

    def summary(self) -> dict[str, Any] | None:
        """report/summary.json; None before it is written and where it is damaged."""
        summary = _read_mapping(self.path / "report" / "summary.json")
        return summary if _is_summary(summary) else None

    def is_finished(self) -> bool:
        """Whether the run did all its iterations and its LoRA is there."""
        return (self.summary() or {}).get("state") == "finished" and self.lora_file.is_file()

    @property
    def log_file(self) -> Path:
        """Where the output of a run in the background goes."""
        return self.path / "log.txt"

    @property
    def lora_file(self) -> Path:
        """The newest LoRA."""
        return self.path / "lora.safetensors"

    @property
    def stop_file(self) -> Path:
        """The run stops when this file appears."""
        return self.path / "stop"

    def request_stop(self) -> None:
        """
        Raises:
            BadInput: the directory cannot be written.
        """
        try:
            self.stop_file.touch()
        except OSError as error:
            raise BadInput(f"run directory {self.path} cannot be written: {error.strerror or error}") from error

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to stop.

        Raises:
            RunFailed: the directory is not this process's own any more, so nobody could ask.
        """
        self.require_ownership()
        return self.stop_file.exists()

    # --------------------------------------------------------------------------------- events and checkpoints

    @property
    def events_file(self) -> Path:
        """Read it with `EventReader` while the run goes on."""
        return self.path / "events.jsonl"

    def append_event(self, event: Event) -> None:
        self.require_ownership()
        events.append_event(self.events_file, event)

    def events(self) -> list[Event]:
        """All events; damaged lines are left out."""
        return events.EventReader(self.events_file).new()

    def keep_events(self, iterations: int) -> int:
        """Drop events after a checkpoint, and damaged lines; returns the number of the latter."""
        self.require_ownership()
        return events.keep_events(self.events_file, iterations)

    def save_checkpoint(self, iteration: int, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint atomically, then remove all but the newest `keep`."""
        self.require_ownership()
        checkpoints.save_checkpoint(self.path / "checkpoints", iteration, checkpoint, keep)

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return checkpoints.checkpoint_files(self.path / "checkpoints")

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is sound, and a sentence about each newer one that is not."""
        return checkpoints.load_checkpoint(self.path / "checkpoints")


# ------------------------------------------------------------------------------------------------- what files may hold


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file of this program's own; empty where it is missing or damaged."""
    try:
        data = try_json(path.read_bytes())
    except OSError:
        return {}
    return data if isinstance(data, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_STATUS: dict[str, Callable[[Any], bool]] = {
    "state": lambda value: value in STATES,
    "pid": _is_count,
    "iteration": _is_count,
    "iterations": _is_count,
    "processes": _is_count,
    "gpus": lambda value: isinstance(value, list) and all(_is_count(gpu) for gpu in value),
    "error": lambda value: value is None or isinstance(value, str),
    "progress": lambda value: value is None or isinstance(value, dict),
    "launcher": lambda value: isinstance(value, dict) and _is_count(value.get("pid")),
}
"""What readers of the status rely on; other fields are free."""


def _is_summary(summary: dict[str, Any]) -> bool:
    held_out, evaluations = summary.get("eval"), summary.get("evaluations")
    if summary.get("state") not in STATES or not isinstance(held_out, dict) or not isinstance(evaluations, list):
        return False
    scores = [held_out.get("before"), held_out.get("after"), *evaluations]
    sound = all(score is None or events.is_score(score) for score in scores)
    return sound and all(is_number(summary.get(name)) for name in ("iterations", "seconds"))
