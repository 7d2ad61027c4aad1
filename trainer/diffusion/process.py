"""Noising processes: how images are noised, and the prediction type (velocity or noise) that goes with it.

A model family converts its network's output to the prediction type of its process, in `predict`. All other code is
independent of the prediction type and uses the methods of the process.

Notation: sigma is the noise level, from 1 (noise) to 0 (image); the noised latents are
x = signal(sigma) image + sigma noise.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

Level = float | Tensor
"""A noise level or a coefficient: a number for the whole batch, or a tensor `[B]`."""


class Process(ABC):
    """How images are noised, and what the network predicts. Stateless; the two instances are `FLOW` and `VP`."""

    name: ClassVar[str]

    @abstractmethod
    def signal(self, sigma: Level) -> Level:
        """Coefficient of the image in the noised latents; same type and shape as `sigma`."""

    @abstractmethod
    def image(self, latents: Tensor, prediction: Tensor, sigma: Level) -> Tensor:
        """The image estimate (x0) from a prediction.

        Args:
            latents, prediction: `[B, ...]`.
            sigma: a number or `[B]`, in [0, 1] for FLOW and [0, 1) for VP.

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
    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the latents and of the prediction in the deterministic first-order step.

        Args:
            sigma, sigma_next: `[B]` float64, sigma > sigma_next.
        """

    @abstractmethod
    def k_scale(self, sigma: Level) -> Level:
        """The factor that converts latents to the scale of k-diffusion and ComfyUI at the same noise level.

        In that scale, latents of diffusion models are image + s noise with s = k_scale sigma; those of flow models are
        unchanged. In both cases, (latents - image estimate) / s is the prediction of the process.
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

    def euler(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar, alpha_bar_next = 1 - sigma**2, 1 - sigma_next**2
        scale = (alpha_bar_next / alpha_bar).sqrt()
        return scale, (1 - alpha_bar_next).sqrt() - scale * (1 - alpha_bar).sqrt()

    def k_scale(self, sigma: Level) -> Level:
        return (1 - sigma**2) ** -0.5

    def from_k_sigma(self, s: float) -> float:
        return s / (1 + s**2) ** 0.5


FLOW = RectifiedFlow()
VP = VariancePreserving()


def column(value: Level, latents: Tensor) -> Level:
    """Reshape a `[B]` tensor so that it broadcasts over `latents`; a number is returned unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.to(latents.dtype).reshape(-1, *[1] * (latents.ndim - 1))
