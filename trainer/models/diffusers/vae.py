"""The autoencoder of a diffusers folder: loading, decoding latents, encoding images."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...config import ModelConfig
from ...utils.errors import BadInput
from .folders import read_json

IMAGE_VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
"""Classes of diffusers that take images, `[B, C, H, W]`."""


def check_vae(folder: Path, known: tuple[str, ...], family: str) -> None:
    """Check the class of the folder's VAE; nothing is loaded.

    Raises:
        BadInput: the family does not decode with that class.
    """
    file = folder / "vae" / "config.json"
    name = str(read_json(file).get("_class_name"))
    if name not in known:
        raise BadInput(f"model.path: {file} names {name!r}, and family {family} takes {' or '.join(known)}")


def vae_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype in which the VAE runs on this device."""
    if config.vae_dtype != "auto":
        return getattr(torch, config.vae_dtype)
    return torch.bfloat16 if _is_fast_in_bfloat16(device) else torch.float32


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Other processors convert every number there and back, which is slower than float32.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _vae_class(folder: Path) -> type:
    import diffusers

    return getattr(diffusers, read_json(folder / "vae" / "config.json")["_class_name"])


def load_vae(folder: Path, config: ModelConfig, device: torch.device) -> nn.Module:
    """The folder's VAE on the device, frozen, in `config.vae_dtype`."""
    vae = _vae_class(folder).from_pretrained(
        folder / "vae", dtype=vae_dtype(config, device), local_files_only=True, use_safetensors=True
    )
    vae = vae.to(device).requires_grad_(False)
    return vae if _is_for_videos(vae) else vae.to(memory_format=torch.channels_last)


def vae_on_meta(folder: Path, config: ModelConfig) -> nn.Module:
    """The folder's VAE without weights, in `config.vae_dtype`."""
    with torch.device("meta"):
        vae = _vae_class(folder).from_config(read_json(folder / "vae" / "config.json"))
    dtype = vae_dtype(config, torch.device("meta"))
    return nn.Module.to(vae, dtype).requires_grad_(False)  # diffusers' own `to` warns of such a cast


def vae_scale(config: dict[str, Any]) -> int:
    """Pixels per latent along each side: one halving between the VAE's resolution levels."""
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


def latent_channels(config: dict[str, Any]) -> int:
    return config.get("latent_channels") or config["z_dim"]


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` or videos `[B, F, 3, H, W]`, float32 in [0, 1].

    Args:
        latents: `[B, C, h, w]` or `[B, C, f, h, w]`, in the scale of the network.
    """
    if not _is_for_videos(vae):
        scaled = _to_vae(latents, vae.config).to(vae.dtype, memory_format=torch.channels_last)
        return _to_unit_range(vae.decode(scaled, return_dict=False)[0]).contiguous()
    frames = latents if latents.ndim == 5 else rearrange(latents, "b c h w -> b c 1 h w")
    videos = vae.decode(_to_vae(frames, vae.config).to(vae.dtype), return_dict=False)[0]
    videos = rearrange(_to_unit_range(videos), "b c f h w -> b f c h w")
    return videos[:, 0] if videos.shape[1] == 1 else videos.contiguous()


def encode(vae: nn.Module, images: Tensor) -> Tensor:
    """Latents in the scale of the network, float32: the mean of the encoder's distribution where it gives one.

    Args:
        images: `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1].

    Returns:
        `[B, C, h, w]` from a VAE of images, `[B, C, f, h, w]` from one of videos.
    """
    pixels = images * 2 - 1
    if _is_for_videos(vae):
        pixels = rearrange(pixels if pixels.ndim == 5 else pixels[:, None], "b f c h w -> b c f h w")
    encoded = vae.encode(pixels.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return _to_network(latents.float(), vae.config)


def _is_for_videos(vae: nn.Module) -> bool:
    return any(parameter.ndim == 5 for parameter in vae.parameters())


def _to_unit_range(pixels: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], float32."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def _to_vae(latents: Tensor, config: Any) -> Tensor:
    """Latents in the scale of the VAE, of latents in the scale of the network."""
    mean, std = _channel_moments(latents, config)
    return latents * std / (config.get("scaling_factor") or 1.0) + mean + (config.get("shift_factor") or 0.0)


def _to_network(latents: Tensor, config: Any) -> Tensor:
    """The inverse of `_to_vae`."""
    mean, std = _channel_moments(latents, config)
    return (latents - mean - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0) / std


def _channel_moments(latents: Tensor, config: Any) -> tuple[Tensor | float, Tensor | float]:
    """Mean and standard deviation per channel, shaped for `latents`; 0 and 1 where the VAE has none."""
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return 0.0, 1.0
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return tuple(torch.tensor(config[name]).view(shape).to(latents) for name in ("latents_mean", "latents_std"))
