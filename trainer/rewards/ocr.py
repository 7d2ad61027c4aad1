"""Text rendering: whether the quoted text of the prompt can be read in the image, by optical character recognition."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.media import png
from .base import Reward
from .preprocess import to_pil

if TYPE_CHECKING:
    from PIL import Image

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class TextRendering(Reward):
    """Text in the image: 1 if the quoted text of the prompt can be read, less for each wrong letter.

    One minus the edit distance per letter between the recognized and the quoted text, ignoring spaces and case, as in
    Flow-GRPO. Recognition uses RapidOCR, which comes with its models and runs on the CPU; Flow-GRPO uses PaddleOCR, so
    its scores differ a little. Every prompt needs a text in double quotes. Install its packages with
    `pip install rapidocr onnxruntime`; nothing is downloaded when they are used.
    """

    name = "ocr"
    typical_range = (0.0, 1.0)
    packages = ("rapidocr", "onnxruntime")
    reader = None

    def check_prompts(self, prompts: list[str]) -> None:
        for prompt in prompts:
            target(prompt)

    def load(self) -> None:
        if self.reader is None:
            from rapidocr import RapidOCR

            self.reader = RapidOCR()

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.load()
        pairs = zip(to_pil(images), prompts, strict=True)
        return torch.tensor([similarity(self._read(image), target(prompt)) for image, prompt in pairs])

    def _read(self, image: "Image.Image") -> str:
        return "".join(self.reader(png(image)).txts or ())


def target(prompt: str) -> str:
    """The first text in double quotes, without spaces, in lower case.

    Raises:
        ValueError: the prompt has no quoted text.
    """
    for match in _QUOTED.finditer(prompt):
        if words := _bare(match[1] or match[2] or ""):
            return words
    raise ValueError(f"{prompt[:100]!r} has no text in double quotes")


def similarity(found: str, wanted: str) -> float:
    """1 - edit distance / letters, in [0, 1]; 1 if `found` contains `wanted`.

    Args:
        wanted: returned by `target`.
    """
    found = _bare(found)
    if wanted in found:
        return 1.0
    return 1 - min(distance(found, wanted), len(wanted)) / len(wanted)


def distance(first: str, second: str) -> int:
    """Edit distance (Levenshtein): insertions, deletions and replacements of letters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def _bare(text: str) -> str:
    return "".join(text.split()).lower()
