"""The interface behind which every model family stands."""

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

PICTURE = "picture_"
"""Start of the names of conditions that come from a prompt's picture and hold for both branches of guidance."""
MEGAPIXEL = 2**20
MAX_DECODE_BATCH = 32
"""Decoded at once where the description gives no number: as many images as make a megapixel, at most these."""


ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that a LoRA can be put on; one on convolutions is known as LoCon."""
ENCODED_AT_ONCE = 16
"""Prompts that text encoders are given at once."""


@dataclass(frozen=True)
class Conditions:
    """What the prompts say to the model: named tensors, each with one row per prompt.

    Attributes:
        tensors: `[N, ...]`; sequences of tokens are `[N, tokens, width]`.
        lengths: `[N]` long on the CPU, the tokens of each row, where the model has no mask and rows differ in them;
            None where all have the same. Shorter rows are filled up with zeros, which the model is not given.
    """

    tensors: dict[str, Tensor]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def rows(self, index: Tensor) -> "Conditions":
        """The rows of `index` (`[N]` long), repeated or left out as it says."""
        tensors = {name: value[index.to(value.device)] for name, value in self.tensors.items()}
        return Conditions(tensors, None if self.lengths is None else self.lengths[index.cpu()])

    def to(self, device: torch.device) -> "Conditions":
        return Conditions({name: value.to(device) for name, value in self.tensors.items()}, self.lengths)

    def joined(self, other: "Conditions") -> "Conditions":
        """These rows, then the other ones; shorter sequences of tokens are filled up with zeros."""
        tensors = {name: stacked([value, other.tensors[name]]) for name, value in self.tensors.items()}
        if self.lengths is None and other.lengths is None and self._tokens() == other._tokens():
            return Conditions(tensors)
        if "mask" in tensors:
            return Conditions(tensors)
        return Conditions(tensors, torch.cat([self._every_length(), other._every_length()]))

    def with_pictures_of(self, other: "Conditions") -> "Conditions":
        """These texts with the pictures of `other`, row by row."""
        pictures = {name: value for name, value in other.tensors.items() if name.startswith(PICTURE)}
        return Conditions(self.tensors | pictures, self.lengths)

    def by_length(self) -> "list[tuple[Tensor, Conditions]]":
        """Rows with the same number of tokens together: their indices, and their conditions without filling."""
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
    """Whether a condition is a prompt's sequence of tokens, `[N, tokens, width]`."""
    return value.ndim == 3 and not name.startswith(PICTURE)


def stacked(values: list[Tensor]) -> Tensor:
    """Rows one under the other, filled up with zeros to the longest along dimension 1."""
    longest = max(value.shape[1] for value in values)
    return torch.cat([filled(value, longest) for value in values])


def filled(value: Tensor, length: int) -> Tensor:
    """`[N, L, ...]` with zeros up to `length` along dimension 1."""
    missing = length - value.shape[1]
    return value if not missing else torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], dim=1)


class DiffusionModel(ABC):
    """A rectified-flow or diffusion model with a frozen base.

    Attributes:
        config: of the model.
        module: the network that predicts, into which the LoRA is injected.
        default_targets: endings of the names of the modules a LoRA goes to.
        process: how its images are noised and what its predictions mean; None in a class whose instances differ.
        needs_opening_check: whether a run first looks if the model can be trained (`trainer.preflight`).
    """

    config: ModelConfig
    module: nn.Module
    default_targets: tuple[str, ...]
    process: Process | None = FLOW
    needs_opening_check: bool = False

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
    def encode_pieces(
        cls, config: ModelConfig, prompts: list[str], pictures: list[Path | None], negative: str, device: torch.device
    ) -> Iterator[Conditions]:
        """Load the text encoders, encode, and free them again; a row per prompt in order, some at a time, on the CPU.

        Args:
            pictures: per prompt its first frame or source image; None where it has none.
            negative: the negative prompt, which some families encode with each picture. To have a row of its own, it
                must be one of `prompts`, with any picture if the family takes them.

        Raises:
            BadInput: a component is missing, or the family needs pictures or takes none.
        """

    @classmethod
    def encode(
        cls, config: ModelConfig, prompts: list[str], device: torch.device, pictures: list[Path | None] | None = None
    ) -> Conditions:
        """Every prompt's conditions at once, as `encode_pieces`; the last prompt is the negative one."""
        pictures = list(pictures or [None] * len(prompts))
        pictures[-1] = pictures[-1] or pictures[0]
        pieces = [piece.tensors for piece in cls.encode_pieces(config, prompts, pictures, prompts[-1], device)]
        return Conditions({name: stacked([piece[name] for piece in pieces]) for name in pieces[0]})

    @classmethod  # noqa: B027 - a family may accept all
    def check_conditions(cls, config: ModelConfig, conditions: Conditions) -> None:
        """Raise BadInput where conditions from a file do not fit the model; nothing large is loaded."""

    @classmethod  # noqa: B027 - a family may look at them when it is loaded
    def check_targets(cls, config: ModelConfig, targets: list[str]) -> None:
        """Raise BadInput for a LoRA target that matches nothing, or nothing ComfyUI has a name for; loads nothing."""

    @classmethod
    def notes(cls, config: ModelConfig) -> list[str]:
        """What a user should know of these settings before the run starts, a sentence each."""
        return []

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
        """The prediction of `process`; float32, shaped as `latents`.

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

        An image does not depend on those beside it. Gradients flow to `latents` where these require them.
        """
        return torch.cat([self.decode_batch(part) for part in latents.split(self.decode_batch_size)])

    def decode_batch(self, latents: Tensor) -> Tensor:
        """`decode` in one call of the VAE."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Latents `[B, ...]` of images or videos, float32, in the scale of the network: the inverse of `decode`.

        Deterministic: the mean where the VAE's encoder gives a distribution.

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
            raise BadInput(f"images to encode are {given}, and the model takes {wanted}: resize them")
        parts = images.float().split(self.decode_batch_size)
        return torch.cat([self.encode_image_batch(part.to(self.device)) for part in parts])

    def encode_image_batch(self, images: Tensor) -> Tensor:
        """`encode_image` in one call of the VAE."""
        raise NotImplementedError

    @classmethod
    def decode_bytes(cls, config: ModelConfig) -> int:
        """Peak memory of decoding `decode_batch_size` images beside the VAE's weights; nothing is loaded.

        0 where the model's host makes room for it.
        """
        return 0

    @abstractmethod
    def lora_key(self, module_name: str) -> "str | Rows":
        """The name under which ComfyUI loads the LoRA of a module of `module`, or its part of a fused layer.

        Raises:
            BadInput: ComfyUI has no name for it.
        """

    def lora_aliases(self, module_name: str) -> list[str]:
        """Further names under which ComfyUI loads the LoRA of a module."""
        return []

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        """steps + 1 falling noise levels.

        Args:
            shift: of evenly spaced levels towards noise; None for those of the model's own scheduler.

        Raises:
            BadInput: it has no scheduler.
        """
        if shift is None:
            raise BadInput("rollout.shift is null, and this model brings no scheduler: give a number")
        return sigma_schedule(steps, shift)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

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
        """`predict` with classifier-free guidance: both branches in one batch, mixed in float32.

        Args:
            guidance_scale: w in uncond + w (cond - uncond); 1 asks for no second branch.
            unconditional: one row, the negative prompt's.
        """
        if guidance_scale == 1.0:
            return self.predict_rows(latents, sigma, conditions)
        both = conditions.joined(self.negatives(conditions, unconditional))
        latents, sigma = latents.repeat(2, *[1] * (latents.ndim - 1)), sigma.repeat(2)
        positive, negative = self.predict_rows(latents, sigma, both).chunk(2)
        return self.guided(positive, negative, guidance_scale)

    def predict_rows(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """`predict`, called once for each number of tokens where rows differ in it."""
        parts = [(rows.to(latents.device), part) for rows, part in conditions.by_length()]
        if len(parts) == 1:
            return self.predict(latents, sigma, parts[0][1])
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat([self.predict(latents[rows], sigma[rows], part) for rows, part in parts])[order]

    def negatives(self, conditions: Conditions, unconditional: Conditions) -> Conditions:
        """What the negative branch is given beside `conditions`, row by row."""
        device = next(iter(unconditional.tensors.values())).device
        index = torch.zeros(len(conditions), dtype=torch.long, device=device)
        return unconditional.rows(index).with_pictures_of(conditions)

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Both branches' predictions mixed."""
        return negative + scale * (positive - negative)


@dataclass(frozen=True)
class Rows:
    """A module's part of a layer that ComfyUI keeps in one piece.

    Attributes:
        key: of the whole layer.
        first: the part's first output row.
        total: output rows of the whole layer.
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
            raise BadInput(f"model.path {str(folder)!r} is no {family} folder: {name} is missing")


def matching(module: nn.Module, targets: list[str]) -> list[str]:
    """Names of the linear and convolution layers that targets, endings of names, choose.

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
