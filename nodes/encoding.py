"""Prompts encoded by the CLIP of the graph, for a trainer that then loads no text encoder."""

import torch

from ..trainer.conditions import all_texts
from ..trainer.config import RunConfig
from ..trainer.errors import BadInput
from ..trainer.models import Conditions, model_class
from ..trainer.prompting import evaluation_prompts, training_prompts
from .host import check_interrupt


def encode(clip: object, config: RunConfig) -> tuple[list[str], Conditions]:
    """Every text of a run and its conditions, one row each, on the CPU.

    Raises:
        BadInput: the text encoders do not belong to the model, or a text is longer than the others can be padded to.
    """
    texts = list(
        dict.fromkeys(all_texts(config, training_prompts(config.prompts), evaluation_prompts(config.evaluation)))
    )
    embeds, pooled = [], []
    for text in texts:
        check_interrupt()
        scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        if len(scheduled) != 1:
            raise BadInput("clip changes over the sampling steps (hooks with a schedule), which training cannot follow")
        tokens, extra = scheduled[0]
        embeds.append(tokens.float().cpu())
        pooled.append(extra.get("pooled_output"))
    _require_equal_lengths(texts, embeds)
    together = None if any(value is None for value in pooled) else torch.cat([value.float().cpu() for value in pooled])
    family = model_class(config.model)
    return texts, family.outside_conditions(config.model, torch.cat(embeds), together)


def _require_equal_lengths(texts: list[str], embeds: list[torch.Tensor]) -> None:
    lengths = [value.shape[1] for value in embeds]
    if len(set(lengths)) > 1:
        longest = max(zip(lengths, texts, strict=True))
        raise BadInput(
            f"prompt {longest[1]!r} is encoded into {longest[0]} tokens and others into {min(lengths)}: all must have "
            "the same length, so shorten it"
        )
