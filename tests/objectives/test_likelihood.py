"""Ratios, clips, masks and weights of likelihood-ratio objectives against tables and transcriptions."""

import math

import numpy as np
import pytest
import torch

from trainer.diffusion import kernels
from trainer.objectives.likelihood import (
    beyond_divergence,
    clipped_objective,
    flash_weight,
    guarded_ratio,
    most_suspicious,
    probability_ratio,
    ranks,
    step_divergence,
    velocity_kl,
)


def brute_force(ratio: float, advantage: float, eps: float) -> float:
    """PPO's case table: no reward for leaving the range on the side the advantage pushes to."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + eps)
    return -advantage * max(ratio, 1 - eps)


def test_clipped_objective_is_its_case_table() -> None:
    cases = [(r, a, eps) for r in (0.5, 0.95, 1.0, 1.05, 2.0) for a in (-3.0, -0.1, 0.0, 2.0) for eps in (0.1, 0.01)]
    for ratio, advantage, eps in cases:
        value = clipped_objective(torch.tensor([ratio]), torch.tensor([advantage]), eps).item()
        assert value == pytest.approx(brute_force(ratio, advantage, eps), rel=1e-6), (ratio, advantage, eps)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient", "plain"),
    [
        (1.2, 2.0, 0, 0),
        (0.8, 2.0, -2, 0),
        (1.2, -2.0, 2, 0),
        (0.8, -2.0, 0, 0),
        (1.05, 2.0, -2, -2),
        (0.95, -2.0, 2, 2),
    ],
)
def test_gradient_stops_where_the_advantage_has_been_followed_too_far_and_with_plain_clip_everywhere_outside(
    ratio: float, advantage: float, gradient: float, plain: float
) -> None:
    for is_plain, expected in ((False, gradient), (True, plain)):
        rho = torch.tensor([ratio], requires_grad=True)
        clipped_objective(rho, torch.tensor([advantage]), 0.1, is_plain).sum().backward()
        assert rho.grad.item() == pytest.approx(expected)


def test_plain_clip_is_the_reference_of_dpok() -> None:
    """`mean(-100 (R - V) clip(ratio, 1 - eps, 1 + eps))`, without its factor."""
    ratio, advantage = torch.tensor([0.9, 1.0, 1.3]), torch.tensor([1.5, -2.0, 0.5])
    expected = [-1.5 * (1 - 0.05), 2.0, -0.5 * 1.05]
    assert clipped_objective(ratio, advantage, 0.05, plain=True).tolist() == pytest.approx(expected)


def test_mask_of_flow_dppo_is_its_case_table() -> None:
    for ratio in (0.9, 1.0, 1.1):
        for advantage in (-1.0, 0.0, 1.0):
            for divergence in (0.5e-5, 1e-5, 3e-5):
                away = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
                given = [torch.tensor([value], dtype=torch.float64) for value in (ratio, advantage, divergence)]
                assert beyond_divergence(*given, 1e-5).item() == (away and divergence >= 1e-5)


def test_ratio_is_that_of_the_densities() -> None:
    new, old = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([-1.0, 0.25, 2.5])
    assert probability_ratio(new, old).tolist() == pytest.approx([1.0, math.exp(0.25), math.exp(-0.5)])


def test_divergence_is_the_kl_of_two_gaussians_per_dimension() -> None:
    from torch.distributions import Normal, kl_divergence

    means, std = torch.randn(2, 3, 4, 5), torch.tensor([0.1, 0.5, 2.0])
    wide = std.view(3, 1, 1)
    expected = kl_divergence(Normal(means[0], wide), Normal(means[1], wide)).flatten(1).mean(1)
    torch.testing.assert_close(step_divergence(means[0], means[1], std), expected)


def test_guarded_ratio_is_its_transcription() -> None:
    rng = np.random.default_rng(0)
    dt, std_t = np.array([-0.1, -0.2]), np.array([0.9, 0.5])
    means = rng.normal(size=(2, 2, 3, 4, 4))
    new, old = rng.normal(size=(2, 2)) * 0.01
    bias = ((means[0] - means[1]) ** 2).mean((1, 2, 3)) / (2 * (np.sqrt(-dt) * std_t) ** 2)
    expected = np.exp((new - old + bias) * np.sqrt(-dt) * std_t)
    tensors = [torch.tensor(value) for value in (new, old, means[0], means[1], np.sqrt(-dt) * std_t)]
    np.testing.assert_allclose(guarded_ratio(*tensors).numpy(), expected, rtol=1e-6)


def test_guarded_ratio_is_exactly_one_where_nothing_moved() -> None:
    mean, log_prob, std = torch.randn(3, 4, 5), torch.randn(3), torch.rand(3) + 0.1
    assert guarded_ratio(log_prob, log_prob, mean, mean, std).tolist() == [1, 1, 1]


def test_guarded_log_ratio_has_no_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.zeros(2000, 50), torch.full((2000, 50), 0.02)
    std = torch.full((2000,), 0.1)
    samples = 0.1 * torch.randn(2000, 50, generator=generator)
    densities = [-((samples - mean) ** 2).mean(1) / (2 * 0.1**2) for mean in (new, old)]
    plain = probability_ratio(*densities).log().mean()
    guarded = guarded_ratio(*densities, new, old, std).log().mean()
    assert plain.item() == pytest.approx(-0.02, abs=0.004)
    assert abs(guarded.item()) < 0.0004


def test_velocity_kl_is_the_mean_square_of_each_row() -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 4.0]]).reshape(2, 1, 2, 2)
    assert velocity_kl(a, b).tolist() == [2.5, 4.0]


# --------------------------------------------------------------------------------------------------- weight of steps


def test_flash_weight_of_flow_is_the_formula_of_the_paper() -> None:
    eta, sigma, after = 0.7, np.array([0.95, 0.8, 0.4]), np.array([0.8, 0.6, 0.2])
    root, g = np.sqrt(sigma - after), eta * np.sqrt(sigma / (1 - sigma))
    expected = 1 / (root / g + g * root * (1 - sigma) / (2 * sigma))
    found = flash_weight("flow", torch.tensor(sigma), torch.tensor(after), eta)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("kernel", kernels.stochastic())
def test_flash_weight_undoes_how_the_gradient_of_the_log_probability_depends_on_the_step(kernel: str) -> None:
    """At every step, the weighted gradient has the size that the noise of the action gives it."""
    sigma, after = (
        torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64),
        torch.tensor([0.7, 0.4, 0.3], dtype=torch.float64),
    )
    sample, noise = torch.randn(3, 4), torch.randn(3, 4)
    prediction = torch.randn(3, 4, requires_grad=True)
    eta = kernels.named(kernel).default_eta
    taken = kernels.step(kernel, sample, prediction.detach(), sigma, after, eta, noise=noise)
    again = kernels.step(kernel, sample, prediction, sigma, after, eta, next_sample=taken.next_sample)
    (gradient,) = torch.autograd.grad(again.log_prob.sum(), prediction)
    weighted = gradient.norm(dim=1) * flash_weight(kernel, sigma, after, eta).float()
    torch.testing.assert_close(weighted, noise.norm(dim=1) / 4, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ GARDO's gate


def test_ranks_count_what_is_below_and_half_of_what_is_equal() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 2.0, 2.0])).tolist() == [0.75, 0.0, 0.375, 0.375]


def test_suspicious_are_images_that_only_the_trained_reward_likes() -> None:
    trained = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    watching = [torch.tensor([0.0, 9.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 8.0, 3.0, 4.0, 2.0])]
    assert most_suspicious(trained, watching, 0.2).tolist() == [True, False, False, False, False]
    assert most_suspicious(trained, watching, 1.0).all()
    assert most_suspicious(trained, watching, 0.21).sum() == 2


def test_the_gate_does_not_care_for_units_and_leaves_out_images_without_a_score() -> None:
    draw = torch.Generator().manual_seed(0)
    trained, first, second = torch.randn(3, 40, generator=draw).double()
    found = most_suspicious(trained, [first, second], 0.25)
    assert found.sum() == 10
    assert torch.equal(found, most_suspicious(trained * 7 + 100, [first + 5, second * 0.01], 0.25))
    second[found.nonzero()[0]] = torch.nan
    again = most_suspicious(trained, [first, second], 0.25)
    assert not again[found.nonzero()[0]]
    assert again.sum() == 10
    assert not most_suspicious(trained, [torch.full_like(trained, torch.nan)], 0.5).any()
