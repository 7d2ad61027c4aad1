"""DanceGRPO's SDE (arXiv 2505.07818): one Euler-Maruyama step, and its exact solution with the image held fixed."""

import torch
from torch import Tensor

from ..process import FLOW
from .base import LARGEST_ETA, Coefficients, Kernel, frozen_image


def dance(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """The reference's flux_step: Euler-Maruyama with diffusion coefficient eta.

    score = -x1 / sigma, so mean = x + v dt + eta^2 / (2 sigma) x1 dt with dt = sigma' - sigma.
    """
    dt = sigma_next - sigma
    pull = eta**2 / (2 * sigma) * dt
    return Coefficients(1 + pull, dt + pull * (1 - sigma), eta * (-dt).sqrt())


def dance_exact(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """The SDE of `dance` solved exactly over the step with x0 held fixed."""
    rate = torch.where(eta > 0, eta**2 / 2 * (1 / sigma_next - 1 / sigma), torch.zeros_like(sigma))
    return frozen_image(sigma, sigma_next, torch.exp(-rate))


DANCE = Kernel(
    name="dance",
    process=FLOW,
    coefficients=dance,
    default_eta=0.3,
    largest_eta=LARGEST_ETA,
    mean="x + v (s' - s) + eta²/(2 s) x1 (s' - s)",
    std="eta √(s - s')",
    summary="DanceGRPO's SDE, one Euler-Maruyama step; eta is a diffusion coefficient",
    source="DanceGRPO, arXiv 2505.07818",
)

DANCE_EXACT = Kernel(
    name="dance-exact",
    process=FLOW,
    coefficients=dance_exact,
    default_eta=0.3,
    largest_eta=LARGEST_ETA,
    mean="(1 - s') x0 + s' e^-L x1, L = eta²/2 (1/s' - 1/s)",
    std="s' √(1 - e^-2L)",
    summary="the SDE of `dance` solved exactly over the step with the image estimate held fixed: no excess noise at "
    "any number of steps",
    source="this project",
)
