"""The policy-gradient pass over an iteration's actions, each model call made once where its answer is shared."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import lora
from ..config import ObjectiveConfig
from ..diffusion import kernels
from ..models import DiffusionModel
from ..rollout import Calls, Plan, Prompting, Trajectories, own
from ..utils.distributed import Processes
from . import grpo


@dataclass(frozen=True)
class Batch:
    """Actions that are trained in one forward and backward pass.

    Attributes:
        rows: `[R, 2]` long, (trajectory, step) of each prediction.
        members: `[N]` long, the trajectory of each action.
        row_of: `[N]` long, the prediction each action uses.
    """

    rows: Tensor
    members: Tensor
    row_of: Tensor


def batches(actions: list[tuple[int, int]], prompt_of: list[int], shared_step: int, size: int) -> list[Batch]:
    """Arrange actions (trajectory, step) in batches of `size` predictions.

    At the shared step all trajectories of a prompt have one latent, one prediction and one mean: one row serves them
    all, and autograd adds their gradients up.
    """
    rows: dict[tuple, tuple[int, int]] = {}
    members: dict[tuple, list[int]] = {}
    for trajectory, step in actions:
        key = ("prompt", prompt_of[trajectory]) if step == shared_step else (trajectory, step)
        rows.setdefault(key, (trajectory, step))
        members.setdefault(key, []).append(trajectory)
    keys = list(rows)
    result = []
    for start in range(0, len(keys), size):
        chunk = keys[start : start + size]
        result.append(
            Batch(
                rows=torch.tensor([rows[key] for key in chunk]),
                members=torch.tensor([t for key in chunk for t in members[key]]),
                row_of=torch.tensor([row for row, key in enumerate(chunk) for _ in members[key]]),
            )
        )
    return result


SUMS = ("loss", "kl", "clipped", "ratio_sum", "deviation_sum")


@dataclass
class Statistics:
    """Sums over actions, kept on the device until they are read once at the end of an iteration."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    ratio_sum: Tensor
    deviation_sum: Tensor
    largest: Tensor
    actions: int = 0
    evaluations: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> "Statistics":
        return cls(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(6)))

    def plus(self, other: "Statistics") -> "Statistics":
        """Both together."""
        summed = [getattr(self, name) + getattr(other, name) for name in SUMS]
        largest = torch.maximum(self.largest, other.largest)
        return Statistics(*summed, largest, self.actions + other.actions, self.evaluations + other.evaluations)

    def totals(self, processes: Processes) -> dict[str, float]:
        """Plain numbers over all processes (the evaluations are this process's own)."""
        here = {name: getattr(self, name).item() for name in SUMS}
        here |= {"largest": self.largest.item(), "actions": self.actions, "evaluations": self.evaluations}
        everywhere = processes.gather([here])
        totals = {name: sum(part[name] for part in everywhere) for name in (*SUMS, "actions")}
        largest = max(part["largest"] for part in everywhere)
        return totals | {"largest": largest, "evaluations": self.evaluations}


@dataclass
class Actions:
    """What an update trains on: trajectories, and what is needed to score them again."""

    plan: Plan
    prompting: Prompting
    trajectories: Trajectories
    prompt_of: Tensor
    sigmas: Tensor = field(init=False)
    position: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device, plan = self.prompt_of.device, self.plan
        self.sigmas = torch.tensor(plan.sigmas, dtype=torch.float64, device=device)
        # Step number -> place among the stochastic steps, which is how trajectories are stored.
        self.position = torch.tensor(plan.stochastic, device=device).cumsum(0) - 1


def accumulate(
    model: DiffusionModel,
    actions: Actions,
    advantages: Tensor,
    batch: Batch,
    config: ObjectiveConfig,
    total: float,
    statistics: Statistics,
) -> None:
    """Add the gradient of one batch's loss, divided by the `total` number of actions of the update."""
    device, plan, kept = actions.prompt_of.device, actions.plan, actions.trajectories
    (trajectory, step), row_of, member = (
        batch.rows.to(device).unbind(1),
        batch.row_of.to(device),
        batch.members.to(device),
    )
    place = actions.position[step]
    sigma, sigma_next = actions.sigmas[step], actions.sigmas[step + 1]
    latents = kept.samples[place, trajectory]
    conditions = actions.prompting.conditions.rows(actions.prompt_of[trajectory])

    def predict() -> Tensor:
        return model.predict_guided(
            latents, sigma.float(), conditions, plan.guidance_scale, actions.prompting.unconditional
        )

    prediction = predict()
    statistics.evaluations += len(latents)
    action = place[row_of], member
    replay = kernels.step(
        plan.kernel,
        latents[row_of],
        prediction.index_select(0, row_of),  # its backward pass adds in a fixed order
        sigma[row_of],
        sigma_next[row_of],
        plan.eta,
        next_sample=kept.next_samples[action],
    )
    old = kept.log_probs[action]
    if config.ratio == "guard":
        ratio = grpo.guarded_ratio(replay.log_prob, old, replay.mean, kept.means[action], replay.std)
        scale = 1 / (sigma - sigma_next)[row_of].float()
    else:
        ratio, scale = grpo.probability_ratio(replay.log_prob, old), 1.0
    loss = grpo.clipped_objective(ratio, advantages[member], config.clip_range) * scale
    if config.kl_weight:
        with torch.no_grad(), lora.disabled(model.module):
            reference = predict()
        statistics.evaluations += len(latents)
        kl = grpo.velocity_kl(prediction, reference).index_select(0, row_of)
        loss = loss + config.kl_weight * kl
        statistics.kl += kl.detach().double().sum()
    (loss.sum() / total).backward()
    _record(statistics, loss.detach(), ratio.detach(), config.clip_range)


def _record(statistics: Statistics, loss: Tensor, ratio: Tensor, clip_range: float) -> None:
    deviation = (ratio.double() - 1).abs()
    statistics.loss += loss.double().sum()
    statistics.clipped += (deviation > clip_range).double().sum()
    statistics.ratio_sum += ratio.double().sum()
    statistics.deviation_sum += deviation.sum()
    statistics.largest = torch.maximum(statistics.largest, deviation.max())
    statistics.actions += len(ratio)


def split(members: list[list[int]], updates: int) -> list[list[int]]:
    """Divide the trained trajectories of all groups over the updates of an iteration.

    Args:
        members: per group, its trained trajectories (empty for a skipped group).

    Returns:
        per update, its trajectories: whole groups where their number allows, so that the shared first step is
        computed once, else an equal part of every group.
    """
    if len(members) % updates == 0:
        share = len(members) // updates
        return [[t for group in members[u * share : (u + 1) * share] for t in group] for u in range(updates)]
    return [
        [t for group in members for t in group[len(group) * u // updates : len(group) * (u + 1) // updates]]
        for u in range(updates)
    ]


def train(
    model: DiffusionModel,
    actions: Actions,
    advantages: Tensor,
    mine: list[tuple[int, int]],
    total: int,
    config: ObjectiveConfig,
    statistics: Statistics,
    between_calls: Callable[[], None],
    calls: Calls = own,
) -> None:
    """Accumulate the gradient of this process's actions of one update.

    Args:
        advantages: `[B]`, of this process's trajectories.
        mine: (trajectory, step) pairs of this process.
        total: number of actions of the update over all processes.
        calls: passes through the network, forward and backward.
    """
    prompt_of = actions.prompt_of.tolist()
    arranged = batches(mine, prompt_of, actions.plan.shared_step, config.batch_size)
    missing = calls(len(arranged)) - len(arranged)  # asked first: from the first call on, all go in step
    for batch in arranged:
        between_calls()
        accumulate(model, actions, advantages, batch, config, total, statistics)
    for _ in range(missing):
        (spare,) = batches([(0, actions.trajectories.steps[0])], prompt_of, -1, 1)
        accumulate(model, actions, advantages, spare, config, math.inf, Statistics.zeros(advantages.device))
