"""The shapes world: scenes, how a prompt becomes one, and how scenes become antialiased images."""

import itertools
import math
import random
from dataclasses import dataclass

import torch

from .prompts import COLORS, SHAPES, Prompt

IMAGE_SIZE = 64
PALETTE = {
    "red": (0.86, 0.20, 0.18),
    "green": (0.20, 0.65, 0.32),
    "blue": (0.16, 0.38, 0.85),
    "yellow": (0.97, 0.80, 0.16),
    "purple": (0.55, 0.27, 0.72),
    "orange": (0.96, 0.52, 0.13),
}
BACKGROUNDS = (
    (0.93, 0.93, 0.93),
    (0.98, 0.95, 0.88),
    (0.87, 0.93, 0.98),
    (0.98, 0.91, 0.91),
    (0.89, 0.96, 0.90),
)
_RADII = {1: (11.0, 15.0), 2: (9.0, 10.5), 3: (8.0, 9.5), 4: (8.0, 9.5)}
_LEFT, _MIDDLE, _RIGHT = IMAGE_SIZE * 0.25, IMAGE_SIZE * 0.5, IMAGE_SIZE * 0.75
_SIDE_BY_SIDE = ((_LEFT, _MIDDLE), (_RIGHT, _MIDDLE))
_ONE_ABOVE = ((_MIDDLE, _LEFT), (_MIDDLE, _RIGHT))
_LAYOUTS = {  # centres in the order in which the prompt names the shapes
    1: [((_MIDDLE, _MIDDLE),)],
    2: [_SIDE_BY_SIDE, _ONE_ABOVE],
    3: [((_MIDDLE, _LEFT), (_LEFT, _RIGHT), (_RIGHT, _RIGHT))],
    4: [tuple(itertools.product((_LEFT, _RIGHT), repeat=2))],
}
_RELATED = {
    "to the left of": _SIDE_BY_SIDE,
    "to the right of": _SIDE_BY_SIDE[::-1],
    "above": _ONE_ABOVE,
    "below": _ONE_ABOVE[::-1],
}
_JITTER = 2.5  # pixels by which a shape may stand off its place
_REACH = 1.25  # furthest point of any shape from its centre, in radii
_GAP = 3.0  # pixels kept free between two shapes


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene: centre and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    objects: tuple[SceneObject, ...]
    background: tuple[float, float, float]


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float]) -> bool:
    dx, dy = second[0] - first[0], second[1] - first[1]
    along, across = {
        "to the left of": (dx, dy),
        "to the right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > abs(across) * 1.5 + 6


def _place(radii: list[float], relation: str | None, rng: random.Random) -> list[tuple[float, float]] | None:
    places = _RELATED[relation] if relation else rng.choice(_LAYOUTS[len(radii)])
    centers = [(x + rng.uniform(-_JITTER, _JITTER), y + rng.uniform(-_JITTER, _JITTER)) for x, y in places]
    shapes = list(zip(centers, radii, strict=True))
    for (center, radius), (other, other_radius) in itertools.combinations(shapes, 2):
        if math.dist(center, other) < (radius + other_radius) * _REACH + _GAP:
            return None
    return centers


def make_scene(prompt: Prompt, rng: random.Random) -> Scene:
    """A random scene that shows exactly what the prompt says; what it leaves open is drawn at random.

    Raises:
        ValueError: the prompt asks for more than four shapes.
    """
    phrases = [phrase for phrase in prompt.phrases for _ in range(phrase.count)]
    if len(phrases) not in _LAYOUTS:
        raise ValueError(f"prompt {prompt.text!r} asks for {len(phrases)} shapes; a scene has room for 1 to 4")
    low, high = _RADII[len(phrases)]
    centers, radii = None, []
    while centers is None:
        radii = [rng.uniform(low, high) for _ in phrases]
        centers = _place(radii, prompt.relation, rng)
    objects = tuple(
        SceneObject(p.shape, p.color or rng.choice(COLORS), x, y, r)
        for p, (x, y), r in zip(phrases, centers, radii, strict=True)
    )
    return Scene(objects, rng.choice(BACKGROUNDS))


def _signed_distance(shape: str, dx: torch.Tensor, dy: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    if shape == "circle":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - radius * 0.88
    sides = dx.abs() * (math.sqrt(3) / 2) - dy / 2
    return torch.maximum(sides, dy) - radius * 0.62


def render(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes with antialiased edges: float32 `[B, 3, 64, 64]` in [0, 1]."""
    axis = torch.arange(IMAGE_SIZE) + 0.5
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.tensor([s.background for s in scenes])[:, :, None, None].repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    depth = max(len(scene.objects) for scene in scenes)
    for layer in range(depth):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if layer < len(s.objects) and s.objects[layer].shape == shape]
            if not rows:
                continue
            objects = [scenes[i].objects[layer] for i in rows]
            x, y, radius = (
                torch.tensor([getattr(item, name) for item in objects])[:, None, None] for name in ("x", "y", "radius")
            )
            distance = _signed_distance(shape, grid_x - x, grid_y - y, radius)
            coverage = (0.5 - distance).clamp(0, 1)[:, None]
            color = torch.tensor([PALETTE[item.color] for item in objects])[:, :, None, None]
            images[rows] = images[rows] * (1 - coverage) + color * coverage
    return images
