"""Image statistics that need no reward model: brightness, saturation, and diversity within a prompt.

Diversity is the mean distance over all pairs of a prompt's images: the root mean square difference of their thumbnails
(0 to 1; layout and colour) and, with a CLIP model, 1 - cosine similarity of their embeddings (content). It is 0 if a
model draws the same image from every noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ..rewards.preprocess import luma

THUMBNAIL = 32
"""Edge of a thumbnail in pixels; thumbnails are made by average pooling."""
PER_IMAGE, DIVERSITY, CLIP_DIVERSITY = ("brightness", "saturation"), "diversity", "diversity (CLIP)"
Embed = Callable[[Tensor], Tensor]
"""Image embeddings `[B, D]` of images `[B, 3, H, W]`."""


@dataclass(frozen=True)
class Look:
    """Statistics of one image.

    Attributes:
        brightness: mean luma, 0 to 1.
        saturation: mean saturation of HSV, 0 (grey) to 1.
        thumbnail: `[3, THUMBNAIL, THUMBNAIL]` float16 on the CPU.
        embedding: CLIP image embedding `[D]`; None without a CLIP model.
    """

    brightness: float
    saturation: float
    thumbnail: Tensor
    embedding: Tensor | None = None


def looks(images: Tensor, embed: Embed | None = None) -> list[Look]:
    """Statistics of each image.

    Args:
        images: `[B, 3, H, W]` in [0, 1], or videos `[B, F, 3, H, W]`, of which the middle frame is used.
    """
    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    images = images.float().nan_to_num(0.0).clamp(0, 1)
    light, colour = luma(images).flatten(1).mean(1).tolist(), saturation(images).tolist()
    thumbnails = adaptive_avg_pool2d(images, THUMBNAIL).half().cpu()
    embeddings = [None] * len(images) if embed is None else list(embed(images).float().cpu())
    return [Look(*parts) for parts in zip(light, colour, thumbnails, embeddings, strict=True)]


def saturation(images: Tensor) -> Tensor:
    """`[B]`: mean over pixels of (max - min) / max over the channels; black counts as 0."""
    highest, lowest = images.amax(1), images.amin(1)
    return ((highest - lowest) / highest.clamp(min=1e-6)).flatten(1).mean(1)


def tabulate(found: Sequence[tuple[int, int, Look]], prompts: int, per_prompt: int) -> dict[str, Tensor]:
    """Statistics by name, `[prompts, per_prompt]` or, if per prompt, `[prompts, 1]`.

    Args:
        found: (prompt, number of the image within its prompt, statistics), each image once.
    """
    table = {name: torch.full((prompts, per_prompt), torch.nan, dtype=torch.float64) for name in PER_IMAGE}
    groups: dict[int, list[Look]] = {}
    for p, k, look in found:
        for name in PER_IMAGE:
            table[name][p, k] = getattr(look, name)
        groups.setdefault(p, []).append(look)
    table[DIVERSITY] = _per_prompt(prompts, {p: diversity([x.thumbnail for x in group]) for p, group in groups.items()})
    if any(look.embedding is not None for *_, look in found):
        clip = {p: clip_diversity([x.embedding for x in group]) for p, group in groups.items()}
        table[CLIP_DIVERSITY] = _per_prompt(prompts, clip)
    return table


def _per_prompt(prompts: int, values: dict[int, float]) -> Tensor:
    return torch.tensor([[values.get(p, torch.nan)] for p in range(prompts)], dtype=torch.float64)


def diversity(thumbnails: list[Tensor]) -> float:
    """Mean over all pairs of the root mean square difference; NaN for fewer than two images."""
    flat = torch.stack(thumbnails).flatten(1).double()
    return _mean_of_pairs(torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5)


def clip_diversity(embeddings: list[Tensor]) -> float:
    """Mean over all pairs of 1 - cosine; NaN for fewer than two images."""
    unit = normalize(torch.stack(embeddings).double(), dim=-1)
    return _mean_of_pairs(1 - unit @ unit.T)


def _mean_of_pairs(distances: Tensor) -> float:
    """
    Args:
        distances: `[K, K]`, symmetric.
    """
    first, second = torch.triu_indices(len(distances), len(distances), offset=1)
    return distances[first, second].mean().item()
