"""Shapes of latents and of conditions, as the families arrange them."""

import torch
from einops import rearrange
from torch import Tensor

from ..base import Conditions


def together(parts: list[Conditions]) -> Conditions:
    """Conditions one under the other, on the CPU; token sequences are padded with zeros to the longest."""
    joined = {}
    for name in parts[0].tensors:
        values = [part.tensors[name].cpu() for part in parts]
        longest = max(value.shape[1] for value in values)
        joined[name] = torch.cat([_padded(value, longest) for value in values])
    return Conditions(joined)


def _padded(value: Tensor, length: int) -> Tensor:
    missing = length - value.shape[1]
    if not missing:
        return value
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], dim=1)


def rows_and_zeros(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows one under the other, on the CPU, and zeros as the last."""
    names = rows[0]
    return {name: torch.cat([*(row[name].cpu() for row in rows), rows[0][name].cpu() * 0]) for name in names}


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens of 2 x 2 latents, `[B, H/2 W/2, 4 C]` (FLUX, Qwen-Image)."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of shape `[C, H, W]`."""
    _, height, width = shape
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, w=width // 2, p=2, q=2)
