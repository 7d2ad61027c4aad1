"""Rewards. A new one is one file, registered in `REWARDS`."""

import inspect

import torch
from torch import Tensor

from ..config import RewardConfig
from ..errors import BadInput
from .base import Reward, Threshold
from .rules import Brightness, Colorfulness, JpegSize, Sharpness
from .shapes import ShapesReward, ShapesStrictReward

REWARDS: dict[str, type[Reward]] = {
    reward.name: reward for reward in (ShapesReward, ShapesStrictReward, Brightness, Colorfulness, Sharpness, JpegSize)
}


def load_reward(config: RewardConfig) -> Reward:
    """Build a reward from its configuration.

    Raises:
        BadInput: unknown name or option.
    """
    if config.name not in REWARDS:
        raise BadInput(f"reward {config.name!r} is unknown: choose one of {', '.join(REWARDS)}")
    reward_class = REWARDS[config.name]
    accepted = list(inspect.signature(reward_class).parameters)
    for option in config.options:
        if option not in accepted:
            known = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise BadInput(f"reward {config.name!r} has no option {option!r}; {known}")
    reward = reward_class(**config.options)
    return reward if config.threshold is None else Threshold(reward, config.threshold)


def score(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Score with a check of what comes back: `[B]` float32 on the CPU.

    Raises:
        ValueError: counts do not match, or the images are not finite.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: there must be one prompt per image")
    if len(prompts) == 0:
        return torch.zeros(0)
    if not images.isfinite().all():
        raise ValueError("the images hold pixels that are not finite numbers")
    scores = _judge(reward, images, prompts).detach().float().cpu()
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward {reward.name} gave scores of shape {tuple(scores.shape)} for {len(prompts)} images")
    return scores


def score_or_nan(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """`score`, but an image that is not finite gets NaN instead of ending everything: its sample is to be dropped."""
    finite = images.flatten(1).isfinite().all(1)
    mask = finite.view(-1, *[1] * (images.ndim - 1))
    scores = score(reward, torch.where(mask, images, 0.0), prompts)
    return torch.where(finite.cpu(), scores, torch.nan)


def _judge(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """A judge of images gives a video `[F, 3, H, W]` the mean score of its frames."""
    if images.ndim == 4:
        return reward.score(images, prompts)
    means = [
        reward.score(frames, [prompt] * len(frames)).mean() for frames, prompt in zip(images, prompts, strict=True)
    ]
    return torch.stack(means)


__all__ = ["REWARDS", "Reward", "Threshold", "load_reward", "score", "score_or_nan"]
