"""Sampling trajectories in batches; a forward pass that several images share is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .diffusion import kernels
from .diffusion.solvers import SOLVERS

if TYPE_CHECKING:
    from .models import Conditions, DiffusionModel
    from .prompts.store import StoredConditions


@dataclass(frozen=True)
class Plan:
    """How the images of an iteration are sampled, and what is kept of their trajectories; the same for all groups.

    Attributes:
        kernel: of the stochastic steps.
        eta: strength of its noise.
        sigmas: T + 1 falling noise levels, of a flow model from 1 to 0.
        stochastic: T flags; the other steps are deterministic. The last is never stochastic.
        shared_noise: images of a group start from one noise.
        guidance_scale: classifier-free guidance; 1 is off.
        solver: of the deterministic steps, a name of `SOLVERS`.
        keep_means: keep the mean of each stochastic step.
        stop: steps that are taken; None for all. Fewer leave `Trajectories.final` at noise level `sigmas[stop]`.
    """

    kernel: str
    eta: float
    sigmas: list[float]
    stochastic: list[bool]
    shared_noise: bool
    guidance_scale: float = 1.0
    solver: str = "euler"
    keep_means: bool = False
    stop: int | None = None

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
        samples, next_samples: latents before and after each of them, `[S, B, ...]` float32.
        log_probs: `[S, B]` float32.
        means: `[S, B, ...]`, or None where the plan does not keep them.
        forwards: number of latents the network was run on.
    """

    final: Tensor
    steps: list[int]
    samples: Tensor
    next_samples: Tensor
    log_probs: Tensor
    means: Tensor | None
    forwards: int


@dataclass(frozen=True)
class Prompting:
    """Conditions of a set of prompts, in memory or in files, and those of the negative prompt that goes with them."""

    conditions: Conditions | StoredConditions
    unconditional: Conditions | None = None

    def rows(self, index: Tensor) -> Prompting:
        """The prompts of `index` (`[N]` long), repeated or left out as it says."""
        return Prompting(self.conditions.rows(index), self.unconditional)

    def to(self, device: torch.device) -> Prompting:
        unconditional = None if self.unconditional is None else self.unconditional.to(device)
        return Prompting(self.conditions.to(device), unconditional)


class Report(Protocol):
    """Told how far a phase is, before each of its steps; may raise StopRequested."""

    def __call__(self, phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
        """
        Args:
            phase: such as rollout.
            step: from 0.
            steps: how many the phase has.
            aligned: whether every process gets to this very step, so that all can agree to stop here.
        """


def silent(phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
    """A `Report` that nobody reads."""


def unmatched(forwards: int) -> int:
    """Without sharding, a rank makes as many forward passes as it needs itself."""
    return forwards


@dataclass(frozen=True)
class Execution:
    """How this process runs the network.

    Attributes:
        batch_size: latents per forward pass where no gradient is needed.
        match: maps the forward passes this rank needs to the number it must make; under FSDP, the maximum over ranks.
            Collective: must precede the first forward pass.
        report: told how far a phase is.
    """

    batch_size: int = 96
    match: Callable[[int], int] = unmatched
    report: Report = silent


def predict(
    model: DiffusionModel,
    latents: Tensor,
    sigma: float,
    prompting: Prompting,
    index: Tensor,
    plan: Plan,
    execution: Execution = Execution(),
) -> Tensor:
    """Predictions of all rows, `batch_size` at a time; row i belongs to prompt `index[i]`."""
    parts, chunks = [], torch.arange(len(latents), device=latents.device).split(execution.batch_size)
    spare = [chunks[0][:1]] * (execution.match(len(chunks)) - len(chunks))
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
    execution: Execution = Execution(),
) -> Trajectories:
    """Sample B trajectories.

    With shared noise, all images of a group have the same latents until the first stochastic step, so up to and
    including it the network runs once per prompt.

    Args:
        prompting: conditions of U prompts.
        prompt_of: `[B]` long, each trajectory's prompt, 0 <= . < U.
        initial: noise, `[U, ...]` with shared noise, else `[B, ...]`.
        step_noise: gives a stochastic step's noise, `[B, ...]`.
        execution: its phase is reported as `rollout`, before every step.
    """
    per_prompt = plan.shared_noise  # one row per prompt, until the rows of a group differ
    index = torch.arange(len(initial), device=prompt_of.device) if per_prompt else prompt_of
    latents, forwards, solver = initial.float(), 0, SOLVERS[plan.solver](model.process)
    starts, ends, log_probs, means = [], [], [], []
    steps = list(zip(plan.sigmas[:-1], plan.sigmas[1:], strict=True))[: plan.stop]
    for i, (sigma, sigma_next) in enumerate(steps):
        execution.report("rollout", i, len(steps), aligned=True)
        prediction = predict(model, latents, sigma, prompting, index, plan, execution)
        forwards += len(latents)
        if i == plan.shared_step:
            latents, prediction, index, per_prompt = latents[prompt_of], prediction[prompt_of], prompt_of, False
        if not plan.stochastic[i]:
            latents = solver.step(latents, prediction, sigma, sigma_next)
            continue
        noise = step_noise(i)
        step = kernels.step(
            plan.kernel, latents, prediction, sigma, sigma_next, plan.eta, noise=noise, process=model.process
        )
        solver.reset()
        starts.append(latents)
        ends.append(step.next_sample)
        log_probs.append(step.log_prob)
        if plan.keep_means:
            means.append(step.mean)
        latents = step.next_sample
    return Trajectories(
        final=latents[prompt_of] if per_prompt else latents,
        steps=[i for i, flag in enumerate(plan.stochastic[: plan.stop]) if flag],
        samples=_stack(starts),
        next_samples=_stack(ends),
        log_probs=_stack(log_probs),
        means=_stack(means) if plan.keep_means else None,
        forwards=forwards,
    )


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if parts else torch.empty(0)
