"""The shapes checker of the embedded model as rewards: graded, and right or wrong."""

from torch import Tensor

from .base import Reward


class ShapesReward(Reward):
    """How well an image of the embedded model matches its prompt, from 0 to 1."""

    name = "shapes"
    typical_range = (0.3, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        from ..shapes.checker import check

        return check(images, prompts)[0]

    def check_prompts(self, prompts: list[str]) -> None:
        from ..shapes.prompts import parse

        for prompt in prompts:
            parse(prompt)


class ShapesStrictReward(ShapesReward):
    """1 if an image of the embedded model matches its prompt exactly, else 0."""

    name = "shapes-strict"
    typical_range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        from ..shapes.checker import check

        return check(images, prompts)[1]
