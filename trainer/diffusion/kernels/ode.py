"""The deterministic Euler step of the flow ODE."""

import torch
from torch import Tensor

from ..process import FLOW
from .base import Coefficients, Kernel


def ode(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """x + v dt; eta is ignored."""
    return Coefficients(*FLOW.euler(sigma, sigma_next), torch.zeros_like(sigma))


ODE = Kernel(
    name="ode",
    process=FLOW,
    coefficients=ode,
    default_eta=0.0,
    largest_eta=0.0,
    mean="x + v (s' - s)",
    std="0",
    summary="deterministic Euler step, for evaluation and for all steps outside a stochastic window",
)
