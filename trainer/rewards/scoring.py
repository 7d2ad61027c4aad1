"""Scores images or videos with any reward, with or without gradients."""

import torch
from torch import Tensor

from .base import Reward

FRAMES = 8
"""Number of frames of a video that an image reward scores, evenly spaced from the first to the last."""


def score(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    """Scores `[B]` float32 on the CPU; NaN for an image without a score.

    Args:
        images: `[B, 3, H, W]` or a list of B `[3, H, W]` of any sizes; or videos, `[B, F, 3, H, W]` or a list of B
            `[F, 3, H, W]` of any lengths and sizes. An image reward scores a video by the mean over `FRAMES` of its
            frames. Images with one channel are grey; a fourth channel is opacity on a white background.

    Raises:
        ValueError: the counts differ, pixels are not finite, or the reward cannot score images of this kind or size.
        RunFailed: the reward's server is unreachable.
    """
    _check_counts(images, prompts)
    if len(prompts) == 0:
        return torch.zeros(0)
    if not _finite(images).all():
        raise ValueError("the images contain pixels that are not finite")
    with torch.no_grad():
        scores = _score(reward, _rgb_all(images, detach=True), prompts).float().cpu()
    _check_shape(reward, scores, len(prompts))
    return scores


def score_or_nan(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    """Like `score`, but images with pixels that are not finite get NaN."""
    finite = _finite(images)
    if isinstance(images, Tensor):
        mask = finite.to(images.device).view(-1, *[1] * (images.ndim - 1))
        images = torch.where(mask, images, 0.0)
    else:
        images = [image if good else torch.zeros_like(image) for image, good in zip(images, finite, strict=True)]
    return torch.where(finite, score(reward, images, prompts), torch.nan)


def differentiable_score(reward: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores `[B]` float32 on the images' device, whose gradient flows back to the pixels.

    Pixels are neither rounded to 256 values nor clamped, so the scores differ slightly from those of `score`.

    Args:
        images: `[B, 3, H, W]`, or `[B, F, 3, H, W]`, float, requiring a gradient.

    Raises:
        ValueError: the reward is not differentiable, the images do not require a gradient, or as for `score`.
    """
    if not reward.differentiable:
        raise ValueError(f"reward {reward.name!r} is not differentiable")
    _check_counts(images, prompts)
    if not images.requires_grad:
        raise ValueError("the images do not require a gradient")
    with torch.enable_grad():
        scores = _score(reward, _rgb_all(images, detach=False), prompts).float()
    _check_shape(reward, scores, len(prompts))
    return scores


def _check_counts(images: Tensor | list[Tensor], prompts: list[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts: there must be one prompt per image")


def _check_shape(reward: Reward, scores: Tensor, count: int) -> None:
    if scores.shape != (count,):
        raise ValueError(f"reward {reward.name!r} gave scores of shape {tuple(scores.shape)} for {count} images")


def _finite(images: Tensor | list[Tensor]) -> Tensor:
    """`[B]` bool on the CPU: whether all pixels of an image are finite."""
    if isinstance(images, Tensor):
        return images.flatten(1).isfinite().all(1).cpu()
    return torch.stack([image.isfinite().all().cpu() for image in images])


def _rgb_all(images: Tensor | list[Tensor], detach: bool) -> Tensor | list[Tensor]:
    if isinstance(images, Tensor):
        return _rgb(images.detach() if detach else images)
    return [_rgb(image.detach() if detach else image) for image in images]


def _rgb(images: Tensor) -> Tensor:
    """Three channels in `[..., C, H, W]`."""
    if images.ndim < 3 or min(images.shape[-2:]) < 1:
        raise ValueError(f"images of shape {tuple(images.shape)} are not [B, 3, H, W]")
    channels = images.shape[-3]
    if channels == 1:
        return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
    if channels == 4:
        color, opacity = images.split([3, 1], dim=-3)
        return color * opacity + 1 - opacity
    if channels != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} are not [B, 3, H, W]")
    return images


def _score(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    if images[0].ndim == 3:
        if reward.media == "video":
            raise ValueError(f"reward {reward.name!r} scores videos, not images")
        return _score_images(reward, images, prompts)
    if reward.media == "video":
        return reward.score(list(images), prompts)
    means = [
        reward.score(frames, [prompt] * len(frames)).mean()
        for frames, prompt in zip(map(_some_frames, images), prompts, strict=True)
    ]
    return torch.stack(means)


def _score_images(reward: Reward, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
    if isinstance(images, Tensor):
        return reward.score(images, prompts)
    if len({image.shape for image in images}) == 1:
        return reward.score(torch.stack(images), prompts)
    if reward.groupwise:
        raise ValueError(f"reward {reward.name!r} compares images, which must be of one size")
    return torch.cat([reward.score(image[None], [prompt]) for image, prompt in zip(images, prompts, strict=True)])


def _some_frames(video: Tensor) -> Tensor:
    index = torch.linspace(0, len(video) - 1, min(FRAMES, len(video))).round().long()
    return video[index.to(video.device)]
