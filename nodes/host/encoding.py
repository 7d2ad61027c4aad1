"""Encodes prompts with the CLIP of the graph into a file, so that the trainer does not load a text encoder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import torch

from ...trainer.config import RunConfig
from ...trainer.models import Conditions, DiffusionModel, EntryConditions, model_class
from ...trainer.models.comfy.conditions import Entry, check_entry, images_of, mapped
from ...trainer.prompts.conditions import announcer, needs_negative, prompts_to_encode
from ...trainer.prompts.sets import read_prompts
from ...trainer.prompts.store import open_conditions, write_conditions
from ...trainer.utils.errors import BadInput, shorten
from .progress import check_interrupt


@dataclass(frozen=True)
class GraphConditioning:
    """CONDITIONING of a graph: one that all prompts share without its text, or a whole one for each prompt.

    Attributes:
        shared: the one; None if there is none, or each prompt has its own.
        training, held_out: those of the prompts, in their order.
    """

    shared: list | None = None
    training: tuple[list, ...] = ()
    held_out: tuple[list, ...] = ()

    @property
    def is_own(self) -> bool:
        return bool(self.training or self.held_out)


@contextmanager
def encoded_prompts(clip: object, config: RunConfig, conditioning: GraphConditioning | None = None) -> Iterator[Path]:
    """A temporary file with a run's encoded prompts. It is deleted at the end unless the caller has moved it.

    Raises:
        BadInput: see `write`.
    """
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    handle = tempfile.NamedTemporaryFile(dir=folder, prefix="conditions-", suffix=".safetensors", delete=False)  # noqa: SIM115
    handle.close()
    path = Path(handle.name)
    try:
        write(path, clip, config, conditioning)
        yield path
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, clip: object, config: RunConfig, conditioning: GraphConditioning | None = None) -> None:
    """Encode the prompts of a run, one at a time, into a file. The negative prompt is included if guidance uses it.

    Args:
        conditioning: CONDITIONING of the graph, for a connected model.

    Raises:
        BadInput: the text encoders do not belong to the model, the conditioning contains something that cannot be
            stored, or the disk is full.
    """
    training, held_out = read_prompts(config)
    keys = list(prompts_to_encode(config, training, held_out, needs_negative(config, held_out)))
    if config.model.graph is not None:
        given = conditioning or GraphConditioning()
        carried = _carried(given.shared)
        whole = [*given.training, *given.held_out]
        own = dict(zip([*training.keys, *held_out.keys], whole, strict=True)) if whole else {}
        batches = (
            EntryConditions.of([_own(own[key]) if key in own else _entry(*_encoded(clip, key[0]), carried)])
            for key in keys
        )
    else:
        family = model_class(config.model)
        batches = (_row(family, config, *_encoded(clip, text)) for text, _ in keys)
    write_conditions(path, keys, batches, announce=announcer(path, len(keys)))


def first_row(path: Path) -> Conditions:
    """The conditioning of the first prompt of a file."""
    return open_conditions(path).rows(torch.tensor([0]))


def applies_weights(clip: object) -> bool:
    """Whether the CLIP supports prompt weights such as `(word:1.5)`; language models treat them as text."""
    return any(weight != 1.0 for weight in _weights(clip.tokenize("(a:1.5)")))


def _weights(tokens: object) -> Iterator[float]:
    """The weights of all tuples (token, weight, ...) in the nested output of a tokenizer."""
    if isinstance(tokens, tuple) and len(tokens) > 1 and isinstance(tokens[1], int | float):
        yield tokens[1]
    elif isinstance(tokens, dict | list | tuple):
        for part in tokens.values() if isinstance(tokens, dict) else tokens:
            yield from _weights(part)


def _encoded(clip: object, text: str) -> tuple[torch.Tensor, dict]:
    """Text embeddings `[1, tokens, width]`, and the other entries of the conditioning."""
    check_interrupt()
    try:
        scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    except RecursionError as error:
        raise BadInput(f"prompt {shorten(text)} has too many nested parentheses for clip: remove some") from error
    if len(scheduled) != 1:
        raise BadInput("clip has scheduled hooks, which training does not support: remove them from the clip")
    tokens, extra = scheduled[0]
    return tokens, extra


def _row(family: type[DiffusionModel], config: RunConfig, tokens: torch.Tensor, extra: dict) -> Conditions:
    """The conditioning of one prompt for a model of a diffusers folder."""
    pooled = extra.get("pooled_output")
    pooled = None if pooled is None else pooled.float().cpu()
    return family.outside_conditions(config.model, tokens.float().cpu(), pooled)


def _entry(tokens: torch.Tensor, extra: dict, carried: Entry) -> Entry:
    entry = {"cross_attn": tokens, **extra}
    check_entry(entry)
    return {name: mapped(value, lambda tensor: tensor.cpu()) for name, value in entry.items()} | carried


def _carried(conditioning: list | None) -> Entry:
    """The entries of a CONDITIONING that do not come from the text encoder.

    Raises:
        BadInput: it has several parts, or an entry that cannot be stored.
    """
    if conditioning is None:
        return {}
    _, extra = _single_part(conditioning)
    carried = _plain(images_of(extra))
    check_entry(carried)
    return mapped(carried, lambda tensor: tensor.cpu())


def _own(conditioning: list) -> Entry:
    """The entry of a prompt that has a CONDITIONING of its own, text included.

    Raises:
        BadInput: as `_carried`.
    """
    tokens, extra = _single_part(conditioning)
    return _entry(tokens, _plain(extra), {})


def _single_part(conditioning: list) -> list:
    if len(conditioning) != 1:
        raise BadInput(f"conditioning has {len(conditioning)} parts: connect one that is not combined from several")
    return conditioning[0]


def _plain(extra: dict) -> dict:
    """The entries of a CONDITIONING with what CLIP vision saw as plain data."""
    if (seen := extra.get("clip_vision_output")) is None:
        return dict(extra)
    names = ("last_hidden_state", "penultimate_hidden_states", "image_embeds", "mm_projected", "image_sizes")
    return {**extra, "clip_vision_output": {name: getattr(seen, name, None) for name in names}}
