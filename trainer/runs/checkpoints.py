"""Checkpoints: the training state for resuming, in one safetensors file with a checksum."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.errors import cut
from ..utils.files import write_atomically


@dataclass(frozen=True)
class Checkpoint:
    """The training state of a run.

    Attributes:
        tensors: LoRA, moving average and optimizer state, by name.
        state: iteration, watchdog, evaluations and similar, as JSON data.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def checkpoint_files(folder: Path) -> list[Path]:
    """Checkpoint files, oldest first."""
    return sorted(folder.glob("[0-9]*.safetensors"))


def save_checkpoint(folder: Path, iteration: int, checkpoint: Checkpoint, keep: int) -> None:
    """Write a checkpoint atomically, then remove all but the newest `keep`.

    Files of later iterations are removed as well: they were corrupt, so the run resumed from an earlier one.

    Raises:
        OSError: the disk is full or not writable; the older checkpoints are untouched.
    """
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in checkpoint.tensors.items()}
    state = json.dumps(checkpoint.state)
    path = folder / f"{iteration:06d}.safetensors"
    write_atomically(path, save(tensors, {"state": state, "sha256": _digest(tensors, state)}))
    present = checkpoint_files(folder)
    end = present.index(path) + 1
    for old in present[: max(0, end - keep)] + present[end:]:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a warning for each newer file that is corrupt."""
    complaints = []
    for path in reversed(checkpoint_files(folder)):
        try:
            return _read(path), complaints
        except Exception as error:  # noqa: BLE001 - on any error, try the next older file
            complaints.append(f"checkpoint {path.name} is corrupt and is ignored ({cut(str(error), 200)})")
    return None, complaints


def _read(path: Path) -> Checkpoint:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if _digest(tensors, record["state"]) != record["sha256"]:
        raise ValueError("the checksum does not match")
    return Checkpoint(tensors, json.loads(record["state"]))


def _digest(tensors: dict[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
