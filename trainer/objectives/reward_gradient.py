"""Backpropagation of differentiable rewards through the last sampling steps: ReFL, DRaFT-K and DRaFT-LV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..diffusion.solvers import Euler
from ..rollout import Plan
from ..utils.errors import BadInput
from ..utils.section import Positive
from ..utils.seeds import generator, noise
from .base import Batch, Loss, Objective, ObjectiveOptions, RolloutBatch, Totals, TrainingItem, split_updates

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..models import DiffusionModel
    from ..rewards import Reward


class RewardGradientOptions(ObjectiveOptions):
    """Backpropagation of differentiable rewards: needs the fewest images and the most memory; over-optimises fast."""

    name: Literal["reward-gradient"] = Field("reward-gradient", description="Name of the objective.")
    method: Literal["refl", "draft", "draft-lv"] = Field(
        "draft",
        description="refl: one late step, drawn at random, and its image estimate. draft: the last gradient_steps "
        "steps. draft-lv: the last step of several copies of the image, each with new noise.",
    )
    gradient_steps: Positive = Field(1, description="Number of last sampling steps to backpropagate through (draft).")
    late_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="Fraction of the last steps from which the step is drawn (refl)."
    )
    copies: Annotated[int, Field(ge=1, le=64)] = Field(2, description="Copies of each image (draft-lv).")
    target: float | None = Field(
        None,
        description="Weighted reward at which an image gets no more gradient (hinge loss); null for no limit.",
    )
    kl_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Weight of the KL to the base model: the squared distance of the predictions."
    )
    batch_size: Positive = Field(8, description="Images per forward and backward pass, decode and rewards included.")


@dataclass(frozen=True)
class GradientBatch(Batch):
    """Images whose last steps are sampled with gradient.

    Attributes:
        rows: `[N]` long, index of each item's image among this process's images.
    """

    rows: Tensor


class RewardGradient(Objective):
    """The mean over images of minus the weighted reward, or of how far it is below a target."""

    name = "reward-gradient"
    Options = RewardGradientOptions
    options: RewardGradientOptions
    needs_advantages = False
    needs_reward_gradients = True

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        super().check_config(config)
        options = config.objective
        if options.method == "draft" and options.gradient_steps > config.rollout.steps:
            raise ValueError(
                f"objective.gradient_steps {options.gradient_steps} is more than rollout.steps {config.rollout.steps}"
            )

    def check(self, family: type[DiffusionModel], rewards: Mapping[str, Reward]) -> None:
        for name, reward in rewards.items():
            if not reward.differentiable:
                raise BadInput(
                    f"reward {name!r} is not differentiable, but objective 'reward-gradient' needs differentiable "
                    "rewards: choose another reward or another objective"
                )

    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        rollout = self.config.rollout
        sigmas = model.sigmas(rollout.steps, rollout.shift)
        self._check_trained(model, sigmas)
        return Plan(
            rollout.kernel,
            rollout.eta,
            sigmas,
            [False] * rollout.steps,
            shared_noise=False,
            guidance_scale=rollout.guidance_scale,
            solver=rollout.solver,
            stop=self._stop(iteration),
            guided=rollout.guided(rollout.steps),
        )

    def _stop(self, iteration: int) -> int | None:
        """Number of steps to sample without gradient; None for all."""
        steps, options = self.config.rollout.steps, self.options
        if options.method == "draft":
            return steps - options.gradient_steps
        if options.method == "draft-lv":
            return None
        late = max(1, round(steps * options.late_share))
        return generator(self.config.runtime.seed, "late step", iteration).randrange(steps - late, steps)

    def _check_trained(self, model: DiffusionModel, sigmas: list[float]) -> None:
        """Raise BadInput if a gradient would reach no network with a LoRA, in a model that has two networks."""
        steps, options = len(sigmas) - 1, self.options
        if options.method == "draft":  # any of its steps suffices, for the gradient goes through all of them
            reached = any(map(model.is_trained_at, sigmas[steps - options.gradient_steps : steps]))
        else:
            late = max(1, round(steps * options.late_share)) if options.method == "refl" else 1
            reached = all(map(model.is_trained_at, sigmas[steps - late : steps]))
        if not reached:
            raise BadInput(
                f"objective reward-gradient with method {options.method} has its gradient in the last steps, at which "
                "the network that is trained does not predict: train the one for low noise, or use another objective"
            )

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        copies = self.options.copies if self.options.method == "draft-lv" else 1
        for members in split_updates(rollout.active_groups(), self.options.updates):
            if members:
                yield [TrainingItem(member, copy) for member in members for copy in range(copies)]

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        return TrainingItem(rollout.members[0])

    def batches(self, items: list[TrainingItem], rollout: RolloutBatch) -> list[Batch]:
        size = self.options.batch_size
        return [self._batch(items[start : start + size], rollout) for start in range(0, len(items), size)]

    @staticmethod
    def _batch(items: list[TrainingItem], rollout: RolloutBatch) -> GradientBatch:
        rows = [rollout.row_of[item.member] for item in items]
        return GradientBatch(items, torch.tensor(rows, device=rollout.device))

    # ----------------------------------------------------------------------------------------------------- the loss

    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: GradientBatch) -> Loss:
        latents, kl, forwards = self._sample(model, rollout, batch)
        images = checkpoint(model.decode, latents, use_reentrant=False)
        texts = [rollout.texts[row] for row in batch.rows.tolist()]
        rewards = self._rewards(images, texts)
        self._note(rollout, batch, rewards)
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        total = sum(weights[name] * values for name, values in rewards.items())
        finite = total.isfinite() & is_finite(rollout.trajectories.final[batch.rows])
        latents.register_hook(lambda gradient: only_rows(gradient, finite))
        value = reward_loss(torch.where(finite, total, 0.0), self.options.target)
        value = torch.where(finite, value + self.options.kl_weight * kl, 0.0)
        sums = {"reward": torch.where(finite, total, 0.0).detach().double().sum(), "dropped": (~finite).double().sum()}
        if self.options.kl_weight:
            sums["kl"] = torch.where(finite, kl, 0.0).detach().double().sum()
        return Loss(value, sums, {}, forwards)

    def _sample(self, model: DiffusionModel, rollout: RolloutBatch, batch: GradientBatch) -> tuple[Tensor, Tensor, int]:
        """Final latents with gradient, `[N, ...]`; mean KL of the steps with gradient, `[N]`; forward passes."""
        plan, rows = rollout.plan, batch.rows
        latents = rollout.trajectories.final[rows]
        latents = only_rows(latents, is_finite(latents))
        if self.options.method == "draft-lv":
            steps = [len(plan.sigmas) - 2]
            noises = torch.stack([self._noise(rollout, item) for item in batch.items]).to(latents.device)
            latents = model.process.noised(latents, noises, plan.sigmas[steps[0]])
        else:
            steps = list(range(plan.stop, len(plan.sigmas) - 1))
        if self.options.method == "refl":
            steps = steps[:1]
        distance, forwards = torch.zeros(len(latents), device=latents.device), 0
        for step in steps:
            sigma, sigma_next = plan.sigmas[step], plan.sigmas[step + 1]
            before = latents
            prediction = self._predict(rollout, before, sigma, rows)
            forwards += len(before)
            if self.options.kl_weight:
                with self.policy.using("base"):
                    reference = self._predict(rollout, before, sigma, rows)
                forwards += len(before)
                distance = distance + (prediction - reference).square().flatten(1).mean(1) / len(steps)
            if self.options.method == "refl":
                latents = model.process.image(before, prediction, sigma)
            else:
                latents = Euler(model.process).step(before, prediction, sigma, sigma_next)
        return latents, distance, forwards

    def _noise(self, rollout: RolloutBatch, item: TrainingItem) -> Tensor:
        step = rollout.optimizer_steps
        seed = self.config.runtime.seed
        return noise(self.model.latent_shape, seed, "copy", rollout.iteration, step, *item.member, item.step)

    def _predict(self, rollout: RolloutBatch, latents: Tensor, sigma: float, rows: Tensor) -> Tensor:
        conditions = rollout.prompting.conditions.rows(rollout.prompt_of[rows])
        levels = torch.full((len(latents),), sigma, device=latents.device)
        negative = rollout.prompting.unconditional
        return self.model.predict_guided(latents, levels, conditions, rollout.plan.guidance_scale, negative)

    def _rewards(self, images: Tensor, texts: list[str]) -> dict[str, Tensor]:
        from ..rewards import differentiable_score

        return {name: differentiable_score(reward, images, texts) for name, reward in self.rewards.items()}

    @staticmethod
    def _note(rollout: RolloutBatch, batch: GradientBatch, rewards: dict[str, Tensor]) -> None:
        """Record the scores of this process's images in the rollout."""
        for name, values in rewards.items():
            table = rollout.scores.setdefault(name, torch.full(rollout.active.shape, torch.nan, dtype=torch.float64))
            for item, value in zip(batch.items, values.detach().tolist(), strict=True):
                table[item.member] = value

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            number of items; means over those with a finite reward: weighted reward, and KL, if weighted.
        """
        names = ("reward", "kl") if self.options.kl_weight else ("reward",)
        finite = max(every.items - every.dropped, 1)
        return {"items": every.items} | {name: every.sums.get(name, 0.0) / finite for name in names}

    def line(self, record: dict) -> str:
        return f"weighted reward {record['reward'] or 0:.3g}"


def is_finite(latents: Tensor) -> Tensor:
    """Which rows are finite, `[N]`."""
    return latents.flatten(1).isfinite().all(1)


def only_rows(values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows of `[N, ...]`, and 0 in the others, whatever they hold: 0 x NaN would be NaN."""
    return torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), values, torch.zeros_like(values))


def reward_loss(rewards: Tensor, target: float | None) -> Tensor:
    """Minus the reward (DRaFT), or how far it is below a target (ReFL's hinge); `[N]`, to be minimised.

    Args:
        rewards: `[N]`.
        target: reward above which the loss is 0; None for no target.
    """
    return -rewards if target is None else torch.relu(target - rewards)
