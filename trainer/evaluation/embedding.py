"""CLIP image embeddings, from a reward that is a CLIP model."""

from collections.abc import Mapping

from ..rewards import Reward
from ..rewards.threshold import Threshold
from .looks import Embed


def embedder(rewards: Mapping[str, Reward]) -> Embed | None:
    """The function that embeds images with the first reward that is a CLIP model; None if there is none."""
    for reward in rewards.values():
        inner = reward.reward if isinstance(reward, Threshold) else reward
        if (embed := getattr(inner, "embed", None)) is not None:
            return embed
    return None
