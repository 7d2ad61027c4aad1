"""Reading a diffusers folder: configurations, the VAE, quantised weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config import ModelConfig
from ...utils.errors import BadInput


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file of the folder.

    Raises:
        BadInput: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"model.path: {path} cannot be read as JSON: {error}") from error


def vae_scale(config: dict[str, Any]) -> int:
    """Pixels per latent along each side: one halving between the VAE's resolution levels."""
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)


def vae_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The type the VAE decodes in on this device."""
    if config.vae_dtype != "auto":
        return getattr(torch, config.vae_dtype)
    return torch.bfloat16 if _is_fast_in_bfloat16(device) else torch.float32


def _is_fast_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Other processors convert every number there and back, which is slower than float32.
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def load_vae(folder: Path, config: ModelConfig, device: torch.device) -> nn.Module:
    """The folder's VAE on the device, in `config.vae_dtype`.

    Raises:
        BadInput: its configuration names no autoencoder of diffusers.
    """
    import diffusers

    name = str(read_json(folder / "vae" / "config.json").get("_class_name"))
    vae_class = getattr(diffusers, name, None) if name.startswith("Autoencoder") else None
    if vae_class is None:
        raise BadInput(f"model.path: {folder / 'vae/config.json'} names {name!r}, which is no autoencoder of diffusers")
    dtype = vae_dtype(config, device)
    vae = vae_class.from_pretrained(folder / "vae", dtype=dtype, local_files_only=True, use_safetensors=True)
    return vae.to(device)


def check_weights(config: ModelConfig, folder: Path, component: str) -> None:
    places = [folder / "vae"] if config.network_file else [folder / component, folder / "vae"]
    for place in places:
        if not any(place.glob("*.safetensors")):
            raise BadInput(f"model.path: {place} holds no .safetensors weights")
    if config.network_file is None:
        return
    file = Path(config.network_file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise BadInput(f"model.network_file is {config.network_file!r}: give a .safetensors file that exists")


def check_quantization(config: ModelConfig) -> None:
    if config.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(
            f"model.quantization is {config.quantization!r}: it needs the package bitsandbytes, which is not installed"
        )
    if config.quantization and not torch.cuda.is_available():
        raise BadInput(f"model.quantization is {config.quantization!r}: diffusers quantises on a GPU, and none is seen")


def quantization(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Arguments with which diffusers loads a network in 8 or 4 bits; none for a plain one."""
    if config.quantization is None:
        return {}
    from diffusers import BitsAndBytesConfig

    kinds = {
        "int8": {"load_in_8bit": True},
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": getattr(torch, config.dtype),
        },
    }
    return {"quantization_config": BitsAndBytesConfig(**kinds[config.quantization]), "device_map": {"": device}}
