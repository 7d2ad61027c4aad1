"""One frozen network divided over all processes (FSDP2), gathered block by block as it is called."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folders import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""Name of a network's file in a diffusers folder; with `.index.json`, of the list of its several files."""


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Leave each process its part of every frozen weight, on its device.

    The blocks (the members of the network's own lists) are gathered one at a time, in forward and in backward
    passes, and let go of again; what lies outside them is gathered for the whole pass. Modules that are added later,
    such as a LoRA, stay whole in every process. From here on all processes must call the network equally often, and
    in the same order, because each call waits for all.

    Args:
        network: frozen, whole on the CPU or on the meta device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)


def load_sharded(network_class: str, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module | None:
    """A frozen network of which each process reads its own part, and no other.

    Args:
        network_class: its name in diffusers.
        folder: with the network's configuration and weights.

    Returns:
        the network as `shard` returns it; None where the files have other names than the network, which diffusers'
        own loading translates.
    """
    import diffusers

    kind = getattr(diffusers, network_class)
    network = _without_weights(kind, read_json(folder / "config.json"), dtype)
    files = _files(folder)
    if not set(network.state_dict()) <= set(files):
        return None
    network = shard(network.requires_grad_(False).eval(), device)
    wide = set(kind._keep_in_fp32_modules or ())
    parts = {}
    for name, value in network.state_dict().items():
        kept = torch.float32 if wide & set(name.split(".")) else dtype
        parts[name] = _part(files[name], name, value, kept, device)
    network.load_state_dict(parts, assign=True)
    return network


def _without_weights(network_class: type, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The network with its parameters on the meta device and its buffers computed, as diffusers' loading begins."""
    import accelerate

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with accelerate.init_empty_weights():
            return network_class.from_config(config)
    finally:
        torch.set_default_dtype(before)


def _files(folder: Path) -> Mapping[str, Path]:
    """The file of each weight, by the weight's name; empty where diffusers would look for other files."""
    from safetensors import safe_open

    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, framework="pt") as content:
            return dict.fromkeys(content.keys(), folder / WEIGHTS)
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    return {}


def _part(file: Path, name: str, empty: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This process's part of a weight, or the whole of one that is not divided.

    The file is opened for each weight, because the pages of what has been read stay in memory until it is closed.

    Args:
        empty: of the network: divided along its first dimension, in as many parts as there are processes.
    """
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    with safe_open(file, framework="pt") as content:
        whole = content.get_slice(name)
        if not isinstance(empty, DTensor):
            return whole[:].to(empty.device, dtype, copy=True) if whole.get_shape() else content.get_tensor(name)
        rows = -(-len(empty) // empty.device_mesh.size())
        first = min(len(empty), rows * empty.device_mesh.get_local_rank())
        local = whole[first : min(len(empty), first + rows)].to(device, dtype, copy=True)
    return DTensor.from_local(
        local, empty.device_mesh, empty.placements, run_check=False, shape=empty.shape, stride=empty.stride()
    )


def local_bytes(network: nn.Module) -> int:
    """Memory that this process keeps for the network's weights between calls."""
    from torch.distributed.tensor import DTensor

    parts = [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)
