"""DDIM with eta (arXiv 2010.02502), the SDE of models that predict noise."""

from torch import Tensor

from ..process import VP, VP_V
from .base import Coefficients, Kernel


def ddim(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """Equations 12 and 16, with alpha_bar = 1 - sigma^2."""
    alpha_bar, alpha_bar_next = 1 - sigma**2, 1 - sigma_next**2
    std = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    scale = (alpha_bar_next / alpha_bar).sqrt()
    direction = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt()
    return Coefficients(scale, direction - scale * (1 - alpha_bar).sqrt(), std)


def ddim_of_v(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> Coefficients:
    """The same for a prediction of v, and from a level without signal as well: sigma 1 is allowed."""
    alpha_bar, alpha_bar_next = 1 - sigma**2, 1 - sigma_next**2
    std = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    signal, signal_next = alpha_bar.sqrt(), alpha_bar_next.sqrt()
    direction = (sigma_next**2 - std**2).clamp(min=0).sqrt()
    return Coefficients(signal_next * signal + direction * sigma, direction * signal - signal_next * sigma, std)


DDIM = Kernel(
    name="ddim",
    process=VP,
    coefficients=ddim,
    also={VP_V: ddim_of_v},
    default_eta=1.0,
    largest_eta=1.0,
    mean="√a' x0 + √(1 - a' - std²) x1",
    std="eta √((1 - a')/(1 - a) (1 - a/a'))",
    summary="DDIM with eta, for epsilon and v-prediction models; eta from 0 (deterministic) to 1 (DDPM)",
    source="DDIM, arXiv 2010.02502",
)
