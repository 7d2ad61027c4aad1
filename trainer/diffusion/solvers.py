"""Solvers of the probability-flow ODE: the deterministic steps of a trajectory, and every step of an evaluation.

To add a solver, write a class here and add it to `SOLVERS`.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from .kernels.base import per_row
from .process import Process, column


class Solver(ABC):
    """Takes the deterministic steps of a batch of trajectories, in order of decreasing noise level.

    Args:
        process: the process of the model.
    """

    name: ClassVar[str]

    def __init__(self, process: Process) -> None:
        self.process = process

    @abstractmethod
    def step(self, latents: Tensor, prediction: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """Step from sigma to sigma_next.

        Args:
            latents: `[B, ...]` with any number of dimensions.
            prediction: prediction of the model, shaped as `latents`.
            sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0.

        Returns:
            latents at sigma_next, float32, shaped as `latents`.
        """

    def reset(self) -> None:  # noqa: B027 - a one-step solver has no state
        """Discard the stored previous predictions, after a stochastic step has added noise."""


class Euler(Solver):
    """The first-order step: Euler of the flow ODE for FLOW, DDIM without noise for VP."""

    name = "euler"

    def step(self, latents: Tensor, prediction: Tensor, sigma: float, sigma_next: float) -> Tensor:
        levels = per_row(sigma, latents), per_row(sigma_next, latents)
        on_latents, on_prediction = self.process.euler(*levels)
        latents, prediction = latents.float(), prediction.float()
        return column(on_latents, latents) * latents + column(on_prediction, latents) * prediction


class DPMSolver2M(Solver):
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): second order from one prediction per step.

    With lambda = log(signal / sigma), h = lambda' - lambda and image estimates m (now) and m_last (the step before),

        x' = sigma'/sigma x + signal' (1 - e^-h) [m + h / (2 h_last) (m - m_last)],

    which is `Euler` without the last term. The first step, and a last step to sigma 0, are first-order.
    """

    name = "2m"

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self._euler = Euler(process)
        self.reset()

    def reset(self) -> None:
        self._last: tuple[Tensor, float] | None = None

    def step(self, latents: Tensor, prediction: Tensor, sigma: float, sigma_next: float) -> Tensor:
        first_order = self._euler.step(latents, prediction, sigma, sigma_next)
        image = self.process.image(latents.float(), prediction.float(), sigma)
        last, self._last = self._last, (image, sigma)
        if last is None or sigma_next == 0:
            return first_order
        last_image, last_sigma = last
        half_ratio = self._log_snr_step(sigma, sigma_next) / (2 * self._log_snr_step(last_sigma, sigma))
        weight = self.process.signal(sigma_next) - self.process.signal(sigma) * sigma_next / sigma
        return first_order + weight * half_ratio * (image - last_image)

    def _log_snr_step(self, sigma: float, sigma_next: float) -> float:
        """h, the step in log(signal / sigma); infinite if the signal is 0 at `sigma`."""
        signal, signal_next = self.process.signal(sigma), self.process.signal(sigma_next)
        return math.inf if signal == 0 else math.log(signal_next / sigma_next) - math.log(signal / sigma)


SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (Euler, DPMSolver2M)}


def solver_names() -> list[str]:
    return list(SOLVERS)
