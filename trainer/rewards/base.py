"""The interface of all rewards, and the base class of those that are networks."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
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
    """A reward that is a network with weights in files; it runs on the device that the images are on.

    Attributes:
        batch_size: images per forward pass.
        gpu_dtype, cpu_dtype: what the option `dtype: auto` means, by the figures of benchmarks/reward_dtypes.py.
        float32_parts: beginnings of the names of weights that stay float32 whatever `dtype` is: small heads.
    """

    batch_size: ClassVar[int] = 16
    gpu_dtype: ClassVar[str] = "float32"
    cpu_dtype: ClassVar[str] = "float32"
    float32_parts: ClassVar[tuple[str, ...]] = ()
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
            module = self.build().eval().requires_grad_(False)
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                if tensor.is_floating_point() and not name.startswith(self.float32_parts):
                    tensor.data = tensor.data.to(self.dtype)
            self.module = module

    def idle(self) -> None:
        if self.module is not None:
            self.module.to("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights and of the computation."""
        name = getattr(self.options, "dtype", "float32")
        return getattr(torch, self.cpu_dtype if name == "auto" else name)

    @classmethod
    def auto_dtype(cls, device: str, gradient: bool) -> str:
        """The dtype that `auto` means.

        Args:
            device: `auto`, which is a GPU if there is one, or the type of a torch device.
            gradient: whether the gradients of scores are wanted, which underflow in float16.
        """
        return cls.gpu_dtype if not gradient and is_fast_in(cls.gpu_dtype, device) else cls.cpu_dtype

    def use_dtype(self, name: str) -> None:
        """Compute in this dtype from now on; if it is another one than before, the weights are read again."""
        if getattr(torch, name) != self.dtype:
            self.options, self.module = self.options.model_copy(update={"dtype": name}), None

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
        """Bytes of the weights; before the network is loaded, by its files: a bound but for small float32 heads."""
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


def is_fast_in(dtype: str, device: str) -> bool:
    """Whether a device is a GPU that computes fast in a dtype.

    Args:
        device: `auto`, which is a GPU if there is one, or the type of a torch device.
    """
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return False
    if dtype == "bfloat16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == "float32" or torch.cuda.get_device_capability() >= (7, 0)


def dtypes(rewards: Mapping[str, Reward]) -> dict[str, str]:
    """The dtypes of those rewards that are networks, by name, for a checkpoint."""
    networks = {name: reward.holder for name, reward in rewards.items() if isinstance(reward.holder, ModelReward)}
    return {name: str(network.dtype).removeprefix("torch.") for name, network in networks.items()}


def use_dtypes(rewards: Mapping[str, Reward], names: Mapping[str, str]) -> None:
    """Compute in these dtypes from now on, as a checkpoint says: `auto` may mean another one on this device."""
    for reward, name in names.items():
        rewards[reward].holder.use_dtype(name)
        rewards[reward].load()


Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def dtype_option(gpu: str, cpu: str = "float32") -> str:
    """The option for the dtype of a network; `auto` by default.

    Args:
        gpu, cpu: what `auto` means, as `ModelReward.gpu_dtype` and `cpu_dtype` say it.
    """
    if gpu == cpu:
        meaning = f"auto is {gpu}"
    else:
        meaning = f"auto is {gpu} on a GPU that is fast in it, and {cpu} on a CPU and where gradients are wanted"
    return Field("auto", description=f"dtype of the weights and of the computation: {meaning}. Scores are float32.")
