"""Random numbers that depend on what they are for, never on what ran before.

Every draw is named by the run's seed and its key (iteration, prompt, member). So a resumed run, another split over
processes or another batch size gives the same numbers, and no random state needs to be saved.
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
    """Standard normal float32 on the CPU, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive(seed, *key)))


def prompt_indices(count: int, per_iteration: int, iteration: int, seed: int) -> list[int]:
    """Which prompts an iteration uses: all come once, in random order, before any comes again."""
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
