"""Reading a diffusers folder: configurations, quantised weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

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


def check_weights(config: ModelConfig, folder: Path, component: str) -> None:
    needed = [folder / "vae"] if config.network_file else [folder / component, folder / "vae"]
    for part in needed:
        if not any(part.glob("*.safetensors")):
            raise BadInput(f"model.path: {part} holds no .safetensors weights")
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
        raise BadInput(f"model.quantization is {config.quantization!r}: it needs a GPU, and none was found")


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
