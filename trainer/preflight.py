"""A look at the model before the first iteration: can what it computes be trained, and is it what it samples?"""

import torch
from torch import Tensor

from .adapters import lora
from .models import DiffusionModel
from .objectives import Objective
from .objectives.advantage import Advantages
from .objectives.base import Experience
from .rollout import Execution, Plan, Prompting, sample
from .utils.errors import RunFailed
from .utils.seeds import noise

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative difference of two forward passes; other types round more."""
COARSE = 0.05


def check(model: DiffusionModel, objective: Objective, prompting: Prompting, execution: Execution) -> None:
    """One prediction with and without gradient, and what the objective itself looks at.

    Args:
        objective: set up.
        prompting: of any prompts; the first is taken.

    Raises:
        RunFailed: the two predictions differ, no gradient reaches the LoRA, or the objective cannot train it.
    """
    plan, prompting = objective.plan(model, 0), prompting.rows(torch.zeros(1, dtype=torch.long)).to(model.device)
    _check_prediction(model, plan, prompting)
    objective.preflight(_two_images(model, plan, prompting, execution))


def _draw(model: DiffusionModel, *name: object) -> Tensor:
    return noise(model.latent_shape, 0, "preflight", *name).to(model.device)


def _check_prediction(model: DiffusionModel, plan: Plan, prompting: Prompting) -> None:
    latents, levels = _draw(model, "latents")[None], torch.tensor([plan.sigmas[0]], device=model.device)

    def predict() -> Tensor:
        return model.predict_guided(latents, levels, prompting.conditions, plan.guidance_scale, prompting.unconditional)

    with torch.no_grad():
        plain = model.plain(predict)
    trained = predict()
    _compare(plain, trained.detach(), model)
    _require_gradient(trained, _draw(model, "direction")[None], model)


def _two_images(model: DiffusionModel, plan: Plan, prompting: Prompting, execution: Execution) -> Experience:
    """Two images of one prompt, after the first step that an iteration may train: one is better than the other."""
    first = next((i for i, flag in enumerate(plan.stochastic) if flag), 0)
    short = Plan(
        plan.kernel,
        plan.eta,
        plan.sigmas[first : first + 2],
        plan.stochastic[first : first + 1],
        shared_noise=False,
        guidance_scale=plan.guidance_scale,
        keep_means=plan.keep_means,
    )
    prompt_of = torch.zeros(2, dtype=torch.long, device=model.device)
    draw = lambda name: torch.stack([_draw(model, name, i) for i in range(2)])  # noqa: E731
    trajectories = sample(model, short, prompting, prompt_of, draw("start"), lambda _: draw("step"), execution)
    advantages = Advantages.none(1, 2)
    advantages.values[0] = torch.tensor([1.0, -1.0])
    return Experience(
        iteration=0,
        plan=short,
        prompting=prompting,
        members=[(0, 0), (0, 1)],
        prompt_of=prompt_of,
        texts=["", ""],
        trajectories=trajectories,
        advantages=advantages,
        active=torch.ones(1, 2, dtype=torch.bool),
    )


def _compare(plain: Tensor, trained: Tensor, model: DiffusionModel) -> None:
    difference = (plain - trained).norm().item() / max(plain.norm().item(), 1e-12)
    kinds = {parameter.dtype for parameter in model.module.parameters() if not parameter.requires_grad}
    allowed = max((TOLERANCE.get(kind, COARSE) for kind in kinds), default=COARSE)
    if not difference <= allowed:
        raise RunFailed(
            f"the model computes something else in training than in sampling (they differ by {difference:.2g} of its "
            f"output, and rounding explains {allowed:g}): this architecture cannot be trained yet"
        )


def _require_gradient(output: Tensor, direction: Tensor, model: DiffusionModel) -> None:
    parameters = lora.parameters(model.module)
    ups = {name: p for name, p in parameters.items() if ".lora_B." in name}  # the others' gradient is 0 at the start
    gradients = torch.autograd.grad((output * direction).sum(), list(ups.values()), allow_unused=True)
    reached = sum(1 for gradient in gradients if gradient is not None and bool(gradient.any()))
    if not reached or any(gradient is not None and not gradient.isfinite().all() for gradient in gradients):
        raise RunFailed(f"the gradient reaches {reached} of the LoRA's {len(ups)} layers, or is not finite")
