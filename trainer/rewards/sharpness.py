"""Sharpness."""

import torch
from torch import Tensor

from .base import Reward
from .preprocess import luma


class Sharpness(Reward):
    """Standard deviation of the luma's Laplacian; 0 for images with fewer than two inner pixels."""

    name = "sharpness"
    typical_range = (0.02, 0.3)
    differentiable = True

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < 3 or (height, width) == (3, 3):
            return luma(images).flatten(1).mean(1) * 0
        kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float32)[None, None]
        edges = torch.nn.functional.conv2d(luma(images)[:, None], kernel)
        return edges.flatten(1).std(1)
