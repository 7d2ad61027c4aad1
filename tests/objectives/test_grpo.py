"""GRPO: its gradient against finite differences in float64, and how its terms are divided."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from stages import gradients_of, items_of, rollout_of, updater_for
from torch import Tensor, nn

from trainer.models import Conditions, DiffusionModel
from trainer.objectives.base import RolloutBatch, Totals, split_updates
from trainer.objectives.grpo import GrpoOptions
from trainer.objectives.updater import Updater
from trainer.rollout import Execution, Plan, Prompting, Trajectories, sample

WIDTH, PROMPTS, GROUP, ETA = 4, 2, 3, 0.6
SIGMAS = [1.0, 0.8, 0.55, 0.25, 0.0]


def brute_force(ratio: float, advantage: float, eps: float) -> float:
    """PPO's case table: no reward for leaving the range on the side the advantage pushes to."""
    if advantage >= 0:
        return -advantage * min(ratio, 1 + eps)
    return -advantage * max(ratio, 1 - eps)


# --------------------------------------------------------------------------------------------------- whole gradient


class LinearModel(DiffusionModel):
    """velocity = W x + sigma c."""

    default_targets = ("proj",)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"proj": nn.Linear(WIDTH, WIDTH, bias=False)}).requires_grad_(False)

    check = load = encode_batches = classmethod(lambda cls, *_: None)
    latent_shape = (WIDTH,)
    decode = None
    lora_key = lambda self, name: name  # noqa: E731

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.module["proj"](latents) + sigma[:, None] * conditions.tensors["c"]


@dataclass
class Scene:
    updater: Updater
    rollout: RolloutBatch
    pairs: list[tuple[int, int]]


def scene(kernel: str, shared_noise: bool = True, **options: object) -> Scene:
    """A rollout with a LoRA on W, after which the LoRA has moved on a little."""
    generator = torch.Generator().manual_seed(3)
    updater = updater_for(LinearModel(), {"clip_range": 0.5, **options}, lora={"rank": 2, "alpha": 4})
    model, parameters = updater.model, updater.policy.parameters.values()
    for parameter in parameters:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    plan = Plan(kernel, ETA, SIGMAS, [True, True, True, False], shared_noise, keep_means=True)
    prompting = Prompting(Conditions({"c": torch.randn(PROMPTS, WIDTH, generator=generator)}))
    prompt_of = torch.arange(PROMPTS).repeat_interleave(GROUP)
    initial = torch.randn(PROMPTS if shared_noise else PROMPTS * GROUP, WIDTH, generator=generator)
    kept = sample(
        model,
        plan,
        prompting,
        prompt_of,
        initial,
        lambda _: torch.randn(PROMPTS * GROUP, WIDTH, generator=generator),
        Execution(4),
    )
    for parameter in parameters:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    rollout = rollout_of(plan, prompting, kept, prompt_of, [1.5, -0.5, -1.0, 0.7, 0.9, -1.6])
    pairs = [(t, s) for t in range(PROMPTS * GROUP) for s in range(3) if (t + s) % 4]
    return Scene(updater, rollout, pairs)


def weights(updater: Updater) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in updater.policy.parameters.items()}


def reference_loss(
    stage: Scene, moved: dict[str, np.ndarray], kernel: str, config: GrpoOptions
) -> tuple[float, list[float], int]:
    """The loss of the stored actions under other weights, in plain float64 sums; every ratio; actions dropped."""
    kept: Trajectories = stage.rollout.trajectories
    base = stage.updater.model.module["proj"].base_layer.weight.double().numpy()
    down, up = (next(v for k, v in moved.items() if part in k) for part in ("lora_A", "lora_B"))
    current = base + 4 / 2 * up @ down
    total, ratios, dropped = 0.0, [], 0
    for t, s in stage.pairs:
        sigma, after = SIGMAS[s], SIGMAS[s + 1]
        dt = after - sigma
        x, stored = kept.samples[s, t].double().numpy(), kept.next_samples[s, t].double().numpy()
        shift = sigma * stage.rollout.prompting.conditions.tensors["c"][t // GROUP].double().numpy()
        v, v_base = current @ x + shift, base @ x + shift
        x0, x1 = x - sigma * v, x + (1 - sigma) * v
        if kernel == "dance":
            mean, std = x + v * dt + ETA**2 / 2 * x1 / sigma * dt, ETA * math.sqrt(-dt)
        else:
            std = after * math.sin(ETA * math.pi / 2)
            mean = (1 - after) * x0 + math.sqrt(after**2 - std**2) * x1
        log_prob = np.mean(-((stored - mean) ** 2) / (2 * std**2)) - math.log(std) - math.log(2 * math.pi) / 2
        difference = log_prob - kept.log_probs[s, t].double().item()
        scale = 1.0
        if config.ratio == "guard":
            drift = np.mean((mean - kept.means[s, t].double().numpy()) ** 2) / (2 * std**2)
            difference, scale = (difference + drift) * std, 1 / -dt
        ratio = math.exp(difference)
        ratios.append(ratio)
        advantage = stage.rollout.advantages.values[divmod(t, GROUP)].item()
        if config.step_weights == "flash":
            slope = -sigma * (1 - after) + math.sqrt(after**2 - std**2) * (1 - sigma)
            scale = std / abs(slope)
        value = brute_force(ratio, advantage, config.clip_range)
        if config.clip == "plain":
            value = -advantage * min(max(ratio, 1 - config.clip_range), 1 + config.clip_range)
        if config.ratio == "dppo":
            divergence = np.mean((mean - kept.means[s, t].double().numpy()) ** 2) / (2 * std**2)
            away = (ratio - 1) * advantage > 0 and divergence >= config.divergence_limit
            value = 0.0 if away else -advantage * ratio
            dropped += away
        total += value * scale
        total += config.kl_weight * np.mean((v - v_base) ** 2)
    return total / len(stage.pairs), ratios, dropped


def trained(stage: Scene) -> tuple[dict[str, np.ndarray], Totals]:
    """The gradient of all actions, and what the updater counts."""
    totals = stage.updater.accumulate(items_of(stage.rollout, stage.pairs), stage.rollout)
    return {name: g.double().numpy() for name, g in gradients_of(stage.updater).items()}, totals


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        ("dance", {}),
        ("cps", {}),
        ("dance", {"clip_range": 0.01}),
        ("dance", {"ratio": "guard"}),
        ("cps", {"ratio": "guard", "kl_weight": 0.5}),
        ("dance", {"kl_weight": 0.5}),
        ("dance", {"clip_range": 0.01, "clip": "plain"}),
        ("dance", {"ratio": "dppo", "divergence_limit": 1e-4}),
        ("cps", {"ratio": "dppo", "divergence_limit": 1e-4, "kl_weight": 0.5}),
        ("cps", {"step_weights": "flash"}),
    ],
)
def test_gradient_of_the_update_equals_finite_differences(kernel: str, settings: dict, shared_noise: bool) -> None:
    stage = scene(kernel, shared_noise, **settings, batch_size=3)
    config, start = stage.updater.objective.options, weights(stage.updater)
    loss, ratios, dropped = reference_loss(stage, start, kernel, config)
    deviations = np.abs(np.array(ratios) - 1)
    assert deviations.max() > 1e-3
    bound = dropped if config.ratio == "dppo" else int((deviations > config.clip_range).sum())
    assert 0 < bound < len(ratios) if config.ratio == "dppo" or config.clip_range != 0.5 else bound == 0

    gradients, totals = trained(stage)
    for name, found in gradients.items():
        expected = np.zeros_like(found)
        for place in np.ndindex(*found.shape):
            sides = []
            for sign in (1, -1):
                moved = {key: value.copy() for key, value in start.items()}
                moved[name][place] += sign * 1e-6
                sides.append(reference_loss(stage, moved, kernel, config)[0])
            expected[place] = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert totals.loss / len(stage.pairs) == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert totals.items == len(ratios)
    assert totals.sums["clipped"] == bound
    assert totals.peaks["deviation"] == pytest.approx(deviations.max(), rel=1e-3)
    assert totals.sums["ratio"] == pytest.approx(sum(ratios), rel=1e-5)


def test_update_does_not_depend_on_the_size_of_its_batches() -> None:
    whole, _ = trained(scene("dance"))
    for size in (1, 4):
        other, _ = trained(scene("dance", batch_size=size))
        for name, value in whole.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6)


def test_steps_to_the_objective_raise_it() -> None:
    stage = scene("dance")
    config, before = stage.updater.objective.options, weights(stage.updater)
    gradients, _ = trained(stage)
    after = {name: before[name] - 1e-3 * value for name, value in gradients.items()}
    assert reference_loss(stage, after, "dance", config)[0] < reference_loss(stage, before, "dance", config)[0]


def test_updates_share_out_every_trajectory_once() -> None:
    groups = [[(p, g) for g in range(4)] for p in range(4)]
    assert split_updates(groups, 2) == [groups[0] + groups[1], groups[2] + groups[3]]
    halves = split_updates(groups[:3], 2)
    assert halves == [[(p, g) for p in range(3) for g in part] for part in ((0, 1), (2, 3))]
    assert split_updates([[], groups[1], groups[2][:2], []], 1) == [groups[1] + groups[2][:2]]
