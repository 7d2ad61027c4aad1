"""Takes optimizer steps on an objective's items: gradient accumulation, sums over processes, and the loss scale."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models import DiffusionModel
from ..policy import Policy
from ..rollout import Execution
from ..utils.distributed import Processes
from .base import Loss, Objective, RolloutBatch, Totals, TrainingItem

TRIES = 10
"""Most attempts at an optimizer step whose gradient overflows, each with half the loss scale."""


@dataclass(frozen=True)
class Update:
    """Results of the optimizer steps of an iteration.

    Attributes:
        every: totals of all steps.
        first: totals of the first step.
        grad_norm: the largest gradient norm before clipping; None if no step was taken.
        bad: number of steps that were skipped because their gradient was not finite; not those without any terms.
    """

    every: Totals
    first: Totals
    grad_norm: float | None
    bad: int


class Updater:
    """
    Takes optimizer steps with a scaled loss. The loss is a mean over all items of an optimizer step and over all
    elements of the latents, so the gradient at the network's output is about 1 / (items x elements), which underflows
    in float16. The loss scale starts at a power of two near that product and is divided out of the LoRA's float32
    gradients, which is exact unless something overflows. After an overflow, the scale is halved and the step repeated.

    Args:
        objective: defines the items and their loss.
        model: the model.
        policy: the LoRA and its optimizer.
        processes: the processes that share the items.
        execution: how forward passes are run; `match` is called before the batches of an optimizer step.
    """

    def __init__(
        self, objective: Objective, model: DiffusionModel, policy: Policy, processes: Processes, execution: Execution
    ) -> None:
        self.objective, self.model, self.policy = objective, model, policy
        self.processes, self.execution = processes, execution
        self.scaler: torch.amp.GradScaler | None = None

    def update(self, rollout: RolloutBatch) -> Update:
        """All optimizer steps of an iteration."""
        steps: list[Totals] = []
        norms: list[float | None] = []
        for items in self.objective.items(rollout):
            totals, norm = self._step(items, rollout)
            steps.append(totals)
            if totals.has_terms:
                norms.append(norm)
            if norm is not None:
                rollout.optimizer_steps += 1
                self.objective.after_step()
        every = Totals()
        for totals in steps:
            every = every.plus(totals)
        made = [norm for norm in norms if norm is not None]
        return Update(every, steps[0] if steps else Totals(), max(made, default=None), len(norms) - len(made))

    def _step(self, items: list[TrainingItem], rollout: RolloutBatch) -> tuple[Totals, float | None]:
        """One optimizer step and its gradient norm, which is None if the step was skipped.

        Without any finite reward there is no step: its gradient would be 0, but the optimizer's momentum is not.
        """
        if self.scaler is None:
            self.scaler = self._new_scaler(self.first_scale(len(items)))
        forwards = 0
        for _ in range(TRIES):
            scale = self.scaler.scale(torch.ones((), device=rollout.device))
            totals = self.accumulate(items, rollout, scale)
            forwards += totals.forwards
            if not totals.has_terms:
                self.policy.optimizer.zero_grad(set_to_none=True)
                return replace(totals, forwards=forwards), None
            norm = self.policy.step(self.processes, self.scaler)
            if norm is not None or not math.isfinite(totals.loss):
                break
        return replace(totals, forwards=forwards), norm

    def first_scale(self, items: int) -> float:
        """The initial loss scale for an optimizer step with this number of items."""
        return 2.0 ** round(math.log2(items * math.prod(self.model.latent_shape)))

    def _new_scaler(self, scale: float) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.processes.device.type, init_scale=scale)

    def accumulate(
        self, items: list[TrainingItem], rollout: RolloutBatch, scale: Tensor | float = 1.0, total: int | None = None
    ) -> Totals:
        """Accumulate this process's part of the scaled gradient of the mean loss over all processes' items.

        Args:
            total: number of items to average over; None for `len(items)`.
        """
        mine = [item for item in items if item.member in rollout.row_of]
        batches = self.objective.batches(mine, rollout)
        missing = self.execution.match(len(batches)) - len(batches)
        statistics = Statistics(rollout.device)
        for number, batch in enumerate(batches):
            self.execution.report("update", number, len(batches))
            loss = self.objective.loss(self.model, rollout, batch)
            (loss.value.sum() / (total or len(items)) * scale).backward()
            statistics.add(loss)
        for _ in range(missing):
            self._dummy_pass(rollout)
        return statistics.totals(self.processes)

    def _dummy_pass(self, rollout: RolloutBatch) -> None:
        """A dummy forward and backward pass for the collective operations of a sharded model; keeps gradients."""
        parameters = list(self.policy.parameters.values())
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        (batch,) = self.objective.batches([self.objective.dummy_item(rollout)], rollout)
        self.objective.loss(self.model, rollout, batch).value.sum().backward()
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient

    def gradient(self, items: list[TrainingItem], rollout: RolloutBatch, scale: float, total: int) -> list[Tensor]:
        """The scaled gradient of this process's items, one tensor per LoRA parameter; clears `.grad` afterwards."""
        self.accumulate(items, rollout, scale, total)
        parameters = self.policy.parameters.values()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        self.policy.optimizer.zero_grad(set_to_none=True)
        return found

    # ---------------------------------------------------------------------------------------------------- resuming

    def state(self) -> dict:
        """JSON data for checkpoints."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict) -> None:
        """Go back to what `state` returned."""
        if state:
            self.scaler = self._new_scaler(state["scale"])
            self.scaler.load_state_dict(state)


class Statistics:
    """Accumulates the losses and statistics of one process on its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss = self._zero()
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}
        self.items = self.forwards = 0

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def add(self, loss: Loss) -> None:
        self.items += len(loss.value)
        self.forwards += loss.forwards
        self.loss += loss.value.detach().double().sum()
        for name, value in loss.sums.items():
            self.sums[name] = self.sums.get(name, self._zero()) + value.detach()
        for name, value in loss.peaks.items():
            self.peaks[name] = torch.maximum(self.peaks[name], value) if name in self.peaks else value.detach()

    def totals(self, processes: Processes) -> Totals:
        """Totals over all processes; `forwards` counts this process only."""
        here = Totals(
            self.items,
            self.loss.item(),
            {name: value.item() for name, value in self.sums.items()},
            {name: value.item() for name, value in self.peaks.items()},
        )
        together = Totals(forwards=self.forwards)
        for part in processes.gather([here]):
            together = together.plus(part)
        return together
