"""The reward `external`: scores from an HTTP server, such as GenEval, VisionReward or your own."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...config import Section
from ...utils.errors import BadInput, RunFailed
from ..base import Reward
from .http import RetryPolicy, ask, check_url, number, to_png

PIXELS = 2**26
"""Largest number of pixels of one request."""


class External(Reward):
    """Scores from your own server, which gets images (or frames of a video) as PNG, and the prompts.

    For rewards whose packages conflict with ComfyUI's, such as GenEval and VisionReward. `python -m trainer
    reward-server` serves any reward of this pack from another GPU or host. docs/external-scorers.md describes the
    protocol. Images and prompts are sent to the address given here and nowhere else. If the server answers null for an
    image, its sample is dropped and counted.
    """

    name = "external"
    typical_range = (0.0, 1.0)
    remote = True

    class Options(Section):
        url: str = Field("http://127.0.0.1:8100/score", description="Address of the server.")
        media: Literal["image", "video"] = Field("image", description="What the server scores.")
        fps: Annotated[float, Field(gt=0, le=240)] = Field(
            8.0, description="Frames per second of videos, which are sent to the server."
        )
        batch: Annotated[int, Field(ge=1, le=1024)] = Field(
            8, description="Largest number of images or videos per request; fewer if they are large."
        )
        timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
            120.0, description="Timeout of one attempt in seconds, from connecting to the end of the answer."
        )
        retries: Annotated[int, Field(ge=0, le=10)] = Field(2, description="Further attempts without a valid answer.")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        check_url(self.options.url, self.name)
        self.media = self.options.media

    def load(self) -> None:
        """Check the server with a request for no images.

        Raises:
            BadInput: the server is unreachable, or its answer is invalid.
        """
        try:
            self._ask([], [])
        except RunFailed as error:
            raise BadInput(f"reward {self.name!r}: {error}") from error

    def score(self, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
        pixels = [image.numel() // image.shape[-3] for image in images]
        scores = []
        for part in batches(pixels, self.options.batch):
            scores += self._ask(images[part], prompts[part])
        return torch.tensor(scores, dtype=torch.float32)

    def _ask(self, images: Tensor | list[Tensor], prompts: list[str]) -> list[float]:
        body: dict[str, Any] = {"prompts": prompts}
        if self.media == "video":
            body |= {"videos": [to_png(video) for video in images], "fps": self.options.fps}
        else:
            body["images"] = to_png(images) if len(images) else []
        retry_policy = RetryPolicy(self.options.timeout, self.options.retries)
        return ask(self.options.url, body, retry_policy, lambda answer: _scores(answer, len(prompts)))


def batches(pixels: list[int], most: int) -> Iterator[slice]:
    """Consecutive slices of at most `most` items and `PIXELS` pixels; a larger item gets its own slice."""
    start = 0
    for end in range(1, len(pixels) + 1):
        if end == len(pixels) or end - start == most or sum(pixels[start : end + 1]) > PIXELS:
            yield slice(start, end)
            start = end


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"expected a list of {count} scores, got {str(scores)[:60]}")
    return [float("nan") if value is None or value != value else number(value) for value in scores]
