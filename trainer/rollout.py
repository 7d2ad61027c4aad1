"""Rollout: samples trajectories in batches. Steps whose latents are equal within a group are computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .diffusion import kernels
from .diffusion.solvers import SOLVERS, Solver

if TYPE_CHECKING:
    from .models import Conditions, DiffusionModel
    from .prompts.store import StoredConditions


@dataclass(frozen=True)
class Plan:
    """How the images of an iteration are sampled, and which parts of the trajectories are stored.

    Attributes:
        kernel: transition kernel of the stochastic steps.
        eta: strength of its noise.
        sigmas: T + 1 decreasing noise levels, for a flow model from 1 to 0.
        stochastic: T flags; the other steps are deterministic. The last is never stochastic.
        shared_noise: whether the images of a group start from the same noise.
        guidance_scale: classifier-free guidance; 1 is off.
        solver: solver of the deterministic steps, a name in `SOLVERS`.
        keep_means: whether to store the mean of each stochastic step.
        stop: number of steps to take; None for all. Fewer leave `Trajectories.final` at noise level `sigmas[stop]`.
        windows: T flags for each prompt slot, if the stochastic steps of prompts differ; `stochastic` is then their
            union.
        guided: T flags for the steps that use guidance; None for all.
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
    windows: list[list[bool]] | None = None
    guided: list[bool] | None = None

    def at(self, step: int) -> Plan:
        """The plan with the guidance of a step."""
        return self if self.guided is None or self.guided[step] else replace(self, guidance_scale=1.0)

    def stochastic_of(self, slot: int) -> list[bool]:
        """T flags of the prompt in this slot."""
        return self.stochastic if self.windows is None else self.windows[slot]

    def shared_step(self, slot: int) -> int:
        """The step whose latents are shared by a group: its first stochastic one; -1 if nothing is shared."""
        flags = self.stochastic_of(slot)
        return flags.index(True) if self.shared_noise and any(flags) else -1


@dataclass(frozen=True)
class Trajectories:
    """The S stochastic steps and the final latents of B trajectories.

    Attributes:
        final: latents of the images, `[B, ...]` float32.
        steps: the stochastic steps, ascending.
        samples, next_samples: latents before and after each of these steps, `[S, B, ...]` float32; here and below, 0
            where the step of a trajectory is deterministic.
        log_probs: `[S, B]` float32.
        means: `[S, B, ...]`, or None without `Plan.keep_means`.
        forwards: forward passes of the network, one per latent.
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
    """Conditioning of a set of prompts, in memory or in a file, and of the negative prompt."""

    conditions: Conditions | StoredConditions
    unconditional: Conditions | None = None

    def rows(self, index: Tensor) -> Prompting:
        """Select prompts by `index` (`[N]` long)."""
        return Prompting(self.conditions.rows(index), self.unconditional)

    def to(self, device: torch.device) -> Prompting:
        unconditional = None if self.unconditional is None else self.unconditional.to(device)
        return Prompting(self.conditions.to(device), unconditional)


class Report(Protocol):
    """A callback for the progress of a phase, called before each of its steps; may raise StopRequested."""

    def __call__(self, phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
        """
        Args:
            phase: name of the phase, such as `rollout`.
            step: number of the step, from 0.
            steps: number of steps of the phase.
            aligned: whether every process reaches this step, so that all can stop together here.
        """


def silent(phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
    """A `Report` that does nothing."""


def unmatched(forwards: int) -> int:
    """The `match` without sharding: a rank makes only the forward passes that it needs."""
    return forwards


@dataclass(frozen=True)
class Execution:
    """How this process runs the network.

    Attributes:
        batch_size: latents per forward pass where no gradient is needed.
        match: maps the forward passes this rank needs to the number it must make; under FSDP, the maximum over ranks.
            Collective: must precede the first forward pass.
        report: callback for progress.
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
    """Predictions for all rows, in batches of `Execution.batch_size`; row i has prompt `index[i]`."""
    parts, chunks = [], torch.arange(len(latents), device=latents.device).split(execution.batch_size)
    dummies = [chunks[0][:1]] * (execution.match(len(chunks)) - len(chunks))
    for rows in [*chunks, *dummies]:
        levels = torch.full((len(rows),), sigma, device=latents.device)
        conditions = prompting.conditions.rows(index[rows])
        parts.append(
            model.predict_guided(latents[rows], levels, conditions, plan.guidance_scale, prompting.unconditional)
        )
    return torch.cat(parts[: len(chunks)])


class PartialTrajectories:
    """Trajectories with the same stochastic steps, during sampling.

    With shared noise, all images of a group have the same latents until the first stochastic step, so up to and
    including it there is one row per prompt.

    Attributes:
        rows: `[N]` long, indices of these among all trajectories.
        latents, index: current latents, and the prompt of each row.
        kept: tensors to store by name, for each stochastic step so far.
    """

    def __init__(self, plan: Plan, flags: list[bool], rows: Tensor, prompt_of: Tensor, initial: Tensor) -> None:
        self.plan, self.flags, self.rows = plan, flags, rows
        self.owner = prompt_of[rows]
        self.index = self.owner.unique() if plan.shared_noise else self.owner
        self.group: Tensor | None = torch.searchsorted(self.index, self.owner) if plan.shared_noise else None
        self.latents = initial[self.index if plan.shared_noise else rows].float()
        self.kept: dict[int, dict[str, Tensor]] = {}

    def advance(self, step: int, prediction: Tensor, solver: Solver, noise: Callable[[int], Tensor]) -> None:
        """Take a step with the predictions of all rows."""
        sigma, sigma_next = self.plan.sigmas[step], self.plan.sigmas[step + 1]
        if not self.flags[step]:
            self.latents = solver.step(self.latents, prediction, sigma, sigma_next)
            return
        before, prediction = self.per_image(self.latents), self.per_image(prediction)
        self.index, self.group = self.owner, None
        taken = kernels.step(
            self.plan.kernel,
            before,
            prediction,
            sigma,
            sigma_next,
            self.plan.eta,
            noise=noise(step)[self.rows],
            process=solver.process,
        )
        solver.reset()
        self.latents = taken.next_sample
        self.kept[step] = {"samples": before, "next_samples": taken.next_sample, "log_probs": taken.log_prob}
        if self.plan.keep_means:
            self.kept[step]["means"] = taken.mean

    def per_image(self, rows: Tensor) -> Tensor:
        """One row per image."""
        return rows if self.group is None else rows[self.group]


@torch.no_grad()
def sample(
    model: DiffusionModel,
    plan: Plan,
    prompting: Prompting,
    prompt_of: Tensor,
    initial: Tensor,
    step_noise: Callable[[int], Tensor],
    execution: Execution = Execution(),
    slots: list[int] | None = None,
) -> Trajectories:
    """Sample B trajectories.

    Args:
        prompting: conditions of U prompts.
        prompt_of: `[B]` long, each trajectory's prompt, 0 <= . < U.
        initial: noise, `[U, ...]` with shared noise, else `[B, ...]`.
        step_noise: returns the noise of a stochastic step, `[B, ...]`.
        execution: its `report` is called before every step, with the phase `rollout`.
        slots: the U prompt slots, if the plan has a window per slot.
    """
    partials = _partials(plan, prompt_of, initial, slots)
    solvers = [SOLVERS[plan.solver](model.process) for _ in partials]
    step_noise, forwards = cache(step_noise), 0
    steps = len(plan.stochastic[: plan.stop])
    for i in range(steps):
        execution.report("rollout", i, steps, aligned=True)
        latents = torch.cat([partial.latents for partial in partials])
        index = torch.cat([partial.index for partial in partials])
        predictions = predict(model, latents, plan.sigmas[i], prompting, index, plan.at(i), execution)
        forwards += len(latents)
        parts = predictions.split([len(partial.latents) for partial in partials])
        for partial, part, solver in zip(partials, parts, solvers, strict=True):
            partial.advance(i, part, solver, step_noise)
        step_noise.cache_clear()
    kept = [i for i in range(steps) if any(i in partial.kept for partial in partials)]
    return Trajectories(
        final=_together(partials, [partial.per_image(partial.latents) for partial in partials]),
        steps=kept,
        samples=_stacked(partials, kept, "samples"),
        next_samples=_stacked(partials, kept, "next_samples"),
        log_probs=_stacked(partials, kept, "log_probs"),
        means=_stacked(partials, kept, "means") if plan.keep_means else None,
        forwards=forwards,
    )


def _partials(plan: Plan, prompt_of: Tensor, initial: Tensor, slots: list[int] | None) -> list[PartialTrajectories]:
    """Group all trajectories by their stochastic steps."""
    if plan.windows is None or slots is None:
        rows = torch.arange(len(prompt_of), device=prompt_of.device)
        return [PartialTrajectories(plan, plan.stochastic, rows, prompt_of, initial)]
    flags = [tuple(plan.windows[slot]) for slot in slots]
    partials = []
    for window in sorted(set(flags), reverse=True):
        inside = torch.tensor([each == window for each in flags], device=prompt_of.device)
        partials.append(
            PartialTrajectories(plan, list(window), inside[prompt_of].nonzero().flatten(), prompt_of, initial)
        )
    return partials


def _stacked(partials: list[PartialTrajectories], steps: list[int], name: str) -> Tensor:
    """Stack what was stored of each stochastic step, `[S, B, ...]`."""
    parts = [
        _together(partials, [partial.kept[i][name] if i in partial.kept else None for partial in partials])
        for i in steps
    ]
    return torch.stack(parts) if parts else torch.empty(0)


def _together(partials: list[PartialTrajectories], parts: list[Tensor | None]) -> Tensor:
    """`[B, ...]` in the order of the trajectories; 0 where one has none."""
    known = next(part for part in parts if part is not None)
    whole = known.new_zeros(sum(len(partial.rows) for partial in partials), *known.shape[1:])
    for partial, part in zip(partials, parts, strict=True):
        if part is not None:
            whole[partial.rows] = part
    return whole
