"""The network from one file, in diffusers' names or in the released ones, which ComfyUI's users have."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...utils.errors import BadInput

PREFIX = "model.diffusion_model."
"""Before the network's names in whole checkpoints and in some files of the network alone."""
_SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")


def network_weights(file: Path) -> dict[str, Tensor]:
    """The network's weights by name, without a prefix; the rest of a whole checkpoint is left out.

    Raises:
        BadInput: it is not a safetensors file, or its weights are quantised.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = list(content.keys())
            if any(name.endswith(_SCALES) for name in names):
                raise BadInput(f"model.network_file {str(file)!r} holds scaled 8-bit weights: give 16 or 32 bits")
            chosen = [name for name in names if name.startswith(PREFIX)] or names
            return {name.removeprefix(PREFIX): content.get_tensor(name) for name in chosen}
    except SafetensorError as error:
        raise BadInput(f"model.network_file {str(file)!r} is not a safetensors file: {error}") from error


def input_channels_of(file: Path, layers: tuple[str, ...]) -> int | None:
    """Input channels of the network in a file, read from its header; None where it is not recognised.

    Args:
        layers: names that the weight of its first layer may have.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            names = set(content.keys())
            found = [name for layer in layers for name in (PREFIX + layer, layer) if name in names]
            return content.get_slice(found[0]).get_shape()[1] if found else None
    except (OSError, SafetensorError, IndexError):  # loading reports it
        return None


def load_network(
    file: Path, network_class: type, folder: Path, component: str, dtype: torch.dtype, extra: dict[str, Any]
) -> nn.Module:
    """The network with the configuration of the folder's component; nothing is looked up elsewhere.

    Args:
        extra: arguments of quantised loading.

    Raises:
        BadInput: the file holds another network.
    """
    weights = network_weights(file)
    if "input_blocks.0.0.weight" in weights:  # diffusers knows a UNet's released names by the prefix
        weights = {PREFIX + name: value for name, value in weights.items()}
    wrong = f"model.network_file {str(file)!r} is no {network_class.__name__} as {folder / component} describes it"
    try:
        network = network_class.from_single_file(
            weights, config=str(folder), subfolder=component, dtype=dtype, local_files_only=True, **extra
        )
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise BadInput(f"{wrong}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    missing = [name for name, parameter in network.named_parameters() if parameter.is_meta]
    if missing:
        raise BadInput(f"{wrong}: {len(missing)} weights are missing, such as {missing[0]!r}")
    return network
