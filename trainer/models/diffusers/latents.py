"""Shapes of latents and of conditions, as the families arrange them."""

from typing import Any

import torch
from torch import Tensor

from ..base import Conditions, stacked


def together(parts: list[Conditions]) -> Conditions:
    """Conditions one under the other, on the CPU; token sequences are padded with zeros to the longest."""
    return Conditions({name: stacked([part.tensors[name].cpu() for part in parts]) for name in parts[0].tensors})


def standard_moments(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a VAE's latent channels, shaped for `[B, C, F, H, W]`."""
    return tuple(torch.tensor(v).view(1, -1, 1, 1, 1).to(like) for v in (config.latents_mean, config.latents_std))


def as_frames(videos: Tensor) -> Tensor:
    """A VAE's `[B, 3, F, H, W]` in [-1, 1] as videos `[B, F, 3, H, W]` in [0, 1], or images where F is 1."""
    frames = (videos.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    return frames[:, 0] if frames.shape[1] == 1 else frames.contiguous()


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as tokens of 2 x 2 latents, `[B, H/2 W/2, 4 C]` (FLUX, Qwen-Image)."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * w // 2, 4 * c)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents of shape `[C, H, W]`."""
    c, h, w = shape
    return tokens.view(len(tokens), h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)
