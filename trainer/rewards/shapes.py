"""The checker of the shapes world as rewards: graded, and right or wrong."""

from torch import Tensor

from .base import Reward


class ShapesReward(Reward):
    """How nearly an image of the shapes world shows what its prompt says."""

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
    """1 where an image of the shapes world shows exactly what its prompt says, else 0."""

    name = "shapes-strict"
    typical_range = (0.0, 1.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        from ..shapes.checker import check

        return check(images, prompts)[1]
