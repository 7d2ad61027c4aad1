"""Core's networks and VAEs in their released sizes: descriptions, weightless ones, and ones with random weights.

What the tests describe too is in tests/core_networks.py. Nothing here imports ComfyUI before `use_comfyui`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from core_networks import FLUX, HUNYUAN, SD15, SDXL, WAN_1_3B, WAN_14B, Z_IMAGE_BASE
from core_networks import SDXL_DIFFUSERS as SDXL_DIFFUSERS
from core_networks import core_model as core_model


@dataclass(frozen=True)
class Network:
    """A released model.

    Attributes:
        core: ComfyUI's class.
        config: of the network, as ComfyUI reads it from the released file.
        text: tokens and width of the token embeddings, and width of the pooled vector.
        guided: whether it needs a negative prompt, so that two predictions are kept at once.
        frames: of a video.
        vae: its VAE, as `core_vae` names it.
        masked: whether the text's mask is asked for.
        multiple: height and width are taken as the next multiple of this.
        encoders: number of weights of the released text encoders, which a server loads to encode the prompts.
    """

    core: str
    config: dict
    text: tuple[int, int, int | None]
    guided: bool = False
    frames: int = 1
    vae: str = "kl"
    masked: bool = False
    multiple: int = 16
    encoders: float = 0.0


Z_IMAGE = Z_IMAGE_BASE | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
LTXV = {
    "image_model": "ltxv",
    "num_layers": 28,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "caption_channels": 4096,
}
NETWORKS = {
    "SD 1.5": Network("SD15", SD15, (77, 768, None), guided=True, encoders=0.123e9),
    "SDXL": Network("SDXL", SDXL, (77, 2048, 1280), guided=True, encoders=0.818e9),
    "Z-Image": Network("ZImage", Z_IMAGE, (100, 2560, None), vae="kl-16", encoders=4.02e9),
    "FLUX.1-dev": Network("Flux", FLUX, (512, 4096, 768), vae="kl-16", encoders=4.89e9),
    "Qwen-Image": Network(
        "QwenImage",
        {"image_model": "qwen_image", "num_layers": 60},
        (100, 3584, None),
        guided=True,
        vae="wan",
        encoders=8.29e9,
    ),
    "Wan 2.1 1.3B": Network(
        "WAN21_T2V",
        WAN_1_3B,
        (512, 4096, None),
        guided=True,
        frames=33,
        vae="wan",
        encoders=5.68e9,
    ),
    "Wan 2.1 14B": Network(
        "WAN21_T2V",
        WAN_14B,
        (512, 4096, None),
        guided=True,
        frames=33,
        vae="wan",
        encoders=5.68e9,
    ),
    "HunyuanVideo": Network("HunyuanVideo", HUNYUAN, (256, 4096, 768), frames=33, vae="hunyuan", encoders=8.15e9),
    "LTX-Video 2B": Network(
        "LTXV", LTXV, (128, 4096, None), guided=True, frames=33, vae="ltx", masked=True, multiple=32, encoders=4.76e9
    ),
}
KL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def use_comfyui(folder: Path, device: torch.device) -> None:
    """Import ComfyUI from its folder, for this device."""
    from trainer.models.comfy.model import import_comfy

    import_comfy(str(folder.expanduser().resolve()), device)


def core_vae(kind: str) -> nn.Module:
    """Core's autoencoder in its released size, without weights.

    Args:
        kind: what `Network.vae` says.
    """
    from comfy.ldm.lightricks.vae import causal_video_autoencoder
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.wan.vae import WanVAE

    makers = {
        "kl": lambda: AutoencoderKL(ddconfig=KL, embed_dim=4),
        "kl-16": lambda: AutoencoderKL(ddconfig=KL | {"z_channels": 16}, embed_dim=16),
        "wan": lambda: WanVAE(dim=96, z_dim=16, temperal_downsample=[False, True, True]),
        "hunyuan": lambda: AutoencoderKL(
            ddconfig=KL | {"z_channels": 16, "conv3d": True, "time_compress": 4}, embed_dim=16
        ),
        "ltx": lambda: causal_video_autoencoder.VideoVAE(version=0),
    }
    with torch.device("meta"):
        return makers[kind]().eval()


def entry(network: Network, tokens: int | None = None) -> dict:
    """Conditioning of zeros for one prompt, as core's nodes hand it over."""
    long, width, pooled = network.text
    tokens = tokens or long
    found: dict[str, Tensor] = {"cross_attn": torch.zeros(1, tokens, width)}
    if pooled is not None:
        found["pooled_output"] = torch.zeros(1, pooled)
    if network.masked:
        found["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return found


@torch.no_grad()
def fill(weights: Any, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Random values: scales of norms near 1, small biases, and matrices that keep the size of what they are given.

    Args:
        weights: pairs of a name and a tensor, which may be anywhere and of any floating type.
        device: where the random numbers are made.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for name, value in weights:
        if not value.is_floating_point():
            continue
        mean, spread = random_like(name, value)
        value.copy_(mean + spread * torch.randn(value.shape, generator=generator, device=device))


def random_like(name: str, value: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the random values of a weight."""
    spread = 0.02 if value.ndim < 2 or "embedding" in name else 0.7 / max(1.0, value[0].numel()) ** 0.5
    is_scale = value.ndim == 1 and name.endswith(("weight", "scale")) or "gamma" in name
    return 1.0 if is_scale else 0.0, spread


FOLDER_KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
FOLDER_KL_16 = FOLDER_KL | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
FOLDER_WAN_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
"""Settings of diffusers' classes for released models, where they are not the defaults."""
