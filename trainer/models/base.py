"""The interface of model families, and the conditioning of prompts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..diffusion.process import FLOW, Process
from ..diffusion.schedules import sigma_schedule
from ..utils.errors import BadInput

IMAGE_PREFIX = "image_"
"""Prefix of conditions that come from a prompt's image; they are used in both branches of guidance."""
MEGAPIXEL = 2**20
MAX_DECODE_BATCH = 32
"""Largest default of `decode_batch_size`, which is as many images as make a megapixel."""


ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that a LoRA can be put on; one on convolutions is known as LoCon."""
ENCODED_AT_ONCE = 16
"""Batch size of text encoding."""


@dataclass(frozen=True)
class Conditions:
    """Conditioning of N prompts: named tensors (text embeddings, masks, image latents), each with one row per prompt.

    Attributes:
        tensors: `[N, ...]`; text embeddings are `[N, tokens, width]`.
        lengths: `[N]` long on the CPU, the number of tokens of each row, if the model has no mask and rows differ in
            length; else None. Shorter rows are padded with zeros, which are removed before the model is called.
    """

    tensors: dict[str, Tensor]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def rows(self, index: Tensor) -> "Conditions":
        """Select rows by `index` (`[N]` long)."""
        tensors = {name: value[index.to(value.device)] for name, value in self.tensors.items()}
        return Conditions(tensors, None if self.lengths is None else self.lengths[index.cpu()])

    def to(self, device: torch.device) -> "Conditions":
        return Conditions({name: value.to(device) for name, value in self.tensors.items()}, self.lengths)

    def joined(self, other: "Conditions") -> "Conditions":
        """Concatenate rows; shorter text embeddings are padded with zeros."""
        tensors = {name: stacked([value, other.tensors[name]]) for name, value in self.tensors.items()}
        if self.lengths is None and other.lengths is None and self._tokens() == other._tokens():
            return Conditions(tensors)
        if "mask" in tensors:
            return Conditions(tensors)
        return Conditions(tensors, torch.cat([self._every_length(), other._every_length()]))

    def with_images_of(self, other: "Conditions") -> "Conditions":
        """These conditions with the image conditions of `other`, row by row."""
        images = {name: value for name, value in other.tensors.items() if name.startswith(IMAGE_PREFIX)}
        return Conditions(self.tensors | images, self.lengths)

    def by_length(self) -> "list[tuple[Tensor, Conditions]]":
        """Group rows by their number of tokens: the indices of each group, and its conditions without padding."""
        if self.lengths is None:
            return [(torch.arange(len(self)), self)]
        parts = []
        for length in self.lengths.unique().tolist():
            index = (self.lengths == length).nonzero().flatten()
            tensors = self.rows(index).tensors
            cut = {name: value[:, :length] if is_tokens(name, value) else value for name, value in tensors.items()}
            parts.append((index, Conditions(cut)))
        return parts

    def _tokens(self) -> int:
        return max((value.shape[1] for name, value in self.tensors.items() if is_tokens(name, value)), default=0)

    def _every_length(self) -> Tensor:
        return torch.full((len(self),), self._tokens()) if self.lengths is None else self.lengths


def is_tokens(name: str, value: Tensor) -> bool:
    """Whether a condition is a text embedding, `[N, tokens, width]`."""
    return value.ndim == 3 and not name.startswith(IMAGE_PREFIX)


def stacked(values: list[Tensor]) -> Tensor:
    """Concatenate tensors, padded with zeros along dimension 1 to the longest."""
    longest = max(value.shape[1] for value in values)
    return torch.cat([filled(value, longest) for value in values])


def filled(value: Tensor, length: int) -> Tensor:
    """Pad `[N, L, ...]` with zeros along dimension 1 to `length`."""
    missing = length - value.shape[1]
    return value if not missing else torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], dim=1)


class DiffusionModel(ABC):
    """A rectified-flow or diffusion model with frozen weights.

    Attributes:
        config: the `model` section.
        module: the transformer or UNet, into which the LoRA is injected.
        default_targets: suffixes of the names of the modules that get a LoRA by default.
        process: its noising process and prediction type; None in a class whose instances differ.
        needs_opening_check: whether a run first checks that the model can be trained (`trainer.preflight`).
    """

    config: ModelConfig
    module: nn.Module
    default_targets: tuple[str, ...]
    process: Process | None = FLOW
    needs_opening_check: bool = False

    @staticmethod
    @abstractmethod
    def check(config: ModelConfig) -> None:
        """Check the files without loading them.

        Raises:
            BadInput: the folder has no model of this family, or the model does not support the image size.
        """

    @classmethod
    @abstractmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "DiffusionModel":
        """Load the network (frozen, in `config.dtype`) and the VAE, without text encoders."""

    @classmethod
    @abstractmethod
    def encode_batches(
        cls, config: ModelConfig, prompts: list[str], images: list[Path | None], negative: str, device: torch.device
    ) -> Iterator[Conditions]:
        """Load the text encoders, encode, and free them; yields conditions on the CPU in batches of a few prompts.

        Args:
            images: first frame or source image of each prompt, or None.
            negative: the negative prompt, which some families encode together with each image. To get its own row, it
                must also be in `prompts`, with any image if the family needs images.

        Raises:
            BadInput: a component is missing, or the family needs images or does not support them.
        """

    @classmethod
    def encode(
        cls, config: ModelConfig, prompts: list[str], device: torch.device, images: list[Path | None] | None = None
    ) -> Conditions:
        """`encode_batches` at once; the last prompt is the negative prompt."""
        images = list(images or [None] * len(prompts))
        images[-1] = images[-1] or images[0]
        batches = [batch.tensors for batch in cls.encode_batches(config, prompts, images, prompts[-1], device)]
        return Conditions({name: stacked([batch[name] for batch in batches]) for name in batches[0]})

    @classmethod  # noqa: B027 - a family may accept all
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        """Raise BadInput if conditions from a file do not match the model, before anything large is loaded."""

    @classmethod  # noqa: B027 - a family may look at them when it is loaded
    def check_targets(cls, config: ModelConfig, targets: list[str]) -> None:
        """Raise BadInput for a LoRA target that matches no layer, or a layer without a LoRA key in ComfyUI."""

    @classmethod
    def notes(cls, config: ModelConfig) -> list[str]:
        """Warnings about these settings to print before the run starts."""
        return []

    @classmethod
    def outside_conditions(cls, config: ModelConfig, embeds: Tensor, pooled: Tensor | None) -> Conditions:
        """Conditions from the output of text encoders that ComfyUI has loaded.

        Args:
            embeds: `[N, tokens, width]`.
            pooled: `[N, width]`, or None if the text encoders have no pooled output.

        Raises:
            BadInput: they do not match this model, or this family supports only its own text encoders.
        """
        raise BadInput(f"family {config.family} encodes prompts with the text encoders of its folder: disconnect clip")

    def compile_blocks(self) -> None:
        """Compile the network's repeated blocks (`models.compiled`), after the LoRA has been injected.

        Raises:
            BadInput: they cannot be compiled.
        """
        raise BadInput(f"runtime.compile is true, which family {self.config.family} does not support: set it to false")

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one image's latents."""

    @abstractmethod
    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predict the velocity or noise, according to `process`; float32, shaped as `latents`.

        Args:
            latents: `[B, ...]` float32.
            sigma: `[B]` in (0, 1].
            conditions: B rows.
        """

    @property
    def decode_batch_size(self) -> int:
        """Images or videos that the VAE decodes or encodes at once."""
        pixels = self.config.frames * self.config.height * self.config.width
        return self.config.decode_batch_size or max(1, min(MAX_DECODE_BATCH, MEGAPIXEL // pixels))

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` or videos `[B, F, 3, H, W]`, float32 in [0, 1], `decode_batch_size` at a time.

        An image does not depend on the others of its batch. Gradients flow to `latents` if they require gradients.
        """
        return torch.cat([self.decode_batch(part) for part in latents.split(self.decode_batch_size)])

    def decode_batch(self, latents: Tensor) -> Tensor:
        """`decode` in one call of the VAE."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images or videos to latents `[B, ...]`, float32, in the scale of the network: inverse of `decode`.

        Deterministic: uses the mean of the VAE's distribution.

        Args:
            images: `[B, 3, H, W]` or videos `[B, F, 3, H, W]` in [0, 1], of the model's size.

        Raises:
            BadInput: they have another size.
        """
        config = self.config
        size = (3, config.height, config.width)
        size = size if config.frames == 1 else (config.frames, *size)
        if tuple(images.shape[1:]) != size:
            given, wanted = (" x ".join(map(str, shape)) for shape in (images.shape[1:], size))
            raise BadInput(f"images to encode have size {given}, but the model needs {wanted}: resize them")
        parts = images.float().split(self.decode_batch_size)
        return torch.cat([self.encode_image_batch(part.to(self.device)) for part in parts])

    def encode_image_batch(self, images: Tensor) -> Tensor:
        """`encode_image` in one call of the VAE."""
        raise NotImplementedError

    @classmethod
    def decode_bytes(cls, config: ModelConfig) -> int:
        """Peak memory in bytes of decoding `decode_batch_size` images, without the VAE's weights; loads nothing.

        0 if ComfyUI's memory management takes care of it.
        """
        return 0

    @abstractmethod
    def lora_key(self, module_name: str) -> "str | FusedRows":
        """ComfyUI's LoRA key for a submodule of `module`, or its part of a fused layer.

        Raises:
            BadInput: ComfyUI has no LoRA key for it.
        """

    def lora_aliases(self, module_name: str) -> list[str]:
        """Further LoRA keys that ComfyUI accepts for a module."""
        return []

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        """steps + 1 decreasing noise levels.

        Args:
            shift: timestep shift of evenly spaced levels; None for the levels of the model's scheduler.

        Raises:
            BadInput: it has no scheduler.
        """
        if shift is None:
            raise BadInput("rollout.shift is null, but this model has no scheduler: set rollout.shift to a number")
        return sigma_schedule(steps, shift)

    def is_trained_at(self, sigma: float) -> bool:
        """Whether what predicts at this noise level gets a LoRA; not so at some levels of models with two networks."""
        return True

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def make_room(self, size: int, device: torch.device) -> None:  # noqa: B027 - most models stay where they are
        """Free `size` bytes on a device for a reward's weights, if ComfyUI manages this model's memory."""

    def plain(self, call: Callable[[], Tensor]) -> Tensor:
        """Run `call` with the model in inference mode, as outside training."""
        return call()

    def predict_guided(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        unconditional: Conditions | None = None,
    ) -> Tensor:
        """`predict` with classifier-free guidance: both branches in one batch, combined in float32.

        Args:
            guidance_scale: w in uncond + w (cond - uncond); with 1 the second branch is not computed.
            unconditional: conditions of the negative prompt, one row.
        """
        if guidance_scale == 1.0:
            return self.predict_rows(latents, sigma, conditions)
        both = conditions.joined(self.negatives(conditions, unconditional))
        latents, sigma = latents.repeat(2, *[1] * (latents.ndim - 1)), sigma.repeat(2)
        positive, negative = self.predict_rows(latents, sigma, both).chunk(2)
        return self.guided(positive, negative, guidance_scale)

    def predict_rows(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """`predict`, called once for each text length, if rows differ in length."""
        parts = [(rows.to(latents.device), part) for rows, part in conditions.by_length()]
        if len(parts) == 1:
            return self.predict(latents, sigma, parts[0][1])
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([self.predict(latents[rows], sigma[rows], part) for rows, part in parts])[order]

    def negatives(self, conditions: Conditions, unconditional: Conditions) -> Conditions:
        """Conditions of the negative branch for `conditions`, row by row."""
        device = next(iter(unconditional.tensors.values())).device
        index = torch.zeros(len(conditions), dtype=torch.long, device=device)
        return unconditional.rows(index).with_images_of(conditions)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine the predictions of both branches."""
        return negative + scale * (positive - negative)


@dataclass(frozen=True)
class FusedRows:
    """The part of a module in a layer that is fused in ComfyUI, such as qkv.

    Attributes:
        key: LoRA key of the fused layer.
        first: first output row of the part.
        total: number of output rows of the fused layer.
    """

    key: str
    first: int
    total: int


def require_files(folder: Path, names: list[str], family: str) -> None:
    """Raise BadInput when a component of a diffusers folder is missing."""
    if not folder.is_dir():
        raise BadInput(f"model.path is {str(folder)!r}: there is no such folder")
    for name in names:
        if not (folder / name).exists():
            raise BadInput(f"model.path {str(folder)!r} is not a {family} folder: {name} is missing")


def matching(module: nn.Module, targets: list[str]) -> list[str]:
    """Names of the linear and convolution layers whose names end in a target.

    Raises:
        BadInput: a target matches nothing.
    """
    names = [name for name, child in module.named_modules() if isinstance(child, ADAPTABLE)]
    chosen = []
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            raise BadInput(
                f"lora.targets: {target!r} matches no linear or convolution layer of this model, such as {names[0]!r}"
            )
        chosen += found
    return chosen
