"""The interface behind which every model family stands."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..errors import BadInput


@dataclass(frozen=True)
class Conditions:
    """What the prompts say to the model: named tensors, each with one row per prompt."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def rows(self, index: Tensor) -> "Conditions":
        """The rows of `index` (`[N]` long), repeated or left out as it says."""
        return Conditions({name: value[index.to(value.device)] for name, value in self.tensors.items()})

    def to(self, device: torch.device) -> "Conditions":
        return Conditions({name: value.to(device) for name, value in self.tensors.items()})

    def joined(self, other: "Conditions") -> "Conditions":
        return Conditions({name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()})


class DiffusionModel(ABC):
    """A rectified-flow model with a frozen base.

    Attributes:
        module: the network that predicts, into which the LoRA is injected.
        default_targets: endings of the names of the modules a LoRA goes to.
    """

    module: nn.Module
    default_targets: tuple[str, ...]

    @staticmethod
    @abstractmethod
    def check(config: ModelConfig) -> None:
        """Look at the files without loading them.

        Raises:
            BadInput: the folder does not hold a model of this family, or the size cannot be taken.
        """

    @classmethod
    @abstractmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "DiffusionModel":
        """Load the network (frozen, in `config.dtype`) and the VAE; no text encoder."""

    @classmethod
    @abstractmethod
    def encode(cls, config: ModelConfig, prompts: list[str], device: torch.device) -> Conditions:
        """Load the text encoders, encode, and free them again; a row per prompt, on the CPU."""

    @classmethod
    def outside_conditions(cls, config: ModelConfig, embeds: Tensor, pooled: Tensor | None) -> Conditions:
        """Conditions from text encoders that the host has loaded itself.

        Args:
            embeds: `[N, tokens, width]`.
            pooled: `[N, width]`, or None where the text encoders give none.

        Raises:
            BadInput: they do not fit this model, or this family only takes its own.
        """
        raise BadInput(f"family {config.family} encodes prompts with its own text encoders: leave clip unconnected")

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity (noise minus image), float32, shaped as `latents`.

        Args:
            latents: `[B, ...]` float32.
            sigma: `[B]` in (0, 1].
            conditions: B rows.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32 in [0, 1]."""

    @abstractmethod
    def lora_key(self, module_name: str) -> str:
        """The name under which ComfyUI loads the LoRA of a module of `module`."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        unconditional: Conditions | None = None,
    ) -> Tensor:
        """Velocity with classifier-free guidance: both branches in one batch, mixed in float32.

        Args:
            guidance_scale: w in uncond + w (cond - uncond); 1 asks for no second branch.
            unconditional: one row, the negative prompt's.
        """
        if guidance_scale == 1.0:
            return self.predict(latents, sigma, conditions)
        index = torch.zeros(len(conditions), dtype=torch.long, device=latents.device)
        both = conditions.joined(unconditional.rows(index))
        positive, negative = self.predict(latents.repeat(2, *[1] * (latents.ndim - 1)), sigma.repeat(2), both).chunk(2)
        return negative + guidance_scale * (positive - negative)


def require_files(folder: Path, names: list[str], family: str) -> None:
    """Raise BadInput when a component of a diffusers folder is missing."""
    if not folder.is_dir():
        raise BadInput(f"model.path is {str(folder)!r}: there is no such folder")
    for name in names:
        if not (folder / name).exists():
            raise BadInput(f"model.path {str(folder)!r} is no {family} folder: {name} is missing")
