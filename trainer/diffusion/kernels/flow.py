"""Flow-GRPO's SDE (arXiv 2505.05470): one Euler-Maruyama step, and its exact solution with the image held fixed."""

import torch
from torch import Tensor

from ..process import FLOW
from .base import LARGEST_ETA, Coefficients, Kernel, frozen_image


def _below_one(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Flow-GRPO's remedy for its infinite coefficient at sigma = 1: the next sigma stands in for it in 1 - sigma."""
    return torch.where(sigma >= 1, sigma_next, sigma)


def flow(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """Equation 9: Euler-Maruyama with diffusion coefficient eta sqrt(sigma / (1 - sigma))."""
    dt = sigma_next - sigma
    g2 = eta**2 * sigma / (1 - _below_one(sigma, sigma_next))
    pull = g2 / (2 * sigma) * dt
    return Coefficients(1 + pull, dt + pull * (1 - sigma), (g2 * -dt).sqrt())


def flow_exact(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """The SDE of `flow` solved exactly over the step with x0 held fixed."""
    odds = sigma / (1 - _below_one(sigma, sigma_next))
    ratio = sigma_next / (1 - sigma_next) / odds
    return frozen_image(sigma, sigma_next, ratio ** (eta**2 / 2))


FLOW_SDE = Kernel(
    name="flow",
    process=FLOW,
    coefficients=flow,
    default_eta=0.7,
    largest_eta=LARGEST_ETA,
    mean="as `dance`, with eta √(s/(1 - s)) for eta",
    std="eta √(s/(1 - s)) √(s - s')",
    summary="Flow-GRPO's SDE, one Euler-Maruyama step; eta is a factor of its diffusion coefficient",
    source="Flow-GRPO, arXiv 2505.05470",
)

FLOW_EXACT = Kernel(
    name="flow-exact",
    process=FLOW,
    coefficients=flow_exact,
    default_eta=0.7,
    largest_eta=LARGEST_ETA,
    mean="as `dance-exact`, with e^-2L = [odds(s')/odds(s)]^(eta²), odds(s) = s/(1 - s)",
    std="s' √(1 - e^-2L)",
    summary="the SDE of `flow` solved exactly over the step with the image estimate held fixed",
    source="this project",
)
