"""The interface of objectives, and the data that they exchange with the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..rollout import Plan, Prompting, Trajectories
from ..utils.section import Positive, Section
from .advantage import Advantages

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..models import DiffusionModel
    from ..policy import Policy
    from ..prompts.sets import PromptSet
    from ..rewards import Reward
    from ..utils.distributed import Processes

Member = tuple[int, int]
"""An image of an iteration: (prompt slot, index in its group)."""


@dataclass(frozen=True)
class TrainingItem:
    """A training example: one term of the mean loss.

    Attributes:
        member: its image; the process that sampled the image computes the term.
        step: the sampling step, or the number of the draw for objectives that draw noise levels.
        other: a second image to compare with, if any.
    """

    member: Member
    step: int = 0
    other: Member | None = None


@dataclass(frozen=True)
class Batch:
    """Items of one forward and backward pass. Objectives subclass it to add what their loss needs."""

    items: list[TrainingItem]


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        value: `[N]`, one per item, with gradient.
        sums: statistics by name, summed over all items and processes.
        peaks: statistics by name, of which the maximum is taken.
        forwards: forward passes of the network, one per latent.
    """

    value: Tensor
    sums: dict[str, Tensor]
    peaks: dict[str, Tensor]
    forwards: int


@dataclass(frozen=True)
class Totals:
    """Losses and statistics of one or several optimizer steps, over all processes.

    Attributes:
        items: number of terms.
        loss: sum of their values.
        sums, peaks: as in `Loss`.
        forwards: forward passes of the network in this process, one per latent.
    """

    items: int = 0
    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    forwards: int = 0

    @property
    def dropped(self) -> int:
        """Number of terms without a finite reward, of objectives that see rewards in their loss."""
        return int(self.sums.get("dropped", 0))

    @property
    def has_terms(self) -> bool:
        """Whether there is a term with a finite reward."""
        return self.items > self.dropped

    def mean(self, name: str, default: float = 0.0) -> float:
        """A sum divided by the number of items, or `default` if there are none."""
        return self.sums[name] / self.items if self.items else default

    def plus(self, other: Totals) -> Totals:
        """The totals of both."""
        names, high = {**self.sums, **other.sums}, {**self.peaks, **other.peaks}
        return Totals(
            self.items + other.items,
            self.loss + other.loss,
            {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names},
            {name: max(t.peaks[name] for t in (self, other) if name in t.peaks) for name in high},
            self.forwards + other.forwards,
        )


@dataclass
class RolloutBatch:
    """The data that an iteration trains on: the images of this process, and the advantages of all images.

    Attributes:
        iteration: from 0.
        plan: how the images were sampled.
        prompting: conditioning of this process's prompts.
        members: this process's B images.
        prompt_of: `[B]` long, index into `prompting` of each image.
        texts: B prompts.
        trajectories: of this process's images.
        advantages: of the images of all processes.
        active: `[P, G]` bool, the images of all processes that may be trained on.
        scores: reward per name, `[P, G]` float64 over all processes, NaN where an image has none. An objective that
            scores images itself fills in the scores of its own members; the rest is NaN until they are gathered.
        watched: as `scores`, by the rewards that are not trained on, where the objective needs them.
        optimizer_steps: optimizer steps already made in this iteration.
    """

    iteration: int
    plan: Plan
    prompting: Prompting
    members: list[Member]
    prompt_of: Tensor
    texts: list[str]
    trajectories: Trajectories
    advantages: Advantages
    active: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)
    watched: dict[str, Tensor] = field(default_factory=dict)
    optimizer_steps: int = 0
    row_of: dict[Member, int] = field(init=False)
    """Index of a member among this process's images."""

    def __post_init__(self) -> None:
        self.row_of = {member: row for row, member in enumerate(self.members)}

    @property
    def device(self) -> torch.device:
        return self.prompt_of.device

    def active_groups(self) -> list[list[Member]]:
        """Per prompt slot, the images that may be trained on."""
        return [[(slot, g) for g in row.nonzero().flatten().tolist()] for slot, row in enumerate(self.active)]

    def advantages_of(self, items: list[TrainingItem]) -> Tensor:
        """Advantages of the items' images, `[N]` float32 on the device."""
        slots, members = zip(*(item.member for item in items), strict=True)
        return self.advantages.values[list(slots), list(members)].to(self.device)


class ObjectiveOptions(Section):
    """Options of every objective."""

    name: str = Field(description="Name of the objective.")
    updates: Positive = Field(1, description="Optimizer steps per iteration.")
    batch_size: Positive = Field(96, description="Predictions per forward and backward pass.")


@dataclass(frozen=True)
class Resources:
    """The loaded model, policy, rewards and prompts that an objective uses."""

    model: DiffusionModel
    policy: Policy
    rewards: Mapping[str, Reward]
    prompting: Prompting
    processes: Processes


class Objective(ABC):
    """Defines the rollout, the terms that are trained, and their loss.

    The constructor loads nothing. `setup` passes the loaded models; `preflight` is called once after it. Then `plan`,
    `rollout_weights`, `collect`, `items`, `batches`, `loss` and the two `after_` methods are called in every iteration.

    Attributes:
        name: its name in run descriptions.
        Options: its settings.
        needs_rewards: whether a run must have rewards.
        needs_advantages: whether images are scored before the update. If not, all images may be trained on, and the
            objective scores them itself if needed.
        needs_reward_gradients: whether it differentiates the rewards that are trained.
        needs_rollout: whether the trainer samples images; if not, `collect` returns the training data.
    """

    name: ClassVar[str]
    Options: ClassVar[type[ObjectiveOptions]]
    needs_rewards: ClassVar[bool] = True
    needs_advantages: ClassVar[bool] = True
    needs_reward_gradients: ClassVar[bool] = False
    needs_rollout: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        self.config, self.options = config, config.objective

    # ----------------------------------------------------------------------------------------------- before a run

    @classmethod
    def variant(cls, options: ObjectiveOptions) -> type[Objective]:
        """The class for these options; some options select a subclass, such as offline DPO."""
        return cls

    @classmethod
    def shares(cls, config: RunConfig) -> tuple[int, str]:
        """Number and name of what an iteration divides over the processes; each process needs at least one."""
        return config.rollout.prompts_per_iteration * config.rollout.group_size, "images"

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Raise ValueError if settings of other sections are incompatible with this objective."""
        rollout, updates = config.rollout, config.objective.updates
        members = config.advantage.best_of_n or rollout.group_size
        if rollout.prompts_per_iteration % updates and members % updates:
            raise ValueError(
                f"objective.updates is {updates}: it must divide rollout.prompts_per_iteration "
                f"({rollout.prompts_per_iteration}) or the number of trained images of a group ({members})"
            )

    def training_prompts(self) -> PromptSet | None:
        """Prompts of the objective's own data; None if it uses the section `prompts`.

        Raises:
            BadInput: the data cannot be read.
        """
        return None

    def check(self, family: type[DiffusionModel], rewards: Mapping[str, Reward]) -> None:  # noqa: B027
        """Check the model family and the rewards of the run, before anything is loaded.

        Raises:
            BadInput: the objective cannot be used with this family or these rewards.
        """

    @property
    def needs_watching(self) -> bool:
        """Whether the rewards of `evaluation.rewards` score the images of every iteration too."""
        return False

    @property
    def keeps_old_weights(self) -> bool:
        """Whether the policy keeps an old copy of the LoRA for `policy.using("old")`, also in checkpoints."""
        return False

    def setup(self, resources: Resources) -> None:
        """Receive the loaded models."""
        self.model, self.policy, self.rewards = resources.model, resources.policy, resources.rewards
        self.prompting, self.processes = resources.prompting, resources.processes

    def preflight(self, rollout: RolloutBatch) -> None:  # noqa: B027
        """Check once, on two images sampled for this purpose, that the model works with this objective.

        Raises:
            RunFailed: training would not work.
        """

    # ------------------------------------------------------------------------------------------ in every iteration

    @abstractmethod
    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        """How the images of an iteration are sampled, and which parts of the trajectories are stored."""

    def rollout_weights(self) -> AbstractContextManager:
        """Context in which the rollout samples: with the live weights, unless overridden."""
        return self.policy.using("live")

    def collect(self, iteration: int) -> RolloutBatch:
        """The training data of an iteration, for an objective with `needs_rollout` False."""
        raise NotImplementedError

    @abstractmethod
    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        """For each optimizer step, the items of all processes; every process must yield the same.

        The optimizer step is taken before the next list is requested.
        """

    @abstractmethod
    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        """An item for dummy passes, which this process can compute at any time.

        With a sharded model all processes must make the same number of forward passes, so a process with fewer batches
        makes dummy passes; their gradients are discarded.
        """

    @abstractmethod
    def batches(self, items: list[TrainingItem], rollout: RolloutBatch) -> list[Batch]:
        """Divide this process's items of one optimizer step into batches."""

    @abstractmethod
    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: Batch) -> Loss:
        """The loss of a batch.

        Every batch must make the same forward passes in the same order, because they are collective if the model is
        sharded.
        """

    def after_step(self) -> None:  # noqa: B027
        """Called after each optimizer step that was not skipped."""

    def after_iteration(self, iteration: int) -> None:  # noqa: B027
        """Called after all optimizer steps of an iteration (counted from 0)."""

    # -------------------------------------------------------------------------------------------------- reporting

    @abstractmethod
    def record(self, every: Totals, first: Totals) -> dict:
        """Statistics for the event of an iteration, under its key `objective`.

        Args:
            every: totals of all optimizer steps of the iteration.
            first: totals of the first one, before which the weights are still those of the rollout.
        """

    def alarm(self, record: dict) -> str | None:
        """A sign of collapse in a record, as a clause; the watchdog stops the run if signs persist."""
        return None

    def warning(self, record: dict) -> str | None:
        """A warning to print after an iteration, if any."""
        return None

    def line(self, record: dict) -> str:
        """Text for the line that is printed after each iteration."""
        return ""

    def closing(self, records: list[dict]) -> list[str]:
        """Lines to print at the end of a run."""
        return []

    # ---------------------------------------------------------------------------------------------------- resuming

    def state(self) -> dict:
        """JSON data for checkpoints; weights are saved by the policy."""
        return {}

    def restore(self, state: dict) -> None:  # noqa: B027
        """Restore what `state` returned."""


def split_updates(groups: list[list[Member]], updates: int) -> list[list[Member]]:
    """Divide the trained images of all groups over the optimizer steps of an iteration.

    Args:
        groups: per group, its trained images (empty for a skipped group).

    Returns:
        the images of each optimizer step: whole groups if their number is divisible, so that a shared first step is
        computed once; else an equal part of every group.
    """
    if len(groups) % updates == 0:
        share = len(groups) // updates
        return [[m for group in groups[u * share : (u + 1) * share] for m in group] for u in range(updates)]
    return [
        [m for group in groups for m in group[len(group) * u // updates : len(group) * (u + 1) // updates]]
        for u in range(updates)
    ]
