"""A reward of any kind in its own program, asked over HTTP: GenEval, VisionReward, or one of your own."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...config import Section
from ...utils.errors import BadInput, RunFailed
from ..base import Reward
from .http import Patience, ask, check_url, number, to_png

PIXELS = 2**26
"""Pixels of one message."""


class External(Reward):
    """Scores of a server of your own. It gets images (or a video's frames) as PNG and the prompts, and returns numbers.

    For rewards whose packages cannot be installed beside ComfyUI's, such as GenEval and VisionReward; `python -m
    trainer reward-server` serves any reward of this pack from another GPU or host. docs/external-scorers.md describes
    the messages. Images and prompts go to the address given here and nowhere else. If the server answers null for an
    image, its sample is dropped and counted.
    """

    name = "external"
    typical_range = (0.0, 1.0)
    remote = True

    class Options(Section):
        url: str = Field("http://127.0.0.1:8100/score", description="Address that the images are sent to.")
        media: Literal["image", "video"] = Field("image", description="What the server scores.")
        fps: Annotated[float, Field(gt=0, le=240)] = Field(
            8.0, description="Frames per second of videos, told to the server."
        )
        batch: Annotated[int, Field(ge=1, le=1024)] = Field(
            8, description="Images or videos in one message, fewer if they are large."
        )
        timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
            120.0, description="Seconds for one attempt, from connecting to the end of the answer."
        )
        retries: Annotated[int, Field(ge=0, le=10)] = Field(2, description="Further attempts if there is no answer.")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        check_url(self.options.url, self.name)
        self.media = self.options.media

    def load(self) -> None:
        """Ask for the scores of an empty list.

        Raises:
            BadInput: the server is unreachable, or does not answer as it should.
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
        patience = Patience(self.options.timeout, self.options.retries)
        return ask(self.options.url, body, patience, lambda answer: _scores(answer, len(prompts)))


def batches(pixels: list[int], most: int) -> Iterator[slice]:
    """Consecutive parts of at most `most` items and `PIXELS` pixels; an item that is larger is a part of its own."""
    start = 0
    for end in range(1, len(pixels) + 1):
        if end == len(pixels) or end - start == most or sum(pixels[start : end + 1]) > PIXELS:
            yield slice(start, end)
            start = end


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"{count} scores are expected, not {str(scores)[:60]}")
    return [float("nan") if value is None else number(value) for value in scores]
