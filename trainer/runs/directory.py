"""The run directory: the one contract between a run and those who watch it."""

import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from ..config import RunConfig, parse_config
from ..utils.errors import BadInput
from ..utils.files import remove_leftovers, write_atomically, write_json

STATES = ("starting", "running", "stopping", "finished", "stopped", "failed")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


def description_hash(config: RunConfig) -> str:
    """Twelve hex digits that stand for a description."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_fields(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two descriptions differ, with both values."""
    changes = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key} was {_short(before)} and is now {_short(after)}")
    return changes


def _short(value: object, limit: int = 100) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


@dataclass(frozen=True)
class Checkpoint:
    """Everything resume needs.

    Attributes:
        tensors: LoRA, moving average, optimizer moments.
        state: position, guard, evaluations: plain data.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class RunDirectory:
    """A run on disk. Every file in it is whole at any moment; only the process that holds the lock writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / ".lock")

    # ---------------------------------------------------------------------------------------------- identity

    @classmethod
    def open(cls, path: Path, config: RunConfig, command: list[str]) -> "RunDirectory":
        """Make the directory, or attach to the one that holds the same description; takes its lock.

        Raises:
            BadInput: it belongs to another description or a live process, or holds something else.
        """
        path = Path(path)
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise BadInput(f"run directory {path} is a file")
        if path.is_dir() and any(path.iterdir()) and not (path / "run.yaml").exists() and not (path / ".lock").exists():
            raise BadInput(f"run directory {path} is not empty and holds no run; choose another")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"run directory {path} cannot be made: {error.strerror}") from error
        run.acquire()
        try:
            run._make_ours(config, command)
        except BaseException:
            run.release()
            raise
        return run

    def _make_ours(self, config: RunConfig, command: list[str]) -> None:
        if (self.path / "run.yaml").exists():
            if changes := self.changes(config):
                raise BadInput(f"run directory {self.path} belongs to another description: {'; '.join(changes[:5])}")
        else:
            self._write_description(config, command)
        remove_leftovers(self.path)
        self.stop_file.unlink(missing_ok=True)  # an old request; from here on every request is for this process

    @classmethod
    def attach(cls, path: Path) -> "RunDirectory":
        """An existing run.

        Raises:
            BadInput: there is none.
        """
        if not (Path(path) / "run.yaml").is_file():
            raise BadInput(f"{path} is no run directory: run.yaml is missing")
        return cls(path)

    def acquire(self, timeout: float = 0.5) -> None:
        """Take the lock; the system gives it back when this process ends, however it ends."""
        try:
            # One that only asks whether the run lives holds the lock for an instant.
            self._lock.acquire(timeout=timeout, poll_interval=0.01)
        except Timeout as error:
            pid = self.status().get("pid", "unknown")
            raise BadInput(f"run directory {self.path} is in use by process {pid}") from error
        except OSError as error:
            raise BadInput(f"run directory {self.path} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        self._lock.release()

    def is_live(self) -> bool:
        """Whether some process holds the lock."""
        if not (self.path / ".lock").exists():  # asking must not make the folder
            return False
        probe = FileLock(self.path / ".lock")
        try:
            probe.acquire(timeout=0)
        except Timeout:
            return True
        probe.release()
        return False

    def _write_description(self, config: RunConfig, command: list[str]) -> None:
        versions = {name: metadata.version(name) for name in PACKAGES}
        record = {
            "description": config.model_dump(mode="json"),
            "hash": description_hash(config),
            "command": command,
            "versions": {"python": sys.version.split()[0], **versions},
        }
        write_atomically(self.path / "run.yaml", yaml.safe_dump(record, sort_keys=False, allow_unicode=True))

    def config(self) -> RunConfig:
        """The run's description.

        Raises:
            BadInput: run.yaml does not hold one.
        """
        try:
            record = yaml.safe_load((self.path / "run.yaml").read_text(encoding="utf-8"))
            return parse_config(record["description"])
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
            raise BadInput(f"{self.path / 'run.yaml'} holds no run description") from error

    def changes(self, config: RunConfig) -> list[str]:
        """In what another description differs from this run's, a sentence each; empty where it is the same."""
        return changed_fields(self.config().model_dump(mode="json"), config.model_dump(mode="json"))

    # ------------------------------------------------------------------------------------------------ status

    def status(self) -> dict[str, Any]:
        """The newest status; empty before the first."""
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}

    def write_status(self, state: str, **fields: Any) -> None:
        """Replace the status; fields that are not named keep their values.

        Args:
            state: one of STATES.
        """
        assert state in STATES, state
        status = {**self.status(), "state": state, "pid": os.getpid(), "time": time.time(), **fields}
        write_json(self.path / "status.json", status)

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
        return self.path / "stop"

    def request_stop(self) -> None:
        self.stop_file.touch()

    def stop_requested(self) -> bool:
        return self.stop_file.exists()

    # ------------------------------------------------------------------------------------------------ events

    def append_event(self, event: dict[str, Any]) -> None:
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, allow_nan=False) + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All whole lines of the event log."""
        path = self.path / "events.jsonl"
        if not path.exists():
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def keep_events(self, iterations: int) -> None:
        """Forget the events of iterations that a resumed run will do again."""
        lines = [json.dumps(event) + "\n" for event in self.events() if event["iteration"] <= iterations]
        write_atomically(self.path / "events.jsonl", "".join(lines))

    # ------------------------------------------------------------------------------------------- checkpoints

    def save_checkpoint(self, iteration: int, checkpoint: Checkpoint, keep: int) -> None:
        """Write a checkpoint in one piece, then remove all but the newest `keep`.

        Later ones are of a past that was lost: the run went on from before them because they were not sound.
        """
        from safetensors.torch import save

        tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
        state = json.dumps(checkpoint.state)
        path = self.path / "checkpoints" / f"{iteration:06d}.safetensors"
        write_atomically(path, save(tensors, {"state": state, "sha256": _digest(tensors, state)}))
        present = self.checkpoints()
        end = present.index(path) + 1
        for old in present[: max(0, end - keep)] + present[end:]:
            old.unlink(missing_ok=True)

    def checkpoints(self) -> list[Path]:
        """Checkpoint files, oldest first."""
        return sorted((self.path / "checkpoints").glob("[0-9]*.safetensors"))

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is sound, and a sentence about each newer one that is not."""
        complaints = []
        for path in reversed(self.checkpoints()):
            try:
                return _read_checkpoint(path), complaints
            except Exception as error:  # noqa: BLE001 - whatever is wrong with a file, an older one may do
                complaints.append(f"checkpoint {path.name} is corrupt ({error}); it is left out")
        return None, complaints

    def summary(self) -> dict[str, Any] | None:
        """report/summary.json, or None before it is written."""
        path = self.path / "report" / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _read_checkpoint(path: Path) -> Checkpoint:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if _digest(tensors, record["state"]) != record["sha256"]:
        raise ValueError("its checksum does not match")
    return Checkpoint(tensors, json.loads(record["state"]))
