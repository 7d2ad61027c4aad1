"""Random numbers that depend only on the run's seed and a key, not on earlier draws.

The key says what the numbers are for (purpose, iteration, prompt, group member). A resumed run, another number of
processes and another batch size therefore give the same numbers, and no generator state needs to be saved.
"""

import functools
import hashlib
import random

import torch
from torch import Tensor


def derive(seed: int, *key: object) -> int:
    """A 63-bit seed for a key."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: object) -> random.Random:
    return random.Random(derive(seed, *key))


def noise(shape: tuple[int, ...], seed: int, *key: object) -> Tensor:
    """Standard normal noise, float32 on the CPU, equal on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive(seed, *key)))


def prompt_indices(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Indices of an iteration's prompts: all prompts are used once, in random order, before any is repeated."""
    chosen = []
    for position in range(iteration * per_iteration, (iteration + 1) * per_iteration):
        epoch, index = divmod(position, count)
        chosen.append(_epoch_order(count, seed, epoch)[index])
    return chosen


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    generator(seed, "prompts", epoch).shuffle(order)
    return order
