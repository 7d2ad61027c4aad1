"""Objectives on the forward process and reward gradients: losses against transcriptions, and whole runs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from short_runs import assert_constant_changes_nothing, train
from torch import Tensor

from trainer.diffusion.process import FLOW, VP
from trainer.objectives.awm import awm_loss, log_likelihood
from trainer.objectives.dpo import best_and_worst, dpo_loss
from trainer.objectives.forward_process import ForwardProcessOptions, draw_levels, mean_square, usable_levels
from trainer.objectives.nft import NftOptions, nft_loss, optimality
from trainer.objectives.reward_gradient import reward_loss
from trainer.utils.errors import BadInput
from trainer.utils.seeds import generator

SHAPE = (3, 2, 4, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def parts() -> dict[str, Tensor]:
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    image, eps = draw(0), draw(1)
    return {"sigma": sigma, "image": image, "noise": eps, "latents": FLOW.noised(image, eps, sigma)}


# ------------------------------------------------------------------------------------------------------------- NFT


def nft_transcription(v: np.ndarray, old: np.ndarray, parts: dict, quality: list[float], beta: float) -> np.ndarray:
    """The reference's lines for one sample after another, in numpy."""
    values = []
    for i, s in enumerate(parts["sigma"].tolist()):
        x_t, x0 = parts["latents"][i].numpy(), parts["image"][i].numpy()
        positive, negative = beta * v[i] + (1 - beta) * old[i], (1 + beta) * old[i] - beta * v[i]
        x_plus, x_minus = x_t - s * positive, x_t - s * negative
        w_plus, w_minus = (max(1e-5, np.abs(x - x0).mean()) for x in (x_plus, x_minus))
        plus, minus = ((x_plus - x0) ** 2).mean() / w_plus, ((x_minus - x0) ** 2).mean() / w_minus
        values.append((quality[i] * plus + (1 - quality[i]) * minus) / beta)
    return np.array(values)


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_is_its_transcription(parts: dict, beta: float) -> None:
    v, old, quality = draw(2), draw(3), torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)
    value = nft_loss(v, old, parts["image"], parts["latents"], parts["sigma"], quality, beta, FLOW)
    np.testing.assert_allclose(value.numpy(), nft_transcription(v.numpy(), old.numpy(), parts, quality.tolist(), beta))


def test_nft_gradient_is_that_of_the_loss_with_its_weights_held(parts: dict) -> None:
    v, old, quality = draw(2).requires_grad_(), draw(3), torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64)
    arguments = parts["image"], parts["latents"], parts["sigma"], quality, 0.5, FLOW
    (gradient,) = torch.autograd.grad(nft_loss(v, old, *arguments).sum(), v)
    held = []
    for implicit in (0.5 * v + 0.5 * old, 1.5 * old - 0.5 * v):
        error = (parts["latents"] - parts["sigma"].view(-1, 1, 1, 1) * implicit - parts["image"]).detach()
        held.append(error.abs().flatten(1).mean(1))

    def fixed(at: Tensor) -> float:
        total = 0.0
        for share, implicit, weight in zip(
            (quality, 1 - quality), (0.5 * at + 0.5 * old, 1.5 * old - 0.5 * at), held, strict=True
        ):
            image = parts["latents"] - parts["sigma"].view(-1, 1, 1, 1) * implicit
            total += (share * mean_square(image - parts["image"]) / weight).sum().item() / 0.5
        return total

    for index in [(0, 0, 0, 0), (1, 1, 2, 3), (2, 0, 3, 1)]:
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[index] = 1e-6
        central = (fixed(v.detach() + step) - fixed(v.detach() - step)) / 2e-6
        assert gradient[index].item() == pytest.approx(central, rel=1e-6, abs=1e-10)


def test_nft_with_old_equal_to_new_is_advantage_weighted_matching(parts: dict) -> None:
    """The gradient is A k d mse(v - u) / dv with k = sigma / mean|v - u| (at strength 1)."""
    v, target = draw(2).requires_grad_(), FLOW.target(parts["image"], parts["noise"], parts["sigma"])
    advantages = torch.tensor([-2.0, 0.5, 4.0], dtype=torch.float64)
    quality = optimality(advantages, 5.0)
    value = 5 * nft_loss(v, v.detach(), parts["image"], parts["latents"], parts["sigma"], quality, 1.0, FLOW)
    (nft,) = torch.autograd.grad(value.sum(), v)
    k = parts["sigma"] / (v - target).detach().abs().flatten(1).mean(1)
    (matched,) = torch.autograd.grad(awm_loss(-k * mean_square(v - target), advantages).sum(), v)
    assert (nft - matched).abs().max() < 1e-9
    assert matched.abs().max() > 1e-3


def test_optimality_covers_the_unit_interval() -> None:
    given = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 7.0])
    assert optimality(given, 5.0).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_nft_in_the_vp_process_uses_its_image_estimate() -> None:
    sigma, image, eps = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64), draw(0), draw(1)
    latents = VP.noised(image, eps, sigma)
    assert nft_loss(eps, eps, image, latents, sigma, torch.ones(3), 1.0, VP).max() < 1e-12, "the noise is the answer"


# ------------------------------------------------------------------------------------------------------------- AWM


def test_awm_weightings_are_their_formulas() -> None:
    error, sigma = torch.tensor([0.04, 2.0], dtype=torch.float64), torch.tensor([0.25, 1.0], dtype=torch.float64)
    expected = {
        "uniform": [-0.04, -2.0],
        "sigma": [-0.01, -2.0],
        "sigma-squared": [-0.0025, -2.0],
        "huber": [-(np.sqrt(0.04 + 1e-10) - 1e-5) * 0.25, -(np.sqrt(2 + 1e-10) - 1e-5)],
        "generalised-huber": [
            -((0.04 + 1e-10) ** 0.25 - 1e-10**0.25) * 0.25 / 0.25,
            -((2 + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25,
        ],
    }
    for weighting, values in expected.items():
        assert log_likelihood(error, sigma, weighting, 0.25).tolist() == pytest.approx(values, rel=1e-12), weighting


@pytest.mark.parametrize("weighting", ["uniform", "sigma", "sigma-squared", "huber", "generalised-huber"])
def test_awm_gradient_is_minus_the_advantage_times_that_of_the_likelihood(parts: dict, weighting: str) -> None:
    v, target = draw(2).requires_grad_(), draw(4)
    advantages = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)

    def log_prob(at: Tensor) -> Tensor:
        return log_likelihood(mean_square(at - target), parts["sigma"], weighting, 0.25)

    loss = awm_loss(log_prob(v), advantages)
    assert loss.tolist() == pytest.approx((-advantages).tolist())
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient[1].abs().max() == 0, "no advantage, no gradient"
    for index in [(0, 0, 0, 0), (2, 1, 2, 3)]:
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[index] = 1e-6
        central = (log_prob(v.detach() + step) - log_prob(v.detach() - step))[index[0]].item() / 2e-6
        assert gradient[index].item() == pytest.approx(-advantages[index[0]].item() * central, rel=1e-5, abs=1e-10)


# ------------------------------------------------------------------------------------------------------------- DPO


def test_dpo_is_its_formula_and_its_gradient() -> None:
    gains = torch.tensor([0.01, -0.02, 0.03, 0.005], dtype=torch.float64, requires_grad=True)
    margin = np.array([0.01 - 0.03, -0.02 - 0.005])
    expected = np.log1p(np.exp(100 / 2 * margin))
    value = dpo_loss(gains, 100.0)
    np.testing.assert_allclose(value.detach().numpy(), expected)
    (gradient,) = torch.autograd.grad(value.sum(), gains)
    slope = 50 / (1 + np.exp(-50 * margin))
    np.testing.assert_allclose(gradient.numpy(), [*slope, *-slope])


def test_a_pair_is_the_best_and_the_worst_and_ties_are_none() -> None:
    class Given:
        class advantages:
            values = torch.tensor([[0.5, -1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])

    assert best_and_worst([(0, g) for g in range(4)], Given) == ((0, 2), (0, 1))
    assert best_and_worst([(0, 0), (0, 1)], Given) == ((0, 0), (0, 1))
    assert best_and_worst([(1, g) for g in range(4)], Given) is None
    assert best_and_worst([(0, 0)], Given) is None


# ---------------------------------------------------------------------------------------------------- noise levels


def test_levels_come_from_the_noisy_share_of_the_schedule_without_repetition() -> None:
    sigmas = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0]
    options = ForwardProcessOptions(name="x", level_fraction=0.6)
    taken = usable_levels(sigmas, options, lambda level: True)
    for seed in range(20):
        levels = draw_levels(taken, "schedule", 3, generator(seed))
        assert sorted(levels) == [0.7, 0.9, 1.0]
    assert sorted(draw_levels(taken, "schedule", 4, generator(0)))[0] == 0.7
    for distribution in ("uniform", "logit-normal"):
        levels = draw_levels(taken, distribution, 500, generator(1))
        assert 0.7 <= min(levels) < 0.75
        assert 0.95 < max(levels) <= 1.0


def test_levels_of_a_network_that_is_not_trained_are_left_out() -> None:
    sigmas, options = [1.0, 0.9, 0.7, 0.4, 0.1, 0.0], ForwardProcessOptions(name="x", level_fraction=0.8)
    assert usable_levels(sigmas, options, lambda level: level < 0.8) == [0.7, 0.4]
    assert usable_levels(sigmas, options, lambda level: level >= 0.8) == [1.0, 0.9]


def test_reward_loss_is_minus_the_reward_or_a_hinge() -> None:
    rewards = torch.tensor([-1.0, 2.0, 3.0])
    assert reward_loss(rewards, None).tolist() == [1.0, -2.0, -3.0]
    assert reward_loss(rewards, 2.5).tolist() == [3.5, 0.5, 0.0]


# ------------------------------------------------------------------------------------------------------- whole runs

CASES = {
    "nft": {"name": "nft", "old_decay_growth": 0.2},
    "awm": {"name": "awm", "trust_weight": 1.0, "trust_decay_growth": 0.2, "kl_weight": 0.01},
    "dpo": {"name": "dpo", "updates": 2},
    "reward-gradient": {"name": "reward-gradient"},
    "refl": {"name": "reward-gradient", "method": "refl", "target": 5.0, "kl_weight": 0.1},
    "draft-lv": {"name": "reward-gradient", "method": "draft-lv"},
}


def described(description: dict, case: str, **runtime: object) -> dict:
    data = copy.deepcopy(description)
    data["objective"] = CASES[case]
    data["rollout"] |= {"group_size": 3}
    data["runtime"] |= {"iterations": 3, "checkpoint_every": 1, **runtime}
    return data


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_records_and_resumes_to_the_bit(case: str, tiny_description: dict, tmp_path: Path) -> None:
    data = described(tiny_description, case)
    trainer, events = train(data, tmp_path / "whole")
    assert all(event["loss"] is not None and event["grad_norm"] > 0 for event in events)
    assert all(value["mean"] is not None for event in events for value in event["rewards"].values())
    assert trainer.policy.updates >= 3
    train(data | {"runtime": data["runtime"] | {"iterations": 2}}, tmp_path / "parted")
    train(data, tmp_path / "parted")
    whole, parted = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name or "up" in name)


def test_nft_warns_of_a_dead_contrast_and_measures_a_live_one(tiny_description: dict) -> None:
    dead = described(tiny_description, "nft")
    dead["objective"] = {"name": "nft", "old_decay_delay": 100}
    trainer, events = train(dead)
    assert [event["objective"]["contrast"] for event in events] == [0.0, 0.0, 0.0]
    assert "the implicit policies do not differ: raise objective.old_decay_growth" in trainer.objective.warning(
        events[-1]["objective"]
    )
    live = described(tiny_description, "nft")
    trainer, events = train(live)
    assert events[0]["objective"]["contrast"] == 0.0
    assert events[1]["objective"]["contrast"] > 0
    assert trainer.objective.warning(events[-1]["objective"]) is None
    assert NftOptions().kl_weight == 1e-4


def test_a_reward_without_a_gradient_is_refused_by_name(tiny_description: dict) -> None:
    data = described(tiny_description, "refl")
    data["rewards"] = [{"name": "shapes"}]
    data["prompts"] = {"shapes": 2}
    with pytest.raises(BadInput, match="reward 'shapes' is not differentiable"):
        train(data)


@pytest.mark.parametrize("case", ["nft", "awm", "dpo"])
def test_a_constant_added_to_all_rewards_changes_nothing(
    case: str, tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = described(tiny_description, case)
    assert_constant_changes_nothing(data, monkeypatch)
