"""The encoded prompts (conditions) of a run: encoded when it starts, or read from a file written by `encode`."""

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import RunConfig
from ..models import Conditions, DiffusionModel
from ..models.base import ENCODED_AT_ONCE
from ..utils.errors import BadInput, cut, shorten
from .sets import PromptSet
from .store import StoredConditions, open_conditions, write_conditions
from .text import Key

if TYPE_CHECKING:
    from ..utils.distributed import Processes  # slow to import, and ComfyUI imports this module at its start

GIB = 2**30
WORTH_MENTIONING = GIB
"""Size in bytes from which a message is printed before the conditions are encoded."""


@dataclass(frozen=True)
class RunConditions:
    """
    Attributes:
        training, held_out: conditions of the training and held-out prompts, one row per prompt; they stay on disk.
        unconditional: conditions of the negative prompt, on the CPU; None if the run uses no guidance.
    """

    training: StoredConditions
    held_out: StoredConditions
    unconditional: Conditions | None


def needs_negative(config: RunConfig, held_out: PromptSet) -> bool:
    """Whether training or evaluation uses classifier-free guidance, and so the negative prompt."""
    scales = [config.rollout.guidance_scale]
    if held_out.texts and config.evaluation.guidance_scale is not None:
        scales.append(config.evaluation.guidance_scale)
    return any(scale != 1.0 for scale in scales)


def prompts_to_encode(
    config: RunConfig, training: PromptSet, held_out: PromptSet, with_negative: bool
) -> dict[Key, Path | None]:
    """All distinct prompts of a run with their images. The negative prompt gets the image of another prompt."""
    wanted = dict(zip([*training.keys, *held_out.keys], [*training.images, *held_out.images], strict=True))
    if with_negative:
        wanted.setdefault(_negative(config), training.images[0])
    return wanted


def _negative(config: RunConfig) -> Key:
    return config.prompts.negative, ""


def conditions_for(
    config: RunConfig,
    family: type[DiffusionModel],
    training: PromptSet,
    held_out: PromptSet,
    processes: "Processes",
    folder: Path | None,
) -> RunConditions:
    """The encoded prompts of a run.

    Without `prompts.conditions`, each process encodes a part of the prompts into a file that all processes read; it is
    deleted when the process ends, and a temporary folder as soon as all have opened the files. This is a collective
    operation.

    Args:
        folder: folder of these files, on a disk that all processes share; None for a temporary folder.

    Raises:
        BadInput: the conditions file cannot be read, does not match the model, or lacks a prompt; or the text encoders
            cannot be loaded, or the disk is full.
    """
    with_negative = needs_negative(config, held_out)
    wanted = prompts_to_encode(config, training, held_out, with_negative)
    if config.prompts.conditions is None:
        stored = _encode_together(config, family, wanted, processes, folder)
    else:
        stored = _from_file(config, family, wanted)
    if config.model.sharded and stored.is_ragged:
        raise BadInput("model.sharded needs prompts that are all encoded to the same number of tokens; set it to false")
    row_of = {key: row for row, key in enumerate(stored.keys)}
    unconditional = stored.rows(torch.tensor([row_of[_negative(config)]])) if with_negative else None
    training_rows, held_out_rows = ([row_of[key] for key in prompts.keys] for prompts in (training, held_out))
    return RunConditions(stored.select(training_rows), stored.select(held_out_rows), unconditional)


def check_conditions(config: RunConfig, family: type[DiffusionModel], training: PromptSet, held_out: PromptSet) -> None:
    """Check that the file `prompts.conditions` matches the model and has every prompt, without reading all of it.

    Raises:
        BadInput: see `conditions_for`.
    """
    _from_file(config, family, prompts_to_encode(config, training, held_out, needs_negative(config, held_out)))


def encode_into(
    path: Path,
    config: RunConfig,
    family: type[DiffusionModel],
    wanted: dict[Key, Path | None],
    device: torch.device,
    announce_from: int = WORTH_MENTIONING,
) -> None:
    """Encode prompts with the model's own text encoders, batch by batch, into a file of conditions.

    Args:
        announce_from: size of the file in bytes from which a message is printed before most prompts are encoded.

    Raises:
        BadInput: the text encoders cannot be loaded, or the disk has too little free space.
    """
    texts, images = [text for text, _ in wanted], list(wanted.values())
    batches = family.encode_batches(config.model, texts, images, config.prompts.negative, device)
    write_conditions(path, list(wanted), batches, announce=announcer(path, len(wanted), announce_from))


def announcer(path: Path, count: int, announce_from: int = WORTH_MENTIONING) -> Callable[[int], None]:
    """A callback that prints the size of the conditions, and raises BadInput if the disk has too little space."""

    def announce(size: int) -> None:
        free = shutil.disk_usage(path.parent).free
        if size > free:
            raise BadInput(
                f"{count} encoded prompts need about {size / GIB:.1f} GiB of disk space, but {path.parent} has "
                f"{free / GIB:.1f} GiB free: free some space, or use fewer prompts"
            )
        if size >= announce_from:
            size_text = f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
            print(f"encoding {count} prompts, which take about {size_text} of disk space in {path}", file=sys.stderr)

    return announce


def _from_file(config: RunConfig, family: type[DiffusionModel], wanted: dict[Key, Path | None]) -> StoredConditions:
    path = Path(config.prompts.conditions)
    stored = open_conditions(path)
    if stored.has_entries and config.model.graph is None:
        raise BadInput(f"prompts.conditions {path} is for a model of a ComfyUI graph (family comfy): encode again")
    family.check_conditions(config.model, stored.rows(torch.tensor([0])))
    known = set(stored.keys)
    for key, image in wanted.items():
        if key not in known:
            which = f"the negative prompt {shorten(key[0])}" if key == _negative(config) else shorten(key[0])
            with_image = f" with image {cut(str(image), 100)}" if key[1] else ""
            raise BadInput(f"prompts.conditions {path} does not contain {which}{with_image}: encode again")
    return stored


# ----------------------------------------------------------------------------------------------- encoded at the start


def _encode_together(
    config: RunConfig,
    family: type[DiffusionModel],
    wanted: dict[Key, Path | None],
    processes: "Processes",
    folder: Path | None,
) -> StoredConditions:
    """Encode the prompts with all processes, in the same batches as a single process would use."""
    temporary = None if folder else _temporary_folder(processes)
    try:
        stored = _encode_shares(config, family, wanted, processes, folder or temporary, temporary)
        if temporary:
            processes.gather([None])  # until every process has opened the files
        return stored
    finally:
        if temporary and processes.is_main:
            # What is open can be read without a name, so that nothing is left of a process that is killed later. Where
            # it cannot (Windows), `_remove` deletes it.
            shutil.rmtree(temporary, ignore_errors=True)


def _encode_shares(
    config: RunConfig,
    family: type[DiffusionModel],
    wanted: dict[Key, Path | None],
    processes: "Processes",
    folder: Path,
    temporary: Path | None,
) -> StoredConditions:
    """
    Args:
        temporary: the folder, if it goes with the files.
    """
    path = folder / f"encoded-{processes.rank}.safetensors"
    batches = processes.share(-(-len(wanted) // ENCODED_AT_ONCE))
    mine = dict(list(wanted.items())[batches.start * ENCODED_AT_ONCE : batches.stop * ENCODED_AT_ONCE])
    fault = None
    try:
        if mine:
            encode_into(path, config, family, mine, processes.device)
    except BadInput as error:
        fault = str(error)
    results = processes.gather([(fault, str(path) if mine else None)])
    if faults := [fault for fault, _ in results if fault]:
        raise BadInput(faults[0])
    paths = [Path(path) for _, path in results if path]
    stored = open_conditions(*paths)
    if mine:
        weakref.finalize(stored.files[paths.index(path)], _remove, path, temporary)
    if processes.is_main:
        for leftover in set(folder.glob("encoded-*.safetensors")) - set(paths):  # of a run that was killed
            _remove(leftover)
    return stored


def _temporary_folder(processes: "Processes") -> Path:
    return Path(processes.broadcast(tempfile.mkdtemp(prefix="dancegrpo-") if processes.is_main else None))


def _remove(path: Path, folder: Path | None = None) -> None:
    """Delete a file of this run, and its folder if it is empty."""
    try:
        path.unlink(missing_ok=True)
        if folder is not None:
            folder.rmdir()
    except OSError:  # on Windows another process may have it open; the next start replaces it
        pass
