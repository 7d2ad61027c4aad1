"""Advantages: rewards normalised within the images of the same prompt, and combined."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..utils.section import Section


class AdvantageConfig(Section):
    """How the rewards of a group of images become advantages."""

    combine: Literal["advantages", "sum", "gdpo"] = Field(
        "advantages", description="Combine rewards as normalised advantages, as a raw weighted sum, or by GDPO."
    )
    normalize: Literal["group", "global-std", "global"] = Field(
        "group", description="Mean and std of the group; mean of the group, std of all images; or both of all (DDPO)."
    )
    clip: Annotated[float, Field(gt=0)] = Field(5.0, description="Advantages are clipped to this absolute value.")
    std_floor: Annotated[float, Field(gt=0)] = Field(1e-6, description="Groups with a smaller std are skipped.")
    best_of_n: int | None = Field(None, ge=2, multiple_of=2, description="Train on the best and worst of each group.")


@dataclass(frozen=True)
class Advantages:
    """
    Attributes:
        values: `[P, G]` float32, 0 for dropped samples and skipped groups.
        skipped: `[P]` bool, groups whose rewards are all (nearly) equal, which give no gradient.
        dropped: `[P, G]` bool, samples with a reward that is not finite.
        spread: per reward, the mean over groups of the std within a group.
    """

    values: Tensor
    skipped: Tensor
    dropped: Tensor
    spread: dict[str, float]

    @classmethod
    def none(cls, prompts: int, group: int) -> "Advantages":
        """Advantages of unscored images: all 0, with nothing skipped or dropped."""
        values = torch.zeros(prompts, group)
        return cls(values, torch.zeros(prompts, dtype=torch.bool), torch.zeros_like(values, dtype=torch.bool), {})


def advantages_of(rewards: Mapping[str, Tensor], weights: Mapping[str, float], config: AdvantageConfig) -> Advantages:
    """`group_advantages` with the settings of a run."""
    return group_advantages(
        rewards,
        weights=weights,
        combine=config.combine,
        normalize=config.normalize,
        floor=config.std_floor,
        clip=config.clip,
    )


def active_images(advantages: Advantages, config: AdvantageConfig) -> Tensor:
    """`[P, G]` bool, the images to train on: not dropped or skipped, and selected by `best_of_n` if it is set."""
    active = ~advantages.dropped & ~advantages.skipped[:, None]
    return best_of_n(advantages.values, config.best_of_n, active) if config.best_of_n else active


def group_advantages(
    rewards: Tensor | Mapping[str, Tensor],
    *,
    weights: Mapping[str, float] | None = None,
    combine: str = "advantages",
    normalize: str = "group",
    floor: float = 1e-6,
    clip: float = 5.0,
) -> Advantages:
    """Advantages relative to the group of images of the same prompt (DanceGRPO eq. 5; computed in float64).

    Args:
        rewards: `[P, G]` (P prompts, G images each) or a mapping from names to such tensors. A sample whose reward is
            NaN or infinite is dropped: its advantage is 0 and it is not part of the mean and std.
        weights: weight of each reward; 1 if absent.
        combine: `advantages` normalises each reward within its group, takes the weighted sum and normalises it again
            (the paper does not normalise again); `sum` is the weighted sum of raw rewards; `gdpo` is `advantages` with
            the last normalisation over all samples (arXiv 2601.05242).
        normalize: `group` (mean and std of the group), `global-std` (mean of the group, std of all samples, as
            Flow-GRPO) or `global` (mean and std of all samples, as DDPO).
        floor: groups whose std is at most floor x max(1, |mean|) are skipped; also added to the divisor.
        clip: largest absolute advantage.

    Raises:
        ValueError: shapes differ, a weight names no reward, or a mode is unknown.
    """
    table = dict(rewards) if isinstance(rewards, Mapping) else {"reward": rewards}
    _check(table, weights or {}, combine, normalize)
    table = {name: value.double() for name, value in table.items()}
    valid = torch.stack([value.isfinite() for value in table.values()]).all(0)
    weight = {name: (weights or {}).get(name, 1.0) for name in table}
    spread = mean_group_std(table)
    if combine == "sum":
        total = sum(weight[name] * torch.where(valid, value, 0.0) for name, value in table.items())
        values, flat = _normalize(total, valid, normalize, floor)
    else:
        parts = {name: _normalize(value, valid, normalize, floor) for name, value in table.items()}
        values = sum(weight[name] * part for name, (part, _) in parts.items())
        flat = torch.stack([flat for _, flat in parts.values()]).all(0)
        if len(table) > 1:
            values, reflat = _normalize(
                values, valid & ~flat[:, None], normalize if combine == "advantages" else "global", floor
            )
            flat = flat | reflat
    values = torch.where(valid & ~flat[:, None], values, 0.0).clamp(-clip, clip)
    return Advantages(values.float(), flat, ~valid, spread)


def best_of_n(advantages: Tensor, keep: int, active: Tensor) -> Tensor:
    """Keep the top and bottom halves of each group.

    Args:
        advantages: `[P, G]`.
        keep: how many of each group, even, 2 <= keep <= G.
        active: `[P, G]` bool, the samples to choose from.

    Returns:
        `[P, G]` bool: the keep/2 highest and keep/2 lowest of each row, or fewer if too few are active.
    """
    mask = torch.zeros_like(active)
    for row, order in enumerate(advantages.argsort(dim=1, stable=True)):
        candidates = order[active[row, order]]
        half = min(keep, len(candidates)) // 2
        mask[row, candidates[:half]] = True
        mask[row, candidates[len(candidates) - half :]] = True
    return mask


def _check(table: dict[str, Tensor], weights: Mapping[str, float], combine: str, normalize: str) -> None:
    shapes = {name: tuple(value.shape) for name, value in table.items()}
    if not table or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"rewards must all have one shape [prompts, group], got {shapes}")
    if unknown := set(weights) - set(table):
        raise ValueError(f"weights name no reward: {', '.join(sorted(unknown))}; rewards are {', '.join(table)}")
    if combine not in ("advantages", "sum", "gdpo"):
        raise ValueError(f"combine {combine!r} is unknown; choose advantages, sum or gdpo")
    if normalize not in ("group", "global-std", "global"):
        raise ValueError(f"normalize {normalize!r} is unknown; choose group, global-std or global")


def _group_mean(value: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, value, 0.0).sum(1) / valid.sum(1).clamp(min=1)


def _group_std(value: Tensor, valid: Tensor) -> Tensor:
    centered = value - _group_mean(value, valid)[:, None]
    variance = torch.where(valid, centered, 0.0).square().sum(1) / (valid.sum(1) - 1).clamp(min=1)
    return variance.sqrt()


def mean_group_std(rewards: Mapping[str, Tensor]) -> dict[str, float]:
    """Per reward, the mean over groups of the std within a group, without images that lack one of the rewards.

    Args:
        rewards: `[P, G]` float64 each.
    """
    if not rewards:
        return {}
    valid = torch.stack([value.isfinite() for value in rewards.values()]).all(0)
    several = valid.sum(1) > 1
    stds = {name: _group_std(value, valid)[several] for name, value in rewards.items()}
    return {name: std.mean().item() if len(std) else 0.0 for name, std in stds.items()}


def _normalize(value: Tensor, valid: Tensor, mode: str, floor: float) -> tuple[Tensor, Tensor]:
    """Subtract the mean and divide by the std. Also returns which groups have too small a std."""
    mean = _group_mean(value, valid)[:, None]
    std = _group_std(value, valid)[:, None]
    flat = (std <= floor * mean.abs().clamp(min=1)) | (valid.sum(1, keepdim=True) < 2)
    if mode != "group":
        everything = value[valid]
        std = everything.std().reshape(1, 1) if everything.numel() > 1 else torch.zeros(1, 1).double()
    if mode == "global":
        mean = (everything.mean() if everything.numel() else torch.zeros(())).reshape(1, 1).double()
        flat = (std <= floor * mean.abs().clamp(min=1)).expand_as(flat)
    normalized = torch.where(valid & ~flat, (value - mean) / (std + floor), 0.0)
    return normalized, flat[:, 0]


@dataclass(frozen=True)
class Mixture:
    """Combines several rewards into one number, the sum of weight x reward / unit.

    This number is "the reward" in evaluations, the watchdog and reward curves.

    Attributes:
        weights: weight of each trained reward.
        units: divisor of each reward; 0 and None mean 1. Training normalises each reward within its group, so the
            matching unit is the reward's within-group std under the base model.
    """

    weights: Mapping[str, float]
    units: Mapping[str, float | None]

    def of(self, rewards: Mapping[str, Tensor] | Mapping[str, float]) -> Tensor | float:
        """The combined reward; NaN if one of the rewards is NaN."""
        return sum(weight * rewards[name] / (self.units[name] or 1.0) for name, weight in self.weights.items())
