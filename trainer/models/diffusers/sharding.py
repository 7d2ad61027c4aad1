"""One frozen network divided over all processes (FSDP2), gathered block by block as it is called."""

import torch
from torch import nn


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Leave each process its part of every frozen weight, on its device.

    The blocks (the members of the network's own lists) are gathered one at a time, in forward and in backward
    passes, and let go of again; what lies outside them is gathered for the whole pass. Modules that are added later,
    such as a LoRA, stay whole in every process. From here on all processes must call the network equally often, and
    in the same order, because each call waits for all.

    Args:
        network: frozen, whole, on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(network, mesh=mesh, reshard_after_forward=True)


def local_bytes(network: nn.Module) -> int:
    """Memory that this process keeps for the network's weights between calls."""
    from torch.distributed.tensor import DTensor

    parts = [p.to_local() if isinstance(p, DTensor) else p for p in network.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)
