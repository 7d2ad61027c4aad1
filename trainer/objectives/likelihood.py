"""The mathematics of likelihood-ratio objectives: ratios of stochastic steps, their losses and weights."""

import math

import torch
from torch import Tensor

from ..diffusion import kernels


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float, plain: bool = False) -> Tensor:
    """The clipped policy-gradient loss, min(rho A, clip(rho, 1 - eps, 1 + eps) A) negated (DanceGRPO eq. 7).

    Args:
        ratio: rho, `[N]`.
        advantages: `[N]`.
        clip_range: eps > 0.
        plain: take the clipped term alone (DPOK, arXiv 2305.16381): outside the range there is no gradient, not even
            one that would lead back.

    Returns:
        `[N]`, to be minimised.
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return -clipped if plain else -torch.minimum(ratio * advantages, clipped)


def beyond_divergence(ratio: Tensor, advantages: Tensor, divergence: Tensor, limit: float) -> Tensor:
    """Which actions Flow-DPPO (arXiv 2606.11025) drops: far from the old policy, and moving on away from it.

    Args:
        ratio, advantages: `[N]`.
        divergence: KL of the step's Gaussian from the old one, `[N]`.
        limit: > 0.

    Returns:
        `[N]` bool.
    """
    away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    return (divergence >= limit) & away


def step_divergence(mean_new: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussian steps of one spread: |mean_new - mean_old|^2 / (2 std^2), the square averaged, `[N]`.

    Args:
        mean_new, mean_old: `[N, ...]`.
        std: of the whole step, sqrt(-dt) included, `[N]`.
    """
    return (mean_new - mean_old).square().flatten(1).mean(1) / (2 * std.square())


def probability_ratio(log_prob_new: Tensor, log_prob_old: Tensor) -> Tensor:
    """rho = exp(log_prob_new - log_prob_old), `[N]`."""
    return torch.exp(log_prob_new - log_prob_old)


def guarded_ratio(
    log_prob_new: Tensor, log_prob_old: Tensor, mean_new: Tensor, mean_old: Tensor, std: Tensor
) -> Tensor:
    """GRPO-Guard's ratio: without the downward drift of the mean log-ratio, and with one spread at every step.

    rho = exp((log_prob_new - log_prob_old + |mean_new - mean_old|^2 / (2 std^2)) std), the square averaged over
    non-batch dimensions (Flow-GRPO's train_sd3_GRPO_Guard; std is that of the whole step, sqrt(-dt) included).

    Args:
        log_prob_new, log_prob_old, std: `[N]`.
        mean_new, mean_old: `[N, ...]`.
    """
    return torch.exp((log_prob_new - log_prob_old + step_divergence(mean_new, mean_old, std)) * std)


def velocity_kl(prediction: Tensor, reference: Tensor) -> Tensor:
    """Distance to the reference's prediction: mean square over non-batch dimensions, `[N]`."""
    return (prediction.float() - reference.float()).square().flatten(1).mean(1)


def flash_weight(kernel: str, sigma: Tensor, sigma_next: Tensor, eta: float) -> Tensor:
    """Flash-GRPO's weight of a step (arXiv 2605.15980): std / |d mean / d prediction|, `[N]` float64.

    The gradient of a step's log-probability is proportional to |d mean / d prediction| / std, which depends on the
    noise level; the weight takes that out. For `flow` it is 1 / (sqrt(-dt)/g + g sqrt(-dt) (1 - sigma) / (2 sigma)).

    Args:
        kernel: name of a stochastic kernel.
        sigma, sigma_next: noise levels before and after the step, `[N]` float64.
        eta: of the kernel.
    """
    step = kernels.named(kernel).coefficients(sigma, sigma_next, torch.full_like(sigma, eta))
    return step.std / step.on_prediction.abs()


def ranks(values: Tensor) -> Tensor:
    """The share of values that each is above, ties counted half: `[N]` in [0, 1)."""
    above = (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
    return above.double() / len(values)


def most_suspicious(trained: Tensor, watching: list[Tensor], share: float) -> Tensor:
    """GARDO's gate (arXiv 2512.24138): the images that the trained reward ranks highest over those that only watch.

    Args:
        trained: `[N]`; only its order counts, here and below. NaN where an image has no score, and it is left out.
        watching: `[N]` of each reward that is not trained on, at least one.
        share: of the images, in (0, 1].

    Returns:
        `[N]` bool, the share (rounded up) of the images with the largest rank by `trained` minus mean rank by others.
    """
    found = torch.zeros(len(trained), dtype=torch.bool)
    known = torch.stack([trained, *watching]).isfinite().all(0).nonzero().flatten()
    if len(known) == 0:
        return found
    doubt = ranks(trained[known]) - torch.stack([ranks(values[known]) for values in watching]).mean(0)
    order = doubt.argsort(descending=True, stable=True)
    found[known[order[: math.ceil(share * len(known) - 1e-9)]]] = True
    return found
