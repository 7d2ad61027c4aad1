"""Shapes of latents and of conditions, as the families arrange them."""

from einops import rearrange
from torch import Tensor

from ..base import Conditions, stacked


def together(parts: list[Conditions]) -> Conditions:
    """Conditions one under the other, on the CPU; token sequences are padded with zeros to the longest."""
    return Conditions({name: stacked([part.tensors[name].cpu() for part in parts]) for name in parts[0].tensors})


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens of 2 x 2 latents, `[B, H/2 W/2, 4 C]` (FLUX, Qwen-Image)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of shape `[C, H, W]`."""
    _, height, width = shape
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)
