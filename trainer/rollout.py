"""Sampling trajectories in batches, with every model call made once where its answer is shared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .diffusion import kernels
from .diffusion.solvers import SOLVERS
from .models import Conditions, DiffusionModel


@dataclass(frozen=True)
class Plan:
    """What the trajectories of an iteration look like; common to all groups.

    Attributes:
        sigmas: T + 1 falling noise levels, of a flow model from 1 to 0.
        stochastic: T flags; the other steps are deterministic. The last is never stochastic.
        shared_noise: images of a group start from one noise.
        solver: of the deterministic steps, a name of `SOLVERS`.
    """

    kernel: str
    eta: float
    sigmas: list[float]
    stochastic: list[bool]
    shared_noise: bool
    guidance_scale: float = 1.0
    solver: str = "euler"

    @property
    def shared_step(self) -> int:
        """The step whose latents are still common to a group: the first stochastic one; -1 where none is."""
        if not self.shared_noise:
            return -1
        return self.stochastic.index(True) if any(self.stochastic) else len(self.stochastic)


@dataclass(frozen=True)
class Trajectories:
    """The S stochastic steps of B trajectories, and what they led to.

    Attributes:
        final: latents of the images, `[B, ...]` float32.
        steps: the stochastic steps, ascending.
        samples, next_samples: where each of them starts and ends, `[S, B, ...]` float32.
        log_probs: `[S, B]` float32.
        means: `[S, B, ...]`, or None where not asked for.
        evaluations: number of latents the model was run on.
    """

    final: Tensor
    steps: list[int]
    samples: Tensor
    next_samples: Tensor
    log_probs: Tensor
    means: Tensor | None
    evaluations: int


@dataclass(frozen=True)
class Prompting:
    """The conditions of a set of prompts and the negative prompt that goes with them."""

    conditions: Conditions
    unconditional: Conditions | None = None


Calls = Callable[[int], int]
"""How many calls of the network a process makes where it needs so many itself: with a sharded one, as many as all."""


def own(calls: int) -> int:
    """Where every process has its own network, it calls it as often as it needs."""
    return calls


def predict(
    model: DiffusionModel,
    latents: Tensor,
    sigma: float,
    prompting: Prompting,
    index: Tensor,
    plan: Plan,
    batch: int,
    calls: Calls = own,
) -> Tensor:
    """Predictions of all rows, `batch` at a time; row i belongs to prompt `index[i]`."""
    parts, chunks = [], torch.arange(len(latents), device=latents.device).split(batch)
    spare = [chunks[0][:1]] * (calls(len(chunks)) - len(chunks))  # asked first: from the first call on, all go in step
    for rows in [*chunks, *spare]:
        levels = torch.full((len(rows),), sigma, device=latents.device)
        conditions = prompting.conditions.rows(index[rows])
        parts.append(
            model.predict_guided(latents[rows], levels, conditions, plan.guidance_scale, prompting.unconditional)
        )
    return torch.cat(parts[: len(chunks)])


@torch.no_grad()
def sample(
    model: DiffusionModel,
    plan: Plan,
    prompting: Prompting,
    prompt_of: Tensor,
    initial: Tensor,
    step_noise: Callable[[int], Tensor],
    *,
    batch: int,
    keep_means: bool = False,
    between_calls: Callable[[], None] = lambda: None,
    calls: Calls = own,
) -> Trajectories:
    """Sample B trajectories.

    With shared noise, all members of a group have the same latents until the first stochastic step, so up to and
    including it the model runs once per prompt.

    Args:
        prompting: conditions of U prompts.
        prompt_of: `[B]` long, each trajectory's prompt, 0 <= . < U.
        initial: noise, `[U, ...]` with shared noise, else `[B, ...]`.
        step_noise: gives a stochastic step's noise, `[B, ...]`.
        batch: latents per model call.
        between_calls: called before every step, and may raise.
        calls: of the network in a step.
    """
    index = torch.arange(len(initial), device=prompt_of.device) if plan.shared_noise else prompt_of
    latents, evaluations = initial.float(), 0
    solver = SOLVERS[plan.solver](model.process)
    starts, ends, log_probs, means = [], [], [], []
    for i, (sigma, sigma_next) in enumerate(zip(plan.sigmas[:-1], plan.sigmas[1:], strict=True)):
        between_calls()
        prediction = predict(model, latents, sigma, prompting, index, plan, batch, calls)
        evaluations += len(latents)
        if i == plan.shared_step:
            latents, prediction, index = latents[prompt_of], prediction[prompt_of], prompt_of
        if not plan.stochastic[i]:
            latents = solver.step(latents, prediction, sigma, sigma_next)
            continue
        step = kernels.step(plan.kernel, latents, prediction, sigma, sigma_next, plan.eta, noise=step_noise(i))
        solver.reset()
        starts.append(latents)
        ends.append(step.next_sample)
        log_probs.append(step.log_prob)
        if keep_means:
            means.append(step.mean)
        latents = step.next_sample
    return Trajectories(
        final=latents if index is prompt_of else latents[prompt_of],
        steps=[i for i, flag in enumerate(plan.stochastic) if flag],
        samples=_stack(starts),
        next_samples=_stack(ends),
        log_probs=_stack(log_probs),
        means=_stack(means) if keep_means else None,
        evaluations=evaluations,
    )


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if parts else torch.empty(0)


@torch.no_grad()
def decode(model: DiffusionModel, latents: Tensor, batch: int) -> Tensor:
    """Images `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1] of final latents, `batch` at a time."""
    return torch.cat([model.decode(part) for part in latents.split(batch)])
