"""Rewards. A new one is one file, registered in `REWARDS`."""

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from ..config import RewardConfig, Section, describe
from ..utils.errors import BadInput
from .base import Reward, Threshold
from .clip.aesthetic import Aesthetic
from .clip.clip_score import ClipScore
from .clip.hps import HPSv21
from .clip.pickscore import PickScore
from .files import located
from .geneval_like import GenEvalLike
from .image_reward import ImageReward
from .ocr import TextRendering
from .preference import Preference
from .qwen.hpsv3 import HPSv3
from .qwen.videoalign import VideoAlign, VideoAlignMQ, VideoAlignTA, VideoAlignVQ
from .remote.external import External
from .remote.mllm import MllmPairwise, MllmRubric, MllmYes
from .rules import Brightness, Colorfulness, JpegSize, Sharpness
from .shapes import ShapesReward, ShapesStrictReward

REWARDS: dict[str, type[Reward]] = {
    reward.name: reward
    for reward in (
        ShapesReward,
        ShapesStrictReward,
        Brightness,
        Colorfulness,
        Sharpness,
        JpegSize,
        HPSv21,
        ClipScore,
        PickScore,
        ImageReward,
        Aesthetic,
        Preference,
        HPSv3,
        VideoAlign,
        VideoAlignVQ,
        VideoAlignMQ,
        VideoAlignTA,
        TextRendering,
        GenEvalLike,
        External,
        MllmRubric,
        MllmYes,
        MllmPairwise,
    )
}

FRAMES = 8
"""Frames of a video that a judge of images looks at, evenly spaced from the first to the last."""


def reward_options(config: RewardConfig) -> Section:
    """A reward's options, validated; no file is looked at.

    Raises:
        BadInput: unknown name or option, or a value that is not accepted.
    """
    if config.name not in REWARDS:
        raise BadInput(f"reward {config.name!r} is unknown: choose one of {', '.join(REWARDS)}")
    kind = REWARDS[config.name].Options
    for option in config.options:
        if option not in kind.model_fields:
            known = f"it takes {', '.join(kind.model_fields)}" if kind.model_fields else "it takes none"
            raise BadInput(f"reward {config.name!r} has no option {option!r}; {known}")
    try:
        return kind.model_validate(config.options)
    except ValidationError as error:
        raise BadInput(f"reward {config.name!r}: {describe(error)}") from error


def with_files_from(config: RewardConfig, folders: Iterable[Path]) -> RewardConfig:
    """The same reward with full paths for its files, each found inside one of the folders (`models/rewards`).

    Raises:
        BadInput: options are not accepted, or a file is in none of the folders.
    """
    options = located(reward_options(config), config.name, folders)
    return config.model_copy(update={"options": options})


def load_reward(config: RewardConfig) -> Reward:
    """Make a reward from its configuration; its weights are read by `Reward.load`.

    Raises:
        BadInput: unknown name or option, or a file or package that is missing.
    """
    options = reward_options(config)
    reward = REWARDS[config.name](options)
    return reward if config.threshold is None else Threshold(reward, config.threshold)


def score(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    """Score with a check of what comes back: `[B]` float32 on the CPU.

    Args:
        images: `[B, 3, H, W]` or a list of B `[3, H, W]` of any sizes; or videos, `[B, F, 3, H, W]` or a list of B
            `[F, 3, H, W]` of any lengths and sizes.
            A judge of images gives a video the mean score of `FRAMES` of its frames. One channel is grey, a fourth is
            transparency, which is laid on white.

    Raises:
        ValueError: counts do not match, the images are not finite or no images, or the reward judges videos only.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: there must be one prompt per image")
    if len(prompts) == 0:
        return torch.zeros(0)
    if not _finite(images).all():
        raise ValueError("the images hold pixels that are not finite numbers")
    images = _rgb(images) if isinstance(images, Tensor) else [_rgb(video) for video in images]
    scores = _judge(reward, images, prompts).detach().float().cpu()
    if scores.shape != (len(prompts),):
        raise ValueError(f"reward {reward.name} gave scores of shape {tuple(scores.shape)} for {len(prompts)} images")
    return scores


def score_or_nan(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    """`score`, but an image that is not finite gets NaN instead of ending everything: its sample is to be dropped."""
    finite = _finite(images)
    if isinstance(images, Tensor):
        mask = finite.to(images.device).view(-1, *[1] * (images.ndim - 1))
        images = torch.where(mask, images, 0.0)
    else:
        images = [image if good else torch.zeros_like(image) for image, good in zip(images, finite, strict=True)]
    return torch.where(finite, score(reward, images, prompts), torch.nan)


def _finite(images: Tensor | list[Tensor]) -> Tensor:
    """`[B]` bool on the CPU: which of them hold finite numbers only."""
    if isinstance(images, Tensor):
        return images.flatten(1).isfinite().all(1).cpu()
    return torch.stack([image.isfinite().all().cpu() for image in images])


def _rgb(images: Tensor) -> Tensor:
    """Three channels in `[..., C, H, W]`."""
    channels = images.shape[-3]
    if channels == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    if channels == 4:
        color, opacity = images.split([3, 1], dim=-3)
        return color * opacity + 1 - opacity
    if channels != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} are not [B, 3, H, W]")
    return images


def _judge(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    if images[0].ndim == 3:
        if reward.media == "video":
            raise ValueError(f"reward {reward.name} judges videos, not images")
        return _judge_images(reward, images, prompts)
    if reward.media == "video":
        return reward.score(list(images), prompts)
    means = [
        reward.score(frames, [prompt] * len(frames)).mean()
        for frames, prompt in zip(map(_some_frames, images), prompts, strict=True)
    ]
    return torch.stack(means)


def _judge_images(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    if isinstance(images, Tensor):
        return reward.score(images, prompts)
    if len({image.shape for image in images}) == 1:
        return reward.score(torch.stack(images), prompts)
    if reward.groupwise:
        raise ValueError(f"reward {reward.name} compares images, which must be of one size")
    return torch.cat([reward.score(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])


def _some_frames(video: Tensor) -> Tensor:
    index = torch.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().long()
    return video[index.to(video.device)]


__all__ = [
    "REWARDS",
    "Reward",
    "Threshold",
    "load_reward",
    "reward_options",
    "score",
    "score_or_nan",
    "with_files_from",
]
