"""Advantage-weighted matching (arXiv 2509.25050): minus the denoising error of a final image as its log-likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from .base import Loss, RolloutBatch, Totals
from .forward_process import ForwardProcessObjective, ForwardProcessOptions, NoisedBatch, mean_square

if TYPE_CHECKING:
    from ..models import DiffusionModel

Weighting = Literal["uniform", "sigma", "sigma-squared", "huber", "generalised-huber"]


class AwmOptions(ForwardProcessOptions):
    """Advantage-weighted matching: an advantage-weighted denoising loss on final images; the simplest objective."""

    name: Literal["awm"] = Field("awm", description="Name of the objective.")
    weighting: Weighting = Field(
        "generalised-huber", description="How the squared error of a prediction becomes a log-likelihood."
    )
    power: Annotated[float, Field(gt=0, le=1)] = Field(
        0.25, description="Exponent of generalised-huber; 1 is the weight sigma."
    )
    advantage_scale: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="Advantages are scaled so that advantage.clip becomes this; they are not clipped to it."
    )
    trust_weight: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.0, description="Weight of the squared distance to the predictions of a moving average of the LoRA; 0 is off."
    )
    trust_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="Largest decay of that moving average, per iteration."
    )
    trust_decay_growth: Annotated[float, Field(gt=0, le=1)] = Field(
        0.001, description="Its decay grows by this per iteration, up to trust_decay."
    )


class Awm(ForwardProcessObjective):
    """The mean over noised images of -A exp(logp - stopgrad(logp)), where logp is minus the weighted error."""

    name = "awm"
    Options = AwmOptions
    options: AwmOptions

    @property
    def keeps_old_weights(self) -> bool:
        return self.options.trust_weight > 0

    def loss(self, model: DiffusionModel, rollout: RolloutBatch, batch: NoisedBatch) -> Loss:
        image = rollout.trajectories.final[batch.rows]
        latents = model.process.noised(image, batch.noise, batch.sigma)
        anchors = [("base", "kl", self.options.kl_weight), ("old", "trust", self.options.trust_weight)]
        anchors = [anchor for anchor in anchors if anchor[2]]
        predicted = {}
        for weights, name, _ in anchors:
            with self.policy.using(weights):
                predicted[name] = self.predict(rollout, latents, batch.sigma, batch.rows)
        prediction = self.predict(rollout, latents, batch.sigma, batch.rows)
        error = mean_square(prediction - model.process.target(image, batch.noise, batch.sigma))
        log_prob = log_likelihood(error, batch.sigma, self.options.weighting, self.options.power)
        scale = self.options.advantage_scale / self.config.advantage.clip
        value = awm_loss(log_prob, rollout.advantages_of(batch.items) * scale)
        sums = {"error": error.detach().sum()}
        for _, name, weight in anchors:
            distance = mean_square(prediction - predicted[name])
            value = value + weight * distance
            sums[name] = distance.detach().sum()
        return Loss(value, sums, {}, len(latents) * (1 + len(anchors)))

    def after_iteration(self, iteration: int) -> None:
        if self.keeps_old_weights:
            decay = min((iteration + 1) * self.options.trust_decay_growth, self.options.trust_decay)
            self.policy.update_old(decay)

    def record(self, every: Totals, first: Totals) -> dict:
        """
        Returns:
            number of items; mean squared denoising error on the run's images; KL and trust distance, if weighted.
        """
        record = {"items": every.items, "error": every.mean("error")}
        return record | {name: every.mean(name) for name in ("kl", "trust") if name in every.sums}

    def line(self, record: dict) -> str:
        return f"denoising error {record['error'] or 0:.3g}"


def log_likelihood(error: Tensor, sigma: Tensor, weighting: Weighting, power: float) -> Tensor:
    """Minus the weighted denoising error (AWM, section 4 and its reference's weightings), `[N]` float64.

    Args:
        error: mean squared error of each prediction, `[N]`.
        sigma: `[N]` in (0, 1].
        power: p of generalised-huber, ((e + 1e-10)^p - (1e-10)^p) sigma / p.
    """
    sigma = sigma.double()
    if weighting == "uniform":
        return -error
    if weighting == "sigma":
        return -sigma * error
    if weighting == "sigma-squared":
        return -sigma.square() * error
    floor = 1e-10
    if weighting == "huber":
        return -((error + floor).sqrt() - floor**0.5) * sigma
    return -((error + floor) ** power - floor**power) * sigma / power


def awm_loss(log_prob: Tensor, advantages: Tensor) -> Tensor:
    """-A exp(logp - stopgrad(logp)): its value is -A, its gradient is that of -A logp. `[N]` float64."""
    ratio = torch.exp(log_prob - log_prob.detach())
    return -advantages.double() * ratio
