"""Rewards that need no weights: brightness, colourfulness, sharpness, JPEG size."""

import io

import torch
from torch import Tensor

from ..utils.media import to_picture
from .base import Reward

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def luma(images: Tensor) -> Tensor:
    """Brightness as the eye sees it, `[B, H, W]` in [0, 1]."""
    return torch.einsum("bchw,c->bhw", images.float(), images.new_tensor(LUMA, dtype=torch.float32))


class Brightness(Reward):
    """Mean luma, 0 (black) to 1 (white)."""

    name = "brightness"
    typical_range = (0.2, 0.8)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return luma(images).flatten(1).mean(1)


class Colorfulness(Reward):
    """Hasler and Suesstrunk's colourfulness (2003), for values in [0, 1]: 0 is grey, above 0.4 very colourful."""

    name = "colorfulness"
    typical_range = (0.05, 0.5)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = images.float().flatten(2).unbind(1)
        red_green, yellow_blue = red - green, (red + green) / 2 - blue
        spread = torch.hypot(red_green.std(1), yellow_blue.std(1))
        offset = torch.hypot(red_green.mean(1), yellow_blue.mean(1))
        return spread + 0.3 * offset


class Sharpness(Reward):
    """Standard deviation of the luma's Laplacian."""

    name = "sharpness"
    typical_range = (0.02, 0.3)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        kernel = images.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=torch.float32)[None, None]
        edges = torch.nn.functional.conv2d(luma(images)[:, None], kernel)
        return edges.flatten(1).std(1)


class JpegSize(Reward):
    """Size in kB as a JPEG of quality 95 (ddpo-pytorch): more detail is larger; a negative weight asks for less."""

    name = "jpeg-size"
    typical_range = (1.0, 300.0)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            to_picture(image).save(buffer, "JPEG", quality=95)
            sizes.append(buffer.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32)
