"""Evaluation: samples images of held-out prompts deterministically from fixed noise, and scores them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .check import CheckedRun
from .config import RunConfig
from .evaluation.looks import Embed, Look, looks, tabulate
from .models import DiffusionModel
from .objectives.advantage import Mixture
from .rollout import Execution, Plan, Prompting, sample, unmatched
from .runs.sample_grids import Sample
from .score import score_by_group
from .utils.distributed import Processes
from .utils.seeds import noise

SHOWN, SHOWN_VIDEOS = 24, 6
"""Number of prompts whose first image or video is saved."""
MIX = "mix"
"""Name of the mixture (weighted sum) of the trained rewards in an evaluation."""
Pair = tuple[int, int]
"""(prompt, number of its image)."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        rewards: mean per reward and of their mixture; here and below, None if no score was finite.
        spread: per reward, mean over prompts of the standard deviation among a prompt's images (None with one image).
        categories: per reward, mean per category.
        images: `[N, 3, H, W]` or `[N, F, 3, H, W]`, the first of each of up to SHOWN prompts, in every process.
        samples: their prompts, seeds and scores.
        scores: per reward, `[prompts, images per prompt]` float64; NaN for images without a score.
        looks: image statistics (brightness, saturation, diversity), `[prompts, images per prompt]` or `[prompts, 1]`.
    """

    rewards: dict[str, float | None]
    spread: dict[str, float | None]
    categories: dict[str, dict[str, float | None]]
    images: Tensor
    samples: list[Sample]
    scores: dict[str, Tensor]
    looks: dict[str, Tensor]

    def record(self) -> dict:
        """Plain data, without the images."""
        means = {name: _mean(values[values.isfinite()]) for name, values in self.looks.items()}
        return {"rewards": self.rewards, "spread": self.spread, "categories": self.categories, "looks": means}


@dataclass(frozen=True)
class _Row:
    """Prompt, number, scores and statistics of one image."""

    prompt: int
    number: int
    scores: dict[str, float]
    look: Look


class Evaluator:
    """Samples and scores the images of the held-out prompts.

    Args:
        checked: held-out prompts and rewards.
        prompting: conditions of the held-out prompts, on the CPU.
        execution: how forward passes are run. Its `match` is applied to the number of images of a process, not of its
            forward passes.
        embed: computes CLIP image embeddings for the diversity; None leaves it out.
    """

    def __init__(
        self,
        config: RunConfig,
        checked: CheckedRun,
        model: DiffusionModel,
        prompting: Prompting,
        processes: Processes,
        execution: Execution,
        embed: Embed | None = None,
    ) -> None:
        self.embed = embed
        self.config, self.prompts, self.rewards = config, checked.held_out, checked.all_rewards
        self.model, self.prompting = model, prompting
        self.processes, self.execution = processes, execution

    @torch.no_grad()
    def evaluate(self, first: dict | None = None) -> Evaluation:
        """Sample and score the images of each held-out prompt, from noise that depends on seed and prompt alone.

        Args:
            first: record of the run's first evaluation, whose spread is the mixture's unit; None if this is the first.
        """
        rows: list[_Row] = []
        shown: list[tuple[int, Tensor, Sample]] = []
        batches = self._batches()
        for number, (pairs, own) in enumerate(batches):
            images = self._images(pairs, own, number, len(batches))
            if images is None:
                continue
            texts, groups = [self.prompts.scored[p] for p, _ in pairs[:own]], [p for p, _ in pairs[:own]]
            columns = {
                name: score_by_group(reward, images, texts, groups).tolist() for name, reward in self.rewards.items()
            }
            for row, ((p, k), look) in enumerate(zip(pairs[:own], looks(images, self.embed), strict=True)):
                rows.append(_Row(p, k, {name: column[row] for name, column in columns.items()}, look))
                if k == 0 and p in self._shown_prompts():
                    shown.append((p, images[row].cpu(), self._sample(p, rows[-1].scores)))
        for reward in self.rewards.values():
            reward.idle()
        rows, shown = self.processes.gather(rows), self.processes.gather(shown)
        return self._summary(rows, shown, first)

    def _batches(self) -> list[tuple[list[Pair], int]]:
        """Batches of this process, and how many images of each are its own; the rest are dummies for collectives."""
        size = self.execution.batch_size
        pairs = [divmod(i, self.config.evaluation.images_per_prompt) for i in range(self._total())]
        mine = [pairs[i] for i in self.processes.share(len(pairs))]
        own = len(mine)
        mine += pairs[:1] * (self.execution.match(own) - own)
        return [(mine[i : i + size], min(max(own - i, 0), size)) for i in range(0, len(mine), size)]

    def _total(self) -> int:
        """Number of images of all processes."""
        return len(self.prompts.texts) * self.config.evaluation.images_per_prompt

    def _shown_prompts(self) -> set[int]:
        """Indices of the prompts whose first image is saved."""
        count = len(self.prompts.texts)
        most = min(SHOWN if len(self.model.latent_shape) == 3 else SHOWN_VIDEOS, count)
        return set(torch.linspace(0, count - 1, most).round().int().tolist())

    def _images(self, pairs: list[Pair], own: int, number: int, batches: int) -> Tensor | None:
        """Sample a batch; returns this process's own images."""

        def report(phase: str, step: int, steps: int, *, aligned: bool = False) -> None:
            # Another process may have one batch less, so steps are aligned only in the first batch.
            together = aligned and number == 0 and self.processes.count <= self._total()
            self.execution.report("evaluation", number * steps + step, batches * steps, aligned=together)

        execution = replace(self.execution, match=unmatched, report=report)
        index = torch.tensor([p for p, _ in pairs])
        device, seed = self.model.device, self.config.evaluation.seed
        start = [noise(self.model.latent_shape, seed, *self.prompts.identity(p), k) for p, k in pairs]
        sampled = sample(
            self.model,
            self._plan(),
            self.prompting.rows(index).to(device),
            torch.arange(len(pairs), device=device),
            torch.stack(start).to(device),
            no_noise,
            execution,
        )
        return self.model.decode(sampled.final[:own]) if own else None

    def _sample(self, prompt: int, scores: dict[str, float]) -> Sample:
        finite = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        return Sample(self.prompts.texts[prompt], str(self.config.evaluation.seed), finite)

    def _plan(self) -> Plan:
        config, rollout = self.config.evaluation, self.config.rollout
        steps = config.steps or rollout.steps
        guidance = rollout.guidance_scale if config.guidance_scale is None else config.guidance_scale
        sigmas = self.model.sigmas(steps, rollout.shift)
        guided = rollout.guided(steps)
        return Plan("ode", 0.0, sigmas, [False] * steps, False, guidance, config.solver, guided=guided)

    def _mixture(self, spread: dict[str, float | None]) -> Mixture | None:
        """The trained rewards as one number; None for fewer than two.

        Args:
            spread: of the run's first evaluation.
        """
        weights = {reward.name: reward.weight for reward in self.config.rewards}
        if len(weights) < 2:
            return None
        return Mixture(weights, dict.fromkeys(weights, 1.0) if self.config.advantage.combine == "sum" else spread)

    def _summary(self, every: list[_Row], shown: list, first: dict | None) -> Evaluation:
        owner, member = (torch.tensor([getattr(row, field) for row in every]) for field in ("prompt", "number"))
        columns = {
            name: torch.tensor([row.scores[name] for row in every], dtype=torch.float64) for name in self.rewards
        }
        spread = {name: _spread(column, owner) for name, column in columns.items()}
        if mixture := self._mixture(first["spread"] if first else spread):
            columns[MIX] = mixture.of(columns)
            spread[MIX] = _spread(columns[MIX], owner)
        names = self.prompts.categories
        labels = sorted(set(names) - {""}, key=names.index)
        label_of = [names[p] for p in owner.tolist()]
        rows = {label: torch.tensor([each == label for each in label_of]) for label in labels}
        categories = {
            name: {label: _mean(column[here & column.isfinite()]) for label, here in rows.items()}
            for name, column in columns.items()
        }
        means = {name: _mean(column[column.isfinite()]) for name, column in columns.items()}
        shown = sorted(shown, key=lambda entry: entry[0])
        images, samples = torch.stack([image for _, image, _ in shown]), [sample for *_, sample in shown]
        shape = (len(self.prompts.texts), self.config.evaluation.images_per_prompt)
        scores = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in columns}
        for name, column in columns.items():
            scores[name][owner, member] = column
        figures = tabulate([(row.prompt, row.number, row.look) for row in every], *shape)
        return Evaluation(means, spread, categories, images, samples, scores, figures)


def no_noise(step: int) -> Tensor:
    """Noise for deterministic trajectories, which need none."""
    raise AssertionError(f"step {step} is deterministic")


def _spread(column: Tensor, owner: Tensor) -> float | None:
    """Mean over prompts of the standard deviation among a prompt's images."""
    groups = [column[column.isfinite() & (owner == p)] for p in owner.unique()]
    several = [group.std() for group in groups if len(group) > 1]
    return _mean(torch.stack(several)) if several else None


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
