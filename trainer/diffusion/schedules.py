"""Noise levels, and which steps of a trajectory are stochastic and which are trained."""

import random
from dataclasses import dataclass

from ..utils.errors import BadInput


def sigma_schedule(steps: int, shift: float = 1.0) -> list[float]:
    """Evenly spaced noise levels from 1 to 0 with a timestep shift (SD3, arXiv 2403.03206, eq. 23).

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
    """A window of consecutive steps, the only ones that are stochastic and trained (MixGRPO)."""

    size: int
    position: str = "random"
    start: int = 0
    every: int = 25

    def begin(self, allowed: range, iteration: int, rng: random.Random) -> int:
        """First step of the window in this iteration.

        `fixed` stays at `start`; `random` and `per-prompt` are anywhere; `moving` starts at `start` and moves on by one
        step every `every` iterations, back to `start` after the last position.

        Args:
            allowed: the steps that can be inside.

        Raises:
            BadInput: the window does not fit them.
        """
        start = self.start if self.position == "fixed" else max(self.start, allowed.start)
        positions = allowed.stop - self.size - start + 1
        if positions < 1 or start < allowed.start:
            raise BadInput(
                f"rollout.window of {self.size} steps from step {self.start} does not fit: the steps that can be "
                f"stochastic and are trained are {allowed.start} to {allowed.stop - 1}; change its size or its start"
            )
        if self.position == "fixed":
            return start
        if self.position == "moving":
            return start + (iteration // self.every) % positions
        return start + rng.randrange(positions)


def stochastic_steps(
    steps: int, window: Window | None, iteration: int, rng: random.Random, allowed: range | None = None
) -> list[bool]:
    """Which steps add noise: those of the window, or without one all that are allowed.

    Args:
        allowed: the steps that can add noise; None for all but the last.
    """
    allowed = range(steps - 1) if allowed is None else allowed
    begin = allowed.start if window is None else window.begin(allowed, iteration, rng)
    end = allowed.stop if window is None else begin + window.size
    return [begin <= i < end for i in range(steps)]


def trained_steps(stochastic: list[bool], mode: str, fraction: float, rng: random.Random) -> list[int]:
    """Which stochastic steps of one trajectory are trained, ascending.

    Args:
        mode: `random` selects a random fraction (60% in the paper), `first` the first fraction, `all` all steps.
        fraction: 0 < fraction <= 1. The number of steps is rounded down, as in the paper's code, and at least 1.
    """
    candidates = [i for i, flag in enumerate(stochastic) if flag]
    count = max(1, int(len(candidates) * fraction))
    if mode == "random":
        return sorted(rng.sample(candidates, count))
    return candidates[:count] if mode == "first" else candidates
