"""A fixed description of an image's colours and layout: 260 numbers, no weights, differentiable.

The image is averaged down to 64 x 64 and converted to OKLab, a colour space in which equal distances look about equally
different (Ottosson 2020, https://bottosson.github.io/posts/oklab/). Its numbers are, in this order:

- 100: histogram over 4 x 5 x 5 bins of (L, a, b). Each pixel is divided linearly between neighbouring bins, and the
  square root of each bin's share is taken, so that Euclidean distances are Hellinger distances.
- 96: mean and std of L, a and b in each cell of a 4 x 4 grid.
- 64: mean magnitude of the horizontal and vertical differences of L in each cell of the grid, at 64 x 64 and 32 x 32.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

SIDE = 64
GRID = 4
BINS = (4, 5, 5)
_LOWEST, _HIGHEST = (0.0, -0.25, -0.25), (1.0, 0.25, 0.25)
"""Centres of the first and the last bin of L, a, b; what lies beyond counts to the last."""
LAYOUT_WEIGHT, EDGE_WEIGHT = 0.5, 6.0
"""Bring the second and the third group to about the same spread over images as the first."""
_SMALLEST = 1e-4
"""Added under roots, whose slope at 0 is infinite."""

_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


class PixelFeatures(nn.Module):
    """The description as a network without weights: `[B, 3, H, W]` in [0, 1] to `[B, 260]` float32."""

    size = BINS[0] * BINS[1] * BINS[2] + 6 * GRID**2 + 4 * GRID**2

    def forward(self, images: Tensor) -> Tensor:
        lab = oklab(adaptive_avg_pool2d(images.float(), SIDE))
        parts = (_histogram(lab), LAYOUT_WEIGHT * _layout(lab), EDGE_WEIGHT * _edges(lab[:, :1]))
        return torch.cat([part.flatten(1) for part in parts], dim=1)


def oklab(images: Tensor) -> Tensor:
    """sRGB `[B, 3, H, W]` in [0, 1] as OKLab: L in [0, 1], a and b within about 0.3 of 0."""
    images = images.clamp(0, 1)
    linear = torch.where(images <= 0.04045, images / 12.92, ((images.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    cones = torch.einsum("ij,bjhw->bihw", images.new_tensor(_TO_CONES), linear)
    return torch.einsum("ij,bjhw->bihw", images.new_tensor(_TO_LAB), (cones + _SMALLEST) ** (1 / 3))


def _histogram(lab: Tensor) -> Tensor:
    """`[B, 100]`: square roots of each bin's share of the pixels."""
    weights = [
        _memberships(channel.flatten(1), low, high, bins)
        for channel, low, high, bins in zip(lab.unbind(1), _LOWEST, _HIGHEST, BINS, strict=True)
    ]
    share = torch.einsum("bpi,bpj,bpk->bijk", *weights) / weights[0].shape[1]
    return (share + _SMALLEST).sqrt()


def _memberships(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """`[B, P, bins]`: how much of each value `[B, P]` belongs to each bin; linear between centres, the sum is 1."""
    position = ((values - low) / (high - low) * (bins - 1)).clamp(0, bins - 1)
    return (1 - (position[..., None] - torch.arange(bins, device=values.device)).abs()).clamp(min=0)


def _layout(lab: Tensor) -> Tensor:
    """`[B, 6, GRID, GRID]`: mean and std of each channel in each cell."""
    cell = SIDE // GRID
    mean = avg_pool2d(lab, cell)
    variance = (avg_pool2d(lab**2, cell) - mean**2).clamp(min=0)
    return torch.cat([mean, (variance + _SMALLEST).sqrt()], dim=1)


def _edges(light: Tensor) -> Tensor:
    """`[B, 4, GRID, GRID]`: mean magnitude of the differences between neighbours, at two scales, in each cell."""
    found = []
    for scale in (light, avg_pool2d(light, 2)):
        for direction in (-1, -2):
            found.append(adaptive_avg_pool2d(scale.diff(dim=direction).abs(), GRID))
    return torch.cat(found, dim=1)
