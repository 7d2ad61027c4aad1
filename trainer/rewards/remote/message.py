"""Parses and validates the requests of the reward server."""

import base64
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.media import check_image, read_image

NAME = "an image of the request"
MOST_IMAGES = 2048
"""Largest number of images, or of frames of all videos, in a request."""
MOST_PIXELS = 4096 * 4096
"""Largest number of pixels of one image."""
MOST_PIXELS_TOGETHER = 2**27
"""Largest number of pixels of all images of a request: 1.6 GB in float32."""
LONGEST_PROMPT = 10_000
"""Characters."""


@dataclass(frozen=True)
class Message:
    """Images or videos as files, and their prompts.

    Attributes:
        items: for each image one file, for each video one file per frame.
        video: whether the items are videos.
        prompts: one per item.
    """

    items: list[list[bytes]]
    video: bool
    prompts: list[str]

    def decoded(self, device: torch.device) -> list[Tensor]:
        """Images `[3, H, W]` or videos `[F, 3, H, W]`, float32 in [0, 1] on the device.

        Raises:
            BadInput: a file is damaged.
            ValueError: the frames of a video differ in size.
        """
        return [self._decoded(item).to(device) for item in self.items]

    def _decoded(self, item: list[bytes]) -> Tensor:
        frames = [read_image(frame, NAME) for frame in item]
        if not self.video:
            return frames[0]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("the frames of a video differ in size")
        return torch.stack(frames)


def read_message(body: bytes, media: str) -> Message:
    """Parse a request, and check the format and size of its images without decoding them.

    Raises:
        BadInput: an image is not a PNG, JPEG or WebP file.
        ValueError: the request is malformed or too large.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {str(error)[:100]}") from error
    name = "videos" if media == "video" else "images"
    if not isinstance(message, dict) or not isinstance(message.get(name), list):
        raise ValueError(f"the request has no list {name!r}")
    prompts = message.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the request has no list 'prompts' of strings")
    if any(len(prompt) > LONGEST_PROMPT for prompt in prompts):
        raise ValueError(f"a prompt has more than {LONGEST_PROMPT} characters")
    items = [_files(item, media) for item in message[name]]
    _check_sizes([file for item in items for file in item])
    return Message(items, media == "video", prompts)


def _files(item: Any, media: str) -> list[bytes]:
    if media == "image":
        return [_file(item)]
    if not isinstance(item, list) or not item:
        raise ValueError("a video must be a list of at least one image")
    return [_file(frame) for frame in item]


def _file(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an image is not a file in base64: {error}") from error


def _check_sizes(files: list[bytes]) -> None:
    if len(files) > MOST_IMAGES:
        raise ValueError(f"the request has {len(files)} images; at most {MOST_IMAGES} are accepted")
    together = 0
    for file in files:
        width, height = check_image(file, NAME)
        together += width * height
        if width * height > MOST_PIXELS:
            raise ValueError(f"an image has {width} x {height} pixels; at most {MOST_PIXELS} pixels are accepted")
        if together > MOST_PIXELS_TOGETHER:
            raise ValueError(f"the images have more than {MOST_PIXELS_TOGETHER} pixels in total: send fewer at once")
