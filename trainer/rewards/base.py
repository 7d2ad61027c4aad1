"""The interface behind which every reward stands."""

import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Section
from ..utils.errors import BadInput
from .files import check_files


class NoOptions(Section):
    """A reward that has nothing to set."""


class Reward(ABC):
    """A judge of images or of videos.

    Making one looks at its options and files and loads nothing; `load` does that.

    Attributes:
        name: its name in run descriptions.
        typical_range: where its scores usually lie.
        media: what it looks at. A judge of images sees a video frame by frame.
        groupwise: whether it compares the images of a prompt with each other, so that a score depends on the batch.
        licence: of its weights, where it has any.
        packages: what must be installed for it beyond this pack's own requirements.
        Options: what can be set; fields made by `files.file_option` name files.

    Raises:
        BadInput: a file or a package is missing.
    """

    name: ClassVar[str]
    typical_range: ClassVar[tuple[float, float]]
    media: ClassVar[Literal["image", "video"]] = "image"
    groupwise: ClassVar[bool] = False
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
        """Scores, `[B]` float32, one per image; deterministic, and independent of the rest unless `groupwise`.

        Args:
            images: `[B, 3, H, W]` float in [0, 1]; a judge of videos takes a list of B `[F, 3, H, W]`.
            prompts: B texts.
        """

    def check_prompts(self, prompts: list[str]) -> None:  # noqa: B027 - most rewards take any text
        """Raise ValueError if this reward cannot judge images of one of the prompts."""

    def load(self) -> None:  # noqa: B027 - most rewards have no weights
        """Read the weights into CPU memory, once; `score` does it where it has not been done.

        Raises:
            BadInput: a file does not hold what it should.
        """

    def idle(self) -> None:  # noqa: B027 - most rewards hold no memory
        """Leave the accelerator's memory to others until the next `score`."""


class ModelReward(Reward):
    """A reward that is a network in a file; it works on the device that the images are on."""

    chunk: ClassVar[int] = 16
    module: nn.Module | None = None

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its weights, float32 on the CPU."""

    @abstractmethod
    def judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores of at most `chunk` images; the network is loaded and on their device."""

    def load(self) -> None:
        if self.module is None:
            self.module = self.build().eval().requires_grad_(False).to(self.dtype)

    def idle(self) -> None:
        if self.module is not None:
            self.module.to("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, getattr(self.options, "dtype", "float32"))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.load()
        self.module.to(images.device)
        with torch.no_grad():
            places = range(0, len(prompts), self.chunk)
            parts = [self.judge(images[i : i + self.chunk], prompts[i : i + self.chunk]) for i in places]
        return torch.cat(parts)


def dtype_option(default: str = "float32") -> str:
    """The field of an option for the type of the weights."""
    return Field(
        default, description="Type of the weights and of the network's arithmetic; the final score is float32."
    )


Dtype = Literal["float32", "bfloat16", "float16"]


class TextCache:
    """Text features, computed once per prompt and kept on the CPU.

    Args:
        encode: features `[N, D]` of N texts.
        limit: tokens that the network reads.
        count: tokens of a text; prompts of more than `limit` are reported, once each.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], limit: int, count: Callable[[str], int]) -> None:
        self.encode, self.limit, self.count = encode, limit, count
        self.known: dict[str, Tensor] = {}

    def __call__(self, prompts: list[str], device: torch.device) -> Tensor:
        """Features `[B, D]` float32, a row per prompt."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for prompt in new:  # one by one, so that a score does not depend on what else was asked for
            self._warn(prompt)
            self.known[prompt] = self.encode([prompt])[0].float().cpu()
        return torch.stack([self.known[prompt] for prompt in prompts]).to(device)

    def _warn(self, prompt: str) -> None:
        if (count := self.count(prompt)) > self.limit:
            words = f"{count} tokens, of which the reward reads {self.limit}"
            print(f"warning: the prompt {prompt[:60]!r} has {words}; the rest is not judged", file=sys.stderr)


class Threshold(Reward):
    """1 where another reward is above a value, else 0: the paper's binary reward."""

    name = "threshold"
    typical_range = (0.0, 1.0)

    def __init__(self, reward: Reward, threshold: float) -> None:
        super().__init__()
        self.reward, self.threshold = reward, threshold
        self.media, self.groupwise = reward.media, reward.groupwise

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = self.reward.score(images, prompts)
        return (scores > self.threshold).float().where(scores.isfinite(), scores)

    def check_prompts(self, prompts: list[str]) -> None:
        self.reward.check_prompts(prompts)

    def load(self) -> None:
        self.reward.load()

    def idle(self) -> None:
        self.reward.idle()
