"""Colourfulness after Hasler and Suesstrunk (2003)."""

import torch
from torch import Tensor

from .base import Reward


class Colorfulness(Reward):
    """Hasler and Suesstrunk's colourfulness (2003), for values in [0, 1]: 0 is grey, above 0.4 very colourful."""

    name = "colorfulness"
    typical_range = (0.05, 0.5)
    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = images.float().flatten(2).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue])  # [2, B, pixels]
        spread = opponent.std(2, correction=min(1, opponent.shape[2] - 1))
        # The norm's gradient at 0 is 0; hypot's, on a grey image, is NaN.
        return torch.linalg.vector_norm(spread, dim=0) + 0.3 * torch.linalg.vector_norm(opponent.mean(2), dim=0)
