"""Memory of a model's weights, known before they are loaded."""

import math
from pathlib import Path

from ..config import ModelConfig
from ..shapes import WEIGHTS
from .diffusers.single_file import PREFIX

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 4.0, "int8": 1.0, "nf4": 0.5}
"""Bytes per weight; "auto" is float32 at most."""


def weight_bytes(config: ModelConfig, processes: int = 1) -> int:
    """Bytes that the network and the VAE take in each process; 0 for folders without safetensors files.

    Args:
        processes: of the run; they share a sharded network.
    """
    if config.graph is not None:
        files = {config.graph.file, config.graph.vae_file}
        return sum(Path(file).stat().st_size for file in files)
    folder = WEIGHTS if config.path == "embedded" else Path(config.path)
    if config.network_file is None:
        network = sum(parameter_count(folder / name) for name in ("transformer", "unet"))
    else:
        sizes = _sizes(Path(config.network_file))
        network = sum(size for name, size in sizes.items() if name.startswith(PREFIX)) or sum(sizes.values())
    network *= BYTES[config.quantization or config.dtype] / (processes if config.sharded else 1)
    return int(network + parameter_count(folder / "vae") * BYTES[config.vae_dtype])


def parameter_count(component: Path) -> int:
    """Number of weights in the `.safetensors` files of a folder, read from their headers; 0 where there are none.

    A folder that holds the weights twice (a `fp16` variant beside them) is counted once.
    """
    sizes: dict[str, int] = {}
    for file in sorted(component.glob("*.safetensors")):
        sizes.update(_sizes(file))
    return sum(sizes.values())


def _sizes(file: Path) -> dict[str, int]:
    """Number of elements per tensor name; empty where it is not a safetensors file, which loading reports."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {name: math.prod(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return {}
