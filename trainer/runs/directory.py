"""The run directory: the files through which a run communicates with other processes."""

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
from ..utils.errors import BadInput, RunFailed
from ..utils.files import is_whole_safetensors, remove_leftovers, write_atomically, write_json
from . import checkpoints, events
from .changes import setting_changes
from .checkpoints import Checkpoint
from .events import Event

STATES = ("starting", "running", "stopping", "finished", "stopped", "failed")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def description_hash(config: RunConfig) -> str:
    """A hash of a description, 12 hex digits."""
    return _hash(config.model_dump(mode="json"))


def _hash(description: dict[str, Any]) -> str:
    text = json.dumps(description, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _printable(word: str) -> str:
    r"""A word of the command line; bytes of a file name that are not UTF-8 become `\\xe9` or the like."""
    return os.fsencode(word).decode("utf-8", "backslashreplace")


class RunDirectory:
    """A run on disk. Files are written atomically, and only by the process that holds the lock.

    - `RunDirectory(path)` touches nothing, and may be no run yet.
    - `existing` is for a run that must be there, to read it or to ask it to stop.
    - `open` is for whoever has a description to run: it creates the run or continues it, and takes the lock.
    - `acquire` takes the lock alone: to start a known run again, or to write how it ended.

    After `open`, every write raises RunFailed if the directory has been deleted or replaced in the meantime.

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
    def existing(cls, path: Path) -> "RunDirectory":
        """A run that must be there; its lock is not taken.

        Raises:
            BadInput: there is none.
        """
        if not (Path(path) / "run.yaml").is_file():
            raise BadInput(f"{path} is not a run directory: run.yaml is missing")
        return cls(path)

    def open(self, config: RunConfig, command: list[str]) -> "RunDirectory":
        """Take the lock, create the run or continue the one with the same description, and become its owner.

        A description that only raises `runtime.iterations` extends the run. `release` ends what this begins.

        Args:
            command: the command line, which is stored in run.yaml.

        Returns:
            this object.

        Raises:
            BadInput: the directory has another description, is used by a running process, or is not a run directory.
        """
        path = self.path
        if str(path).encode("utf-8", "ignore") != os.fsencode(path):
            raise BadInput(f"run directory {path} has a name that is not UTF-8; choose another name")
        if path.exists() and not path.is_dir():
            raise BadInput(f"run directory {path} is a file; choose another name")
        if path.is_dir() and any(path.iterdir()) and not (path / "run.yaml").exists() and not (path / ".lock").exists():
            raise BadInput(f"run directory {path} is not empty and is not a run; choose another directory")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"run directory {path} cannot be created: {error.strerror}") from error
        self.acquire()
        try:
            self._accept(config, command)
            self._become_owner()
        except BaseException:
            self.release()
            raise
        return self

    def _accept(self, config: RunConfig, command: list[str]) -> None:
        """Store or compare the description, and remove what an earlier process left."""
        if not (self.path / "run.yaml").exists():
            self._write_description(config, command)
        try:
            stored = self.config()
        except BadInput:
            if self._stored_hash() != description_hash(config):
                raise
            self._write_description(config, command)  # run.yaml was damaged or edited; restore it
            stored = config
        if self.never_began():
            self._write_description(config, command)
            stored = config
        if changes := setting_changes(stored, config):
            raise BadInput(f"run directory {self.path} has a run with other settings: {'; '.join(changes[:5])}")
        if config != stored:
            self.extended_from = stored.runtime.iterations
            (self.path / "report" / "summary.json").unlink(missing_ok=True)  # the summary of the finished run
            self._write_description(config, command)
        remove_leftovers(self.path)
        for report in self.path.glob("error-*.txt"):  # of an earlier start
            report.unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)  # an old request; later ones are for this process

    def _stored_hash(self) -> str | None:
        """The hash of the run's description, even if the description is damaged."""
        try:
            return self._record()["hash"]
        except BadInput:
            return self.status().get("description")

    def acquire(self, timeout: float = 0.5) -> None:
        """Take the lock alone. The operating system releases it when this process ends for any reason.

        Raises:
            BadInput: another process holds it, or the directory cannot be written.
        """
        try:
            # Wait a moment, because `is_locked_elsewhere` of another process takes the lock briefly.
            self._lock.acquire(timeout=timeout, poll_interval=0.01)
        except Timeout as error:
            pid = self.status().get("pid", "unknown")
            raise BadInput(f"run directory {self.path} is in use by process {pid}") from error
        except OSError as error:
            raise BadInput(f"run directory {self.path} cannot be written: {error.strerror or error}") from error

    def release(self) -> None:
        """Release the lock; what is written afterwards is no longer checked for another owner."""
        self._token = None
        self._lock.release()

    @property
    def holds_lock(self) -> bool:
        return self._lock.is_locked

    def is_locked_elsewhere(self) -> bool | None:
        """Whether another process or object holds the lock; None if the disk is read-only."""
        if self.holds_lock or not (self.path / ".lock").exists():  # do not create the folder
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

    def _become_owner(self) -> None:
        """Record this object as the owner of the directory, so that `require_ownership` notices another one."""
        token = uuid.uuid4().hex
        write_json(self._owner_file, {"token": token, "pid": os.getpid()})
        self._token = token

    @property
    def _owner_file(self) -> Path:
        return self.path / ".owner"

    def require_ownership(self) -> None:
        """
        Raises:
            RunFailed: the directory that this object has opened was deleted, or another process has opened it.
        """
        if self._token is None:
            return
        owner = _read_mapping(self._owner_file)
        if owner.get("token") == self._token:
            return
        what = "was taken over by another process" if owner else "was deleted"
        raise RunFailed(f"run directory {self.path} {what} during the run; this run stops without writing to it")

    # ------------------------------------------------------------------------------------------- description

    def _write_description(self, config: RunConfig, command: list[str]) -> None:
        versions = {name: metadata.version(name) for name in PACKAGES}
        record = {
            "description": config.model_dump(mode="json"),
            "hash": description_hash(config),
            "command": [_printable(word) for word in command],
            "versions": {"python": sys.version.split()[0], **versions},
        }
        write_atomically(self.path / "run.yaml", dump_yaml(record))

    def _record(self) -> dict[str, Any]:
        """The content of run.yaml, with at least a mapping `description` and a string `hash`.

        Raises:
            BadInput: it is damaged.
        """
        path = self.path / "run.yaml"
        record = read_document(path, f"{path}")
        kinds = {"description": dict, "hash": str}
        if not isinstance(record, dict) or any(not isinstance(record.get(key), kind) for key, kind in kinds.items()):
            raise BadInput(f"{path} does not contain a run description")
        return record

    def config(self) -> RunConfig:
        """The run's description.

        Raises:
            BadInput: run.yaml is damaged, or was edited after the run had started.
        """
        record = self._record()
        if _hash(record["description"]) != record["hash"]:
            raise BadInput(
                f"{self.path / 'run.yaml'} was edited: its settings do not match its hash. Undo the changes (`train` "
                "with the original description restores the file), or start a new run with these settings"
            )
        return parse_config(record["description"])

    def changes(self, config: RunConfig) -> list[str]:
        """The changed settings of another description, a sentence each; empty if the run can be resumed with it.

        Raises:
            BadInput: run.yaml is damaged, or was edited.
        """
        return [] if self.never_began() else setting_changes(self.config(), config)

    def never_began(self) -> bool:
        """Whether the run was refused before its first iteration: another description may take its directory."""
        status = self.status()
        refused = status.get("state") == "failed" and status.get("bad_input") is True
        has_events = self.events_file.is_file() and self.events_file.stat().st_size > 0
        return refused and not has_events and not self.checkpoints()

    # ------------------------------------------------------------------------------------------------ status

    def status(self) -> dict[str, Any]:
        """The newest status; empty if the file does not exist or is damaged."""
        status = _read_mapping(self.path / "status.json")
        return {name: value for name, value in status.items() if name not in _STATUS or _STATUS[name](value)}

    def write_status(self, state: str, **fields: Any) -> None:
        """Replace the status; fields that are not named keep their values.

        Args:
            state: one of STATES.

        Raises:
            RunFailed: the directory was deleted or taken over by another process.
        """
        assert state in STATES, state
        self.require_ownership()
        status = {**self.status(), "state": state, "pid": os.getpid(), "time": time.time(), **fields}
        write_json(self.path / "status.json", status)

    def summary(self) -> dict[str, Any] | None:
        """The content of report/summary.json; None if the file does not exist or is damaged."""
        summary = _read_mapping(self.path / "report" / "summary.json")
        return summary if _is_summary(summary) else None

    def is_finished(self) -> bool:
        """Whether the run has finished all iterations and its LoRA is there, whole."""
        return (self.summary() or {}).get("state") == "finished" and is_whole_safetensors(self.lora_file)

    @property
    def log_file(self) -> Path:
        """The log file of a run in the background."""
        return self.path / "log.txt"

    @property
    def lora_file(self) -> Path:
        """The newest LoRA."""
        return self.path / "lora.safetensors"

    @property
    def stop_file(self) -> Path:
        """The run stops when this file exists."""
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
            RunFailed: the directory was deleted or taken over by another process.
        """
        self.require_ownership()
        return self.stop_file.exists()

    # --------------------------------------------------------------------------------- events and checkpoints

    @property
    def events_file(self) -> Path:
        """The event log; use `EventReader` to follow it during the run."""
        return self.path / "events.jsonl"

    def append_event(self, event: Event) -> None:
        self.require_ownership()
        events.append_event(self.events_file, event)

    def events(self) -> list[Event]:
        """All events, without damaged lines."""
        return events.EventReader(self.events_file).new()

    def keep_events(self, iterations: int) -> int:
        """Drop events after a checkpoint and damaged lines; returns the number of damaged lines."""
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
        """The newest valid checkpoint, and a warning for each newer file that is corrupt."""
        return checkpoints.load_checkpoint(self.path / "checkpoints")


# ------------------------------------------------------------------------------------------------- what files may hold


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object that this program wrote; empty if the file is missing or damaged."""
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
"""Validators for the fields of the status that are used; other fields are not checked."""


def _is_summary(summary: dict[str, Any]) -> bool:
    held_out, evaluations = summary.get("eval"), summary.get("evaluations")
    if summary.get("state") not in STATES or not isinstance(held_out, dict) or not isinstance(evaluations, list):
        return False
    scores = [held_out.get("before"), held_out.get("after"), *evaluations]
    sound = all(score is None or events.is_score(score) for score in scores)
    return sound and all(is_number(summary.get(name)) for name in ("iterations", "seconds"))
