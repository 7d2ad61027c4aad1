"""Prompts encoded by the CLIP of the graph, for a trainer that then loads no text encoder."""

import torch

from ...trainer.config import RunConfig
from ...trainer.models import Conditions, EntryConditions, model_class
from ...trainer.models.comfy.conditions import Entry, check_entry, mapped
from ...trainer.prompts.conditions import all_texts
from ...trainer.prompts.sets import evaluation_prompts, training_prompts
from ...trainer.utils.errors import BadInput
from .progress import check_interrupt


def encode(clip: object, config: RunConfig, conditioning: list | None = None) -> tuple[list[str], Conditions]:
    """Every text of a run and its conditions, one row each, on the CPU.

    Args:
        conditioning: CONDITIONING whose content beside the text goes with every text, for models of the graph.

    Raises:
        BadInput: the text encoders do not belong to the model, or a text is longer than the others can be padded to.
    """
    texts = list(
        dict.fromkeys(all_texts(config, training_prompts(config.prompts), evaluation_prompts(config.evaluation)))
    )
    if config.model.graph is not None:
        carried = _carried(conditioning)
        return texts, EntryConditions.of([_entry(*_encoded(clip, text), carried) for text in texts])
    embeds, pooled = [], []
    for text in texts:
        tokens, extra = _encoded(clip, text)
        embeds.append(tokens.float().cpu())
        pooled.append(extra.get("pooled_output"))
    _require_equal_lengths(texts, embeds)
    together = None if any(value is None for value in pooled) else torch.cat([value.float().cpu() for value in pooled])
    family = model_class(config.model)
    return texts, family.outside_conditions(config.model, torch.cat(embeds), together)


def _encoded(clip: object, text: str) -> tuple[torch.Tensor, dict]:
    """Token embeddings and what comes with them."""
    check_interrupt()
    scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(scheduled) != 1:
        raise BadInput("clip changes over the sampling steps (hooks with a schedule), which training cannot follow")
    tokens, extra = scheduled[0]
    return tokens, extra


TEXT = ("pooled_output", "attention_mask", "num_tokens", "conditioning_lyrics", "t5xxl_ids", "t5xxl_weights")
"""What text encoders put into CONDITIONING, and other nodes do not."""


def _entry(tokens: torch.Tensor, extra: dict, carried: Entry) -> Entry:
    entry = {"cross_attn": tokens, **extra}
    check_entry(entry)
    return {name: mapped(value, lambda tensor: tensor.cpu()) for name, value in entry.items()} | carried


def _carried(conditioning: list | None) -> Entry:
    """What a CONDITIONING holds beside its text.

    Raises:
        BadInput: it has several parts, or something that is no data.
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


def _require_equal_lengths(texts: list[str], embeds: list[torch.Tensor]) -> None:
    lengths = [value.shape[1] for value in embeds]
    if len(set(lengths)) > 1:
        longest = max(zip(lengths, texts, strict=True))
        raise BadInput(
            f"prompt {longest[1]!r} is encoded into {longest[0]} tokens and others into {min(lengths)}: all must have "
            "the same length, so shorten it"
        )
