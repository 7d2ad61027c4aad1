"""From an objective's items to optimizer steps: batches, accumulation, sums over processes. No mathematics."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import DiffusionModel
from ..policy import Policy
from ..rollout import Execution
from ..utils.distributed import Processes
from .base import Experience, Item, Loss, Objective, Totals


@dataclass(frozen=True)
class Update:
    """What the optimizer steps of an iteration were.

    Attributes:
        every: totals of all of them.
        first: totals of the first.
        grad_norm: the largest gradient norm before clipping; None where no step was made.
        bad: steps left out because their gradient was not finite.
    """

    every: Totals
    first: Totals
    grad_norm: float | None
    bad: int


class Engine:
    """
    Args:
        objective: whose items are trained.
        model: that predicts.
        policy: whose LoRA learns.
        processes: who shares the items.
        execution: of the forward passes; `match` is asked before the batches of an optimizer step.
    """

    def __init__(
        self, objective: Objective, model: DiffusionModel, policy: Policy, processes: Processes, execution: Execution
    ) -> None:
        self.objective, self.model, self.policy = objective, model, policy
        self.processes, self.execution = processes, execution

    def update(self, experience: Experience) -> Update:
        """All optimizer steps of an iteration."""
        steps: list[Totals] = []
        norms: list[float | None] = []
        for items in self.objective.items(experience):
            steps.append(self.accumulate(items, experience))
            norms.append(self.policy.step(self.processes))
            if norms[-1] is not None:
                experience.optimizer_steps += 1
                self.objective.after_step()
        every = Totals()
        for totals in steps:
            every = every.plus(totals)
        made = [norm for norm in norms if norm is not None]
        return Update(every, steps[0] if steps else Totals(), max(made, default=None), len(norms) - len(made))

    def accumulate(self, items: list[Item], experience: Experience) -> Totals:
        """Add the gradient of the mean loss of all processes' items, this process's part of it."""
        mine = [item for item in items if item.member in experience.row_of]
        batches = self.objective.batches(mine, experience)
        missing = self.execution.match(len(batches)) - len(batches)
        statistics = Statistics(experience.device)
        for number, batch in enumerate(batches):
            self.execution.report("update", number, len(batches))
            loss = self.objective.loss(self.model, experience, batch)
            (loss.value.sum() / len(items)).backward()
            statistics.add(loss)
        for _ in range(missing):
            self._spare_pass(experience)
        return statistics.totals(self.processes)

    def _spare_pass(self, experience: Experience) -> None:
        """A forward and backward pass that others need this process to make, without any trace in the gradient."""
        parameters = list(self.policy.parameters.values())
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        (batch,) = self.objective.batches([self.objective.spare(experience)], experience)
        self.objective.loss(self.model, experience, batch).value.sum().backward()
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient


class Statistics:
    """Totals of the losses of one process, kept on the device until they are read."""

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
        """Plain numbers over all processes; the forward passes are this process's own."""
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
