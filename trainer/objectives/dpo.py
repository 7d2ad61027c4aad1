"""DPO for diffusion models (Diffusion-DPO, arXiv 2311.12908): the best image of each group against its worst.

With a collection of votes the pairs come from there instead: `offline_dpo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..utils.section import Positive
from .base import Batch, Loss, Member, Objective, RolloutBatch, Totals, TrainingItem
from .forward_process import ForwardProcessObjective, ForwardProcessOptions, mean_square

if TYPE_CHECKING:
    from ..models import DiffusionModel


class DpoOptions(ForwardProcessOptions):
    """DPO: pairs of a better and a worse image, compared with the base model at the same noise and noise level."""

    name: Literal["dpo"] = Field("dpo", description="Name of the objective.")
    collection: str = Field(
        "",
        description="Pairs to train on, instead of sampled images that rewards have ranked: a collection of votes (its "
        "name in ComfyUI, else its folder), or a CSV file with the columns better, worse and prompt. Every iteration "
        "takes rollout.prompts_per_iteration of them.",
        json_schema_extra={"votes": "collection"},
    )
    beta: Annotated[float, Field(gt=0, le=1_000_000)] = Field(
        100.0,
        description="DPO's beta: the loss is -log sigmoid(-beta / 2 x difference), where the denoising errors are "
        "averaged over the elements of the latents (for summed errors, divide beta by their number).",
    )
    noise_levels: Positive = Field(1, description="Noise levels drawn per pair and optimizer step.")
    level_distribution: Literal["schedule", "uniform", "logit-normal"] = Field(
        "logit-normal",
        description="Distribution of the noise levels: schedule draws from the levels of the rollout's steps without "
        "repetition; uniform and logit-normal(0, 1) draw from the range of these levels.",
    )
    winner_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Weight of the winner's denoising error in the loss, which keeps that error from rising."
    )


@dataclass(frozen=True)
class PairBatch(Batch):
    """Pairs of images, each with one noise and one noise level for both.

    Attributes:
        rows: `[N]` long, index of the winner among this process's images; the loser has the same prompt.
        winner, loser: latents of the images, `[N, ...]` float32.
        sigma: `[N]` float32.
        noise: `[N, ...]` float32.
    """

    rows: Tensor
    winner: Tensor
    loser: Tensor
    sigma: Tensor
    noise: Tensor


class Dpo(ForwardProcessObjective):
    """The mean over pairs of -log sigmoid(-beta/2 ((e_w - e_w_base) - (e_l - e_l_base))), e the denoising error."""

    name = "dpo"
    Options = DpoOptions
    options: DpoOptions

    @classmethod
    def variant(cls, options: DpoOptions) -> type[Objective]:
        from .offline_dpo import OfflineDpo

        return OfflineDpo if options.collection else cls

    def items(self, rollout: RolloutBatch) -> Iterator[list[TrainingItem]]:
        pairs = self._pairs(rollout)
        updates = min(self.options.updates, len(pairs))
        for update in range(updates):
            part = pairs[len(pairs) * update // updates : len(pairs) * (update + 1) // updates]
            draws = range(self.options.noise_levels)
            yield [TrainingItem(best, draw, other=worst) for best, worst in part for draw in draws]

    def _pairs(self, rollout: RolloutBatch) -> list[tuple[Member, Member]]:
        """Better and worse image of each pair; sees to it that the latents of all of them are known."""
        pairs = [pair for group in rollout.active_groups() if (pair := best_and_worst(group, rollout))]
        self._latents = self._gather(rollout, {member for pair in pairs for member in pair})
        return pairs

    def _gather(self, rollout: RolloutBatch, members: set[Member]) -> dict[Member, Tensor]:
        """Final latents of all images in pairs; the two of a pair may have been sampled by different processes."""
        here = [(m, rollout.trajectories.final[rollout.row_of[m]].cpu()) for m in members if m in rollout.row_of]
        return dict(self.processes.gather(here))

    def dummy_item(self, rollout: RolloutBatch) -> TrainingItem:
        member = rollout.members[0]
        self._latents.setdefault(member, rollout.trajectories.final[0].cpu())
        return TrainingItem(member, 0, other=member)

    def _batch(self, items: list[TrainingItem], rollout: RolloutBatch) -> PairBatch:
        noised, device = super()._batch(items, rollout), rollout.device
        return PairBatch(
            items=items,
            rows=noised.rows,
            winner=torch.stack([self._latents[item.member] for item in items]).to(device),
            loser=torch.stack([self._latents[item.other] for item in items]).to(device),
            sigma=noised.sigma,
            noise=noised.noise,
        )

    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: PairBatch) -> Loss:
        images = torch.cat([batch.winner, batch.loser])
        eps, sigma, rows = batch.noise.repeat(2, *[1] * (images.ndim - 1)), batch.sigma.repeat(2), batch.rows.repeat(2)
        latents = model.process.noised(images, eps, sigma)
        target = model.process.target(images, eps, sigma)
        with self.policy.using("base"):
            reference = self.predict(rollout, latents, sigma, rows)
        base = mean_square(reference - target)
        prediction = self.predict(rollout, latents, sigma, rows)
        error = mean_square(prediction - target)
        winner, loser = error.chunk(2)
        gains = (error - base).detach().chunk(2)
        value = dpo_loss(error - base, self.options.beta)
        if self.options.winner_weight:
            value = value + self.options.winner_weight * winner
        if self.options.kl_weight:
            value = value + self.options.kl_weight * sum(mean_square(prediction - reference).chunk(2)) / 2
        sums = {
            "winner": gains[0].sum(),
            "loser": gains[1].sum(),
            "accuracy": (gains[0] < gains[1]).double().sum(),
        }
        return Loss(value, sums, {}, 2 * len(latents))

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            number of pairs; mean denoising errors of winners and losers minus those of the base model; share of pairs
            in which the winner's difference is below the loser's.
        """
        return {
            "pairs": every.items,
            "winner_error": every.mean("winner"),
            "loser_error": every.mean("loser"),
            "accuracy": every.mean("accuracy"),
        }

    def warning(self, record: dict) -> str | None:
        winner = record["winner_error"]
        if not record["pairs"] or winner is None or winner <= 0 or record["loser_error"] <= winner:
            return None
        if winner < RISING / self.options.beta:
            return None
        return (
            f"the denoising errors of both images rise above the base model's (better image: {winner:.2g}), so the "
            "model degrades: set objective.winner_weight, or lower optimizer.learning_rate"
        )

    def line(self, record: dict) -> str:
        winner, loser = record["winner_error"] or 0.0, record["loser_error"] or 0.0
        return f"error above base: better {winner:+.1e}, worse {loser:+.1e}"


RISING = 1.0
"""Warn when the winner's error exceeds the base model's by more than this / beta."""


def best_and_worst(group: list[Member], rollout: RolloutBatch) -> tuple[Member, Member] | None:
    """The images with the highest and the lowest advantage; None if all are equal."""
    if len(group) < 2:
        return None
    value = rollout.advantages.values
    best, worst = max(group, key=lambda m: value[m].item()), min(group, key=lambda m: value[m].item())
    return None if value[best] == value[worst] else (best, worst)


def dpo_loss(gains: Tensor, beta: float) -> Tensor:
    """-log sigmoid(-beta/2 (gain of the winner - gain of the loser)) (arXiv 2311.12908, eq. 14).

    Args:
        gains: mean squared errors minus the base model's, `[2 N]`: all winners, then all losers.
        beta: > 0.

    Returns:
        `[N]`.
    """
    winner, loser = gains.chunk(2)
    return -logsigmoid(-beta / 2 * (winner - loser))
