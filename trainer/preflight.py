"""A look at the model before the first iteration: can what it computes be trained, and is it what it samples?"""

import torch
from torch import Tensor

from .adapters import lora
from .diffusion import kernels
from .models import DiffusionModel
from .rollout import Plan, Prompting
from .utils.errors import RunFailed
from .utils.seeds import noise

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest relative difference of two forward passes; other types round more."""
COARSE = 0.05


def check(model: DiffusionModel, plan: Plan, prompting: Prompting, clip_range: float) -> None:
    """One prediction with and without gradient, and one action scored twice.

    Args:
        prompting: of any prompts; the first is taken.

    Raises:
        RunFailed: the two predictions differ, no gradient reaches the LoRA, or the ratio is not 1.
    """
    step = next((i for i, flag in enumerate(plan.stochastic) if flag), 0)
    first = torch.zeros(1, dtype=torch.long)
    conditions = prompting.conditions.rows(first).to(model.device)
    draw = lambda name: noise(model.latent_shape, 0, "opening", name)[None].to(model.device)  # noqa: E731
    latents, levels = draw("latents"), torch.tensor([plan.sigmas[step]], device=model.device)

    def predict() -> Tensor:
        return model.predict_guided(latents, levels, conditions, plan.guidance_scale, prompting.unconditional)

    with torch.no_grad():
        plain, sampled = model.plain(predict), predict()
    trained = predict()
    _compare(plain, trained.detach(), model)
    _require_gradient(trained, draw("direction"), model)
    sigma, sigma_next = plan.sigmas[step], plan.sigmas[step + 1]
    taken = kernels.step(plan.kernel, latents, sampled, sigma, sigma_next, plan.eta, noise=draw("step"))
    again = kernels.step(
        plan.kernel, latents, trained.detach(), sigma, sigma_next, plan.eta, next_sample=taken.next_sample
    )
    deviation = ((again.log_prob - taken.log_prob).exp() - 1).abs().max().item()
    if deviation > clip_range:
        raise RunFailed(
            f"the same action scored twice has a ratio {deviation:.2g} off 1, which is beyond objective.clip_range "
            f"{clip_range:g}: raise the clip range, or take float32 weights"
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
