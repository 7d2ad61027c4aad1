"""Counts the calls of an iteration, by running it on a stand-in model with one layer of four weights.

So no objective needs a cost formula of its own, and computations that several images share are counted once.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..check import CheckedRun
from ..collect import Collector
from ..config import ModelConfig, RunConfig
from ..diffusion.process import Process
from ..models import Conditions, DiffusionModel
from ..objectives import make_objective
from ..objectives.base import Resources
from ..objectives.updater import Updater
from ..policy import Policy
from ..rewards import Reward
from ..rollout import Execution, Prompting
from ..runs.metrics import Clock
from ..runs.recorder import Recorder
from ..utils.distributed import Processes


@dataclass(frozen=True)
class Call:
    """A kind of call and its size.

    Attributes:
        kind: forward, train (forward and backward), decode, encode, score, decode-train or score-train.
        rows: latents or images.
        scale: guidance scale of forward and train; guidance doubles the work.
        reward: name of the reward, for score and score-train.
        prompts: different prompts among the rows of forward and train; a graph's model calls its network for each.
    """

    kind: str
    rows: int
    scale: float = 1.0
    reward: str = ""
    prompts: int = 1

    @property
    def size(self) -> int:
        """What its duration grows with, among calls of one kind."""
        return self.rows + self.prompts


Calls = Counter[Call]


class CountingModel(DiffusionModel):
    """A model on latents of four values that counts its calls.

    Args:
        process: diffusion process of the real model.
        levels: returns the noise levels of the real model.
        calls: the counter.
        is_trained_at: tells whether the real model is trained at a noise level.
    """

    family = "stand-in"
    default_targets = ("0",)

    def __init__(
        self,
        process: Process,
        levels: Callable[[int, float | None], list[float]],
        device: torch.device,
        calls: Calls,
        is_trained_at: Callable[[float], bool],
    ) -> None:
        self.is_trained_at = is_trained_at
        self.config, self.process, self.levels, self.calls = ModelConfig(), process, levels, calls
        self.module = nn.Sequential(nn.Linear(2, 2)).to(device).requires_grad_(False)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (1, 2, 2)

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        return self.levels(steps, shift)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        return self.module(latents)

    def predict_guided(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        unconditional: Conditions | None = None,
    ) -> Tensor:
        kind, prompts = "train" if torch.is_grad_enabled() else "forward", len(conditions.tensors["x"].unique())
        self.calls[Call(kind, len(latents), guidance_scale, prompts=prompts)] += 1
        return self.predict(latents, sigma, conditions)

    def decode(self, latents: Tensor) -> Tensor:
        trained = torch.is_grad_enabled() and latents.requires_grad
        self.calls[Call("decode-train" if trained else "decode", len(latents))] += 1
        return latents.expand(-1, 3, -1, -1).sigmoid()

    def encode_image(self, images: Tensor) -> Tensor:
        self.calls[Call("encode", len(images))] += 1
        return images.new_zeros(len(images), *self.latent_shape)

    def lora_key(self, module_name: str) -> str:
        return module_name

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Nothing to check."""

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "CountingModel":
        raise NotImplementedError

    @classmethod
    def encode_batches(
        cls, config: ModelConfig, prompts: list[str], images: list[Path | None], negative: str, device: torch.device
    ) -> Iterator[Conditions]:
        raise NotImplementedError


class CountingReward(Reward):
    """Gives every image another score, so that no group is skipped, and counts its calls."""

    name = "stand-in"
    differentiable = True
    typical_range = (0.0, 1.0)

    def __init__(self, reward: Reward, name: str, calls: Calls) -> None:
        super().__init__()
        self.name, self.media, self.groupwise, self.calls = name, "image", reward.groupwise, calls

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        kind = "score-train" if images.requires_grad and torch.is_grad_enabled() else "score"
        self.calls[Call(kind, len(images), reward=self.name)] += 1
        weights = torch.arange(images[0].numel(), device=images.device, dtype=images.dtype)
        return images.flatten(1) @ weights.cos()


def iteration_calls(
    config: RunConfig,
    checked: CheckedRun,
    process: Process,
    levels: Callable[[int, float | None], list[float]],
    processes: Processes,
    is_trained_at: Callable[[float], bool] = lambda sigma: True,
) -> Calls:
    """The calls that this process makes in a run's first iteration, if no group is skipped.

    Args:
        checked: prompts and rewards; its objective is not used.
        process, levels, is_trained_at: as in `CountingModel`.
    """
    calls: Calls = Counter()
    lora = config.lora.model_copy(update={"targets": ["0"], "rank": 1, "alpha": 1.0, "start_from": None})
    config = config.model_copy(update={"lora": lora})
    model, objective = CountingModel(process, levels, processes.device, calls, is_trained_at), make_objective(config)
    checked = replace(checked, objective=objective, rewards=_counting_rewards(checked.rewards, calls))
    policy = Policy(model, config, objective.keeps_old_weights)
    prompting = _prompting(len(checked.prompts.texts))
    objective.setup(Resources(model, policy, checked.rewards, prompting, processes))
    execution, recorder = Execution(config.rollout.batch_size), Recorder(None, config, None, False)
    rollout = Collector(config, checked, model, prompting, processes, execution, recorder).collect(0, Clock())
    Updater(objective, model, policy, processes, execution).update(rollout)
    return calls


def _counting_rewards(rewards: Mapping[str, Reward], calls: Calls) -> dict[str, Reward]:
    return {name: CountingReward(reward, name, calls) for name, reward in rewards.items()}


def _prompting(count: int) -> Prompting:
    """Conditions that are the number of their prompt."""
    return Prompting(Conditions({"x": torch.arange(count)[:, None]}), Conditions({"x": torch.zeros(1, 1)}))


def evaluation_calls(config: RunConfig, checked: CheckedRun, processes: Processes) -> Calls:
    """The calls that this process makes in one evaluation of the held-out prompts."""
    calls: Calls = Counter()
    images = len(processes.share(len(checked.held_out.texts) * config.evaluation.images_per_prompt))
    steps = config.evaluation.steps or config.rollout.steps
    scale = config.evaluation.guidance_scale
    scale = config.rollout.guidance_scale if scale is None else scale
    size = config.rollout.batch_size
    for rows in [size] * (images // size) + ([images % size] if images % size else []):
        prompts = math.ceil(rows / config.evaluation.images_per_prompt)
        calls[Call("forward", rows, scale, prompts=prompts)] += steps
        calls[Call("decode", rows)] += 1
        for name in checked.all_rewards:
            calls[Call("score", rows, reward=name)] += 1
    return calls


def evaluations(config: RunConfig, checked: CheckedRun) -> int:
    """How many evaluations a whole run makes."""
    if not checked.held_out.texts:
        return 0
    every, iterations = config.evaluation.every, config.runtime.iterations
    return 2 + ((iterations - 1) // every if every else 0)
