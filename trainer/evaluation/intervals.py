"""Means with bootstrap confidence intervals. Images of one prompt are correlated, so whole prompts are resampled."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 2000
_CHUNK = 2**22
"""Largest number of resampled indices in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval at LEVEL; None where they cannot be computed."""

    mean: float | None
    low: float | None = None
    high: float | None = None

    def record(self) -> dict[str, float | None]:
        return asdict(self)


def bootstrap(values: Tensor, level: float = LEVEL) -> Estimate:
    """Mean over all images, and its percentile interval over resampled prompts.

    Resampling n prompts with replacement shrinks their spread by sqrt((n - 1) / n), which is corrected (T. Hesterberg,
    "What Teachers Should Know About the Bootstrap", 2015, section 4.4). The draws are the same in every call.

    Args:
        values: `[prompts, images]`; values that are not finite are ignored.
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
    """Mean paired difference; `values` and `base` score images of the same prompts and noise."""
    return bootstrap(values - base)


def win_rate(values: Tensor, base: Tensor) -> Estimate:
    """Share of images that score higher than the base model's of the same prompt and noise; ties count half."""
    wins = (values > base).double() + 0.5 * (values == base).double()
    found = bootstrap(torch.where((values - base).isfinite(), wins, torch.nan))
    if found.low is None:
        return found
    return Estimate(found.mean, max(found.low, 0.0), min(found.high, 1.0))
