"""Models with zero terminal SNR: they start at a level without signal, and train."""

import json
from pathlib import Path

import pytest
import torch
from stages import InFloat64, gradients_of, items_of, rollout_of, updater_for
from tiny_families import CASES, build_sd
from torch import Tensor

from trainer.config import ModelConfig
from trainer.diffusion import kernels
from trainer.models.diffusers.stable_diffusion import StableDiffusionModel
from trainer.objectives.updater import Updater
from trainer.rollout import Plan, Prompting, sample

STEPS, GUIDANCE = 4, 2.0
ACTIONS = [(0, 0), (1, 1)]
"""Trajectory and step: the first step starts without signal."""
ADVANTAGES = [1.0, -0.6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sd(tmp_path_factory.mktemp("sd"), "v_prediction", zero_snr=True)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_levels_are_those_of_trailing_timesteps_whatever_the_folder_says(folder: Path) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    config = ModelConfig(family="sd", path=str(folder), **CASES["sd-zero-snr"].model)
    # The beta schedule of Stable Diffusion, rescaled as arXiv 2305.08891, algorithm 1, says.
    roots = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    expected = [(1 - roots[t].square()).sqrt().item() for t in (999, 749, 499, 249)] + [0.0]
    for spacing in ("trailing", "leading", "linspace"):
        file.write_text(json.dumps(settings | {"timestep_spacing": spacing}))
        levels = StableDiffusionModel.load(config, torch.device("cpu")).sigmas(STEPS, None)
        assert levels == pytest.approx(expected, abs=1e-5)
        assert levels[0] == 1
    file.write_text(json.dumps(settings))


def test_the_gradient_of_the_first_step_is_that_of_finite_differences(folder: Path) -> None:
    config = ModelConfig(family="sd", path=str(folder), **CASES["sd-zero-snr"].model)
    conditions = StableDiffusionModel.encode(config, ["a red circle", "two triangles", "blue"], torch.device("cpu"))
    prompting = Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))
    model = StableDiffusionModel.load(config, torch.device("cpu"))
    options = {"batch_size": 4, "clip_range": 0.99, "old_log_prob": "rollout"}
    updater = updater_for(model, options, rollout={"kernel": "ddim"}, lora={"rank": 2, "alpha": 6})
    model.module.double()
    plan = Plan("ddim", 0.5, model.sigmas(STEPS, None)[:3], [True, True], False, GUIDANCE)
    with InFloat64():
        compare_gradient(updater, prompting, plan)


def compare_gradient(updater: Updater, prompting: Prompting, plan: Plan) -> None:
    model, prompt_of = updater.model, torch.arange(2)
    noise = torch.stack([draw(*model.latent_shape, seed=i) for i in (1, 2)])
    kept = sample(model, plan, prompting, prompt_of, noise, lambda step: draw(*noise.shape, seed=10 + step))
    sampled = rollout_of(plan, prompting, kept, prompt_of, ADVANTAGES, dtype=torch.float64)
    first = updater.accumulate(items_of(sampled, ACTIONS), sampled)
    assert first.peaks["deviation"] < 1e-6, "before an update the ratio is 1"
    gradients_of(updater)
    parameters = updater.policy.parameters
    for i, parameter in enumerate(parameters.values()):
        parameter.data = 0.02 * draw(*parameter.shape, seed=20 + i)
    updater.accumulate(items_of(sampled, ACTIONS), sampled)
    directions = {name: draw(*p.shape, seed=50 + i) for i, (name, p) in enumerate(parameters.items())}
    slope = sum((g * directions[name]).sum() for name, g in gradients_of(updater).items()).item()
    values = []
    for sign in (1, -2):
        for name, parameter in parameters.items():
            parameter.data += sign * 1e-5 * directions[name]
        values.append(objective(model, plan, prompting, kept))
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@torch.no_grad()
def objective(model: StableDiffusionModel, plan: Plan, prompting: Prompting, kept: object) -> float:
    """Minus the mean of ratio times advantage."""
    losses = []
    for (i, step), advantage in zip(ACTIONS, ADVANTAGES, strict=True):
        latents, rows = kept.samples[step, i : i + 1], torch.tensor([i])
        levels = torch.tensor([plan.sigmas[step]])
        conditions = prompting.conditions.rows(rows)
        prediction = model.predict_guided(latents, levels, conditions, GUIDANCE, prompting.unconditional)
        outcome = kept.next_samples[step, i : i + 1]
        pair = plan.sigmas[step], plan.sigmas[step + 1]
        again = kernels.step("ddim", latents, prediction, *pair, plan.eta, next_sample=outcome, process=model.process)
        losses.append(-(again.log_prob - kept.log_probs[step, i]).exp() * advantage)
    return torch.cat(losses).double().mean().item()
