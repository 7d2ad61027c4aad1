"""Deterministic sampling on held-out prompts with fixed noise, and what the judges say of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rewards as judges
from .distributed import Processes
from .models import DiffusionModel
from .prompting import PromptSet
from .rollout import Plan, Prompting, decode, sample
from .schedule import sigma_schedule
from .seeds import noise

SHOWN = 24  # images kept for the pictures


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        rewards: mean per judge (None where no score was finite, here and below).
        spread: per judge, mean over prompts of the standard deviation among a prompt's images (None with one image).
        categories: per judge, mean per category.
        images: `[N, 3, H, W]`, the first image of each of up to SHOWN prompts, in every process.
    """

    rewards: dict[str, float | None]
    spread: dict[str, float | None]
    categories: dict[str, dict[str, float | None]]
    images: Tensor

    def record(self) -> dict:
        """Plain data, without the images."""
        return {"rewards": self.rewards, "spread": self.spread, "categories": self.categories}


@torch.no_grad()
def evaluate(
    model: DiffusionModel,
    prompts: PromptSet,
    prompting: Prompting,
    rewards: dict[str, judges.Reward],
    processes: Processes,
    *,
    steps: int,
    shift: float,
    guidance_scale: float,
    images_per_prompt: int,
    seed: int,
    batch: int,
    between_calls: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Sample `images_per_prompt` images of each prompt, from noise that depends on the seed and the prompt's text."""
    sigmas = sigma_schedule(steps, shift)
    plan = Plan("ode", 0.0, sigmas, [False] * steps, False, guidance_scale)
    pairs = [(p, k) for p in range(len(prompts.texts)) for k in range(images_per_prompt)]
    scores: list[tuple[int, dict[str, float]]] = []
    shown: list[tuple[int, Tensor]] = []
    picture = set(torch.linspace(0, len(prompts.texts) - 1, min(SHOWN, len(prompts.texts))).round().int().tolist())
    mine = [pairs[i] for i in processes.share(len(pairs))]
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
        images = decode(model, sampled.final, batch)
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
    return _summary(prompts, rewards, scores, shown)


def no_noise(step: int) -> Tensor:
    """Deterministic trajectories have no stochastic step to draw noise for."""
    raise AssertionError(f"step {step} is deterministic")


def _summary(prompts: PromptSet, rewards: dict, scores: list, shown: list) -> Evaluation:
    means, spread, categories = {}, {}, {}
    owner = torch.tensor([p for p, _ in scores])
    for name in rewards:
        column = torch.tensor([row[name] for _, row in scores], dtype=torch.float64)
        finite = column.isfinite()
        groups = [column[finite & (owner == p)] for p in range(len(prompts.texts))]
        means[name] = _mean(column[finite])
        several = [group.std() for group in groups if len(group) > 1]
        spread[name] = _mean(torch.stack(several)) if several else None
        labels = sorted(set(prompts.categories) - {""}, key=prompts.categories.index)
        categories[name] = {
            label: _mean(torch.cat([g for g, c in zip(groups, prompts.categories, strict=True) if c == label]))
            for label in labels
        }
    images = torch.stack([image for _, image in sorted(shown, key=lambda pair: pair[0])])
    return Evaluation(means, spread, categories, images)


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
