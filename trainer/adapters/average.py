"""Moving average of the LoRA."""

import torch
from torch import Tensor


class MovingAverage:
    """Exponential moving average with warm-up: decay min(decay, (1 + n) / (10 + n)) at the n-th update.

    Args:
        weights: by name; the average starts as a copy of them.
        decay: in [0, 1); 0 keeps the newest weights.
    """

    def __init__(self, weights: dict[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in weights.items()}

    @torch.no_grad()
    def update(self, weights: dict[str, Tensor], count: int) -> None:
        """Take in the weights after update number `count` (from 0)."""
        decay = min(self.decay, (1 + count) / (10 + count))
        for name, value in weights.items():
            self.weights[name].lerp_(value.detach(), 1 - decay)
