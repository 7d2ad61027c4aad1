"""Checks an image of the shapes world against its prompt: GenEval in miniature.

The shapes are found in the image alone, by colour distance to the background and connected components
(`scipy.ndimage.label`); nothing is known of how the image was made.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .prompts import SHAPES, Prompt, parse
from .world import PALETTE

MIN_AREA = 24  # pixels; smaller components are specks
FOREGROUND_DISTANCE = 0.22  # RGB distance to the background
MIN_CLARITY = 0.75  # overlap with the ideal outline below which a component is not a shape
MAX_COLOR_DISTANCE = 0.30
_COLOR_NAMES = tuple(PALETTE)
_COLOR_VALUES = np.array(list(PALETTE.values()), dtype=np.float32)


@dataclass(frozen=True)
class FoundShape:
    """Something found in an image; without a colour of the palette and a clear outline its `shape` is None."""

    shape: str | None
    color: str | None
    x: float
    y: float
    clarity: float
    """Overlap (intersection over union) with the ideal outline of its shape, 0 to 1."""


def _outlines(height: int, width: int) -> np.ndarray:
    v = ((np.arange(height) + 0.5) * 2 / height - 1)[:, None]
    u = ((np.arange(width) + 0.5) * 2 / width - 1)[None, :]
    full = np.ones((height, width), dtype=bool)
    return np.stack([u * u + v * v <= 1.0, full, np.abs(u) <= (v + 1) / 2])


def _classify_shape(mask: np.ndarray) -> tuple[str | None, float]:
    height, width = mask.shape
    if not 0.7 < height / width < 1.4:
        return None, 0.0
    ideal = _outlines(height, width)
    overlap = (ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2))
    best = int(overlap.argmax())
    clarity = float(overlap[best])
    return (SHAPES[best] if clarity >= MIN_CLARITY else None), clarity


def _classify_color(pixels: np.ndarray) -> str | None:
    distance = np.linalg.norm(_COLOR_VALUES - np.median(pixels, axis=0), axis=1)
    best = int(distance.argmin())
    return _COLOR_NAMES[best] if distance[best] < MAX_COLOR_DISTANCE else None


def find_shapes(image: np.ndarray) -> list[FoundShape]:
    """Find the shapes of one image.

    Args:
        image: float `[H, W, 3]` in [0, 1].
    """
    from scipy import ndimage

    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    contrast = np.linalg.norm(image - np.median(border, axis=0), axis=2)
    labels, _ = ndimage.label(contrast > FOREGROUND_DISTANCE)
    found = []
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[window] == index
        if mask.sum() < MIN_AREA:
            continue
        mask, top, left = _outline(mask, contrast[window])
        rows, columns = np.nonzero(mask)
        color = _classify_color(image[window][top : top + mask.shape[0], left : left + mask.shape[1]][mask])
        # Noise, or what fills the frame, would pass for a square.
        is_shape = color is not None and mask.shape != labels.shape
        shape, clarity = _classify_shape(mask) if is_shape else (None, 0.0)
        found.append(
            FoundShape(
                shape=shape,
                color=color,
                x=float(columns.mean() + window[1].start + left),
                y=float(rows.mean() + window[0].start + top),
                clarity=clarity,
            )
        )
    return found


def _outline(mask: np.ndarray, contrast: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The mask drawn where the contrast is half of the shape's own, which is where an antialiased edge lies.

    Returns:
        the mask cut to its box, and the box's top and left.
    """
    inside = mask & (contrast > 0.5 * np.median(contrast[mask]))
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    return inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], int(rows[0]), int(columns[0])


def _relation_margin(relation: str, first: FoundShape, second: FoundShape) -> float:
    """How far, in pixels, the relation holds beyond the diagonal; negative where it does not."""
    dx, dy = second.x - first.x, second.y - first.y
    if relation in ("to the left of", "to the right of"):
        return (dx if relation == "to the left of" else -dx) - abs(dy)
    return (dy if relation == "above" else -dy) - abs(dx)


def _relation_score(prompt: Prompt, found: list[FoundShape]) -> float:
    groups = [[f for f in found if f.shape == p.shape and p.color in (None, f.color)] for p in prompt.phrases[:2]]
    if any(len(group) != 1 for group in groups):
        return 0.0
    margin = _relation_margin(prompt.relation, groups[0][0], groups[1][0])
    return float(np.clip(0.5 + margin / 32, 0.0, 1.0))


def graded_score(prompt: Prompt, found: list[FoundShape]) -> float:
    """Mean over the prompt's demands of how nearly each is met, times the share of found shapes that were asked for.

    Demands: the number of each shape (weighted by its clarity), its colour where named, the relation where named.
    Range [0, 1].
    """
    terms = []
    for phrase in prompt.phrases:
        same_shape = [f for f in found if f.shape == phrase.shape]
        wanted = max(phrase.count, len(same_shape))
        matched = sorted((f.clarity for f in same_shape), reverse=True)[: phrase.count]
        terms.append(sum(matched) / wanted)
        if phrase.color:
            right = sum(f.color == phrase.color for f in same_shape)
            terms.append(min(right, phrase.count) / wanted)
    if prompt.relation:
        terms.append(_relation_score(prompt, found))
    asked = sum(phrase.count for phrase in prompt.phrases)
    surplus = asked / max(asked, len(found))
    return float(np.mean(terms)) * surplus


def is_right(prompt: Prompt, found: list[FoundShape]) -> bool:
    """Whether the image shows exactly what the prompt says: every shape, count, colour and relation, nothing else."""
    if len(found) != sum(phrase.count for phrase in prompt.phrases):
        return False
    for phrase in prompt.phrases:
        if sum(f.shape == phrase.shape and phrase.color in (None, f.color) for f in found) != phrase.count:
            return False
    return prompt.relation is None or _relation_score(prompt, found) > 0.5


def check(images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score images of the shapes world.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        prompts: B texts of the shapes world.

    Returns:
        graded score in [0, 1] and strict score (0 or 1), both float32 `[B]`.

    Raises:
        ValueError: a prompt is not of this world.
    """
    parsed = [parse(text) for text in prompts]
    arrays = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    found = [find_shapes(array) for array in arrays]
    graded = [graded_score(p, f) for p, f in zip(parsed, found, strict=True)]
    right = [float(is_right(p, f)) for p, f in zip(parsed, found, strict=True)]
    return torch.tensor(graded, dtype=torch.float32), torch.tensor(right, dtype=torch.float32)
