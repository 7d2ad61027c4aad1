"""Estimate of the memory that an iteration's latents and images need, before anything is loaded."""

import math

from ..config import RunConfig
from ..utils.errors import BadInput

FLOAT32 = 4


def iteration_bytes(config: RunConfig, processes: int, latent_numbers: int) -> int:
    """Bytes that one process needs between rollout and update: latents of the stochastic steps, and decoded images.

    The model, its activations and the rewards are not included.

    Args:
        processes: number of processes that share the images of an iteration.
        latent_numbers: number of elements of one image's latents (`models.latent_numbers`).
    """
    rollout, model = config.rollout, config.model
    images = math.ceil(rollout.prompts_per_iteration * rollout.group_size / processes)
    pixels = 3 * model.height * model.width * model.frames
    stochastic = rollout.window.size if rollout.window else rollout.steps - 1
    return images * FLOAT32 * (pixels + latent_numbers * (2 * stochastic + 1))


def check_iteration(config: RunConfig, processes: int) -> None:
    """A first check, without looking at the model.

    Raises:
        BadInput: an iteration's images alone do not fit into this machine's memory.
    """
    need, total = iteration_bytes(config, processes, 0), memory_bytes(config.runtime.device, processes)
    if need > total:
        rollout = config.rollout
        raise BadInput(
            f"rollout.prompts_per_iteration {rollout.prompts_per_iteration} x rollout.group_size {rollout.group_size} "
            f"images of {config.model.width} x {config.model.height} need {need / 2**30:,.1f} GiB per process, but it "
            f"has {total / 2**30:,.1f} GiB: lower one of these settings, or use more processes"
        )


def check_memory(
    config: RunConfig, processes: int, latent_numbers: int, weights: int, decode: int, rewards: int
) -> None:
    """
    Args:
        latent_numbers: number of elements of one image's latents.
        weights: bytes of the network and the VAE on the device of a process; 0 where others find room for them.
        decode, rewards: bytes of decoding at its peak and of the reward models, which take turns.

    Raises:
        BadInput: they cannot fit the memory of this machine together with an iteration's images and latents.
    """
    held = iteration_bytes(config, processes, latent_numbers)
    total = memory_bytes(config.runtime.device, processes)
    if held + weights + max(decode, rewards) <= total:
        return
    gib = [f"{size / 2**30:,.1f} GiB" for size in (held, weights, decode, rewards, total)]
    raise BadInput(
        f"a process holds {gib[0]} of images and latents, {gib[1]} of weights, and while it decodes {gib[2]} or while "
        f"it scores {gib[3]} more, and it has {gib[4]}: lower rollout.group_size or model.decode_batch_size, or choose "
        "bfloat16 or smaller rewards"
    )


def memory_bytes(device: str, processes: int) -> int:
    """Total memory in bytes that one process can use: of its GPU, or its share of the RAM."""
    import psutil
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total // processes
