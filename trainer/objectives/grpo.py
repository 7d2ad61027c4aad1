"""GRPO: a clipped likelihood ratio over the stochastic steps of a rollout (DanceGRPO, arXiv 2505.07818)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..diffusion import kernels
from ..diffusion.schedules import Window, stochastic_steps, trained_steps
from ..rollout import Plan
from ..utils.errors import RunFailed
from ..utils.seeds import generator
from .base import Batch, Experience, Item, Loss, Objective, ObjectiveOptions, Totals, split_updates

if TYPE_CHECKING:
    from ..models import DiffusionModel


class GrpoOptions(ObjectiveOptions):
    """A clipped likelihood ratio over the stochastic steps of the rollout (DanceGRPO)."""

    name: Literal["grpo"] = Field("grpo", description="The objective.")
    train_steps: Literal["random", "first", "all"] = Field(
        "random",
        description="Steps trained: a random or the first share of the stochastic ones, or all; all of a window.",
    )
    step_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="The share of stochastic steps trained."
    )
    clip_range: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="Clip range of the likelihood ratio.")
    ratio: Literal["plain", "guard"] = Field("plain", description="Likelihood ratio: plain or GRPO-Guard's.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the KL to the base model: the squared distance of the predictions."
    )
    old_log_prob: Literal["rollout", "update"] = Field(
        "rollout",
        description="Where the old policy's log-probability comes from after an iteration's first optimizer step, in "
        "which it is the new one's own: stored by the rollout, or computed again in the update's batches by the old "
        "weights, for one more forward pass per action.",
    )
    ratio_limit: Annotated[float, Field(gt=0)] = Field(
        0.5, description="The watchdog takes ratios further from 1 than this, on average, as a sign of collapse."
    )


@dataclass(frozen=True)
class GrpoBatch(Batch):
    """Actions: a stochastic step of a trajectory each.

    Attributes:
        rows: `[R, 2]` long, (trajectory, step) of each prediction.
        trajectory: `[N]` long, the trajectory of each item.
        row_of: `[N]` long, the prediction each item uses.
    """

    rows: Tensor
    trajectory: Tensor
    row_of: Tensor


class Grpo(Objective):
    """The mean over actions of -min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho the likelihood ratio of a step."""

    name = "grpo"
    Options = GrpoOptions
    options: GrpoOptions
    warned = False

    def preflight(self, experience: Experience) -> None:
        """Rounding keeps a ratio within the clip range, where it reaches one."""
        if self.options.updates == 1 or self.keeps_old_weights:
            return
        step = experience.trajectories.steps[0]
        batches = self.batches([Item(member, step) for member in experience.members], experience)
        deviation = max(self.loss(self.model, experience, b).peaks["rollout_deviation"].item() for b in batches)
        if deviation > self.options.clip_range:
            raise RunFailed(
                f"the same action scored twice has a ratio {deviation:.2g} off 1, which is beyond objective.clip_range "
                f"{self.options.clip_range:g}: set objective.old_log_prob to update, or objective.updates to 1"
            )

    @property
    def keeps_old_weights(self) -> bool:
        return self.options.old_log_prob == "update" and self.options.updates > 1

    # ------------------------------------------------------------------------------------------ in every iteration

    def plan(self, model: DiffusionModel, iteration: int) -> Plan:
        config, seed = self.config.rollout, self.config.runtime.seed
        window = Window(**config.window.model_dump()) if config.window else None
        return Plan(
            config.kernel,
            config.eta,
            model.sigmas(config.steps, config.shift),
            stochastic_steps(config.steps, window, iteration, generator(seed, "window", iteration)),
            config.shared_noise,
            config.guidance_scale,
            solver=config.solver,
            keep_means=self.options.ratio == "guard" and self.options.updates > 1 and not self.keeps_old_weights,
        )

    def items(self, experience: Experience) -> Iterator[list[Item]]:
        if self.keeps_old_weights:
            self.policy.update_old()
        for members in split_updates(experience.active_groups(), self.options.updates):
            if members:
                yield [Item(member, step) for member in members for step in self._steps(experience, member)]

    def _steps(self, experience: Experience, member: tuple[int, int]) -> list[int]:
        """The trained steps of an image."""
        rng = generator(self.config.runtime.seed, "steps", experience.iteration, *member)
        mode = "all" if self.config.rollout.window else self.options.train_steps
        return trained_steps(experience.plan.stochastic, mode, self.options.step_fraction, rng)

    def spare(self, experience: Experience) -> Item:
        return Item(experience.members[0], experience.trajectories.steps[0])

    def batches(self, items: list[Item], experience: Experience) -> list[Batch]:
        """Batches of `batch_size` predictions.

        At the shared step all images of a prompt have the same latents, prediction and mean: one row serves them all,
        and autograd adds their gradients up.
        """
        prompt_of, shared_step = experience.prompt_of.tolist(), experience.plan.shared_step
        rows: dict[tuple, tuple[int, int]] = {}
        users: dict[tuple, list[Item]] = {}
        for item in items:
            trajectory = experience.row_of[item.member]
            is_shared = item.step == shared_step
            key = ("prompt", prompt_of[trajectory]) if is_shared else (trajectory, item.step)
            rows.setdefault(key, (trajectory, item.step))
            users.setdefault(key, []).append(item)
        keys = list(rows)
        chunks = [
            keys[start : start + self.options.batch_size] for start in range(0, len(keys), self.options.batch_size)
        ]
        return [
            GrpoBatch(
                items=[item for key in chunk for item in users[key]],
                rows=torch.tensor([rows[key] for key in chunk]),
                trajectory=torch.tensor([experience.row_of[item.member] for key in chunk for item in users[key]]),
                row_of=torch.tensor([row for row, key in enumerate(chunk) for _ in users[key]]),
            )
            for chunk in chunks
        ]

    def loss(self, model: DiffusionModel, experience: Experience, batch: GrpoBatch) -> Loss:
        actions = Actions(model, experience, batch)
        prediction = actions.predict()
        new = actions.score(prediction)
        old_log_prob, old_mean, passes = self._old(actions, new)
        if self.options.ratio == "guard":
            ratio = guarded_ratio(new.log_prob, old_log_prob, new.mean, old_mean, new.std)
            scale = 1 / actions.step_size
        else:
            ratio, scale = probability_ratio(new.log_prob, old_log_prob), 1.0
        value = clipped_objective(ratio, experience.advantages_of(batch.items), self.options.clip_range) * scale
        rollout = probability_ratio(new.log_prob.detach(), actions.log_probs)
        sums, peaks = self._figures(ratio.detach(), rollout)
        if self.options.kl_weight:
            with self.policy.using("base"):
                reference = actions.predict()
            passes += 1
            kl = velocity_kl(prediction, reference).index_select(0, actions.row_of)
            value = value + self.options.kl_weight * kl
            sums["kl"] = kl.detach().double().sum()
        return Loss(value, sums, peaks, (1 + passes) * len(batch.rows))

    def _old(self, actions: Actions, new: kernels.Step) -> tuple[Tensor, Tensor | None, int]:
        """What the weights that the iteration began with say of the actions.

        Batches of another size round differently, in reduced precision by more than the clip range. Before the first
        optimizer step the weights are the same as in the rollout, so the new log-probability is taken for the old one:
        the ratio is 1 and the gradient that of the policy itself.

        Returns:
            log-probabilities `[N]`; means `[N, ...]`, None where they are not needed; forward passes it took.
        """
        if actions.experience.optimizer_steps == 0:
            return new.log_prob.detach(), new.mean.detach(), 0
        if self.keeps_old_weights:
            with self.policy.using("old"):
                old = actions.score(actions.predict())
            return old.log_prob, old.mean, 1
        return actions.log_probs, actions.means, 0

    def _figures(self, ratio: Tensor, rollout: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Sums and peaks: of the ratios, and of those to the log-probabilities that the rollout stored."""
        deviation, rounding = (ratio.double() - 1).abs(), (rollout.double() - 1).abs()
        sums = {
            "ratio": ratio.double().sum(),
            "deviation": deviation.sum(),
            "clipped": (deviation > self.options.clip_range).double().sum(),
            "rollout_deviation": rounding.sum(),
        }
        return sums, {"deviation": deviation.max(), "rollout_deviation": rounding.max()}

    # ----------------------------------------------------------------------------------------------- what is said

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            actions trained; mean, mean deviation and largest deviation from 1 of the ratios; the share of actions
            beyond the clip range; mean and largest deviation from 1 of ratios to the rollout's log-probabilities before
            the first optimizer step, where only rounding makes them differ; the mean KL, where it is weighted.
        """
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
            "kl": every.mean("kl") if self.options.kl_weight else None,
        }

    def alarm(self, record: dict) -> str | None:
        deviation = record["ratio"]["mean_deviation"]
        if deviation is None or deviation <= self.options.ratio_limit:
            return None
        return f"the mean |ratio - 1| is {deviation:.3g}"

    def warning(self, record: dict) -> str | None:
        """Where rounding reaches the ratios of later optimizer steps; said once."""
        deviation = record["rollout_deviation"]["max"]
        exact = self.options.updates == 1 or self.keeps_old_weights
        if exact or self.warned or deviation is None or deviation <= self.options.clip_range / 10:
            return None
        self.warned = True
        return (
            f"rounding alone makes ratios of the update to the rollout differ from 1 by {deviation:.2g}, above a tenth "
            f"of objective.clip_range {self.options.clip_range:g}, in every optimizer step of an iteration but the "
            "first: set objective.old_log_prob to update, or rollout.batch_size and objective.batch_size alike"
        )

    def line(self, record: dict) -> str:
        off = record["rollout_deviation"]["max"] or 0.0
        return f"clipped {record['clip_fraction'] or 0:.0%}, rollout off by {off:.1e}"

    def closing(self, records: list[dict]) -> list[str]:
        off = max((record["rollout_deviation"]["max"] or 0.0 for record in records), default=0.0)
        return [f"largest deviation of a ratio from 1 by rounding between rollout and update {off:.1e}"]


class Actions:
    """The stored actions of a batch, to be predicted and scored again.

    Attributes:
        row_of: `[N]` long, the prediction each action uses.
        log_probs: `[N]`, of the rollout.
        means: `[N, ...]` of the rollout; None where they are not kept.
        step_size: `[N]` float32, sigma minus the next sigma.
    """

    def __init__(self, model: DiffusionModel, experience: Experience, batch: GrpoBatch) -> None:
        self.model, self.experience = model, experience
        device, plan, kept = experience.device, experience.plan, experience.trajectories
        trajectory, step = batch.rows.to(device).unbind(1)
        self.row_of = batch.row_of.to(device)
        levels = torch.tensor(plan.sigmas, dtype=torch.float64, device=device)
        self.sigma, self.sigma_next = levels[step], levels[step + 1]
        index = torch.tensor([kept.steps.index(s) for s in batch.rows[:, 1].tolist()], device=device)
        self.latents = kept.samples[index, trajectory]
        self.conditions = experience.prompting.conditions.rows(experience.prompt_of[trajectory])
        action = index[self.row_of], batch.trajectory.to(device)
        self.next_samples, self.log_probs = kept.next_samples[action], kept.log_probs[action]
        self.means = None if kept.means is None else kept.means[action]
        self.step_size = (self.sigma - self.sigma_next)[self.row_of].float()

    def predict(self) -> Tensor:
        """Predictions under the weights in use, `[R, ...]`."""
        guidance, negative = self.experience.plan.guidance_scale, self.experience.prompting.unconditional
        return self.model.predict_guided(self.latents, self.sigma.float(), self.conditions, guidance, negative)

    def score(self, prediction: Tensor) -> kernels.Step:
        """The actions under a prediction, N of them."""
        return kernels.step(
            self.experience.plan.kernel,
            self.latents[self.row_of],
            prediction.index_select(0, self.row_of),  # its backward pass adds in a fixed order
            self.sigma[self.row_of],
            self.sigma_next[self.row_of],
            self.experience.plan.eta,
            next_sample=self.next_samples,
            process=self.model.process,
        )


# ------------------------------------------------------------------------------------------------------ mathematics


def clipped_objective(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped policy-gradient loss, min(rho A, clip(rho, 1 - eps, 1 + eps) A) negated (DanceGRPO eq. 7).

    Args:
        ratio: rho, `[N]`.
        advantages: `[N]`.
        clip_range: eps > 0.

    Returns:
        `[N]`, to be minimised.
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def probability_ratio(log_prob_new: Tensor, log_prob_old: Tensor) -> Tensor:
    """rho = exp(log_prob_new - log_prob_old), `[N]`."""
    return torch.exp(log_prob_new - log_prob_old)


def guarded_ratio(
    log_prob_new: Tensor, log_prob_old: Tensor, mean_new: Tensor, mean_old: Tensor, std: Tensor
) -> Tensor:
    """GRPO-Guard's ratio: without the downward drift of the mean log-ratio, and with one spread at every step.

    rho = exp((log_prob_new - log_prob_old + |mean_new - mean_old|^2 / (2 std^2)) std), the square averaged over
    non-batch dimensions (Flow-GRPO's train_sd3_GRPO_Guard; std is that of the whole step, sqrt(-dt) included).

    Args:
        log_prob_new, log_prob_old, std: `[N]`.
        mean_new, mean_old: `[N, ...]`.
    """
    drift = (mean_new - mean_old).square().flatten(1).mean(1) / (2 * std.square())
    return torch.exp((log_prob_new - log_prob_old + drift) * std)


def velocity_kl(prediction: Tensor, reference: Tensor) -> Tensor:
    """Distance to the base model's prediction: mean square over non-batch dimensions, `[N]`."""
    return (prediction.float() - reference.float()).square().flatten(1).mean(1)
