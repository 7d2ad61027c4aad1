"""Noising processes: how images are noised, and the prediction type (velocity or noise) that goes with it.

A model family converts its network's output to the prediction type of its process, in `predict`. All other code is
independent of the prediction type and uses the methods of the process.

Notation: sigma is the noise level, from 1 (noise) to 0 (image); the noised latents are
x = signal(sigma) image + sigma noise.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

Level = float | Tensor
"""A noise level or a coefficient: a number for the whole batch, or a tensor `[B]`."""


class Process(ABC):
    """How images are noised, and what a network that undoes it predicts. Stateless: `FLOW`, `VP` and `VP_V`."""

    name: ClassVar[str]

    @abstractmethod
    def signal(self, sigma: Level) -> Level:
        """Coefficient of the image in the noised latents; same type and shape as `sigma`."""

    @abstractmethod
    def image(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        """The image estimate (x0) from a prediction.

        Args:
            latents, prediction: `[B, ...]`.
            sigma: in [0, 1], but for VP in [0, 1); a number or `[B]`.

        Returns:
            the estimate, shaped as `latents`.
        """

    @abstractmethod
    def noise(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        """The noise estimate (x1) from a prediction; arguments as in `image`."""

    @abstractmethod
    def target(self, image: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        """The training target for `noised(image, noise, sigma)`: the velocity for FLOW, the noise for VP."""

    @abstractmethod
    def predicting(self, latents: Tensor, image: Tensor, sigma: Level) -> Tensor:
        """The prediction whose image estimate is `image`, at sigma in (0, 1]: the inverse of `image`."""

    @abstractmethod
    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the latents and of the prediction in the deterministic first-order step.

        Args:
            sigma, sigma_next: `[B]` float64, sigma > sigma_next.
        """

    @abstractmethod
    def k_scale(self, sigma: Level) -> Level:
        """The factor that converts latents to the scale of k-diffusion and ComfyUI at the same noise level.

        There, diffusion models have latents image + s noise with s = k_scale sigma, and flow models the same as here.
        Infinite where diffusion models have no signal.
        """

    @abstractmethod
    def from_k_sigma(self, s: float) -> float:
        """Convert a noise level of k-diffusion and ComfyUI to sigma."""

    def noised(self, image: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        """Latents at noise level sigma, shaped as `image`.

        Args:
            image, noise: `[B, ...]`; noise is standard normal.
            sigma: in [0, 1]; a number or `[B]`.
        """
        return column(self.signal(sigma), image) * image + column(sigma, image) * noise

    def __repr__(self) -> str:
        return f"<process {self.name}>"


class RectifiedFlow(Process):
    """x = (1 - sigma) image + sigma noise; the prediction is the velocity v = noise - image (arXiv 2209.03003)."""

    name = "flow"

    def signal(self, sigma: Level) -> Level:
        return 1 - sigma

    def image(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return latents - column(sigma, latents) * prediction

    def noise(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return latents + column(1 - sigma, latents) * prediction

    def target(self, image: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        return noise - image

    def predicting(self, latents: Tensor, image: Tensor, sigma: Level) -> Tensor:
        return (latents - image) / column(sigma, latents)

    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma_next - sigma

    def k_scale(self, sigma: Level) -> Level:
        return torch.ones_like(sigma) if isinstance(sigma, Tensor) else 1.0

    def from_k_sigma(self, s: float) -> float:
        return s


class VariancePreserving(Process):
    """x = sqrt(1 - sigma^2) image + sigma noise; the prediction is the noise (DDPM, arXiv 2006.11239).

    In the usual notation sigma = sqrt(1 - alpha_bar).
    """

    name = "vp"

    def signal(self, sigma: Level) -> Level:
        return (1 - sigma**2) ** 0.5

    def image(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return (latents - column(sigma, latents) * prediction) / column(self.signal(sigma), latents)

    def noise(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return prediction

    def target(self, image: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        return noise

    def predicting(self, latents: Tensor, image: Tensor, sigma: Level) -> Tensor:
        return (latents - column(self.signal(sigma), latents) * image) / column(sigma, latents)

    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar, alpha_bar_next = 1 - sigma**2, 1 - sigma_next**2
        scale = (alpha_bar_next / alpha_bar).sqrt()
        return scale, (1 - alpha_bar_next).sqrt() - scale * (1 - alpha_bar).sqrt()

    def k_scale(self, sigma: Level) -> Level:
        return 1 / (1 - sigma**2) ** 0.5 if isinstance(sigma, Tensor) or sigma < 1 else math.inf

    def from_k_sigma(self, s: float) -> float:
        return s / (1 + s**2) ** 0.5


class VariancePreservingVelocity(VariancePreserving):
    """The same noised latents; the prediction is v = sqrt(1 - sigma^2) noise - sigma image (arXiv 2202.00512).

    Unlike the noise it says something at sigma 1 too, where the latents hold no signal.
    """

    name = "vp-v"

    def image(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return column(self.signal(sigma), latents) * latents - column(sigma, latents) * prediction

    def noise(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        return column(sigma, latents) * latents + column(self.signal(sigma), latents) * prediction

    def target(self, image: Tensor, noise: Tensor, sigma: Level) -> Tensor:
        return column(self.signal(sigma), image) * noise - column(sigma, image) * image

    def predicting(self, latents: Tensor, image: Tensor, sigma: Level) -> Tensor:
        return (column(self.signal(sigma), latents) * latents - image) / column(sigma, latents)

    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        signal, signal_next = self.signal(sigma), self.signal(sigma_next)
        return signal_next * signal + sigma_next * sigma, sigma_next * signal - signal_next * sigma


FLOW = RectifiedFlow()
VP = VariancePreserving()
VP_V = VariancePreservingVelocity()


def column(value: Level, latents: Tensor) -> Level:
    """Reshape a `[B]` tensor so that it broadcasts over `latents`; a number is returned unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.to(latents.dtype).reshape(-1, *[1] * (latents.ndim - 1))
