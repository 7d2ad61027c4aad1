"""The LoRA's gradient of every objective without stochastic steps, against central differences in plain float64.

The network is linear, so that its float64 transcription is one line; base, old and new weights all differ.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from stages import gradients_of, rollout_of, updater_for
from torch import Tensor, nn

from trainer.models import Conditions, DiffusionModel
from trainer.objectives.base import RolloutBatch
from trainer.objectives.updater import Updater
from trainer.rewards import load_reward
from trainer.rollout import Plan, Prompting, Trajectories

WIDTH, PROMPTS, GROUP = 4, 2, 3
SIGMAS = [1.0, 0.8, 0.55, 0.25, 0.0]
ADVANTAGES = [1.5, -0.5, -1.0, 0.7, 0.9, -1.6]
Weights = dict[str, np.ndarray]


class LinearModel(DiffusionModel):
    """velocity = W x + sigma c; its images are grey, of 2 x 2 pixels."""

    default_targets = ("proj",)
    check = load = encode_batches = classmethod(lambda cls, *_: None)
    latent_shape = (WIDTH,)
    lora_key = lambda self, name: name  # noqa: E731

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH, bias=False)}).requires_grad_(False)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.module["proj"](latents) + sigma[:, None] * conditions.tensors["c"]

    def decode(self, latents: Tensor) -> Tensor:
        return latents.sigmoid().reshape(-1, 1, 2, 2).expand(-1, 3, -1, -1)


class Scene:
    """Images of two prompts, and an updater whose live, old and base weights differ."""

    def __init__(self, options: dict, stop: int | None = None) -> None:
        draw = torch.Generator().manual_seed(3)
        self.updater: Updater = updater_for(LinearModel(), {"batch_size": 4, **options}, lora={"rank": 2, "alpha": 4})
        policy, self.objective = self.updater.policy, self.updater.objective
        self.objective.rewards = {"brightness": load_reward(self.objective.config.rewards[0])}
        for name, parameter in policy.parameters.items():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
            if policy.old is not None:
                policy.old[name] = 0.3 * torch.randn(parameter.shape, generator=draw)
        self.context = torch.randn(PROMPTS, WIDTH, generator=draw)
        final, nothing = torch.randn(PROMPTS * GROUP, WIDTH, generator=draw), torch.empty(0)
        prompt_of = torch.arange(PROMPTS).repeat_interleave(GROUP)
        plan = Plan("dance", 0.0, SIGMAS, [False] * 4, shared_noise=False, stop=stop)
        kept = Trajectories(final, [], nothing, nothing, nothing, None, 0)
        prompting = Prompting(Conditions({"c": self.context}))
        self.rollout: RolloutBatch = rollout_of(plan, prompting, kept, prompt_of, ADVANTAGES, optimizer_steps=0)
        self.items = next(self.objective.items(self.rollout))
        self.batches = self.objective.batches(self.items, self.rollout)

    def weights(self, which: str = "live") -> Weights:
        source = self.updater.policy.old if which == "old" else self.updater.policy.parameters
        found = {name: value.detach().double().numpy() for name, value in source.items()}
        return {name: 0 * value for name, value in found.items()} if which == "base" else found

    def velocity(self, weights: Weights, latents: np.ndarray, sigma: np.ndarray, rows: Tensor) -> np.ndarray:
        base = self.updater.model.module["proj"].base_layer.weight.double().numpy()
        down, up = (next(v for k, v in weights.items() if part in k) for part in ("lora_A", "lora_B"))
        context = self.context.double().numpy()[self.rollout.prompt_of[rows].numpy()]
        return latents @ (base + 4 / 2 * up @ down).T + sigma[:, None] * context

    def noised(self, batch: object) -> tuple[np.ndarray, ...]:
        """Images, noise and levels of a batch, and the images noised."""
        image = self.rollout.trajectories.final[batch.rows].double().numpy()
        eps, sigma = batch.noise.double().numpy(), batch.sigma.double().numpy()
        return image, eps, sigma, (1 - sigma[:, None]) * image + sigma[:, None] * eps

    def advantages(self, batch: object) -> np.ndarray:
        return np.array([ADVANTAGES[GROUP * item.member[0] + item.member[1]] for item in batch.items])


def mse(difference: np.ndarray) -> np.ndarray:
    return (difference**2).mean(1)


def nft(stage: Scene, live: Weights, held: Weights) -> float:
    total = 0.0
    for batch in stage.batches:
        image, _, sigma, x = stage.noised(batch)
        q = np.clip(np.clip(stage.advantages(batch), -5, 5) / 5 / 2 + 0.5, 0, 1)
        v, v_then, old, base = (
            stage.velocity(w, x, sigma, batch.rows) for w in (live, held, stage.weights("old"), stage.weights("base"))
        )
        for share, sign in ((q, 1), (1 - q, -1)):
            now, then = (x - sigma[:, None] * (old + sign * 0.5 * (each - old)) - image for each in (v, v_then))
            total += (5 * share * mse(now) / np.abs(then).mean(1) / 0.5).sum()
        total += 0.3 * mse(v - base).sum()
    return total / len(stage.items)


def awm(stage: Scene, live: Weights, held: Weights) -> float:
    total = 0.0
    for batch in stage.batches:
        image, eps, sigma, x = stage.noised(batch)
        v, v_then, old, base = (
            stage.velocity(w, x, sigma, batch.rows) for w in (live, held, stage.weights("old"), stage.weights("base"))
        )
        now, then = (-(mse(each - (eps - image)) ** 0.25) * sigma / 0.25 for each in (v, v_then))
        total += (-stage.advantages(batch) / 5 * np.exp(now - then)).sum()
        total += (0.2 * mse(v - old) + 0.3 * mse(v - base)).sum()
    return total / len(stage.items)


def dpo(stage: Scene, live: Weights, held: Weights) -> float:
    total = 0.0
    for batch in stage.batches:
        _, eps, sigma, _ = stage.noised(batch)
        errors = []
        for image in (batch.winner.double().numpy(), batch.loser.double().numpy()):
            x, target = (1 - sigma[:, None]) * image + sigma[:, None] * eps, eps - image
            new, base = (mse(stage.velocity(w, x, sigma, batch.rows) - target) for w in (live, stage.weights("base")))
            errors.append(new - base)
            total += 0.1 * new.sum() if len(errors) == 1 else 0.0
        total += np.log1p(np.exp(3 / 2 * (errors[0] - errors[1]))).sum()
    return total / len(stage.items)


def draft(stage: Scene, live: Weights, held: Weights) -> float:
    def path(weights: Weights, rows: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
        x, states, velocities = stage.rollout.trajectories.final[rows].double().numpy(), [], []
        for now, after in zip(SIGMAS[2:-1], SIGMAS[3:], strict=True):
            states.append(x)
            velocities.append(stage.velocity(weights, x, np.full(len(x), now), rows))
            x = x + (after - now) * velocities[-1]
        return [*states, x], velocities

    total = 0.0
    for batch in stage.batches:
        states, velocities = path(live, batch.rows)
        total -= (1 / (1 + np.exp(-states[-1]))).mean(1).sum()
        before, _ = path(held, batch.rows)  # where the base model looked
        for i, v in enumerate(velocities):
            base = stage.velocity(stage.weights("base"), before[i], np.full(len(v), SIGMAS[2 + i]), batch.rows)
            total += 0.1 * mse(v - base).sum() / 2
    return total / len(stage.items)


CASES: dict[str, tuple[Callable, dict, int | None]] = {
    "nft": (nft, {"name": "nft", "beta": 0.5, "kl_weight": 0.3}, None),
    "awm": (awm, {"name": "awm", "trust_weight": 0.2, "kl_weight": 0.3}, None),
    "dpo": (dpo, {"name": "dpo", "beta": 3.0, "winner_weight": 0.1, "noise_levels": 3}, None),
    "draft": (draft, {"name": "reward-gradient", "gradient_steps": 2, "kl_weight": 0.1}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_update_equals_central_differences(case: str) -> None:
    transcription, options, stop = CASES[case]
    stage = Scene(options, stop)
    start = stage.weights()
    totals = stage.updater.accumulate(stage.items, stage.rollout)
    assert totals.loss / len(stage.items) == pytest.approx(transcription(stage, start, start), rel=1e-4, abs=1e-5)
    for name, found in gradients_of(stage.updater).items():
        expected = np.zeros(found.shape)
        for place in np.ndindex(*found.shape):
            sides = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in start.items()}
                moved[name][place] += sign * 1e-6
                sides.append(transcription(stage, moved, start))
            expected[place] = (sides[0] - sides[1]) / 2e-6
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
