"""Means with intervals, by bootstrap over prompts: images of one prompt are alike, so prompts are drawn as a whole."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK = 2**22
"""Most numbers of a part of the resamples that is held at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval that covers the true one in about LEVEL of all cases; None where there is none."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float | None]:
        return asdict(self)


def bootstrap(values: Tensor, level: float = LEVEL) -> Estimate:
    """Mean over all images, and its percentile interval over resampled prompts.

    Resampling n prompts with replacement shrinks their spread by sqrt((n - 1) / n), which is made good (T. Hesterberg,
    "What Teachers Should Know About the Bootstrap", 2015, section 4.4). The draws are the same in every call.

    Args:
        values: `[prompts, images]`; what is not finite does not count.
    """
    finite = values.isfinite()
    counts, sums = finite.sum(1).double(), torch.where(finite, values, 0.0).double().sum(1)
    sums, counts = sums[counts > 0], counts[counts > 0]
    prompts = len(counts)
    if prompts == 0:
        return Estimate(None)
    mean = (sums.sum() / counts.sum()).item()
    if prompts == 1:
        return Estimate(mean)
    means, generator = [], torch.Generator().manual_seed(0)
    part = max(1, min(RESAMPLES, _CHUNK // prompts))
    for start in range(0, RESAMPLES, part):
        drawn = torch.randint(prompts, (min(part, RESAMPLES - start), prompts), generator=generator)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    wide = mean + (torch.cat(means) - mean) * (prompts / (prompts - 1)) ** 0.5
    tail = (1 - level) / 2
    low, high = wide.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high)


def change(values: Tensor, base: Tensor) -> Estimate:
    """How much higher `values` are than `base`, image by image: both are of the same prompts and noise."""
    return bootstrap(values - base)


def win_rate(values: Tensor, base: Tensor) -> Estimate:
    """The share of images that score higher than the base's of the same prompt and noise; equal ones count half."""
    wins = (values > base).double() + 0.5 * (values == base).double()
    found = bootstrap(torch.where((values - base).isfinite(), wins, torch.nan))
    if found.low is None:
        return found
    return Estimate(found.mean, max(found.low, 0.0), min(found.high, 1.0))
