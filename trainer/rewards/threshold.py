"""A reward turned into 0 or 1 by a threshold: DanceGRPO's binary reward."""

from torch import Tensor

from .base import MemoryHook, Reward


class Threshold(Reward):
    """1 where another reward is above a value, else 0; NaN where it has no score."""

    name = "threshold"
    typical_range = (0.0, 1.0)

    def __init__(self, reward: Reward, threshold: float) -> None:
        super().__init__()
        self.reward, self.threshold = reward, threshold
        self.media, self.groupwise, self.remote = reward.media, reward.groupwise, reward.remote

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = self.reward.score(images, prompts)
        return (scores > self.threshold).float().where(scores.isfinite(), scores)

    def check_prompts(self, prompts: list[str]) -> None:
        self.reward.check_prompts(prompts)

    def load(self) -> None:
        self.reward.load()

    def idle(self) -> None:
        self.reward.idle()

    @property
    def holder(self) -> Reward:
        return self.reward.holder

    def memory(self) -> int:
        return self.reward.memory()

    def register_memory_hook(self, hook: MemoryHook) -> None:
        self.reward.register_memory_hook(hook)
