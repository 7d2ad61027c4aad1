"""Deterministic sampling on held-out prompts with fixed noise, and what the judges say of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rewards as judges
from .models import DiffusionModel
from .prompts.sets import PromptSet
from .rollout import Calls, Plan, Prompting, decode, own, sample
from .utils.distributed import Processes
from .utils.seeds import noise

SHOWN, SHOWN_VIDEOS = 24, 6  # kept for the pictures
MIX = "mix"
"""Among an evaluation's judges, the name of the trained rewards' mixture."""


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        rewards: mean per judge (None where no score was finite, here and below), and of their mixture.
        spread: per judge, mean over prompts of the standard deviation among a prompt's images (None with one image).
        categories: per judge, mean per category.
        images: `[N, 3, H, W]` or `[N, F, 3, H, W]`, the first of each of up to SHOWN prompts, in every process.
    """

    rewards: dict[str, float | None]
    spread: dict[str, float | None]
    categories: dict[str, dict[str, float | None]]
    images: Tensor

    def record(self) -> dict:
        """Plain data, without the images."""
        return {"rewards": self.rewards, "spread": self.spread, "categories": self.categories}


@dataclass(frozen=True)
class Mixture:
    """What several rewards amount to together: the weighted sum that training raises.

    Attributes:
        weights: per trained reward.
        units: what each is divided by before it is weighted; None for its spread in this evaluation. Training
            normalises every reward within its group, so a spread of the base model's is the unit that fits.
    """

    weights: dict[str, float]
    units: dict[str, float | None] | None = None

    def of(self, columns: dict[str, Tensor], spread: dict[str, float | None]) -> Tensor:
        """One value per image, NaN where one of the rewards is."""
        units = self.units or spread
        return sum(weight * columns[name] / (units[name] or 1.0) for name, weight in self.weights.items())


@torch.no_grad()
def evaluate(
    model: DiffusionModel,
    prompts: PromptSet,
    prompting: Prompting,
    rewards: dict[str, judges.Reward],
    processes: Processes,
    *,
    steps: int,
    shift: float | None,
    guidance_scale: float,
    solver: str,
    images_per_prompt: int,
    seed: int,
    batch: int,
    mixture: Mixture | None = None,
    between_calls: Callable[[], None] = lambda: None,
    calls: Calls = own,
) -> Evaluation:
    """Sample `images_per_prompt` images of each prompt, from noise that depends on the seed and the prompt's text.

    Args:
        calls: how many images a process samples that has so many.
    """
    plan = Plan("ode", 0.0, model.sigmas(steps, shift), [False] * steps, False, guidance_scale, solver)
    pairs = [(p, k) for p in range(len(prompts.texts)) for k in range(images_per_prompt)]
    scores: list[tuple[int, dict[str, float]]] = []
    shown: list[tuple[int, Tensor]] = []
    most = min(SHOWN if len(model.latent_shape) == 3 else SHOWN_VIDEOS, len(prompts.texts))
    picture = set(torch.linspace(0, len(prompts.texts) - 1, most).round().int().tolist())
    mine = [pairs[i] for i in processes.share(len(pairs))]
    own_images = len(mine)
    mine += pairs[:1] * (calls(own_images) - own_images)  # sampled, not judged
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        index = torch.tensor([p for p, _ in part])
        initial = torch.stack([noise(model.latent_shape, seed, prompts.texts[p], k) for p, k in part])
        conditions = prompting.conditions.rows(index).to(model.device)
        here = Prompting(conditions, prompting.unconditional)
        sampled = sample(
            model,
            plan,
            here,
            torch.arange(len(part), device=model.device),
            initial.to(model.device),
            no_noise,
            batch=batch,
            between_calls=between_calls,
        )
        part = part[: max(0, own_images - start)]
        if not part:
            continue
        images = decode(model, sampled.final[: len(part)], batch)
        texts = [prompts.texts[p] for p, _ in part]
        columns = {name: judges.score_or_nan(reward, images, texts).tolist() for name, reward in rewards.items()}
        for row, (p, k) in enumerate(part):
            scores.append((p, {name: column[row] for name, column in columns.items()}))
            if k == 0 and p in picture:
                shown.append((p, images[row].cpu()))
    for reward in rewards.values():
        reward.idle()
    scores = processes.gather(scores)
    shown = processes.gather(shown)
    return _summary(prompts, list(rewards), scores, shown, mixture)


def no_noise(step: int) -> Tensor:
    """Deterministic trajectories have no stochastic step to draw noise for."""
    raise AssertionError(f"step {step} is deterministic")


def _summary(prompts: PromptSet, names: list[str], scores: list, shown: list, mixture: Mixture | None) -> Evaluation:
    owner = torch.tensor([p for p, _ in scores])
    columns = {name: torch.tensor([row[name] for _, row in scores], dtype=torch.float64) for name in names}
    spread = {name: _spread(column, owner) for name, column in columns.items()}
    if mixture is not None:
        columns[MIX] = mixture.of(columns, spread)
        spread[MIX] = _spread(columns[MIX], owner)
    labels = sorted(set(prompts.categories) - {""}, key=prompts.categories.index)
    label_of = [prompts.categories[p] for p, _ in scores]
    places = {label: torch.tensor([each == label for each in label_of]) for label in labels}
    categories = {
        name: {label: _mean(column[here & column.isfinite()]) for label, here in places.items()}
        for name, column in columns.items()
    }
    means = {name: _mean(column[column.isfinite()]) for name, column in columns.items()}
    images = torch.stack([image for _, image in sorted(shown, key=lambda pair: pair[0])])
    return Evaluation(means, spread, categories, images)


def _spread(column: Tensor, owner: Tensor) -> float | None:
    """Mean over prompts of the standard deviation among a prompt's images."""
    groups = [column[column.isfinite() & (owner == p)] for p in owner.unique()]
    several = [group.std() for group in groups if len(group) > 1]
    return _mean(torch.stack(several)) if several else None


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
