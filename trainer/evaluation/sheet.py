"""The contact sheet of a comparison: per prompt the image of every model, with its name and scores."""

from typing import TYPE_CHECKING

from ..runs.sample_grids import CELL, arranged, block, checker_of, magnification, score_lines
from ..utils.media import to_pil_image
from .comparison import ModelScores

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

LARGEST = 320
"""Longer edge of an image in pixels."""
WIDTH = 1500
"""Prompts are placed side by side up to this width in pixels."""


def contact_sheet(models: list[ModelScores]) -> "Image":
    """Draw the contact sheet. A reward that only gives 0 or 1 also marks the images as right or wrong.

    Args:
        models: with images of the same prompts, in the same order.
    """
    checker = checker_of([sample.scores for model in models for sample in model.samples])
    small = max(models[0].images.shape[-2:]) < CELL
    strips = []
    for number, sample in enumerate(models[0].samples):
        cells = [_cell(model.images[number], small) for model in models]
        width = max(CELL, *(cell.width for cell in cells))
        blocks = []
        for model, cell in zip(models, cells, strict=True):
            scores = model.samples[number].scores
            verdict = None if checker is None else bool(scores[checker])
            blocks.append(block([(verdict, cell)], model.name, score_lines(scores), width))
        strips.append(arranged(blocks, len(blocks), sample.prompt))
    columns = max(1, min(len(strips), WIDTH // strips[0].width))
    rule = "The same noise for every model" if len(models) > 1 else models[0].name
    return arranged(strips, columns, rule if checker is None else f"{rule}. Marks: right or wrong by {checker}.")


def _cell(image: "Tensor", small: bool) -> "Image":
    """An image, or the middle frame of a video; small ones are enlarged without smoothing, large ones reduced."""
    image = image[len(image) // 2] if image.ndim == 4 else image
    factor = magnification(image, CELL) if small else 1
    cell = to_pil_image(image.repeat_interleave(factor, -1).repeat_interleave(factor, -2))
    cell.thumbnail((LARGEST, LARGEST))
    return cell
