"""A scorer of any kind in its own program, asked over HTTP: GenEval, VisionReward, or one of your own."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...config import Section
from ...utils.errors import BadInput, RunFailed
from ..base import Reward
from .http import ask, check_url, number, to_png


class External(Reward):
    """Scores of a server of your own: it gets images (or a video's frames) as PNG and the prompts, and answers numbers.

    For scorers whose packages cannot live beside ComfyUI's, such as GenEval and VisionReward; `python -m trainer
    reward-server` serves any reward of this pack from another GPU or host. docs/external-scorers.md describes the
    messages. Images and prompts go to the address given here and nowhere else. Where the server answers null, that
    image is left out of training.
    """

    name = "external"
    typical_range = (0.0, 1.0)

    class Options(Section):
        url: str = Field("http://127.0.0.1:8100/score", description="Address that the images are sent to.")
        media: Literal["image", "video"] = Field("image", description="What the server judges.")
        fps: Annotated[float, Field(gt=0)] = Field(8.0, description="Frames per second of videos, told to the server.")
        batch: Annotated[int, Field(ge=1)] = Field(8, description="Images or videos in one message.")
        timeout: Annotated[float, Field(gt=0)] = Field(120.0, description="Seconds that one answer may take.")
        retries: Annotated[int, Field(ge=0, le=10)] = Field(2, description="Further tries where there is no answer.")

    def __init__(self, options: Section | None = None) -> None:
        super().__init__(options)
        check_url(self.options.url, self.name)
        self.media = self.options.media

    def load(self) -> None:
        """Ask for the scores of nothing.

        Raises:
            BadInput: the server is not there, or speaks another language.
        """
        try:
            self._ask([], [])
        except RunFailed as error:
            raise BadInput(f"reward {self.name!r}: {error}") from error

    def score(self, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
        size, scores = self.options.batch, []
        for start in range(0, len(prompts), size):
            scores += self._ask(images[start : start + size], prompts[start : start + size])
        return torch.tensor(scores, dtype=torch.float32)

    def _ask(self, images: Tensor | list[Tensor], prompts: list[str]) -> list[float]:
        body: dict[str, Any] = {"prompts": prompts}
        if self.media == "video":
            body |= {"videos": [to_png(video) for video in images], "fps": self.options.fps}
        else:
            body["images"] = to_png(images) if len(images) else []
        return ask(
            self.options.url,
            body,
            timeout=self.options.timeout,
            retries=self.options.retries,
            check=lambda answer: _scores(answer, len(prompts)),
        )


def _scores(answer: Any, count: int) -> list[float]:
    scores = answer["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"{count} scores are expected, not {str(scores)[:60]}")
    return [float("nan") if value is None else number(value) for value in scores]
