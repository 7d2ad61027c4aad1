"""Transition kernels: one denoising step as a stochastic action, with its log-probability.

Sampling and training call the same functions: given `noise` a step is taken, given `next_sample` the stored step is
scored again. All arithmetic is float32 (coefficients float64), because clip ranges of 1e-4 mean nothing below that.

Notation: sigma runs from 1 (noise) to 0 (image); x0 = x - sigma v is the image estimate, x1 = x + (1 - sigma) v the
noise estimate, dt = sigma_next - sigma < 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Level = float | Tensor


@dataclass(frozen=True)
class Step:
    """One transition.

    Attributes:
        next_sample: `[B, ...]` float32.
        mean: mean of the Gaussian it was drawn from, `[B, ...]` float32.
        std: its standard deviation, `[B]` float32; 0 for a deterministic step.
        log_prob: mean over all non-batch dimensions of the log-density of `next_sample`, `[B]` float32; 0 for a
            deterministic step, which is no action.
    """

    next_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


@dataclass(frozen=True)
class _Coefficients:
    """mean = on_sample * sample + on_prediction * prediction; all float64 `[B]`."""

    on_sample: Tensor
    on_prediction: Tensor
    std: Tensor


def log_prob(next_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density, averaged over all non-batch dimensions (the mean is what gives clip ranges their scale).

    Args:
        next_sample, mean: `[B, ...]` float32.
        std: `[B]` float32, 0 for deterministic steps.

    Returns:
        `[B]` float32; exactly 0 where std is 0.
    """
    safe = torch.where(std > 0, std, torch.ones_like(std))
    squared = ((next_sample - mean) / _like(safe, mean)).square().reshape(len(mean), -1).mean(1)
    density = -0.5 * squared - safe.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(std > 0, density, torch.zeros_like(density))


# ------------------------------------------------------------------------------------------------------ flow kernels


def _dance(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """DanceGRPO (arXiv 2505.07818, the reference's flux_step): Euler-Maruyama with diffusion coefficient eta.

    score = -x1 / sigma, so mean = x + v dt + eta^2 / (2 sigma) x1 dt.
    """
    dt = sigma_next - sigma
    pull = eta**2 / (2 * sigma) * dt
    return _Coefficients(1 + pull, dt + pull * (1 - sigma), eta * (-dt).sqrt())


def _frozen_image(sigma: Tensor, sigma_next: Tensor, keep: Tensor) -> _Coefficients:
    """x' = (1 - sigma') x0 + sigma' (keep x1 + sqrt(1 - keep^2) z): x0 frozen, x1 an Ornstein-Uhlenbeck process."""
    image, noise = 1 - sigma_next, sigma_next * keep
    std = sigma_next * (1 - keep**2).clamp(min=0).sqrt()
    return _Coefficients(image + noise, noise * (1 - sigma) - image * sigma, std)


def _dance_exact(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """The SDE of `dance` solved exactly over the step with x0 frozen."""
    rate = torch.where(eta > 0, eta**2 / 2 * (1 / sigma_next - 1 / sigma), torch.zeros_like(sigma))
    return _frozen_image(sigma, sigma_next, torch.exp(-rate))


def _below_one(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Flow-GRPO's remedy for its infinite coefficient at sigma = 1: the next sigma stands in for it in 1 - sigma."""
    return torch.where(sigma >= 1, sigma_next, sigma)


def _flow(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """Flow-GRPO (arXiv 2505.05470, eq. 9): Euler-Maruyama with coefficient eta sqrt(sigma / (1 - sigma))."""
    dt = sigma_next - sigma
    g2 = eta**2 * sigma / (1 - _below_one(sigma, sigma_next))
    pull = g2 / (2 * sigma) * dt
    return _Coefficients(1 + pull, dt + pull * (1 - sigma), (g2 * -dt).sqrt())


def _flow_exact(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """The SDE of `flow` solved exactly over the step with x0 frozen."""
    odds = sigma / (1 - _below_one(sigma, sigma_next))
    ratio = sigma_next / (1 - sigma_next) / odds
    return _frozen_image(sigma, sigma_next, ratio ** (eta**2 / 2))


def _cps(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """Coefficient-preserving sampling (FlowCPS, arXiv 2509.05952); eta in [0, 2), 1 renoises fully."""
    return _frozen_image(sigma, sigma_next, torch.cos(eta * math.pi / 2).abs())


def _ode(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """The deterministic Euler step."""
    return _Coefficients(torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma))


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], _Coefficients]] = {
    "dance": _dance,
    "dance-exact": _dance_exact,
    "flow": _flow,
    "flow-exact": _flow_exact,
    "cps": _cps,
    "ode": _ode,
}


# ------------------------------------------------------------------------------------------------- diffusion kernels


def _preserving(alpha_bar: Tensor, alpha_bar_next: Tensor, eta: Tensor) -> _Coefficients:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); the prediction is the noise."""
    std = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    scale = (alpha_bar_next / alpha_bar).sqrt()
    direction = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt()
    return _Coefficients(scale, direction - scale * (1 - alpha_bar).sqrt(), std)


def _ddim(sigma: Tensor, sigma_next: Tensor, eta: Tensor) -> _Coefficients:
    """DDIM between noise levels sigma = sqrt(1 - alpha_bar)."""
    return _preserving(1 - sigma**2, 1 - sigma_next**2, eta)


DIFFUSION_KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], _Coefficients]] = {"ddim": _ddim}
"""Kernels of models that predict noise: x = sqrt(1 - sigma^2) x0 + sigma noise."""


# ------------------------------------------------------------------------------------------------------------- steps


def step(
    kernel: str,
    sample: Tensor,
    velocity: Tensor,
    sigma: Level,
    sigma_next: Level,
    eta: Level,
    *,
    noise: Tensor | None = None,
    next_sample: Tensor | None = None,
) -> Step:
    """One step of a rectified-flow model, or with a kernel of `DIFFUSION_KERNELS` of a diffusion model.

    Args:
        kernel: a name of `KERNELS` or `DIFFUSION_KERNELS`.
        sample: latents `[B, ...]` of any rank.
        velocity: the model's prediction, shaped as `sample`: noise minus image, or for a diffusion kernel the noise.
        sigma, sigma_next: noise levels, 1 >= sigma > sigma_next >= 0; floats or `[B]`.
        eta: strength of the kernel's noise, >= 0 (a diffusion coefficient in `dance`, not the [0, 1] eta of
            ancestral samplers); float or `[B]`.
        noise: standard normal, shaped as `sample`, to take the step.
        next_sample: a stored outcome, to score it.

    Raises:
        ValueError: unknown kernel, or not exactly one of `noise` and `next_sample` (neither is needed for `ode`, or
            for `ddim` with eta 0).
    """
    kernels = KERNELS | DIFFUSION_KERNELS
    if kernel not in kernels:
        raise ValueError(f"kernel {kernel!r} is unknown; choose one of {', '.join(kernels)}")
    levels = [_level(value, sample) for value in (sigma, sigma_next, eta)]
    deterministic = kernel == "ode" or (kernel in DIFFUSION_KERNELS and _is_zero(eta))
    return _transition(sample, velocity, kernels[kernel](*levels), noise, next_sample, deterministic)


def ddim_step(
    sample: Tensor,
    epsilon: Tensor,
    alpha_bar: Level,
    alpha_bar_next: Level,
    eta: Level,
    *,
    noise: Tensor | None = None,
    next_sample: Tensor | None = None,
) -> Step:
    """One step of a diffusion model: DDIM with eta (arXiv 2010.02502, eq. 12 and 16), the paper's VP SDE.

    Args:
        sample: `[B, ...]`.
        epsilon: the noise estimate, shaped as `sample` (from v-prediction: sqrt(abar) v + sqrt(1 - abar) x).
        alpha_bar, alpha_bar_next: cumulative signal levels, 0 < alpha_bar < alpha_bar_next <= 1; floats or `[B]`.
        eta: 0 (deterministic) to 1 (DDPM); float or `[B]`.
        noise, next_sample: as for `step`; neither is needed where eta is 0.
    """
    a, a_next, eta_ = (_level(value, sample) for value in (alpha_bar, alpha_bar_next, eta))
    deterministic = _is_zero(eta)
    return _transition(sample, epsilon, _preserving(a, a_next, eta_), noise, next_sample, deterministic)


# ------------------------------------------------------------------------------------------------------------ shared


def _level(value: Level, sample: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(sample.device, torch.float64).expand(sample.shape[0])
    return torch.full((sample.shape[0],), value, dtype=torch.float64, device=sample.device)


def _is_zero(eta: Level) -> bool:
    return bool((eta == 0).all()) if isinstance(eta, Tensor) else eta == 0


def _like(value: Tensor, sample: Tensor) -> Tensor:
    return value.float().reshape(-1, *[1] * (sample.ndim - 1))


def _transition(
    sample: Tensor,
    prediction: Tensor,
    coefficients: _Coefficients,
    noise: Tensor | None,
    next_sample: Tensor | None,
    deterministic: bool,
) -> Step:
    if (noise is not None and next_sample is not None) or (noise is next_sample and not deterministic):
        raise ValueError("give exactly one of noise (to take a step) and next_sample (to score one)")
    sample, prediction = sample.float(), prediction.float()
    mean = _like(coefficients.on_sample, sample) * sample + _like(coefficients.on_prediction, sample) * prediction
    std = coefficients.std.float()
    if next_sample is None:
        next_sample = mean if noise is None else mean + _like(std, sample) * noise.float()
    return Step(next_sample.float(), mean, std, log_prob(next_sample.float(), mean, std))
