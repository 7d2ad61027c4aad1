"""Checks before the first iteration that training and inference agree, and that gradients reach the LoRA."""

from dataclasses import replace

import torch
from torch import Tensor

from .models import DiffusionModel
from .objectives.advantage import Advantages
from .objectives.base import RolloutBatch
from .objectives.updater import TRIES, Updater
from .rollout import Plan, Prompting, sample
from .utils.errors import RunFailed
from .utils.seeds import noise

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative difference between two forward passes; other dtypes round more (COARSE)."""
COARSE = 0.05
COMPILED = {torch.float32: 1e-3}
"""Largest relative difference between gradients with and without compiled blocks; other dtypes round more (COARSE)."""
LARGER = 64.0
"""Factor between the two loss scales whose gradients are compared."""
LEAST_COSINE = 0.99


def check(updater: Updater, prompting: Prompting, texts: list[str]) -> None:
    """Compare a prediction with and without gradient, check the gradient of the loss, and call `Objective.preflight`.

    Args:
        prompting, texts: of any prompts; the first is used.

    Raises:
        RunFailed: the predictions differ, no gradient reaches the LoRA, the gradient is dominated by rounding, or the
            objective cannot train the model.
    """
    objective, model = updater.objective, updater.model
    plan, prompting = objective.plan(model, 0), prompting.rows(torch.zeros(1, dtype=torch.long)).to(model.device)
    _check_prediction(model, plan, prompting)
    rollout = _rollout(updater, plan, prompting, texts[0])
    _check_gradient(updater, rollout, plan)
    objective.preflight(rollout)


def _draw(model: DiffusionModel, *name: object) -> Tensor:
    return noise(model.latent_shape, 0, "preflight", *name).to(model.device)


def _check_prediction(model: DiffusionModel, plan: Plan, prompting: Prompting) -> None:
    first = next(level for level in plan.sigmas if model.is_trained_at(level))
    latents, levels = _draw(model, "latents")[None], torch.tensor([first], device=model.device)

    def predict() -> Tensor:
        return model.predict_guided(latents, levels, prompting.conditions, plan.guidance_scale, prompting.unconditional)

    with torch.no_grad():
        plain = model.plain(predict)
    trained = predict().detach()
    difference = (plain - trained).norm().item() / max(plain.norm().item(), 1e-12)
    allowed = max((TOLERANCE.get(kind, COARSE) for kind in frozen_dtypes(model)), default=COARSE)
    if not difference <= allowed:
        raise RunFailed(
            f"the model computes something else in training than in sampling (they differ by {difference:.2g} of its "
            f"output, and rounding explains {allowed:g}): this architecture cannot be trained yet"
        )


def check_compiled(updater: Updater, prompting: Prompting) -> None:
    """Compare the gradient of the compiled network with that of the same one uncompiled, at the size of a batch.

    On a CPU PyTorch 2.11 compiles the blocks of SD1.5 for one row to a gradient that is 3 to 6% off, and 20% in some
    layers, while the prediction is right (benchmarks/RESULTS.md).

    Raises:
        RunFailed: they differ.
    """
    model, options = updater.model, updater.objective.config
    plan, rows = updater.objective.plan(model, 0), options.objective.batch_size
    only = prompting.rows(torch.zeros(rows, dtype=torch.long)).to(model.device)
    latents = torch.stack([_draw(model, "compiled", i) for i in range(rows)])
    first = next(level for level in plan.sigmas if model.is_trained_at(level))
    levels, scale = torch.full((rows,), first, device=model.device), updater.first_scale(rows)
    parameters = updater.policy.parameters.values()

    def gradient() -> Tensor:
        found = model.predict_guided(latents, levels, only.conditions, plan.guidance_scale, only.unconditional)
        (found.float().square().mean() * scale).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        updater.policy.optimizer.zero_grad(set_to_none=True)
        return torch.cat([each.flatten() for each in gradients])

    compiled = gradient()
    with torch.compiler.set_stance("force_eager"):
        plain = gradient()
    difference = ((compiled - plain).norm() / plain.norm().clamp(min=1e-12)).item()
    allowed = max(COMPILED.get(kind, COARSE) for kind in frozen_dtypes(model))
    if not difference <= allowed:
        raise RunFailed(
            f"the gradient of the compiled network differs from the uncompiled one's by {difference:.2g} of its size, "
            f"and rounding explains {allowed:g}: set runtime.compile to false"
        )


def frozen_dtypes(model: DiffusionModel) -> set[torch.dtype]:
    """The dtypes of the frozen weights."""
    return {parameter.dtype for parameter in model.module.parameters() if not parameter.requires_grad}


def _rollout(updater: Updater, plan: Plan, prompting: Prompting, text: str) -> RolloutBatch:
    """A rollout of two images of one prompt.

    They are sampled in one step: the first stochastic step, or one step over all deterministic ones.
    """
    objective, model = updater.objective, updater.model
    if not objective.needs_rollout:
        return objective.collect(0)
    first = next((i for i, flag in enumerate(plan.stochastic) if flag), None)
    start, end = (0, len(plan.stochastic) if plan.stop is None else plan.stop) if first is None else (first, first + 1)
    levels = [plan.sigmas[start], plan.sigmas[end]] if end > start else [plan.sigmas[start]]
    flags = [first is not None][: len(levels) - 1]
    step = replace(plan, sigmas=levels, stochastic=flags, shared_noise=False, stop=None, windows=None, guided=None)
    prompt_of = torch.zeros(2, dtype=torch.long, device=model.device)
    draw = lambda name: torch.stack([_draw(model, name, i) for i in range(2)])  # noqa: E731
    trajectories = sample(model, step, prompting, prompt_of, draw("start"), lambda _: draw("step"), updater.execution)
    config = objective.config.rollout
    advantages = Advantages.none(config.prompts_per_iteration, config.group_size)
    advantages.values[:, 0::2], advantages.values[:, 1::2] = 1.0, -1.0
    only = [i == first for i in range(len(plan.stochastic))]
    return RolloutBatch(
        iteration=0,
        plan=replace(plan, stochastic=only, shared_noise=False, windows=None),
        prompting=prompting,
        members=[(0, 0), (0, 1)],
        prompt_of=prompt_of,
        texts=[text, text],
        trajectories=replace(trajectories, steps=[] if first is None else [first]),
        advantages=advantages,
        active=torch.ones_like(advantages.values, dtype=torch.bool),
    )


def _check_gradient(updater: Updater, rollout: RolloutBatch, plan: Plan) -> None:
    """Compare the gradients under the loss scale of the run and under a larger one; they differ if rounding matters."""
    items = next(iter(updater.objective.items(rollout)), [])
    if not items:
        return
    total = len(next(iter(updater.objective.items(replace(rollout, plan=plan)))))  # with all steps of a real rollout
    scale = updater.first_scale(total)

    def gradient(scale: float) -> Tensor:
        return torch.cat([g.flatten() for g in updater.gradient(items, rollout, scale, total)]).double() / scale

    for _ in range(TRIES):
        found = gradient(scale)
        if found.isfinite().all():
            break
        scale /= 2
    else:
        raise RunFailed("the gradient of the LoRA is not finite: this model cannot be trained yet")
    if not found.any():
        raise RunFailed("no gradient reaches the LoRA: this model cannot be trained yet")
    larger = scale * LARGER
    while larger > scale and not (other := gradient(larger)).isfinite().all():
        larger /= 2
    cosine = _cosine(found, other) if larger > scale else 1.0
    if cosine < LEAST_COSINE:
        raise RunFailed(
            f"the gradient is lost in rounding (its cosine to one of {larger / scale:g} times the size is "
            f"{cosine:.2f}): load the base model in bfloat16 or float32"
        )


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity; unlike torch's, also for vectors with a norm below 1e-8."""
    return (a / a.norm() @ (b / b.norm())).item()
