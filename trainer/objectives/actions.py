"""Recomputes predictions and log-probabilities of the stochastic steps that a rollout stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion import kernels
from ..utils.errors import BadInput
from .base import Batch, RolloutBatch

if TYPE_CHECKING:
    from ..models import DiffusionModel


def trainable_steps(model: DiffusionModel, levels: list[float]) -> range:
    """The steps, out of those that begin at these falling noise levels, that train a network with a LoRA.

    Raises:
        BadInput: there are none.
    """
    steps = [i for i, level in enumerate(levels) if model.is_trained_at(level)]
    if not steps:
        raise BadInput(
            f"rollout.steps {len(levels) + 1}: the network that is trained predicts at none of the steps that can be "
            "stochastic, which are all but the last: use more steps, another boundary, or train the other network"
        )
    return range(steps[0], steps[-1] + 1)


@dataclass(frozen=True)
class ActionBatch(Batch):
    """A batch of actions; each is a stochastic step of a trajectory.

    Attributes:
        rows: `[R, 2]` long, (trajectory, step) of each prediction.
        trajectory: `[N]` long, the trajectory of each item.
        row_of: `[N]` long, the prediction that each item uses.
    """

    rows: Tensor
    trajectory: Tensor
    row_of: Tensor


class Actions:
    """The stored actions of a batch.

    Attributes:
        row_of: `[N]` long, the prediction that each action uses.
        log_probs: `[N]`, from the rollout.
        means: `[N, ...]` from the rollout; None if they are not stored.
        step_size: `[N]` float32, sigma minus the next sigma.
    """

    def __init__(self, model: DiffusionModel, rollout: RolloutBatch, batch: ActionBatch) -> None:
        self.model, self.rollout = model, rollout
        device, plan, kept = rollout.device, rollout.plan, rollout.trajectories
        trajectory, step = batch.rows.to(device).unbind(1)
        self.row_of = batch.row_of.to(device)
        levels = torch.tensor(plan.sigmas, dtype=torch.float64, device=device)
        self.sigma, self.sigma_next = levels[step], levels[step + 1]
        index = torch.tensor([kept.steps.index(s) for s in batch.rows[:, 1].tolist()], device=device)
        self.latents = kept.samples[index, trajectory]
        self.conditions = rollout.prompting.conditions.rows(rollout.prompt_of[trajectory])
        action = index[self.row_of], batch.trajectory.to(device)
        self.next_samples, self.log_probs = kept.next_samples[action], kept.log_probs[action]
        self.means = None if kept.means is None else kept.means[action]
        self.step_size = (self.sigma - self.sigma_next)[self.row_of].float()

    def predict(self) -> Tensor:
        """Predictions under the weights in use, `[R, ...]`."""
        guidance, negative = self.rollout.plan.guidance_scale, self.rollout.prompting.unconditional
        return self.model.predict_guided(self.latents, self.sigma.float(), self.conditions, guidance, negative)

    def score(self, prediction: Tensor) -> kernels.Step:
        """Means and log-probabilities of the N actions, given predictions."""
        return kernels.step(
            self.rollout.plan.kernel,
            self.latents[self.row_of],
            prediction.index_select(0, self.row_of),  # its backward pass adds in a fixed order
            self.sigma[self.row_of],
            self.sigma_next[self.row_of],
            self.rollout.plan.eta,
            next_sample=self.next_samples,
            process=self.model.process,
        )
