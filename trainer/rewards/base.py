"""The interface behind which every reward stands."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Reward(ABC):
    """A judge of images.

    Attributes:
        name: its name in run descriptions.
        typical_range: where its scores usually lie.
    """

    name: ClassVar[str]
    typical_range: ClassVar[tuple[float, float]]

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores, `[B]` float32, one per image; deterministic, and independent of the rest of the batch.

        Args:
            images: `[B, 3, H, W]` float in [0, 1].
            prompts: B texts.
        """

    def check_prompts(self, prompts: list[str]) -> None:  # noqa: B027 - most rewards take any text
        """Raise ValueError if this reward cannot judge images of one of the prompts."""


class Threshold(Reward):
    """1 where another reward is above a value, else 0: the paper's binary reward."""

    name = "threshold"
    typical_range = (0.0, 1.0)

    def __init__(self, reward: Reward, threshold: float) -> None:
        self.reward, self.threshold = reward, threshold

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = self.reward.score(images, prompts)
        return (scores > self.threshold).float().where(scores.isfinite(), scores)

    def check_prompts(self, prompts: list[str]) -> None:
        self.reward.check_prompts(prompts)
