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

    def preflight(self, experience: Experience) -> None:
        """The same actions scored twice have a ratio within the clip range."""
        items = [Item(member, 0) for member in experience.members]
        losses = [self.loss(self.model, experience, batch) for batch in self.batches(items, experience)]
        deviation = max(loss.peaks["deviation"].item() for loss in losses)
        if deviation > self.options.clip_range:
            raise RunFailed(
                f"the same action scored twice has a ratio {deviation:.2g} off 1, which is beyond objective.clip_range "
                f"{self.options.clip_range:g}: raise the clip range, or take float32 weights"
            )

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
            keep_means=self.options.ratio == "guard",
        )

    def items(self, experience: Experience) -> Iterator[list[Item]]:
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
        device, plan, kept = experience.device, experience.plan, experience.trajectories
        trajectory, step = batch.rows.to(device).unbind(1)
        row_of, image = batch.row_of.to(device), batch.trajectory.to(device)
        sigmas = torch.tensor(plan.sigmas, dtype=torch.float64, device=device)
        index = torch.tensor([kept.steps.index(s) for s in batch.rows[:, 1].tolist()], device=device)
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        latents = kept.samples[index, trajectory]
        conditions = experience.prompting.conditions.rows(experience.prompt_of[trajectory])

        def predict() -> Tensor:
            negative = experience.prompting.unconditional
            return model.predict_guided(latents, sigma.float(), conditions, plan.guidance_scale, negative)

        prediction = predict()
        action = index[row_of], image
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
        if self.options.ratio == "guard":
            ratio = guarded_ratio(replay.log_prob, old, replay.mean, kept.means[action], replay.std)
            scale = 1 / (sigma - sigma_next)[row_of].float()
        else:
            ratio, scale = probability_ratio(replay.log_prob, old), 1.0
        value = clipped_objective(ratio, experience.advantages_of(batch.items), self.options.clip_range) * scale
        sums, peaks = self._figures(ratio.detach())
        forwards = len(latents)
        if self.options.kl_weight:
            with self.policy.using("base"):
                reference = predict()
            forwards += len(latents)
            kl = velocity_kl(prediction, reference).index_select(0, row_of)
            value = value + self.options.kl_weight * kl
            sums["kl"] = kl.detach().double().sum()
        return Loss(value, sums, peaks, forwards)

    def _figures(self, ratio: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        deviation = (ratio.double() - 1).abs()
        sums = {
            "ratio": ratio.double().sum(),
            "deviation": deviation.sum(),
            "clipped": (deviation > self.options.clip_range).double().sum(),
        }
        return sums, {"deviation": deviation.max()}

    # ----------------------------------------------------------------------------------------------- what is said

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            actions trained; mean, mean deviation and largest deviation from 1 of the ratios, and the largest before
            the first optimizer step; the share of actions beyond the clip range; the mean KL, where it is weighted.
        """
        return {
            "actions": every.items,
            "ratio": {
                "mean": every.mean("ratio", default=1.0),
                "mean_deviation": every.mean("deviation"),
                "max_deviation": every.peaks.get("deviation", 0.0),
                "max_deviation_before_update": first.peaks.get("deviation", 0.0),
            },
            "clip_fraction": every.mean("clipped"),
            "kl": every.mean("kl") if self.options.kl_weight else None,
        }

    def alarm(self, record: dict) -> str | None:
        deviation = record["ratio"]["mean_deviation"]
        if deviation is None or deviation <= self.options.ratio_limit:
            return None
        return f"the mean |ratio - 1| is {deviation:.3g}"

    def warning(self, record: dict) -> str | None:
        deviation = record["ratio"]["max_deviation_before_update"]
        if deviation is None or deviation <= self.options.clip_range / 10:
            return None
        return (
            f"before the first update a ratio is {deviation:.2g} from 1, above a tenth of the clip range "
            f"{self.options.clip_range:g}"
        )

    def line(self, record: dict) -> str:
        off = record["ratio"]["max_deviation_before_update"] or 0.0
        return f"ratio off by {off:.1e} before, clipped {record['clip_fraction']:.0%}"

    def closing(self, records: list[dict]) -> list[str]:
        off = max(record["ratio"]["max_deviation_before_update"] or 0.0 for record in records)
        return [f"largest deviation of a ratio from 1 before an iteration's first update {off:.1e}"]


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
