"""Sample grids of a run, plain and annotated.

A sample grid is a plain image with a JSON file beside it, which lists the prompt, seed, scores and box of each cell.
The annotated ones are drawn from these two files: prompt and scores below each image, and images before and after
training above each other.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..utils.documents import try_json
from ..utils.errors import BadInput
from ..utils.files import write_json
from ..utils.media import open_image, save_image, to_pil_image

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

CELL = 192
"""Smallest width of an annotated cell in pixels, so that its caption is readable."""
BORDER = 4
"""Pixels between the images of a plain grid, and around them."""
TEXT, SMALL, TITLE = 14, 12, 20
GAP, LINES = 10, 4
GREEN, RED, GREY, INK = "#1a7f37", "#cf222e", "#57606a", "#1f2328"


@dataclass(frozen=True)
class Sample:
    """One cell of a grid.

    Attributes:
        prompt: what the image should show.
        seed: identifies its noise, such as `1234` or `3/7/0/2` (seed, iteration, prompt, member).
        scores: by reward; None for no score.
        box: left, top, right and bottom of the cell in its grid, in pixels.
    """

    prompt: str
    seed: str = ""
    scores: dict[str, float | None] = field(default_factory=dict)
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


# --------------------------------------------------------------------------------------------------------- plain grids


def magnification(images: Tensor, largest: int) -> int:
    """Integer factor that enlarges small images to a longer edge of at most `largest` pixels."""
    return max(1, largest // max(images.shape[-2:]))


def plain_grid(images: Tensor, columns: int, largest: int = 160) -> "Image":
    """Images side by side, small ones enlarged without smoothing.

    Args:
        images: `[N, 3, H, W]` in [0, 1].
        columns: images per row.
        largest: wanted edge of one image in pixels.
    """
    from torchvision.utils import make_grid

    factor = magnification(images, largest)
    images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    if len(images) == 1:  # make_grid adds no border to a single image
        return to_pil_image(torch.nn.functional.pad(images[0], [BORDER] * 4, value=1.0))
    return to_pil_image(make_grid(images, nrow=columns, padding=BORDER, pad_value=1.0))


def boxes(count: int, columns: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes of the cells of `plain_grid`, row by row.

    Args:
        width, height: of a cell as it is drawn.
    """
    found = []
    for number in range(count):
        row, column = divmod(number, columns)
        left, top = BORDER + column * (width + BORDER), BORDER + row * (height + BORDER)
        found.append((left, top, left + width, top + height))
    return found


def write_samples(grid: Path, samples: Iterable[Sample]) -> None:
    """Write the JSON file of a grid."""
    write_json(grid.with_suffix(".json"), {"cells": [asdict(sample) for sample in samples]})


def read_samples(grid: Path) -> list[Sample]:
    """The cells of a grid; none if its JSON file is missing or damaged."""
    try:
        data = try_json(grid.with_suffix(".json").read_bytes())
        return [_sample(cell) for cell in data["cells"]]
    except (OSError, KeyError, TypeError, ValueError):
        return []


def _sample(cell: dict[str, Any]) -> Sample:
    left, top, right, bottom = (int(edge) for edge in cell["box"])
    if not (0 <= left < right and 0 <= top < bottom):
        raise ValueError("an empty cell")
    scores = {str(name): None if value is None else float(value) for name, value in cell["scores"].items()}
    return Sample(str(cell["prompt"]), str(cell["seed"]), scores, (left, top, right, bottom))


# ----------------------------------------------------------------------------------------------------- annotated grids


def captioned(file: Path) -> "Image":
    """A grid with the prompt and the scores below each cell; the plain grid if it has no valid JSON file.

    Raises:
        BadInput: the image cannot be read.
    """
    grid, samples = open_image(file), read_samples(file)
    cells = [(sample, grid.crop(sample.box)) for sample in samples if _inside(sample, grid)]
    if not cells:
        return grid
    columns = sum(1 for sample, _ in cells if sample.box[1] == cells[0][0].box[1])
    width = max(CELL, *(cell.width for _, cell in cells))
    blocks = [block([(None, cell)], sample.prompt, score_lines(sample.scores), width) for sample, cell in cells]
    return arranged(blocks, columns)


def before_after(before: Path, after: Path, target: Path) -> bool:
    """Draw each prompt's image before training above the one after training; returns False if there are none.

    If a reward is 0 or 1 for every image, images are marked as right or wrong, and changes get a frame.
    """
    try:
        grids = [open_image(path) for path in (before, after)]
    except BadInput:
        return False
    sets = [
        {(s.prompt, s.seed): (s, grid.crop(s.box)) for s in read_samples(path) if _inside(s, grid)}
        for path, grid in zip((before, after), grids, strict=True)
    ]
    pairs = [(sets[0][key], sets[1][key]) for key in sets[0] if key in sets[1]]
    if not pairs:
        return False
    checker = checker_of([sample.scores for pair in pairs for sample, _ in pair])
    width = max(CELL, *(cell.width for pair in pairs for _, cell in pair))
    blocks = [_pair(one, two, checker, width) for one, two in pairs]
    save_image(target, arranged(blocks, min(6, len(blocks)), _legend(checker)))
    return True


def _pair(before: tuple[Sample, "Image"], after: tuple[Sample, "Image"], checker: str | None, width: int) -> "Image":
    (old, old_cell), (new, new_cell) = before, after
    verdicts = [None if checker is None else bool(sample.scores[checker]) for sample in (old, new)]
    color = None if verdicts[0] == verdicts[1] else GREEN if verdicts[1] else RED
    cells = [(verdict, cell) for verdict, cell in zip(verdicts, (old_cell, new_cell), strict=True)]
    return block(cells, new.prompt, _changes(old.scores, new.scores), width, color)


def checker_of(scores: list[dict[str, float | None]]) -> str | None:
    """The first reward that is 0 or 1 for every image, and not the same for all."""
    for name in scores[0]:
        values = {each.get(name) for each in scores}
        if values == {0.0, 1.0}:
            return name
    return None


def _legend(checker: str | None) -> str:
    rule = "Above: before training; below: after training, from the same noise"
    return rule if checker is None else f"{rule}. Marks: right or wrong according to {checker}; frame: it changed."


def _inside(sample: Sample, grid: "Image") -> bool:
    return sample.box[2] <= grid.width and sample.box[3] <= grid.height


def score_lines(scores: dict[str, float | None]) -> list[str]:
    return [f"{name} {number_text(value)}" for name, value in scores.items()]


def _changes(before: dict[str, float | None], after: dict[str, float | None]) -> list[str]:
    return [f"{name} {number_text(before.get(name))} to {number_text(value)}" for name, value in after.items()]


def number_text(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------------- drawing


def block(
    cells: list[tuple[bool | None, "Image"]],
    prompt: str,
    scores: list[str],
    width: int,
    frame: str | None = None,
) -> "Image":
    """Cells above each other, then the prompt, then a line per score.

    Args:
        cells: whether each image is right (None for no mark), and the image.
        frame: colour of a frame around the cells; None for no frame.
    """
    from PIL import Image, ImageDraw

    lines = [(line, _font(TEXT), INK) for line in wrapped(prompt, width, _measure(_font(TEXT)), LINES)]
    for text in scores:
        lines += [(line, _font(SMALL), GREY) for line in wrapped(text, width, _measure(_font(SMALL)), 2)]
    top = sum(cell.height + 4 for _, cell in cells)
    block = Image.new("RGB", (width, top + 2 + sum(_line_height(font) for _, font, _ in lines)), "white")
    draw, y = ImageDraw.Draw(block), 0
    for verdict, cell in cells:
        left = (width - cell.width) // 2
        block.paste(cell, (left, y))
        if verdict is not None:
            _mark(draw, verdict, left + cell.width - 24, y + 4)
        if frame is not None:
            draw.rectangle((left, y, left + cell.width - 1, y + cell.height - 1), outline=frame, width=3)
        y += cell.height + 4
    y += 2
    for text, font, color in lines:
        draw.text((0, y), text, color, font)
        y += _line_height(font)
    return block


def _mark(draw: "ImageDraw", right: bool, left: int, top: int) -> None:
    """Draw a check mark or a cross in a disc, because fonts may lack these characters."""
    color = GREEN if right else RED
    draw.ellipse((left, top, left + 20, top + 20), fill=color, outline="white", width=2)
    if right:
        draw.line([(left + 5, top + 11), (left + 9, top + 15), (left + 15, top + 6)], "white", 3, "curve")
    else:
        draw.line([(left + 6, top + 6), (left + 14, top + 14)], "white", 3)
        draw.line([(left + 14, top + 6), (left + 6, top + 14)], "white", 3)


def arranged(blocks: list["Image"], columns: int, title: str = "") -> "Image":
    """Arrange blocks in rows below a title; a row is as high as its highest block."""
    from PIL import Image, ImageDraw

    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    width = GAP + columns * (blocks[0].width + GAP)
    head = wrapped(title, width - 2 * GAP, _measure(_font(TITLE)), 3) if title else []
    height = GAP + len(head) * _line_height(_font(TITLE)) + sum(max(b.height for b in row) + GAP for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, y = ImageDraw.Draw(sheet), GAP // 2
    for line in head:
        draw.text((GAP, y), line, INK, _font(TITLE))
        y += _line_height(_font(TITLE))
    y += GAP // 2
    for row in rows:
        for column, block in enumerate(row):
            sheet.paste(block, (GAP + column * (block.width + GAP), y))
        y += max(block.height for block in row) + GAP
    return sheet


def wrapped(text: str, width: int, measure: Callable[[str], float], most: int) -> list[str]:
    """Wrap a text to a width. Words that are too long are broken, and a text that is too long ends in an ellipsis.

    Args:
        measure: returns the width of a line.
        most: the largest number of lines.
    """
    lines: list[str] = []
    rest = _printable(text)
    while rest and len(lines) < most:
        end = _fitting(rest, width, measure)
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > 0:
            end = space
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest and lines:
        last = lines[-1]
        while last and measure(last + "...") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "..."
    return lines


def _fitting(text: str, width: int, measure: Callable[[str], float]) -> int:
    """Number of characters of a text that fit, at least one."""
    low, high = 1, min(len(text), 4 * width)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if measure(text[:middle]) <= width else (low, middle - 1)
    return low


def _printable(text: str) -> str:
    """A text in one line, with unprintable characters such as lone surrogates replaced."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text[:2000].split()))


def _measure(font: "FreeTypeFont") -> Callable[[str], float]:
    return font.getlength


def _line_height(font: "FreeTypeFont") -> int:
    return int(font.size * 1.3)


@lru_cache
def _font(size: int) -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib and covers more scripts than Pillow's own font."""
    from PIL import ImageFont

    try:
        import matplotlib

        return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)
