"""DiffusionNFT (arXiv 2509.16117): contrasts an implicit positive with an implicit negative policy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from ..diffusion.process import Process
from .base import Loss, RolloutBatch, Totals
from .forward_process import ForwardProcessObjective, ForwardProcessOptions, NoisedBatch, mean_square

if TYPE_CHECKING:
    from ..models import DiffusionModel

DEAD_CONTRAST = 1e-12
"""Mean squared distance of new and old predictions below which the loss is plain advantage-weighted matching."""


class NftOptions(ForwardProcessOptions):
    """DiffusionNFT: trains towards good images and away from bad ones, without a stochastic sampler."""

    name: Literal["nft"] = Field("nft", description="Name of the objective.")
    beta: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0,
        description="Distance of the implicit policies from the old one; 0.1 for several rewards.",
    )
    old_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="Largest decay of the old LoRA: after an iteration, old = decay old + (1 - decay) new."
    )
    old_decay_growth: Annotated[float, Field(gt=0, le=1)] = Field(
        0.001, description="The decay grows by this per iteration, up to old_decay."
    )
    old_decay_delay: int = Field(0, ge=0, le=1_000_000, description="Iterations before the decay begins to grow.")
    kl_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        1e-4, description="Weight of the KL to the base model: the squared distance of the predictions."
    )


class Nft(ForwardProcessObjective):
    """The mean over noised images of q |x0+ - x0|^2 / w+ + (1 - q) |x0- - x0|^2 / w-; see `nft_loss`."""

    name = "nft"
    Options = NftOptions
    options: NftOptions

    @property
    def keeps_old_weights(self) -> bool:
        return True

    def rollout_weights(self) -> AbstractContextManager:
        return self.policy.using("old")

    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: NoisedBatch) -> Loss:
        image = rollout.trajectories.final[batch.rows]
        latents = model.process.noised(image, batch.noise, batch.sigma)
        with self.policy.using("old"):
            old = self.predict(rollout, latents, batch.sigma, batch.rows)
        forwards = 2 * len(latents)
        reference = None
        if self.options.kl_weight:
            with self.policy.using("base"):
                reference = self.predict(rollout, latents, batch.sigma, batch.rows)
            forwards += len(latents)
        prediction = self.predict(rollout, latents, batch.sigma, batch.rows)
        bound = self.config.advantage.clip
        quality = optimality(rollout.advantages_of(batch.items), bound)
        value = bound * nft_loss(
            prediction, old, image, latents, batch.sigma, quality, self.options.beta, model.process
        )
        sums = {"contrast": mean_square(prediction.detach() - old).sum()}
        if reference is not None:
            kl = mean_square(prediction - reference)
            value = value + self.options.kl_weight * kl
            sums["kl"] = kl.detach().sum()
        return Loss(value, sums, {}, forwards)

    def after_iteration(self, iteration: int) -> None:
        self.policy.update_old(self._decay(iteration + 1))

    def _decay(self, iterations: int) -> float:
        grown = max(0, iterations - self.options.old_decay_delay) * self.options.old_decay_growth
        return min(grown, self.options.old_decay)

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            number of items; contrast, the mean squared distance of new and old predictions; KL, if weighted.
        """
        record = {"items": every.items, "contrast": every.mean("contrast")}
        return record | ({"kl": every.mean("kl")} if self.options.kl_weight else {})

    def warning(self, record: dict) -> str | None:
        if not record["items"] or record["contrast"] is None or record["contrast"] > DEAD_CONTRAST:
            return None
        if self.policy.updates <= self.options.updates:
            return None  # in the first iteration the old and the new weights are still equal
        return (
            "the old policy equals the new one, so the implicit policies do not differ: raise "
            "objective.old_decay_growth or objective.updates, or lower objective.old_decay_delay"
        )

    def line(self, record: dict) -> str:
        return f"contrast {record['contrast'] or 0:.1e}"


def optimality(advantages: Tensor, bound: float) -> Tensor:
    """q, the probability that an image is optimal: the advantage clipped to the bound and mapped to [0, 1].

    Args:
        advantages: `[N]`.
        bound: > 0, the largest absolute advantage.
    """
    return (advantages.double().clamp(-bound, bound) / bound / 2 + 0.5).clamp(0, 1)


def nft_loss(
    prediction: Tensor,
    old: Tensor,
    image: Tensor,
    latents: Tensor,
    sigma: Tensor,
    quality: Tensor,
    beta: float,
    process: Process,
) -> Tensor:
    """DiffusionNFT's loss with its adaptive weight (arXiv 2509.16117, eq. 5 and section 4).

    The implicit policies are beta v + (1 - beta) v_old and (1 + beta) v_old - beta v; each image estimate's
    squared error is divided by its mean absolute error, which is taken in float64 and gets no gradient.

    Args:
        prediction, old: of the new and the old policy, `[N, ...]`; `old` gets no gradient.
        image, latents: the clean and the noised latents, `[N, ...]`.
        sigma: `[N]`.
        quality: q in [0, 1], `[N]`.
        beta: > 0.

    Returns:
        `[N]` float64, to be minimised.
    """
    old = old.detach()
    total = 0
    for share, implicit in (
        (quality, beta * prediction + (1 - beta) * old),
        (1 - quality, (1 + beta) * old - beta * prediction),
    ):
        error = (process.image(latents, implicit, sigma) - image).double()
        weight = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        total = total + share * error.square().flatten(1).mean(1) / weight
    return total / beta
