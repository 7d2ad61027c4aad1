"""Brightness."""

from torch import Tensor

from .base import Reward
from .preprocess import luma


class Brightness(Reward):
    """Mean luma, 0 (black) to 1 (white)."""

    name = "brightness"
    typical_range = (0.2, 0.8)
    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return luma(images).flatten(1).mean(1)
