"""CLIP's view of the images, borrowed from a judge that is a CLIP model."""

from collections.abc import Mapping

from ..rewards import Reward
from ..rewards.threshold import Threshold
from .looks import Embed


def embedder(judges: Mapping[str, Reward]) -> Embed | None:
    """The image embeddings of the first judge that is a CLIP model; None where there is none."""
    for judge in judges.values():
        inner = judge.reward if isinstance(judge, Threshold) else judge
        if (embed := getattr(inner, "embed", None)) is not None:
            return embed
    return None
