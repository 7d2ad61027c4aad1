"""Encoded prompts: from the model's own text encoders, or from a file written beforehand."""

import json
from pathlib import Path

import torch

from ..config import RunConfig
from ..models import Conditions, DiffusionModel, EntryConditions
from ..models.comfy.conditions import packed, unpacked
from ..utils.errors import BadInput
from ..utils.files import write_atomically
from .sets import PromptSet


def all_texts(config: RunConfig, training: PromptSet, held_out: PromptSet) -> list[str]:
    """Every text a run needs encoded: training prompts, held-out prompts, the negative prompt."""
    return [*training.texts, *held_out.texts, config.prompts.negative]


def all_pictures(training: PromptSet, held_out: PromptSet) -> list[Path | None]:
    """The picture of each of those texts; the negative prompt has none."""
    return [*training.pictures, *held_out.pictures, None]


def conditions_for(
    config: RunConfig,
    family: type[DiffusionModel],
    texts: list[str],
    device: torch.device,
    pictures: list[Path | None] | None = None,
) -> Conditions:
    """One row per text.

    Raises:
        BadInput: the conditions file cannot be read, does not fit the model or lacks a text.
    """
    if config.prompts.conditions is None:
        return family.encode(config.model, texts, device, pictures)
    known, conditions = load_conditions(Path(config.prompts.conditions))
    if isinstance(conditions, EntryConditions) and config.model.graph is None:
        raise BadInput(f"prompts.conditions {config.prompts.conditions} is for family comfy, a model of a graph")
    family.check_conditions(config.model, conditions)
    place = {text: row for row, text in enumerate(known)}
    for text in texts:
        if text not in place:
            raise BadInput(f"prompts.conditions {config.prompts.conditions} holds no conditions for {text!r}")
    return conditions.rows(torch.tensor([place[text] for text in texts]))


def save_conditions(path: Path, texts: list[str], conditions: Conditions) -> None:
    """Write conditions with the texts they belong to."""
    from safetensors.torch import save

    notes = {"texts": json.dumps(texts)}
    if isinstance(conditions, EntryConditions):
        entries = tuple(conditions.entries[i] for i in conditions.index.tolist())
        tensors, notes["entries"] = packed(entries)
    else:
        tensors = {name: value.contiguous() for name, value in conditions.tensors.items()}
    write_atomically(path, save(tensors, notes))


def load_conditions(path: Path) -> tuple[list[str], Conditions]:
    """The texts of a file and their conditions.

    Raises:
        BadInput: it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            texts = json.loads(notes["texts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if "entries" in notes:
            conditions = EntryConditions.of(unpacked(tensors, notes["entries"]))
        else:
            conditions = Conditions(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"conditions file {path} cannot be read: {error}") from error
    if len(texts) != len(conditions) or any(len(value) != len(texts) for value in conditions.tensors.values()):
        raise BadInput(f"conditions file {path} does not hold one row per text")
    return texts, conditions
