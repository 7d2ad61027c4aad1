"""Rollouts of a tiny SD3 model: equal to diffusers' pipeline, and exact where model calls are saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stages import gradients_of, items_of, rollout_of, updater_for, with_options
from torch import Tensor

from trainer.adapters import lora
from trainer.config import ModelConfig
from trainer.diffusion.process import FLOW
from trainer.diffusion.solvers import DPMSolver2M
from trainer.models import DiffusionModel
from trainer.models.diffusers.sd3 import SD3Model
from trainer.objectives.base import Totals
from trainer.objectives.updater import Updater
from trainer.rollout import Execution, Plan, Prompting, Trajectories, sample
from trainer.utils.errors import StopRequested

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
def updater(description: ModelConfig) -> Updater:
    """The model with a LoRA that does something, and what trains it."""
    model = SD3Model.load(description, CPU)
    updater = updater_for(model, {"name": "grpo"}, lora={"rank": 2, "alpha": 4})
    nudge(model, 0.1, seed=1)
    return updater


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
    plan = replace(plan, keep_means=means)
    return sample(model, plan, prompting, PROMPT_OF, initial, step_noise, Execution(batch))


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
    mine = sample(model, plan, prompting, torch.arange(PROMPTS), starts(), step_noise, Execution())
    assert mine.final.std() > 0.1
    close(mine.final, generate("latent"), 1e-4)
    images = model.decode(mine.final)
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
    ("stochastic", "forwards"),
    [
        (ALL, PROMPTS + (STEPS - 1) * PROMPTS * GROUP),
        (WINDOW, 2 * PROMPTS + 3 * PROMPTS * GROUP),
        ([False] * STEPS, STEPS * PROMPTS),
    ],
)
def test_shared_prefix_changes_nothing_but_the_number_of_calls(
    model: SD3Model, prompting: Prompting, stochastic: list[bool], forwards: int, guidance: float
) -> None:
    shared = roll(model, plan_of(stochastic, True, guidance=guidance), prompting, means=True)
    alone = roll(model, plan_of(stochastic, False, guidance=guidance), prompting, means=True)
    assert shared.forwards == forwards
    assert alone.forwards == STEPS * PROMPTS * GROUP
    close(shared.final, alone.final, 1e-5)
    if any(stochastic):
        for name in ("samples", "next_samples", "means", "log_probs"):
            close(getattr(shared, name), getattr(alone, name), 1e-5)


@pytest.mark.parametrize("solver", ["euler", "2m"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_window_per_prompt_is_the_rollout_of_each_prompt_with_its_own_window(
    model: SD3Model, prompting: Prompting, shared: bool, solver: str
) -> None:
    windows = [[False, False, True, True, False], [False, True, True, False, False]]
    union = [a or b for a, b in zip(*windows, strict=True)]
    plan = replace(plan_of(union, shared), windows=windows, keep_means=True, solver=solver)
    initial = starts() if shared else starts()[PROMPT_OF]
    mixed = sample(model, plan, prompting, PROMPT_OF, initial, step_noise, Execution(4), slots=[0, 1])
    assert mixed.steps == [1, 2, 3]
    forwards = 0
    for prompt, window in enumerate(windows):
        alone = roll(model, replace(plan_of(window, shared), solver=solver), prompting, means=True)
        forwards += alone.forwards // PROMPTS
        rows = prompt == PROMPT_OF
        close(mixed.final[rows], alone.final[rows], 1e-5)
        for place, step in enumerate(mixed.steps):
            for name in ("samples", "next_samples", "means", "log_probs"):
                found = getattr(mixed, name)[place, rows]
                if window[step]:
                    close(found, getattr(alone, name)[alone.steps.index(step), rows], 1e-5)
                else:
                    assert not found.any(), "nothing is kept of a deterministic step"
    assert mixed.forwards == forwards
    assert [plan.shared_step(slot) for slot in (0, 1)] == ([2, 1] if shared else [-1, -1])


def test_model_is_called_exactly_as_often_as_counted(model: SD3Model, prompting: Prompting) -> None:
    seen = []
    handle = model.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        counted = roll(model, plan_of(WINDOW), prompting, batch=4).forwards
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

    kept = sample(model, plan_of(WINDOW), prompting, PROMPT_OF, starts(), noise, Execution())
    assert asked == kept.steps == [1, 2]
    assert len(kept.samples) == len(kept.next_samples) == len(kept.log_probs) == 2

    def euler(x: Tensor, step: int) -> Tensor:
        sigma, conditions = torch.full((len(x),), SIGMAS[step]), prompting.conditions.rows(PROMPT_OF)
        with torch.no_grad():
            return x + model.predict(x, sigma, conditions) * (SIGMAS[step + 1] - SIGMAS[step])

    close(kept.samples[0], euler(starts()[PROMPT_OF], 0), 1e-5)
    close(kept.final, euler(euler(kept.next_samples[1], 3), 4), 1e-5)


def test_a_rollout_that_stops_early_is_the_beginning_of_the_whole(model: SD3Model, prompting: Prompting) -> None:
    whole, part = roll(model, plan_of(ALL), prompting), roll(model, replace(plan_of(ALL), stop=2), prompting)
    assert part.steps == [0, 1]
    assert part.forwards == PROMPTS + PROMPTS * GROUP
    for name in ("samples", "next_samples", "log_probs"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:2])
    assert torch.equal(part.final, whole.samples[2]), "the latents at the third noise level"


def test_every_step_is_reported_before_it_is_taken_and_may_be_the_last(model: SD3Model, prompting: Prompting) -> None:
    seen: list[tuple] = []

    def report(phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
        seen.append((phase, step, steps, aligned))
        if step == 3:
            raise StopRequested

    with pytest.raises(StopRequested):
        sample(model, plan_of(ALL), prompting, PROMPT_OF, starts(), step_noise, Execution(report=report))
    assert seen == [("rollout", step, STEPS, True) for step in range(4)]


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


# ------------------------------------------------------------------------------------------------------------ update


ADVANTAGES = [1.2, -0.4, -0.8, 0.3, 0.9, -1.2]
Grads = dict[str, Tensor]


def update(
    updater: Updater, plan: Plan, prompting: Prompting, kept: Trajectories, optimizer_steps: int = 1, **options: object
) -> tuple[Grads, Totals]:
    """Gradients and totals of all actions of a rollout."""
    rollout = rollout_of(plan, prompting, kept, PROMPT_OF, ADVANTAGES, optimizer_steps=optimizer_steps)
    pairs = [(t, s) for t in range(PROMPTS * GROUP) for s in kept.steps]
    totals = with_options(updater, options).accumulate(items_of(rollout, pairs), rollout)
    return gradients_of(updater), totals


@pytest.mark.parametrize("settings", [{}, {"ratio": "guard"}, {"kl_weight": 0.1}])
@pytest.mark.parametrize(("stochastic", "predictions"), [(ALL, 2 + 3 * 6), (WINDOW, 2 + 6)])
def test_sharing_the_first_stochastic_step_gives_the_same_gradient(
    updater: Updater, prompting: Prompting, stochastic: list[bool], predictions: int, settings: dict
) -> None:
    plan = plan_of(stochastic)
    kept = roll(updater.model, plan, prompting, means=True)
    nudge(updater.model, 0.005, seed=2)
    shared, with_sharing = update(updater, plan, prompting, kept, clip_range=0.5, **settings)
    alone, without = update(updater, replace(plan, shared_noise=False), prompting, kept, clip_range=0.5, **settings)
    models = 2 if "kl_weight" in settings else 1  # the base model predicts too
    assert with_sharing.forwards == predictions * models
    assert with_sharing.items == without.items == 6 * sum(stochastic)
    assert without.forwards == without.items * models
    norm = torch.cat([g.flatten() for g in alone.values()]).norm()
    assert with_sharing.peaks["deviation"] > 2e-5
    assert norm > 1e-4
    for name, value in alone.items():
        assert (shared[name] - value).norm() < 1e-5 * norm, name
    assert with_sharing.loss == pytest.approx(without.loss, abs=1e-5)


@pytest.mark.parametrize("kernel", ["dance", "dance-exact", "flow", "flow-exact", "cps"])
@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_every_ratio_is_one_before_the_update(updater: Updater, prompting: Prompting, kernel: str, ratio: str) -> None:
    plan = plan_of(ALL, kernel=kernel, guidance=2.0)
    kept = roll(updater.model, plan, prompting, means=True)
    _, totals = update(updater, plan, prompting, kept, ratio=ratio, batch_size=5)
    assert totals.peaks["deviation"] <= 1e-6
    assert totals.sums["clipped"] == 0
    assert totals.items == 24


@pytest.mark.parametrize("change", [lambda plan: replace(plan, eta=0.55), lambda plan: replace(plan, kernel="flow")])
def test_another_kernel_or_eta_in_replay_would_be_seen(
    updater: Updater, prompting: Prompting, change: Callable[[Plan], Plan]
) -> None:
    plan = plan_of(ALL)
    kept = roll(updater.model, plan, prompting)
    _, totals = update(updater, change(plan), prompting, kept)
    assert totals.peaks["deviation"] > 1e-3


def test_base_is_the_reference_of_the_kl(updater: Updater, model: SD3Model, prompting: Prompting) -> None:
    kept = roll(updater.model, plan_of(WINDOW), prompting)
    _, totals = update(updater, plan_of(WINDOW), prompting, kept, kl_weight=0.1)
    expected = 0.0
    with torch.no_grad():
        for index, step in enumerate(kept.steps):
            rows, sigma = prompting.conditions.rows(PROMPT_OF), torch.full((6,), SIGMAS[step])
            velocities = [m.predict(kept.samples[index], sigma, rows) for m in (updater.model, model)]
            expected += (velocities[0] - velocities[1]).square().mean((1, 2, 3)).sum().item()
    assert expected > 1e-3
    assert totals.sums["kl"] == pytest.approx(expected, rel=1e-4)


def same_gradients(ours: Grads, theirs: Grads, tolerance: float) -> None:
    ours, theirs = (torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, theirs))
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_the_first_optimizer_step_is_on_policy_whatever_the_batches_of_the_rollout_rounded_to(
    updater: Updater, prompting: Prompting, ratio: str
) -> None:
    plan = plan_of(ALL, guidance=2.0)
    kept = roll(updater.model, plan, prompting, means=True)
    expected, _ = update(updater, plan, prompting, kept, ratio=ratio, clip_range=0.5)
    # A rollout whose log-probabilities are off by more than the clip range, some up and some down.
    off = 0.01 * torch.randn(kept.log_probs.shape, generator=torch.Generator().manual_seed(2))
    rough = replace(kept, log_probs=kept.log_probs + off, means=None)
    gradients, totals = update(updater, plan, prompting, rough, ratio=ratio, clip_range=1e-4, optimizer_steps=0)
    assert totals.sums["ratio"] == totals.items
    assert totals.peaks["deviation"] == totals.sums["clipped"] == 0
    assert totals.peaks["rollout_deviation"] == pytest.approx(off.neg().exp().sub(1).abs().max().item(), rel=1e-3)
    same_gradients(gradients, expected, 1e-5)
    # In later steps, ratios to such log-probabilities clip gradients away that should be there.
    spoilt, totals = update(updater, plan, prompting, replace(rough, means=kept.means), ratio=ratio, clip_range=1e-4)
    assert totals.sums["clipped"] > 0
    with pytest.raises(AssertionError):
        same_gradients(spoilt, expected, 1e-2)


@pytest.mark.parametrize("ratio", ["plain", "guard"])
def test_later_steps_may_score_the_old_policy_again_in_their_own_batches(
    updater: Updater, prompting: Prompting, ratio: str
) -> None:
    plan = plan_of(WINDOW)
    kept = roll(updater.model, plan, prompting, means=True)
    updater.policy.old = {name: p.detach().clone() for name, p in updater.policy.parameters.items()}
    nudge(updater.model, 0.005, seed=2)
    options = {"ratio": ratio, "clip_range": 0.5, "updates": 2}
    expected, stored = update(updater, plan, prompting, kept, **options)
    bare = replace(kept, log_probs=kept.log_probs + 1, means=None)
    again, totals = update(updater, plan, prompting, bare, **options, old_log_prob="update")
    assert totals.forwards == 2 * stored.forwards
    assert stored.peaks["deviation"] > 2e-5
    assert totals.peaks["deviation"] == pytest.approx(stored.peaks["deviation"], rel=0.02)
    same_gradients(again, expected, 1e-5)
