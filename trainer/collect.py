"""What an iteration trains on: images sampled by the policy, scored, and ranked within their groups."""

import itertools
import math

import torch
from torch import Tensor

from .check import Checked
from .config import RunConfig
from .models import DiffusionModel
from .objectives.advantage import Advantages, active_images, advantages_of
from .objectives.base import Experience
from .rollout import Execution, Prompting, sample
from .runs.metrics import Clock
from .runs.pictures import Sample
from .runs.recorder import Recorder
from .score import score_by_group
from .utils.distributed import Processes
from .utils.seeds import noise, prompt_indices


class Collector:
    """
    Args:
        checked: prompts, rewards and the objective, which has been set up.
        prompting: conditions of the training prompts, on the CPU.
        recorder: keeps a picture of the samples.
    """

    def __init__(
        self,
        config: RunConfig,
        checked: Checked,
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

    def collect(self, iteration: int, clock: Clock) -> Experience:
        """Sample and, where the objective needs advantages, score the images of an iteration."""
        if not self.objective.needs_rollout:
            with clock("rollout"):
                return self.objective.collect(iteration)
        with clock("rollout"), self.objective.acting():
            experience = self._rollout(iteration)
        if not self.objective.needs_advantages:
            return experience
        table = self._score(experience, clock)
        experience.scores = {name: table[name] for name in self.rewards}
        experience.watched = {name: table[name] for name in self.watching}
        config = self.config.advantage
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        experience.advantages = advantages_of(experience.scores, weights, config)
        experience.active = active_images(experience.advantages, config)
        return experience

    def _rollout(self, iteration: int) -> Experience:
        """This process's trajectories; scores and advantages are still to come."""
        config, device = self.config.rollout, self.processes.device
        count, group = config.prompts_per_iteration, config.group_size
        chosen = prompt_indices(len(self.texts), count, iteration, self.config.runtime.seed)
        everything = list(itertools.product(range(count), range(group)))
        members = [everything[i] for i in self.processes.share(len(everything))]
        slots = sorted({slot for slot, _ in members})
        prompting = self.prompting.rows(torch.tensor([chosen[slot] for slot in slots])).to(device)
        prompt_of = torch.tensor([slots.index(slot) for slot, _ in members], device=device)
        plan = self.objective.plan(self.model, iteration)
        starts: list[tuple[int, ...]] = [(slot,) for slot in slots] if plan.shared_noise else list(members)
        trajectories = sample(
            self.model,
            plan,
            prompting,
            prompt_of,
            self._noise(iteration, "start", starts),
            lambda step: self._noise(iteration, f"step {step}", members),
            self.execution,
            slots,
        )
        return Experience(
            iteration=iteration,
            plan=plan,
            prompting=prompting,
            members=members,
            prompt_of=prompt_of,
            texts=[self.texts[chosen[slot]] for slot, _ in members],
            trajectories=trajectories,
            advantages=Advantages.none(count, group),
            active=torch.ones(count, group, dtype=torch.bool),
        )

    def _noise(self, iteration: int, use: str, keys: list[tuple[int, ...]]) -> Tensor:
        shape, seed = self.model.latent_shape, self.config.runtime.seed
        return torch.stack([noise(shape, seed, use, iteration, *key) for key in keys]).to(self.processes.device)

    def _score(self, experience: Experience, clock: Clock) -> dict[str, Tensor]:
        """Scores of all processes' images, `[P, G]` float64 per reward, those that only watch included."""
        self.execution.report("decode", 0, 1)
        with clock("decode"):
            images = self.model.decode(experience.trajectories.final)
        with clock("reward"):
            columns, slots = {}, [slot for slot, _ in experience.members]
            every = self.rewards | self.watching
            for number, (name, reward) in enumerate(every.items()):
                self.execution.report("reward", number, len(every))
                columns[name] = score_by_group(reward, images, experience.texts, slots).tolist()
            for reward in every.values():
                reward.idle()
        self.recorder.rollout_picture(images, experience.iteration, self._samples(experience, columns))
        rows = self.processes.gather(list(zip(*columns.values(), strict=True)))
        values = torch.tensor(rows, dtype=torch.float64)
        shape = experience.active.shape
        return {name: values[:, i].reshape(shape) for i, name in enumerate(columns)}

    def _samples(self, experience: Experience, columns: dict[str, list[float]]) -> list[Sample]:
        """What is known of this process's images, for people."""
        seed, iteration = self.config.runtime.seed, experience.iteration
        return [
            Sample(
                text,
                f"{seed}/{iteration}/{slot}/{member}",
                {name: column[row] if math.isfinite(column[row]) else None for name, column in columns.items()},
            )
            for row, (text, (slot, member)) in enumerate(zip(experience.texts, experience.members, strict=True))
        ]


def gather_scores(scores: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Scores that each process has of its own images, NaN elsewhere, put together: `[P, G]` per reward."""
    together: dict[str, Tensor] = {}
    for part in processes.gather([scores]):
        for name, values in part.items():
            together[name] = torch.where(together[name].isnan(), values, together[name]) if name in together else values
    return together
