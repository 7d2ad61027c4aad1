"""The interface of all rewards, and the base class of those that are networks."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Section
from ..utils.errors import BadInput
from .files import check_files, file_rule, stored_elements

MemoryHook = Callable[[int, torch.device], object]
"""Called with the bytes that are about to be allocated, and the device."""


class NoOptions(Section):
    """Options of a reward that has none."""


class Reward(ABC):
    """A score for each image or video.

    The constructor checks options and files; `load` reads the weights.

    Attributes:
        name: its name in run descriptions.
        typical_range: usual range of its scores.
        media: what it scores. An image reward scores a video by its frames.
        groupwise: whether it compares the images of a prompt, so that a score depends on the rest of the batch.
        differentiable: whether `score` can carry a gradient back to the pixels.
        remote: whether a server does the scoring, so that this process can sample the next images meanwhile.
        licence: licence of its weights, if any.
        packages: packages that it needs beyond the requirements of this pack.
        Options: its options; those made by `files.file_option` name files.

    Raises:
        BadInput: a file or a package is missing.
    """

    name: ClassVar[str]
    typical_range: ClassVar[tuple[float, float]]
    media: ClassVar[Literal["image", "video"]] = "image"
    groupwise: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    remote: ClassVar[bool] = False
    licence: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    Options: ClassVar[type[Section]] = NoOptions

    def __init__(self, options: Section | None = None) -> None:
        self.options = self.Options() if options is None else options
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise BadInput(f"reward {self.name!r} needs the package {package!r}, which is not installed")
        check_files(self.options, self.name)

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores, `[B]` float32; deterministic, and independent of the rest of the batch unless `groupwise`.

        NaN means that an image has no score; its sample is dropped and counted.

        Args:
            images: `[B, 3, H, W]` float in [0, 1]; a video reward takes a list of B `[F, 3, H, W]`. If they require
                a gradient and the reward is `differentiable`, pixels are not rounded, and the scores carry the graph.
            prompts: B texts.

        Raises:
            ValueError: the reward cannot score images of this size.
            RunFailed: a server that does the scoring is unreachable.
        """

    def check_prompts(self, prompts: list[str]) -> None:  # noqa: B027 - most rewards take any text
        """Raise ValueError if this reward cannot score images of one of the prompts."""

    def load(self) -> None:  # noqa: B027 - most rewards have no weights
        """Read the weights into CPU memory; `score` does so if needed.

        Raises:
            BadInput: a file is damaged or is not the expected one.
        """

    def idle(self) -> None:  # noqa: B027 - most rewards hold no memory
        """Move the weights to the CPU until the next `score`."""

    @property
    def holder(self) -> "Reward":
        """The object that holds the weights; rewards that share weights have the same holder."""
        return self

    def memory(self) -> int:
        """Bytes of the weights on the device, without activations."""
        return 0

    def register_memory_hook(self, hook: MemoryHook) -> None:  # noqa: B027 - most rewards hold no memory
        """Register `hook(bytes, device)`, which is called before weights move to an accelerator and may free memory."""


def memory_together(rewards: Iterable[Reward]) -> int:
    """Bytes of the weights of several rewards on the device; shared weights count once."""
    holders = {id(reward.holder): reward.holder for reward in rewards}
    return sum(holder.memory() for holder in holders.values())


class ModelReward(Reward):
    """A reward that is a network with weights in files; it runs on the device that the images are on."""

    batch_size: ClassVar[int] = 16
    module: nn.Module | None = None
    memory_hook: MemoryHook | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its weights, float32 on the CPU."""

    @abstractmethod
    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores of at most `batch_size` images; the network is loaded and on their device."""

    def load(self) -> None:
        if self.module is None:
            self.module = self.build().eval().requires_grad_(False).to(self.dtype)

    def idle(self) -> None:
        if self.module is not None:
            self.module.to("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights and of the computation."""
        return getattr(torch, getattr(self.options, "dtype", "float32"))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.move_to(images.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            starts = range(0, len(prompts), self.batch_size)
            parts = [
                self.score_batch(images[i : i + self.batch_size], prompts[i : i + self.batch_size]) for i in starts
            ]
        return torch.cat(parts)

    def move_to(self, device: torch.device) -> None:
        """Load the network and move it to a device, calling the memory hook first."""
        self.load()
        parameter = next(self.module.parameters(), None)
        moves = parameter is not None and parameter.device != device
        if moves and device.type != "cpu" and self.memory_hook is not None:
            self.memory_hook(self.memory(), device)
        self.module.to(device)

    def memory(self) -> int:
        """Bytes of the weights; before the network is loaded, an upper bound from its files."""
        if self.module is None:
            return self.stored_elements() * self.dtype.itemsize
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))

    def stored_elements(self) -> int:
        """Number of elements of all tensors in the files of weights."""
        return sum(map(stored_elements, self.weight_files()))

    def weight_files(self) -> list[Path]:
        """Files that hold the network's weights."""
        rules = {name: file_rule(field) for name, field in type(self.options).model_fields.items()}
        return [Path(getattr(self.options, name)) for name, rule in rules.items() if rule and rule.weights]

    def register_memory_hook(self, hook: MemoryHook) -> None:
        self.memory_hook = hook


Dtype = Literal["float32", "bfloat16", "float16"]


def dtype_option(default: str = "float32") -> str:
    """The option for the dtype of a network."""
    return Field(default, description="dtype of the weights and of the computation; scores are float32.")
