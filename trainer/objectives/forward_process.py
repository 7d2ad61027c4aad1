"""Base of the forward-process objectives, which noise final images again and train the predictions on them.

They need no stochastic sampler, no log-probabilities and no stored trajectories, only the final latents of a rollout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..rollout import Plan
from ..utils.errors import BadInput
from ..utils.section import Positive
from ..utils.seeds import generator, noise
from .base import Batch, Member, Objective, ObjectiveOptions, RolloutBatch, TrainingItem, split_updates

if TYPE_CHECKING:
    from ..models import DiffusionModel


class ForwardProcessOptions(ObjectiveOptions):
    """Options that all objectives on the forward process have."""

    noise_levels: Positive = Field(2, description="Noise levels drawn per image and optimizer step.")
    level_distribution: Literal["schedule", "uniform", "logit-normal"] = Field(
        "schedule",
        description="Distribution of the noise levels: schedule draws from the levels of the rollout's steps without "
        "repetition; uniform and logit-normal(0, 1) draw from the range of these levels.",
    )
    level_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="Use only the levels of this first, noisiest fraction of the rollout's steps."
    )
    kl_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Weight of the KL to the base model: the squared distance of the predictions."
    )


@dataclass(frozen=True)
class NoisedBatch(Batch):
    """Images noised again.

    Attributes:
        rows: `[N]` long, index of each item's image among this process's images.
        sigma: `[N]` float32 noise levels.
        noise: `[N, ...]` float32, standard normal.
    """

    rows: Tensor
    sigma: Tensor
    noise: Tensor


class ForwardProcessObjective(Objective):
    """Samples deterministically, and trains on final images that are noised again."""

    options: ForwardProcessOptions

    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        rollout = self.config.rollout
        sigmas = model.sigmas(rollout.steps, rollout.shift)
        if not usable_levels(sigmas, self.options, model.is_trained_at):
            raise BadInput(
                f"objective.level_fraction {self.options.level_fraction:g}: the network that is trained predicts at "
                f"none of the levels of this part of the {rollout.steps} steps: raise it, use more steps, or train the "
                "other network"
            )
        return Plan(
            rollout.kernel,
            rollout.eta,
            sigmas,
            [False] * rollout.steps,
            shared_noise=False,  # with deterministic steps, the images of a group would be identical
            guidance_scale=rollout.guidance_scale,
            solver=rollout.solver,
            guided=rollout.guided(rollout.steps),
        )

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        for members in split_updates(rollout.active_groups(), self.options.updates):
            if members:
                yield [TrainingItem(member, draw) for member in members for draw in range(self.options.noise_levels)]

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        return TrainingItem(rollout.members[0])

    def batches(self, items: list[TrainingItem], rollout: RolloutBatch) -> list[Batch]:
        size = self.options.batch_size
        return [self._batch(items[start : start + size], rollout) for start in range(0, len(items), size)]

    def _batch(self, items: list[TrainingItem], rollout: RolloutBatch) -> NoisedBatch:
        device = rollout.device
        return NoisedBatch(
            items=items,
            rows=torch.tensor([rollout.row_of[item.member] for item in items], device=device),
            sigma=torch.tensor([self._level(rollout, item) for item in items], device=device),
            noise=torch.stack([self._noise(rollout, item) for item in items]).to(device),
        )

    def _level(self, rollout: RolloutBatch, item: TrainingItem) -> float:
        """The noise level of an item. The draws of one image have different levels if the schedule has enough."""
        rng = self._rng(rollout, "levels", item.member)
        usable = usable_levels(rollout.plan.sigmas, self.options, self.model.is_trained_at)
        levels = draw_levels(usable, self.options.level_distribution, self.options.noise_levels, rng)
        return levels[item.step]

    def _rng(self, rollout: RolloutBatch, use: str, member: Member) -> random.Random:
        seed = self.config.runtime.seed
        return generator(seed, use, rollout.iteration, rollout.optimizer_steps, *member)

    def _noise(self, rollout: RolloutBatch, item: TrainingItem) -> Tensor:
        seed, step = self.config.runtime.seed, rollout.optimizer_steps
        return noise(self.model.latent_shape, seed, "renoise", rollout.iteration, step, *item.member, item.step)

    def predict(self, rollout: RolloutBatch, latents: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """Guided predictions for noised images of this process, `[N, ...]`."""
        conditions = rollout.prompting.conditions.rows(rollout.prompt_of[rows])
        negative = rollout.prompting.unconditional
        return self.model.predict_guided(latents, sigma, conditions, rollout.plan.guidance_scale, negative)


def usable_levels(
    sigmas: list[float], options: ForwardProcessOptions, is_trained_at: Callable[[float], bool]
) -> list[float]:
    """The levels of the first `level_fraction` of the steps at which a network with a LoRA predicts.

    Args:
        sigmas: the T + 1 levels of the rollout, falling, the last 0.
    """
    taken = sigmas[: max(1, int((len(sigmas) - 1) * options.level_fraction))]
    return [level for level in taken if is_trained_at(level)]


def draw_levels(taken: list[float], distribution: str, count: int, rng: random.Random) -> list[float]:
    """`count` noise levels.

    Args:
        taken: levels of steps, falling.
        distribution: `ForwardProcessOptions.level_distribution`.

    Returns:
        levels in (0, 1]; with `schedule`, without repetition if there are at least `count` levels.
    """
    if distribution == "schedule":
        full, rest = divmod(count, len(taken))
        return taken * full + rng.sample(taken, rest)
    low, high = taken[-1], taken[0]
    if distribution == "uniform":
        shares = [rng.random() for _ in range(count)]
    else:
        shares = [torch.sigmoid(torch.tensor(rng.gauss(0, 1))).item() for _ in range(count)]
    return [low + (high - low) * share for share in shares]


def mean_square(difference: Tensor) -> Tensor:
    """Mean of the squares over all non-batch dimensions, in float64: `[N, ...]` to `[N]`."""
    return difference.double().square().flatten(1).mean(1)
