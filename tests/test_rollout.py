"""Rollouts of a tiny SD3 model: equal to diffusers' pipeline, and exact where model calls are saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trainer.adapters import lora
from trainer.config import LoraConfig, ModelConfig, ObjectiveConfig
from trainer.diffusion.process import FLOW
from trainer.diffusion.solvers import DPMSolver2M
from trainer.models import DiffusionModel
from trainer.models.diffusers.sd3 import SD3Model
from trainer.objectives.engine import Actions, Statistics, train
from trainer.rollout import Plan, Prompting, Trajectories, decode, sample

CPU = torch.device("cpu")
SHIFT, STEPS = 3.0, 5
EVEN = [1 - i / STEPS for i in range(STEPS)]
SIGMAS = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in EVEN] + [0.0]
ALL = [True] * (STEPS - 1) + [False]
WINDOW = [False, True, True, False, False]
PROMPTS, GROUP = 2, 3
PROMPT_OF = torch.arange(PROMPTS).repeat_interleave(GROUP)


@pytest.fixture(scope="module")
def description(tiny_sd3: Path) -> ModelConfig:
    return ModelConfig(family="sd3", path=str(tiny_sd3), height=16, width=16)


@pytest.fixture(scope="module")
def model(description: ModelConfig) -> SD3Model:
    return SD3Model.load(description, CPU)


@pytest.fixture(scope="module")
def prompting(description: ModelConfig) -> Prompting:
    conditions = SD3Model.encode(description, ["a red circle", "two triangles", ""], CPU)
    return Prompting(conditions.rows(torch.tensor([0, 1])), conditions.rows(torch.tensor([2])))


@pytest.fixture
def learner(description: ModelConfig) -> SD3Model:
    """The model with a LoRA that does something."""
    model = SD3Model.load(description, CPU)
    lora.inject(model.module, LoraConfig(rank=2, alpha=4), model.default_targets, seed=0)
    nudge(model, 0.1, seed=1)
    return model


def nudge(model: DiffusionModel, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(model.module).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def starts(count: int = PROMPTS) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def step_noise(step: int) -> Tensor:
    return torch.randn(PROMPTS * GROUP, 4, 8, 8, generator=torch.Generator().manual_seed(100 + step))


def roll(model: DiffusionModel, plan: Plan, prompting: Prompting, batch: int = 96, means: bool = False) -> Trajectories:
    initial = starts() if plan.shared_noise else starts()[PROMPT_OF]
    return sample(model, plan, prompting, PROMPT_OF, initial, step_noise, batch=batch, keep_means=means)


def plan_of(stochastic: list[bool], shared_noise: bool = True, kernel: str = "dance", guidance: float = 1.0) -> Plan:
    return Plan(kernel, 0.5, SIGMAS, stochastic, shared_noise, guidance)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() < tolerance


# --------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_ode_rollout_equals_the_diffusers_pipeline(
    tiny_sd3: Path, model: SD3Model, prompting: Prompting, guidance: float
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tiny_sd3, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline.set_progress_bar_config(disable=True)
    positive, negative = prompting.conditions.tensors, prompting.unconditional.tensors

    def generate(output: str) -> Tensor:
        return pipeline(
            prompt_embeds=positive["embeds"],
            pooled_prompt_embeds=positive["pooled"],
            negative_prompt_embeds=negative["embeds"].expand_as(positive["embeds"]),
            negative_pooled_prompt_embeds=negative["pooled"].expand_as(positive["pooled"]),
            guidance_scale=guidance,
            latents=starts(),
            sigmas=EVEN,
            num_inference_steps=STEPS,
            height=16,
            width=16,
            output_type=output,
        ).images

    plan = plan_of([False] * STEPS, kernel="ode", guidance=guidance)
    mine = sample(model, plan, prompting, torch.arange(PROMPTS), starts(), step_noise, batch=96)
    assert mine.final.std() > 0.1
    close(mine.final, generate("latent"), 1e-4)
    images = decode(model, mine.final, 96)
    assert images.std() > 1e-3
    close(images, generate("pt"), 1e-4)


def test_prompts_and_guidance_matter(model: SD3Model, prompting: Prompting) -> None:
    plain, guided = (roll(model, plan_of(ALL, guidance=g), prompting).final for g in (1.0, 3.0))
    assert (plain - guided).abs().max() > 1e-3
    swapped = Prompting(prompting.conditions.rows(torch.tensor([1, 0])), prompting.unconditional)
    assert (roll(model, plan_of(ALL), swapped).final - plain).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------ shared prefix


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    ("stochastic", "evaluations"),
    [
        (ALL, PROMPTS + (STEPS - 1) * PROMPTS * GROUP),
        (WINDOW, 2 * PROMPTS + 3 * PROMPTS * GROUP),
        ([False] * STEPS, STEPS * PROMPTS),
    ],
)
def test_shared_prefix_changes_nothing_but_the_number_of_calls(
    model: SD3Model, prompting: Prompting, stochastic: list[bool], evaluations: int, guidance: float
) -> None:
    shared = roll(model, plan_of(stochastic, True, guidance=guidance), prompting, means=True)
    alone = roll(model, plan_of(stochastic, False, guidance=guidance), prompting, means=True)
    assert shared.evaluations == evaluations
    assert alone.evaluations == STEPS * PROMPTS * GROUP
    close(shared.final, alone.final, 1e-5)
    if any(stochastic):
        for name in ("samples", "next_samples", "means", "log_probs"):
            close(getattr(shared, name), getattr(alone, name), 1e-5)


def test_model_is_called_exactly_as_often_as_counted(model: SD3Model, prompting: Prompting) -> None:
    seen = []
    handle = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        counted = roll(model, plan_of(WINDOW), prompting, batch=4).evaluations
    finally:
        handle.remove()
    assert seen == [2, 2, 4, 2, 4, 2, 4, 2]
    assert counted == sum(seen)


@pytest.mark.parametrize("shared", [True, False])
def test_batch_size_does_not_matter(model: SD3Model, prompting: Prompting, shared: bool) -> None:
    whole = roll(model, plan_of(ALL, shared), prompting, 96)
    for batch in (1, 4):
        other = roll(model, plan_of(ALL, shared), prompting, batch)
        close(whole.final, other.final, 1e-5)
        close(whole.log_probs, other.log_probs, 1e-5)
    close(decode(model, whole.final, 96), decode(model, whole.final, 1), 1e-5)


# ------------------------------------------------------------------------------------------------ what is remembered


def test_trajectories_hang_together(model: SD3Model, prompting: Prompting) -> None:
    kept = roll(model, plan_of(ALL), prompting)
    assert kept.steps == [0, 1, 2, 3]
    assert torch.equal(kept.samples[0], starts()[PROMPT_OF])
    assert torch.equal(kept.samples[1:], kept.next_samples[:-1])
    assert kept.means is None
    assert kept.log_probs.shape == (4, PROMPTS * GROUP)
    final = kept.final.reshape(PROMPTS, GROUP, -1)
    assert (final[:, 0] - final[:, 1]).abs().max() > 1e-2


def test_steps_outside_the_window_are_deterministic(model: SD3Model, prompting: Prompting) -> None:
    asked = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return step_noise(step)

    kept = sample(model, plan_of(WINDOW), prompting, PROMPT_OF, starts(), noise, batch=96)
    assert asked == kept.steps == [1, 2]
    assert len(kept.samples) == len(kept.next_samples) == len(kept.log_probs) == 2

    def euler(x: Tensor, step: int) -> Tensor:
        sigma, conditions = torch.full((len(x),), SIGMAS[step]), prompting.conditions.rows(PROMPT_OF)
        with torch.no_grad():
            return x + model.predict(x, sigma, conditions) * (SIGMAS[step + 1] - SIGMAS[step])

    close(kept.samples[0], euler(starts()[PROMPT_OF], 0), 1e-5)
    close(kept.final, euler(euler(kept.next_samples[1], 3), 4), 1e-5)


@pytest.mark.parametrize("stochastic", [[False] * STEPS, [True, False, False, False, False]])
def test_2m_takes_the_deterministic_steps_and_starts_anew_after_noise(
    model: SD3Model, prompting: Prompting, stochastic: list[bool]
) -> None:
    kept = roll(model, replace(plan_of(stochastic), solver="2m"), prompting)
    first = sum(stochastic)
    latents, solver = kept.next_samples[0] if first else starts()[PROMPT_OF], DPMSolver2M(FLOW)
    for sigma, sigma_next in zip(SIGMAS[first:-1], SIGMAS[first + 1 :], strict=True):
        with torch.no_grad():
            levels = torch.full((len(latents),), sigma)
            prediction = model.predict(latents, levels, prompting.conditions.rows(PROMPT_OF))
        latents = solver.step(latents, prediction, sigma, sigma_next)
    close(kept.final, latents, 1e-5)
    euler = roll(model, plan_of(stochastic), prompting)
    assert (euler.final - kept.final).abs().max() > 1e-3
    assert torch.equal(euler.log_probs, kept.log_probs)


def test_rollout_can_be_interrupted_before_every_step(model: SD3Model, prompting: Prompting) -> None:
    calls = []
    sample(
        model,
        plan_of(ALL),
        prompting,
        PROMPT_OF,
        starts(),
        step_noise,
        batch=96,
        between_calls=lambda: calls.append(1),
    )
    assert len(calls) == STEPS


# ------------------------------------------------------------------------------------------------------------ update


ADVANTAGES = torch.tensor([1.2, -0.4, -0.8, 0.3, 0.9, -1.2])
Grads = dict[str, Tensor]


def update(
    model: DiffusionModel, plan: Plan, prompting: Prompting, kept: Trajectories, config: ObjectiveConfig
) -> tuple[Grads, Statistics]:
    actions = Actions(plan, prompting, kept, PROMPT_OF)
    pairs = [(t, s) for t in range(PROMPTS * GROUP) for s in kept.steps]
    statistics = Statistics.zeros(CPU)
    train(model, actions, ADVANTAGES, pairs, len(pairs), config, statistics, lambda: None)
    gradients = {name: p.grad.clone() for name, p in lora.parameters(model.module).items()}
    for parameter in lora.parameters(model.module).values():
        parameter.grad = None
    return gradients, statistics


@pytest.mark.parametrize("settings", [{}, {"ratio": "guard"}, {"kl_weight": 0.1}])
@pytest.mark.parametrize(("stochastic", "predictions"), [(ALL, 2 + 3 * 6), (WINDOW, 2 + 6)])
def test_sharing_the_first_stochastic_step_gives_the_same_gradient(
    learner: SD3Model, prompting: Prompting, stochastic: list[bool], predictions: int, settings: dict
) -> None:
    plan = plan_of(stochastic)
    kept = roll(learner, plan, prompting, means=True)
    nudge(learner, 0.005, seed=2)
    config = ObjectiveConfig(clip_range=0.5, **settings)
    shared, with_sharing = update(learner, plan, prompting, kept, config)
    alone, without = update(learner, replace(plan, shared_noise=False), prompting, kept, config)
    models = 2 if config.kl_weight else 1  # the base model predicts too
    assert with_sharing.evaluations == predictions * models
    assert with_sharing.actions == without.actions == 6 * sum(stochastic)
    assert without.evaluations == without.actions * models
    norm = torch.cat([g.flatten() for g in alone.values()]).norm()
    assert with_sharing.largest > 2e-5
    assert norm > 1e-4
    for name, value in alone.items():
        assert (shared[name] - value).norm() < 1e-5 * norm, name
    assert with_sharing.loss.item() == pytest.approx(without.loss.item(), abs=1e-5)


@pytest.mark.parametrize("kernel", ["dance", "dance-exact", "flow", "flow-exact", "cps"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_every_ratio_is_one_before_the_update(learner: SD3Model, prompting: Prompting, kernel: str, ratio: str) -> None:
    plan = plan_of(ALL, kernel=kernel, guidance=2.0)
    kept = roll(learner, plan, prompting, means=True)
    _, statistics = update(learner, plan, prompting, kept, ObjectiveConfig(ratio=ratio, batch_size=5))
    assert statistics.largest <= 1e-6
    assert statistics.clipped == 0
    assert statistics.actions == 24


@pytest.mark.parametrize("change", [lambda plan: replace(plan, eta=0.55), lambda plan: replace(plan, kernel="flow")])
def test_another_kernel_or_eta_in_replay_would_be_seen(
    learner: SD3Model, prompting: Prompting, change: Callable[[Plan], Plan]
) -> None:
    plan = plan_of(ALL)
    kept = roll(learner, plan, prompting)
    _, statistics = update(learner, change(plan), prompting, kept, ObjectiveConfig())
    assert statistics.largest > 1e-3


def test_base_is_the_reference_of_the_kl(learner: SD3Model, model: SD3Model, prompting: Prompting) -> None:
    kept = roll(learner, plan_of(WINDOW), prompting)
    _, statistics = update(learner, plan_of(WINDOW), prompting, kept, ObjectiveConfig(kl_weight=0.1))
    total = 0.0
    with torch.no_grad():
        for place, step in enumerate(kept.steps):
            rows, sigma = prompting.conditions.rows(PROMPT_OF), torch.full((6,), SIGMAS[step])
            velocities = [m.predict(kept.samples[place], sigma, rows) for m in (learner, model)]
            total += (velocities[0] - velocities[1]).square().mean((1, 2, 3)).sum().item()
    assert total > 1e-3
    assert statistics.kl.item() == pytest.approx(total, rel=1e-4)
