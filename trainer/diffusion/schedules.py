"""Noise levels, and which steps of a trajectory are stochastic and which are trained."""

import random
from dataclasses import dataclass


def sigma_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """Evenly spaced noise levels from 1 to 0, shifted towards noise (SD3, arXiv 2403.03206, eq. 23).

    Args:
        steps: number of steps, >= 1.
        shift: > 0; above 1 spends more steps at high noise.

    Returns:
        steps + 1 floats, the first 1.0 and the last 0.0.
    """
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


@dataclass(frozen=True)
class Window:
    """A run of stochastic steps [start, start + size): the only ones that are stochastic and trained (MixGRPO)."""

    size: int
    position: str = "random"
    start: int = 0
    every: int = 25

    def begin(self, steps: int, iteration: int, rng: random.Random) -> int:
        """First step of the window in this iteration.

        `fixed` stays at `start`; `random` is anywhere; `moving` starts at `start` and moves on by one step every
        `every` iterations, back to `start` after the last position. The last step of the schedule is never inside.
        """
        positions = steps - 1 - self.size - self.start + 1
        if self.position == "fixed":
            return self.start
        if self.position == "moving":
            return self.start + (iteration // self.every) % positions
        return self.start + rng.randrange(positions)


def stochastic_steps(steps: int, window: Window | None, iteration: int, rng: random.Random) -> list[bool]:
    """Which steps add noise: all but the last, or those of the window."""
    if window is None:
        return [True] * (steps - 1) + [False]
    begin = window.begin(steps, iteration, rng)
    return [begin <= i < begin + window.size for i in range(steps)]


def trained_steps(stochastic: list[bool], mode: str, fraction: float, rng: random.Random) -> list[int]:
    """Which stochastic steps of one trajectory are trained, ascending.

    Args:
        mode: `random` takes a random share (the paper's 60%), `first` the first share of them, `all` every one.
        fraction: the share, 0 < fraction <= 1; at least one step is taken, fractions round down as the paper's code.
    """
    candidates = [i for i, flag in enumerate(stochastic) if flag]
    count = max(1, int(len(candidates) * fraction))
    if mode == "random":
        return sorted(rng.sample(candidates, count))
    return candidates[:count] if mode == "first" else candidates
