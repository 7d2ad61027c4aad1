"""Solvers of the deterministic steps of a trajectory."""

from torch import Tensor

from .kernels.base import per_row
from .process import Process, column


class Euler:
    """The first-order step: Euler of the flow ODE for FLOW, DDIM without noise for VP."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def step(self, latents: Tensor, prediction: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The latents at sigma_next.

        Args:
            latents: `[B, ...]` of any rank.
            prediction: of a model of the process, shaped as `latents`.
            sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0.

        Returns:
            float32, shaped as `latents`.
        """
        levels = per_row(sigma, latents), per_row(sigma_next, latents)
        on_latents, on_prediction = self.process.euler(*levels)
        latents, prediction = latents.float(), prediction.float()
        return column(on_latents, latents) * latents + column(on_prediction, latents) * prediction
