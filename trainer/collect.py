"""Collects the training data of an iteration: samples images with the policy, scores them, computes advantages."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters.merge import sampling
from .check import CheckedRun
from .config import RunConfig
from .models import DiffusionModel
from .objectives.advantage import Advantages, active_images, advantages_of
from .objectives.base import Member, RolloutBatch
from .rollout import Execution, Plan, Prompting, Trajectories, sample
from .runs.metrics import Clock
from .runs.recorder import Recorder
from .runs.sample_grids import Sample
from .score import score_by_group
from .utils.distributed import Processes
from .utils.seeds import noise, prompt_indices

if TYPE_CHECKING:
    from .rewards import Reward


class Collector:
    """Samples and scores the images of an iteration.

    Args:
        checked: prompts, rewards and the objective, which has been set up.
        prompting: conditions of the training prompts, on the CPU.
        recorder: saves a grid of the samples.
    """

    def __init__(
        self,
        config: RunConfig,
        checked: CheckedRun,
        model: DiffusionModel,
        prompting: Prompting,
        processes: Processes,
        execution: Execution,
        recorder: Recorder,
    ) -> None:
        self.config, self.model, self.prompting = config, model, prompting
        self.processes, self.execution, self.recorder = processes, execution, recorder
        self.objective, self.rewards, self.texts = checked.objective, checked.rewards, checked.prompts.scored
        watching = checked.all_rewards if checked.objective.needs_watching else {}
        self.watching = {name: reward for name, reward in watching.items() if name not in checked.rewards}

    def collect(self, iteration: int, clock: Clock) -> RolloutBatch:
        """Sample and, where the objective needs advantages, score the images of an iteration."""
        if not self.objective.needs_rollout:
            with clock("rollout"):
                return self.objective.collect(iteration)
        remote = {name: reward for name, reward in (self.rewards | self.watching).items() if reward.remote}
        with BackgroundScoring(remote if self.objective.needs_advantages else {}) as background:
            with self.objective.rollout_weights(), sampling(self.config, self.model.module):
                rollout, images = self._rollout(iteration, background, clock)
            if not self.objective.needs_advantages:
                return rollout
            table = self._score(rollout, images, background, clock)
        rollout.scores = {name: table[name] for name in self.rewards}
        rollout.watched = {name: table[name] for name in self.watching}
        config = self.config.advantage
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        rollout.advantages = advantages_of(rollout.scores, weights, config)
        rollout.active = active_images(rollout.advantages, config)
        return rollout

    def _rollout(
        self, iteration: int, background: BackgroundScoring, clock: Clock
    ) -> tuple[RolloutBatch, list[Tensor]]:
        """Sample this process's trajectories, without scores and advantages.

        Returns:
            the rollout; and the decoded images in parts if remote rewards are scoring them already, else none.
        """
        config, device = self.config.rollout, self.processes.device
        count, group = config.prompts_per_iteration, config.group_size
        chosen = prompt_indices(len(self.texts), count, iteration, self.config.runtime.seed)
        everything = list(itertools.product(range(count), range(group)))
        members = [everything[i] for i in self.processes.share(len(everything))]
        slots = sorted({slot for slot, _ in members})
        prompting = self.prompting.rows(torch.tensor([chosen[slot] for slot in slots])).to(device)
        prompt_of = torch.tensor([slots.index(slot) for slot, _ in members], device=device)
        plan = self.objective.plan(self.model, iteration)
        texts = [self.texts[chosen[slot]] for slot, _ in members]
        trajectories, images = [], []
        for number, rows in enumerate(self._parts(members, plan, bool(background.rewards))):
            part = [members[row] for row in rows]
            starts = [(slot,) for slot in slots] if plan.shared_noise else part
            with clock("rollout"):
                sampled = sample(
                    self.model,
                    plan,
                    prompting,
                    prompt_of[rows],
                    self._noise(iteration, "start", starts),
                    lambda step, part=part: self._noise(iteration, f"step {step}", part),
                    self.execution if number == 0 else replace(self.execution, report=self._report_alone),
                    slots,
                )
            trajectories.append(sampled)
            if background.rewards:
                with clock("decode"):
                    images.append(self.model.decode(sampled.final))
                background.ask(images[-1], [texts[row] for row in rows], [slot for slot, _ in part])
        rollout = RolloutBatch(
            iteration=iteration,
            plan=plan,
            prompting=prompting,
            members=members,
            prompt_of=prompt_of,
            texts=texts,
            trajectories=joined(trajectories),
            advantages=Advantages.none(count, group),
            active=torch.ones(count, group, dtype=torch.bool),
        )
        return rollout, images

    def _parts(self, members: list[Member], plan: Plan, wanted: bool) -> list[list[int]]:
        """Rows that are sampled together: all, or if parts are wanted, groups that fill a batch.

        Parts do not depend on the speed of a server. There is only one part if prompts have windows of their own, whose
        steps are stored together, or if the model is sharded, because all ranks must make the same forward passes.
        """
        if not wanted or plan.windows is not None or self.config.model.sharded:
            return [list(range(len(members)))]
        parts: list[list[int]] = [[]]
        for row, (slot, _) in enumerate(members):
            begins = row == 0 or members[row - 1][0] != slot
            if begins and len(parts[-1]) >= self.config.rollout.batch_size:
                parts.append([])
            parts[-1].append(row)
        return parts

    def _report_alone(self, phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
        """Progress of later parts: other processes may have fewer, so their steps are not aligned."""
        self.execution.report(phase, step, steps)

    def _noise(self, iteration: int, use: str, keys: list[tuple[int, ...]]) -> Tensor:
        shape, seed = self.model.latent_shape, self.config.runtime.seed
        return torch.stack([noise(shape, seed, use, iteration, *key) for key in keys]).to(self.processes.device)

    def _score(
        self, rollout: RolloutBatch, parts: list[Tensor], background: BackgroundScoring, clock: Clock
    ) -> dict[str, Tensor]:
        """Scores of all processes' images, `[P, G]` float64 per reward, including rewards that are not trained."""
        self.execution.report("decode", 0, 1)
        with clock("decode"):
            images = torch.cat(parts) if parts else self.model.decode(rollout.trajectories.final)
        with clock("reward"):
            columns, slots = {}, [slot for slot, _ in rollout.members]
            every = self.rewards | self.watching
            for number, (name, reward) in enumerate(every.items()):
                self.execution.report("reward", number, len(every))
                columns[name] = (
                    background.scores(name)
                    if name in background.rewards
                    else score_by_group(reward, images, rollout.texts, slots).tolist()
                )
            for reward in every.values():
                reward.idle()
        self.recorder.rollout_grid(images, rollout.iteration, self._samples(rollout, columns))
        rows = self.processes.gather(list(zip(*columns.values(), strict=True)))
        values = torch.tensor(rows, dtype=torch.float64)
        shape = rollout.active.shape
        return {name: values[:, i].reshape(shape) for i, name in enumerate(columns)}

    def _samples(self, rollout: RolloutBatch, columns: dict[str, list[float]]) -> list[Sample]:
        """Prompt, seed and scores of this process's images, for the saved grid."""
        seed, iteration = self.config.runtime.seed, rollout.iteration
        return [
            Sample(
                text,
                f"{seed}/{iteration}/{slot}/{member}",
                {name: column[row] if math.isfinite(column[row]) else None for name, column in columns.items()},
            )
            for row, (text, (slot, member)) in enumerate(zip(rollout.texts, rollout.members, strict=True))
        ]


class BackgroundScoring:
    """Scores images with remote rewards while the next ones are sampled; leaving the context cancels open requests.

    Args:
        rewards: remote rewards by name.
    """

    def __init__(self, rewards: dict[str, Reward]) -> None:
        self.rewards = rewards
        self._pools = {name: ThreadPoolExecutor(1, f"reward {name}") for name in rewards}  # one request at a time
        self._asked: dict[str, list[Future[Tensor]]] = {name: [] for name in rewards}

    def __enter__(self) -> BackgroundScoring:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, images: Tensor, texts: list[str], slots: list[int]) -> None:
        """Start scoring images, in whole groups; arguments as for `score_by_group`."""
        images = images.cpu()
        for name, reward in self.rewards.items():
            self._asked[name].append(self._pools[name].submit(score_by_group, reward, images, texts, slots))

    def scores(self, name: str) -> list[float]:
        """Wait for the scores of all images passed to `ask`, in that order.

        Raises:
            RunFailed: as the reward does.
        """
        return [score for asked in self._asked[name] for score in asked.result().tolist()]


def joined(parts: list[Trajectories]) -> Trajectories:
    """Concatenate trajectories with the same steps."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def together(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return torch.cat(tensors, dim=1) if first.steps and tensors[0] is not None else tensors[0]

    return Trajectories(
        final=torch.cat([part.final for part in parts]),
        steps=first.steps,
        samples=together("samples"),
        next_samples=together("next_samples"),
        log_probs=together("log_probs"),
        means=together("means"),
        forwards=sum(part.forwards for part in parts),
    )


def gather_scores(scores: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Merge the scores of all processes, each NaN for the images of others: `[P, G]` per reward."""
    together: dict[str, Tensor] = {}
    for part in processes.gather([scores]):
        for name, values in part.items():
            together[name] = torch.where(together[name].isnan(), values, together[name]) if name in together else values
    return together
