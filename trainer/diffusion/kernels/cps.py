"""Coefficient-preserving sampling (FlowCPS, arXiv 2509.05952)."""

import math

import torch
from torch import Tensor

from ..process import FLOW
from .base import Coefficients, Kernel, frozen_image


def cps(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """Part of the noise is replaced by new noise; at eta 1 all of it, and beyond 1 less again."""
    return frozen_image(sigma, sigma_next, torch.cos(eta * math.pi / 2).abs())


CPS = Kernel(
    name="cps",
    process=FLOW,
    coefficients=cps,
    default_eta=0.8,
    largest_eta=1.0,
    mean="(1 - s') x0 + s' cos(eta π/2) x1",
    std="s' sin(eta π/2)",
    summary="coefficient-preserving sampling; eta from 0 (deterministic) to 1 (all noise fresh)",
    source="FlowCPS, arXiv 2509.05952",
)
