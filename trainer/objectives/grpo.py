"""Losses of the update: pure functions of log-probabilities, advantages and velocities."""

import torch
from torch import Tensor


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped policy-gradient loss, min(rho A, clip(rho, 1 - eps, 1 + eps) A) negated (DanceGRPO eq. 7).

    Args:
        ratio: rho, `[N]`.
        advantages: `[N]`.
        clip_range: eps > 0.

    Returns:
        `[N]`, to be minimised.
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def probability_ratio(log_prob_new: Tensor, log_prob_old: Tensor) -> Tensor:
    """rho = exp(log_prob_new - log_prob_old), `[N]`."""
    return torch.exp(log_prob_new - log_prob_old)


def guarded_ratio(
    log_prob_new: Tensor, log_prob_old: Tensor, mean_new: Tensor, mean_old: Tensor, std: Tensor
) -> Tensor:
    """GRPO-Guard's ratio: without the downward drift of the mean log-ratio, and of one spread at every step.

    rho = exp((log_prob_new - log_prob_old + |mean_new - mean_old|^2 / (2 std^2)) std), the square averaged over
    non-batch dimensions (Flow-GRPO's train_sd3_GRPO_Guard; std is that of the whole step, sqrt(-dt) included).

    Args:
        log_prob_new, log_prob_old, std: `[N]`.
        mean_new, mean_old: `[N, ...]`.
    """
    drift = (mean_new - mean_old).square().flatten(1).mean(1) / (2 * std.square())
    return torch.exp((log_prob_new - log_prob_old + drift) * std)


def velocity_kl(velocity: Tensor, reference: Tensor) -> Tensor:
    """Distance to the base model in velocity space: mean square over non-batch dimensions, `[N]`."""
    return (velocity.float() - reference.float()).square().flatten(1).mean(1)
