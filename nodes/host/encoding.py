"""Prompts encoded by the CLIP of the graph, into a file that the trainer reads, so that it loads no text encoder."""

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
    """A temporary file with the conditions of a run's prompts, to be moved away; else it is deleted.

    Raises:
        BadInput: as `write`.
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
    """Encode every prompt of a run, one at a time, into a file of conditions.

    The negative prompt is encoded only where guidance uses it.

    Args:
        conditioning: CONDITIONING whose content beside the text goes with every prompt, for models of the graph.

    Raises:
        BadInput: the text encoders do not belong to the model, the conditioning holds what cannot be stored, or the
            disk has no room.
    """
    training, held_out = read_prompts(config)
    keys = list(prompts_to_encode(config, training, held_out, needs_negative(config, held_out)))
    texts = [text for text, _ in keys]
    if config.model.graph is not None:
        carried = _carried(conditioning)
        pieces = (EntryConditions.of([_entry(*_encoded(clip, text), carried)]) for text in texts)
    else:
        family = model_class(config.model)
        pieces = (_row(family, config, *_encoded(clip, text)) for text in texts)
    write_conditions(path, keys, pieces, announce=announcer(path, len(keys)))


def first_row(path: Path) -> Conditions:
    """The first prompt's conditions in a file."""
    return open_conditions(path).rows(torch.tensor([0]))


def applies_weights(clip: object) -> bool:
    """Whether the CLIP takes `(word:1.5)` for a weight; encoders that are language models take it for text."""
    return any(weight != 1.0 for weight in _weights(clip.tokenize("(a:1.5)")))


def _weights(tokens: object) -> Iterator[float]:
    """Second numbers of the tuples (token, weight, ...) in whatever a tokenizer gives."""
    if isinstance(tokens, tuple) and len(tokens) > 1 and isinstance(tokens[1], int | float):
        yield tokens[1]
    elif isinstance(tokens, dict | list | tuple):
        for part in tokens.values() if isinstance(tokens, dict) else tokens:
            yield from _weights(part)


def _encoded(clip: object, text: str) -> tuple[torch.Tensor, dict]:
    """Token embeddings `[1, tokens, width]`, and what comes with them."""
    check_interrupt()
    try:
        scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    except RecursionError as error:
        raise BadInput(f"prompt {shorten(text)} nests parentheses too deep for clip") from error
    if len(scheduled) != 1:
        raise BadInput("clip changes over the sampling steps (hooks with a schedule), which training cannot follow")
    tokens, extra = scheduled[0]
    return tokens, extra


def _row(family: type[DiffusionModel], config: RunConfig, tokens: torch.Tensor, extra: dict) -> Conditions:
    """One prompt's conditions for a model of a diffusers folder."""
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
    """What a CONDITIONING holds beside its text.

    Raises:
        BadInput: it has several parts, or holds an object that cannot be stored.
    """
    if conditioning is None:
        return {}
    if len(conditioning) != 1:
        raise BadInput(f"conditioning has {len(conditioning)} parts, and training takes one")
    carried = {name: value for name, value in conditioning[0][1].items() if name not in TEXT}
    if (seen := carried.get("clip_vision_output")) is not None:
        names = ("last_hidden_state", "penultimate_hidden_states", "image_embeds", "mm_projected", "image_sizes")
        carried["clip_vision_output"] = {name: getattr(seen, name, None) for name in names}
    check_entry(carried)
    return mapped(carried, lambda tensor: tensor.cpu())
