"""Scores image files in batches, and the images of a run by group."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .rewards import Reward, score, score_or_nan
from .utils.errors import BadInput
from .utils.media import read_image

BATCH, BATCH_PIXELS = 16, 16 * 2**20
"""Largest number of images and of pixels of a batch (a single larger image is a batch of its own)."""

Result = float | BadInput
"""Score of an image, or the error if it has none."""


def score_files(reward: Reward, paths: list[Path], prompts: list[str]) -> Iterator[Result]:
    """The result of each image, in order; an image that cannot be read or scored does not affect the others.

    Args:
        reward: loaded. A groupwise reward gets all images at once, because their scores depend on each other.
        prompts: one per image.

    Raises:
        BadInput: the reward cannot score images of one of the prompts.
    """
    try:
        reward.check_prompts(prompts)
    except ValueError as error:
        raise BadInput(str(error)) from error
    batch: list[Tensor | BadInput] = []
    waiting: list[str] = []
    for path, prompt in zip(paths, prompts, strict=True):
        batch.append(_read(path))
        waiting.append(prompt)
        if not reward.groupwise and _is_full(batch):
            yield from _score_batch(reward, batch, waiting)
            batch, waiting = [], []
    yield from _score_batch(reward, batch, waiting)


def score_by_group(reward: Reward, images: Tensor, prompts: list[str], groups: Sequence[int]) -> Tensor:
    """Scores of a run's images, `[B]`; NaN for images that are not finite.

    Args:
        groups: group of each image, for group-wise rewards; two groups may have the same prompt with different source
            images.
    """
    if not reward.groupwise:
        return score_or_nan(reward, images, prompts)
    scores = torch.empty(len(prompts))
    for group in sorted(set(groups)):
        rows = [row for row, other in enumerate(groups) if other == group]
        scores[rows] = score_or_nan(reward, images[rows], [prompts[row] for row in rows])
    return scores


def fps_notes(rewards: Mapping[str, Reward], fps: float) -> list[str]:
    """A warning for every reward that assumes another frame rate than the model's.

    Args:
        fps: frames per second of the model's videos.
    """
    notes = []
    for name, reward in rewards.items():
        options = getattr(reward, "reward", reward).options  # a threshold has those of the reward inside it
        taken = getattr(options, "fps", None)
        if reward.media == "video" and taken is not None and taken != fps:
            notes.append(
                f"reward {name!r} takes videos to have {taken:g} frames per second, and model.fps is {fps:g}: set its "
                "option fps to the same number, unless the difference is meant"
            )
    return notes


def _read(path: Path) -> Tensor | BadInput:
    try:
        return read_image(path)
    except BadInput as error:
        return error


def _is_full(batch: list[Tensor | BadInput]) -> bool:
    pixels = sum(image[0].numel() for image in batch if isinstance(image, Tensor))
    return len(batch) >= BATCH or pixels >= BATCH_PIXELS


def _score_batch(reward: Reward, batch: list[Tensor | BadInput], prompts: list[str]) -> list[Result]:
    images = {i: image for i, image in enumerate(batch) if isinstance(image, Tensor)}
    scores = dict(zip(images, _scores(reward, list(images.values()), [prompts[i] for i in images]), strict=True))
    return [scores.get(i, image) for i, image in enumerate(batch)]


def _scores(reward: Reward, images: list[Tensor], prompts: list[str]) -> list[Result]:
    try:
        return score(reward, images, prompts).tolist()
    except ValueError as error:
        if len(images) == 1 or reward.groupwise:
            return [BadInput(str(error))] * len(images)
    return [_scores(reward, [image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
