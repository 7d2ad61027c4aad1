"""The interface behind which every objective stands, and what passes between it and the training loop."""

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
class Item:
    """One term of the loss.

    Attributes:
        member: the image it trains on; the process that holds this image computes the term.
        step: the sampling step it belongs to, or the number of its draw where an objective draws noise levels.
        other: an image it is compared with.
    """

    member: Member
    step: int = 0
    other: Member | None = None


@dataclass(frozen=True)
class Batch:
    """Items that share a forward and backward pass; an objective adds what its loss needs."""

    items: list[Item]


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes:
        value: `[N]`, one per item, with gradient.
        sums: figures by name, added up over all items and processes.
        peaks: figures by name, of which the largest is kept.
        forwards: latents the network was run on.
    """

    value: Tensor
    sums: dict[str, Tensor]
    peaks: dict[str, Tensor]
    forwards: int


@dataclass(frozen=True)
class Totals:
    """What the losses of one or several optimizer steps add up to, over all processes.

    Attributes:
        items: number of terms.
        loss: sum of their values.
        sums, peaks: as in `Loss`.
        forwards: latents the network was run on in this process.
    """

    items: int = 0
    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    forwards: int = 0

    def mean(self, name: str, default: float = 0.0) -> float:
        """A sum divided by the number of items, or `default` where there are none."""
        return self.sums[name] / self.items if self.items else default

    def plus(self, other: Totals) -> Totals:
        """Both together."""
        names, high = {**self.sums, **other.sums}, {**self.peaks, **other.peaks}
        return Totals(
            self.items + other.items,
            self.loss + other.loss,
            {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names},
            {name: max(t.peaks[name] for t in (self, other) if name in t.peaks) for name in high},
            self.forwards + other.forwards,
        )


@dataclass
class Experience:
    """What an iteration trains on: the images of this process, and what is known of those of all processes.

    Attributes:
        iteration: from 0.
        plan: how the images were sampled.
        prompting: conditions of this process's prompts.
        members: this process's B images.
        prompt_of: `[B]` long, the row of `prompting` of each.
        texts: B prompts.
        trajectories: of this process's images.
        advantages: of the images of all processes.
        active: `[P, G]` bool, the images of all processes that may be trained on.
        scores: reward per name, `[P, G]` float64 over all processes, NaN where an image has none. An objective that
            scores images itself fills in those of its own members, and the rest is NaN until they are gathered.
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

    def advantages_of(self, items: list[Item]) -> Tensor:
        """`[N]` float32 on the device."""
        slots, members = zip(*(item.member for item in items), strict=True)
        return self.advantages.values[list(slots), list(members)].to(self.device)


class ObjectiveOptions(Section):
    """How rewards become an update."""

    name: str = Field(description="The objective.")
    updates: Positive = Field(1, description="Optimizer steps per iteration.")
    batch_size: Positive = Field(96, description="Predictions per forward and backward pass.")


@dataclass(frozen=True)
class Resources:
    """What an objective works with once everything is loaded."""

    model: DiffusionModel
    policy: Policy
    rewards: Mapping[str, Reward]
    prompting: Prompting
    processes: Processes


class Objective(ABC):
    """What is sampled, which terms are trained, and their loss; everything else is the same for all objectives.

    Making one loads nothing. `setup` hands over what was loaded; `preflight`, `plan`, `acting`, `collect`, `items`,
    `batches`, `loss` and the two `after_` methods come after it, in this order in every iteration.

    Attributes:
        name: its name in run descriptions.
        Options: what can be set.
        needs_rewards: whether a run must name rewards.
        needs_advantages: whether sampled images are scored and ranked before the update. Without, every image may be
            trained on, and the objective scores images itself where it does at all.
        needs_rollout: whether the trainer samples images; if not, `collect` gives what is trained on.
    """

    name: ClassVar[str]
    Options: ClassVar[type[ObjectiveOptions]]
    needs_rewards: ClassVar[bool] = True
    needs_advantages: ClassVar[bool] = True
    needs_rollout: ClassVar[bool] = True

    def __init__(self, config: RunConfig) -> None:
        self.config, self.options = config, config.objective

    # ----------------------------------------------------------------------------------------------- before a run

    @classmethod
    def variant(cls, options: ObjectiveOptions) -> type[Objective]:
        """The class that stands for these options, where some of them make it another kind of objective."""
        return cls

    @classmethod
    def shares(cls, config: RunConfig) -> tuple[int, str]:
        """How many things of an iteration processes share out, and what they are; no process may have none."""
        return config.rollout.prompts_per_iteration * config.rollout.group_size, "images"

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        """Raise ValueError where settings of other sections do not go with this objective."""
        rollout, updates = config.rollout, config.objective.updates
        members = config.advantage.best_of_n or rollout.group_size
        if rollout.prompts_per_iteration % updates and members % updates:
            raise ValueError(
                f"objective.updates {updates} divides neither rollout.prompts_per_iteration "
                f"{rollout.prompts_per_iteration} nor the {members} trained images of a group"
            )

    def training_prompts(self) -> PromptSet | None:
        """Prompts of the objective's own data; None takes those of the section `prompts`.

        Raises:
            BadInput: the data cannot be read.
        """
        return None

    def check(self, family: type[DiffusionModel], rewards: Mapping[str, Reward]) -> None:  # noqa: B027
        """Look at the family and the rewards of the run; nothing is loaded.

        Raises:
            BadInput: the objective cannot train this family, or with these rewards.
        """

    @property
    def keeps_old_weights(self) -> bool:
        """Whether `policy.using("old")` is needed: a copy of the LoRA, kept in checkpoints."""
        return False

    def setup(self, resources: Resources) -> None:
        """Take over what was loaded."""
        self.model, self.policy, self.rewards = resources.model, resources.policy, resources.rewards
        self.prompting, self.processes = resources.prompting, resources.processes

    def preflight(self, experience: Experience) -> None:  # noqa: B027
        """Look for faults of the model that would spoil this objective, on two images sampled for this alone.

        Raises:
            RunFailed: training could not work.
        """

    # ------------------------------------------------------------------------------------------ in every iteration

    @abstractmethod
    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        """How the images of an iteration are sampled, and what is kept of their trajectories."""

    def acting(self) -> AbstractContextManager:
        """Inside, the weights are those that sample: the live ones, unless an objective says otherwise."""
        return self.policy.using("live")

    def collect(self, iteration: int) -> Experience:
        """What an iteration trains on, of an objective that needs no rollout."""
        raise NotImplementedError

    @abstractmethod
    def items(self, experience: Experience) -> Iterator[list[Item]]:
        """Per optimizer step, its items over all processes; the same in every process.

        An optimizer step is made before the next list is asked for.
        """

    @abstractmethod
    def spare(self, experience: Experience) -> Item:
        """An item that this process can compute at any time.

        It fills up where this process has fewer batches than others and all must make the same number of forward
        passes; its gradient is discarded.
        """

    @abstractmethod
    def batches(self, items: list[Item], experience: Experience) -> list[Batch]:
        """Arrange this process's items of one optimizer step."""

    @abstractmethod
    def loss(self, model: DiffusionModel, experience: Experience, batch: Batch) -> Loss:
        """The loss of a batch.

        Every batch must make the same forward passes in the same order: with a sharded model they are collective.
        """

    def after_step(self) -> None:  # noqa: B027
        """After an optimizer step that was made."""

    def after_iteration(self, iteration: int) -> None:  # noqa: B027
        """After all optimizer steps of an iteration (from 0)."""

    # ----------------------------------------------------------------------------------------------- what is said

    @abstractmethod
    def record(self, every: Totals, first: Totals) -> dict:
        """Plain data for the event of an iteration, under `objective`.

        Args:
            every: of all its optimizer steps.
            first: of the first alone, in which the weights are still those the iteration began with.
        """

    def alarm(self, record: dict) -> str | None:
        """A sign of collapse in a record; the watchdog stops the run where signs last."""
        return None

    def warning(self, record: dict) -> str | None:
        """What a user should be told about an iteration."""
        return None

    def line(self, record: dict) -> str:
        """A few words for the line printed per iteration."""
        return ""

    def closing(self, records: list[dict]) -> list[str]:
        """Sentences for the end of a run."""
        return []

    # ---------------------------------------------------------------------------------------------------- resuming

    def state(self) -> dict:
        """Plain data that a checkpoint keeps; weights are the policy's."""
        return {}

    def restore(self, state: dict) -> None:  # noqa: B027
        """Go back to what `state` returned."""


def split_updates(groups: list[list[Member]], updates: int) -> list[list[Member]]:
    """Divide the trained images of all groups over the optimizer steps of an iteration.

    Args:
        groups: per group, its trained images (empty for a skipped group).

    Returns:
        per optimizer step, its images: whole groups where their number allows, so that a shared first step is
        computed once; else an equal part of every group.
    """
    if len(groups) % updates == 0:
        share = len(groups) // updates
        return [[m for group in groups[u * share : (u + 1) * share] for m in group] for u in range(updates)]
    return [
        [m for group in groups for m in group[len(group) * u // updates : len(group) * (u + 1) // updates]]
        for u in range(updates)
    ]
