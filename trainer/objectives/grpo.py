"""GRPO: a clipped likelihood ratio over the stochastic steps of a rollout (DanceGRPO, arXiv 2505.07818)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion import kernels
from ..diffusion.schedules import Window, stochastic_steps, trained_steps
from ..rollout import Plan
from ..utils.errors import RunFailed
from ..utils.section import Positive
from ..utils.seeds import generator
from .actions import ActionBatch, Actions, trainable_steps
from .advantage import Mixture
from .base import Batch, Loss, Objective, ObjectiveOptions, RolloutBatch, Totals, TrainingItem, split_updates
from .likelihood import (
    beyond_divergence,
    clipped_objective,
    flash_weight,
    guarded_ratio,
    most_suspicious,
    probability_ratio,
    step_divergence,
    velocity_kl,
)

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..models import DiffusionModel


class GrpoOptions(ObjectiveOptions):
    """A clipped likelihood ratio over the stochastic steps of the rollout (DanceGRPO)."""

    name: Literal["grpo"] = Field("grpo", description="Name of the objective.")
    train_steps: Literal["random", "first", "all"] = Field(
        "random",
        description="Which stochastic steps are trained: a random or the first fraction, or all; with a window, all.",
    )
    step_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="Fraction of the stochastic steps that is trained."
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="Clip range of the likelihood ratio.")
    clip: Literal["pessimistic", "plain"] = Field(
        "pessimistic",
        description="Beyond the range, pessimistic keeps the gradient that leads back (PPO); plain has none (DPOK).",
    )
    ratio: Literal["plain", "guard", "dppo"] = Field(
        "plain",
        description="Likelihood ratio: plain; guard, GRPO-Guard's; or dppo, the plain one with Flow-DPPO's mask in "
        "place of the clip.",
    )
    divergence_limit: Annotated[float, Field(gt=0)] = Field(
        1e-5,
        description="With ratio dppo: an action is dropped if the KL of its step to the old policy reaches this and "
        "the update would increase it.",
    )
    step_weights: Literal["equal", "flash"] = Field(
        "equal",
        description="flash weights each step by std / |d mean / d prediction|, divided by the mean of these weights, "
        "so that steps at all noise levels have gradients of equal size (Flash-GRPO).",
    )
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL to the reference: the squared distance of the predictions, with guidance."
    )
    kl_reference: Literal["base", "moving"] = Field(
        "base",
        description="Reference of the KL: the base model, or a copy of the LoRA that is replaced now and then (GARDO).",
    )
    kl_reference_every: Positive = Field(
        15, description="Iterations after which a moving reference is replaced by the current LoRA."
    )
    kl_reference_limit: Annotated[float, Field(gt=0)] = Field(
        3e-4, description="A moving reference is replaced at once when the mean KL of an iteration is above this."
    )
    kl_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Below 1, only this share of the images gets the KL: those that the trained rewards rank highest "
        "over those of evaluation.rewards (GARDO's gate).",
    )
    old_log_prob: Literal["rollout", "update"] = Field(
        "rollout",
        description="Source of the old policy's log-probability in all but the first optimizer step of an iteration: "
        "stored by the rollout, or recomputed in the update's batches with the old weights, at the cost of one more "
        "forward pass per action. In the first step it equals the new log-probability.",
    )
    ratio_limit: Annotated[float, Field(gt=0)] = Field(
        0.5, description="Mean deviation of the ratios from 1 above which the watchdog sees a sign of collapse."
    )


class Grpo(Objective):
    """The mean over actions of -min(rho A, clip(rho, 1 - eps, 1 + eps) A), where rho is the likelihood ratio."""

    name = "grpo"
    Options = GrpoOptions
    options: GrpoOptions
    warned = False

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._kl = 0.0  # of the last iteration
        self._age = 0  # iterations since a moving reference was renewed
        self._mean_weight = 1.0  # of the steps in this optimizer step
        self._gate: Tensor | None = None  # which images get the KL term (GARDO's gate); None for all

    @classmethod
    def check_config(cls, config: RunConfig) -> None:
        super().check_config(config)
        config.rollout.check_stochastic_steps_are_guided()
        options = config.objective
        if options.kl_share < 1 and not config.evaluation.rewards:
            raise ValueError(
                f"objective.kl_share {options.kl_share:g} compares the trained rewards with others, and "
                "evaluation.rewards is empty: name a reward there, or set kl_share to 1"
            )
        moving = options.kl_weight and options.kl_reference == "moving"
        if moving and options.old_log_prob == "update" and options.updates > 1:
            raise ValueError(
                "objective.kl_reference moving and objective.old_log_prob update both need the old copy of the LoRA, "
                "and there is only one: change one of them, or set objective.updates to 1"
            )

    @property
    def needs_watching(self) -> bool:
        return bool(self.options.kl_weight) and self.options.kl_share < 1

    def preflight(self, rollout: RolloutBatch) -> None:
        """Check that rounding alone does not move ratios out of the clip range, if the run has several updates."""
        if self.options.updates == 1 or self.scores_again:
            return
        step = rollout.trajectories.steps[0]
        batches = self.batches([TrainingItem(member, step) for member in rollout.members], rollout)
        deviation = max(self.loss(self.model, rollout, b).peaks["rollout_deviation"].item() for b in batches)
        if deviation > self.options.clip_range:
            raise RunFailed(
                f"the ratio of an action that is scored twice deviates from 1 by {deviation:.2g}, more than "
                f"objective.clip_range ({self.options.clip_range:g}): set objective.old_log_prob to update, or "
                "objective.updates to 1"
            )

    @property
    def scores_again(self) -> bool:
        """Whether later optimizer steps recompute the old policy's log-probabilities in the update's batches."""
        return self.options.old_log_prob == "update" and self.options.updates > 1

    @property
    def moves_reference(self) -> bool:
        return bool(self.options.kl_weight) and self.options.kl_reference == "moving"

    @property
    def keeps_old_weights(self) -> bool:
        return self.scores_again or self.moves_reference

    # ------------------------------------------------------------------------------------------ in every iteration

    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        config, seed = self.config.rollout, self.config.runtime.seed
        window, windows = Window(**config.window.model_dump()) if config.window else None, None
        sigmas = model.sigmas(config.steps, config.shift)
        allowed = trainable_steps(model, sigmas[:-2])
        flags = stochastic_steps(config.steps, window, iteration, generator(seed, "window", iteration), allowed)
        if window and window.position == "per-prompt":
            windows = [
                stochastic_steps(config.steps, window, iteration, generator(seed, "window", iteration, slot), allowed)
                for slot in range(config.prompts_per_iteration)
            ]
            flags = [any(column) for column in zip(*windows, strict=True)]
        return Plan(
            config.kernel,
            config.eta,
            sigmas,
            flags,
            config.shared_noise,
            config.guidance_scale,
            solver=config.solver,
            keep_means=self.options.ratio != "plain" and self.options.updates > 1 and not self.scores_again,
            windows=windows,
            guided=config.guided(config.steps),
        )

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        if self.scores_again:
            self.policy.update_old()
        if self.moves_reference:
            self._renew_reference()
        self._gate = self._suspicious(rollout) if self.needs_watching else None
        for members in split_updates(rollout.active_groups(), self.options.updates):
            if members:
                items = [TrainingItem(member, step) for member in members for step in self._steps(rollout, member)]
                if self.options.step_weights == "flash":
                    self._mean_weight = self._flash(rollout.plan, [item.step for item in items]).mean().item()
                yield items

    @staticmethod
    def _flash(plan: Plan, steps: list[int]) -> Tensor:
        levels = torch.tensor(plan.sigmas, dtype=torch.float64)
        index = torch.tensor(steps)
        return flash_weight(plan.kernel, levels[index], levels[index + 1], plan.eta)

    def _suspicious(self, rollout: RolloutBatch) -> Tensor | None:
        """`[P, G]` bool, the images that get the KL term; None for all, before anything was scored (preflight)."""
        if not rollout.watched:
            return None
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        trained = Mixture(weights, rollout.advantages.spread).of(rollout.scores)
        watching = [values.flatten() for values in rollout.watched.values()]
        return most_suspicious(trained.flatten(), watching, self.options.kl_share).reshape(trained.shape)

    def _steps(self, rollout: RolloutBatch, member: tuple[int, int]) -> list[int]:
        """The trained steps of an image."""
        rng = generator(self.config.runtime.seed, "steps", rollout.iteration, *member)
        mode = "all" if self.config.rollout.window else self.options.train_steps
        return trained_steps(rollout.plan.stochastic_of(member[0]), mode, self.options.step_fraction, rng)

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        member = rollout.members[0]
        return TrainingItem(member, rollout.plan.stochastic_of(member[0]).index(True))

    def batches(self, items: list[TrainingItem], rollout: RolloutBatch) -> list[Batch]:
        """Batches of `batch_size` predictions.

        At the shared step all images of a prompt have the same latents, prediction and mean, so they share one row, and
        autograd sums their gradients.
        """
        prompt_of = rollout.prompt_of.tolist()
        rows: dict[tuple, tuple[int, int]] = {}
        users: dict[tuple, list[TrainingItem]] = {}
        for item in items:
            trajectory = rollout.row_of[item.member]
            is_shared = item.step == rollout.plan.shared_step(item.member[0])
            key = ("prompt", prompt_of[trajectory]) if is_shared else (trajectory, item.step)
            rows.setdefault(key, (trajectory, item.step))
            users.setdefault(key, []).append(item)
        keys = list(rows)
        chunks = [
            keys[start : start + self.options.batch_size] for start in range(0, len(keys), self.options.batch_size)
        ]
        return [
            ActionBatch(
                items=[item for key in chunk for item in users[key]],
                rows=torch.tensor([rows[key] for key in chunk]),
                trajectory=torch.tensor([rollout.row_of[item.member] for key in chunk for item in users[key]]),
                row_of=torch.tensor([row for row, key in enumerate(chunk) for _ in users[key]]),
            )
            for chunk in chunks
        ]

    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: ActionBatch) -> Loss:
        actions = Actions(model, rollout, batch)
        prediction = actions.predict()
        new = actions.score(prediction)
        old_log_prob, old_mean, passes = self._old(actions, new)
        advantages = rollout.advantages_of(batch.items)
        value, ratio, clipped = self._policy_loss(actions, new, old_log_prob, old_mean, advantages)
        if self.options.step_weights == "flash":
            weight = self._flash(rollout.plan, [item.step for item in batch.items]) / self._mean_weight
            value = value * weight.float().to(value.device)
        rollout_ratio = probability_ratio(new.log_prob.detach(), actions.log_probs)
        sums, peaks = self._figures(ratio.detach(), clipped, rollout_ratio)
        if self.options.kl_weight:
            with self.policy.using("old" if self.moves_reference else "base"):
                reference = actions.predict()
            passes += 1
            kl = velocity_kl(prediction, reference).index_select(0, actions.row_of)
            value = value + self.options.kl_weight * kl * self._gated(batch.items, kl)
            sums["kl"] = kl.detach().double().sum()
        return Loss(value, sums, peaks, (1 + passes) * len(batch.rows))

    def _policy_loss(
        self, actions: Actions, new: kernels.Step, old_log_prob: Tensor, old_mean: Tensor | None, advantages: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss without weights and KL, the ratios, and which of them are clipped or dropped; all `[N]`."""
        options = self.options
        if options.ratio == "dppo":
            ratio = probability_ratio(new.log_prob, old_log_prob)
            divergence = step_divergence(new.mean.detach(), old_mean, new.std)
            dropped = beyond_divergence(ratio.detach(), advantages, divergence, options.divergence_limit)
            return torch.where(dropped, 0.0, -advantages * ratio), ratio, dropped
        if options.ratio == "guard":
            ratio = guarded_ratio(new.log_prob, old_log_prob, new.mean, old_mean, new.std)
            scale = 1 / actions.step_size
        else:
            ratio, scale = probability_ratio(new.log_prob, old_log_prob), 1.0
        value = clipped_objective(ratio, advantages, options.clip_range, options.clip == "plain") * scale
        return value, ratio, (ratio.detach().double() - 1).abs() > options.clip_range

    def _gated(self, items: list[TrainingItem], kl: Tensor) -> Tensor:
        """1 for images that get the KL term, else 0, `[N]`."""
        if self._gate is None:
            return torch.ones_like(kl)
        slots, places = zip(*(item.member for item in items), strict=True)
        return self._gate[list(slots), list(places)].to(kl.device, kl.dtype)

    def _old(self, actions: Actions, new: kernels.Step) -> tuple[Tensor, Tensor | None, int]:
        """Log-probabilities of the actions under the old policy.

        Different batch sizes round differently, in reduced precision by more than the clip range. Before the first
        optimizer step the weights are those of the rollout, so the new log-probability is also used as the old one:
        the ratio is exactly 1, and the gradient is the plain policy gradient.

        Returns:
            log-probabilities `[N]`; means `[N, ...]` or None; number of forward passes that were needed.
        """
        if actions.rollout.optimizer_steps == 0:
            return new.log_prob.detach(), new.mean.detach(), 0
        if self.scores_again:
            with self.policy.using("old"):
                old = actions.score(actions.predict())
            return old.log_prob, old.mean, 1
        return actions.log_probs, actions.means, 0

    @staticmethod
    def _figures(ratio: Tensor, clipped: Tensor, rollout_ratio: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums and peaks of the ratios, and of the ratios to the log-probabilities stored in the rollout."""
        deviation, rounding = (ratio.double() - 1).abs(), (rollout_ratio.double() - 1).abs()
        sums = {
            "ratio": ratio.double().sum(),
            "deviation": deviation.sum(),
            "clipped": clipped.double().sum(),
            "rollout_deviation": rounding.sum(),
        }
        return sums, {"deviation": deviation.max(), "rollout_deviation": rounding.max()}

    def after_iteration(self, iteration: int) -> None:
        self._age += 1

    def _renew_reference(self) -> None:
        """Copy the live weights to the moving reference if it is old, or if the KL to it is above the limit."""
        if self._age >= self.options.kl_reference_every or self._kl > self.options.kl_reference_limit:
            self.policy.update_old()
            self._age, self._kl = 0, 0.0

    def state(self) -> dict:
        return {"kl": self._kl, "age": self._age}

    def restore(self, state: dict) -> None:
        self._kl, self._age = state["kl"], state["age"]

    # -------------------------------------------------------------------------------------------------- reporting

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            number of actions; mean, mean deviation from 1 and largest deviation from 1 of the ratios; fraction of
            actions outside the clip range; mean and largest deviation from 1 of the ratios to the rollout's
            log-probabilities in the first optimizer step, where only rounding causes a deviation; mean KL, if weighted.
        """
        self._kl = every.mean("kl") if self.options.kl_weight else 0.0
        return {
            "actions": every.items,
            "ratio": {
                "mean": every.mean("ratio", default=1.0),
                "mean_deviation": every.mean("deviation"),
                "max_deviation": every.peaks.get("deviation", 0.0),
            },
            "clip_fraction": every.mean("clipped"),
            "rollout_deviation": {
                "mean": first.mean("rollout_deviation"),
                "max": first.peaks.get("rollout_deviation", 0.0),
            },
            "kl": self._kl if self.options.kl_weight else None,
        }

    def alarm(self, record: dict) -> str | None:
        deviation = record["ratio"]["mean_deviation"]
        if deviation is None or deviation <= self.options.ratio_limit:
            return None
        return f"the mean |ratio - 1| is {deviation:.3g}"

    def warning(self, record: dict) -> str | None:
        """Warn once if rounding affects the ratios of later optimizer steps."""
        deviation = record["rollout_deviation"]["max"]
        exact = self.options.updates == 1 or self.scores_again
        if exact or self.warned or deviation is None or deviation <= self.options.clip_range / 10:
            return None
        self.warned = True
        return (
            f"rounding alone moves ratios from 1 by up to {deviation:.2g}, more than a tenth of objective.clip_range "
            f"({self.options.clip_range:g}), in all but the first optimizer step of an iteration: set "
            "objective.old_log_prob to update, or make rollout.batch_size and objective.batch_size equal"
        )

    def line(self, record: dict) -> str:
        off = record["rollout_deviation"]["max"] or 0.0
        return f"clipped {record['clip_fraction'] or 0:.0%}, rollout off by {off:.1e}"

    def closing(self, records: list[dict]) -> list[str]:
        off = max((record["rollout_deviation"]["max"] or 0.0 for record in records), default=0.0)
        return [f"largest deviation of a ratio from 1 by rounding between rollout and update {off:.1e}"]
