"""The size of an image as a JPEG file (ddpo-pytorch)."""

import io

import torch
from torch import Tensor

from .base import Reward
from .preprocess import to_pil

LARGEST_SIDE = 65_500
"""Largest side in pixels that libjpeg accepts."""


class JpegSize(Reward):
    """Size in kB as a JPEG of quality 95 (ddpo-pytorch): grows with detail; use a negative weight for less detail."""

    name = "jpeg-size"
    typical_range = (1.0, 300.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        height, width = images.shape[-2:]
        if max(height, width) > LARGEST_SIDE:
            raise ValueError(f"an image of {width} x {height} is too large for JPEG: at most {LARGEST_SIDE} pixels")
        return torch.tensor([_kilobytes(image) for image in to_pil(images)], dtype=torch.float32)


def _kilobytes(image: object) -> float:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.tell() / 1000
