"""Encodes prompts with the CLIP of the graph into a file, so that the trainer does not load a text encoder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import torch

from ...trainer.config import RunConfig
from ...trainer.models import Conditions, DiffusionModel, EntryConditions, model_class
from ...trainer.models.comfy.conditions import Entry, check_entry, mapped
from ...trainer.prompts.conditions import announcer, needs_negative, prompts_to_encode
from ...trainer.prompts.sets import read_prompts
from ...trainer.prompts.store import open_conditions, write_conditions
from ...trainer.utils.errors import BadInput, shorten
from .progress import check_interrupt


@contextmanager
def encoded_prompts(clip: object, config: RunConfig, conditioning: list | None = None) -> Iterator[Path]:
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


def write(path: Path, clip: object, config: RunConfig, conditioning: list | None = None) -> None:
    """Encode the prompts of a run, one at a time, into a file. The negative prompt is included if guidance uses it.

    Args:
        conditioning: CONDITIONING that is added to every prompt without its text, for a connected model.

    Raises:
        BadInput: the text encoders do not belong to the model, the conditioning contains something that cannot be
            stored, or the disk is full.
    """
    training, held_out = read_prompts(config)
    keys = list(prompts_to_encode(config, training, held_out, needs_negative(config, held_out)))
    texts = [text for text, _ in keys]
    if config.model.graph is not None:
        carried = _carried(conditioning)
        batches = (EntryConditions.of([_entry(*_encoded(clip, text), carried)]) for text in texts)
    else:
        family = model_class(config.model)
        batches = (_row(family, config, *_encoded(clip, text)) for text in texts)
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


TEXT = (
    "attention_mask",
    "attention_mask_mt5xl",
    "conditioning_byt5small",
    "conditioning_llama3",
    "conditioning_lyrics",
    "conditioning_mt5xl",
    "num_layers_stacked",
    "num_tokens",
    "pooled_output",
    "t5xxl_ids",
    "t5xxl_weights",
)
"""What text encoders put into CONDITIONING, and other nodes do not."""


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
    if len(conditioning) != 1:
        raise BadInput(f"conditioning has {len(conditioning)} parts: connect one that is not combined from several")
    carried = {name: value for name, value in conditioning[0][1].items() if name not in TEXT}
    if (seen := carried.get("clip_vision_output")) is not None:
        names = ("last_hidden_state", "penultimate_hidden_states", "image_embeds", "mm_projected", "image_sizes")
        carried["clip_vision_output"] = {name: getattr(seen, name, None) for name in names}
    check_entry(carried)
    return mapped(carried, lambda tensor: tensor.cpu())
