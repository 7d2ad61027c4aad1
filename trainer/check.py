"""Checks a run description before anything large is loaded or written."""

from collections.abc import Mapping
from dataclasses import dataclass

from .adapters.merge import check_merge
from .config import RunConfig
from .models import DiffusionModel, check_kernel, latent_numbers, model_class, weight_bytes
from .models.compiled import check_compile
from .objectives import Objective, make_objective, objective_class
from .prompts.conditions import check_conditions
from .prompts.sets import PromptSet, read_prompts
from .rewards import Reward, load_reward, memory_together
from .runs.capacity import check_memory
from .utils.errors import BadInput


@dataclass(frozen=True)
class CheckedRun:
    """The objects of a checked description, without loaded weights.

    Attributes:
        family: class of the model.
        objective: created, but not set up.
        prompts, held_out: training prompts and held-out prompts.
        rewards: rewards that are trained, by name.
        all_rewards: these and those of the evaluation alone.
    """

    family: type[DiffusionModel]
    objective: Objective
    prompts: PromptSet
    held_out: PromptSet
    rewards: dict[str, Reward]
    all_rewards: dict[str, Reward]


def check_run(config: RunConfig, processes: int, conditions_exist: bool = True) -> CheckedRun:
    """Check model, prompts, rewards and objective of a description, and whether they are compatible.

    Args:
        processes: number of processes of the run.
        conditions_exist: whether the file `prompts.conditions` must exist already.

    Raises:
        BadInput: what would keep the run from starting.
    """
    if config.model.sharded and processes == 1:
        raise BadInput("model.sharded is true: it takes several processes, and this run has one (--processes)")
    family = model_class(config.model)
    check_kernel(family, config.model.family, config.rollout)
    check_merge(config)
    if config.runtime.compile:
        check_compile(config.model, config.runtime.device)
    family.check_targets(config.model, config.lora.targets or [])
    objective = make_objective(config)
    prompts, held_out = read_prompts(config, objective)
    rewards, all_rewards = check_rewards(config, processes, prompts, held_out)
    check_media(all_rewards, config.model.frames)
    objective.check(family, rewards)
    _check_memory(config, processes, family, all_rewards)
    if config.prompts.conditions is not None and conditions_exist:
        check_conditions(config, family, prompts, held_out)
    return CheckedRun(family, objective, prompts, held_out, rewards, all_rewards)


def _check_memory(
    config: RunConfig, processes: int, family: type[DiffusionModel], all_rewards: Mapping[str, Reward]
) -> None:
    """Raise BadInput if weights, decoding and rewards cannot fit the memory; ComfyUI manages a connected model's."""
    check_memory(
        config,
        processes,
        latent_numbers=latent_numbers(family, config.model),
        weights=0 if config.model.graph is not None else weight_bytes(config.model, processes),
        decode=family.decode_bytes(config.model),
        rewards=memory_together(all_rewards.values()),
    )


def check_rewards(
    config: RunConfig, processes: int, prompts: PromptSet, held_out: PromptSet
) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """The part of `check_run` that needs no model.

    Returns:
        by name, the rewards that are trained; and all rewards, with those that are only evaluated.

    Raises:
        BadInput: prompts, rewards and number of processes are not compatible.
    """
    count, what = objective_class(config.objective).shares(config)
    if processes > count:
        raise BadInput(f"{processes} processes are more than the {count} {what} of an iteration")
    rewards, all_rewards = load_rewards(config)
    check_groups(rewards, processes)
    _check_prompts(all_rewards, [*prompts.scored, *held_out.scored])
    return rewards, all_rewards


def load_rewards(config: RunConfig) -> tuple[dict[str, Reward], dict[str, Reward]]:
    """The rewards of a run by name, without weights: those that are trained; and these with those of the evaluation.

    Raises:
        BadInput: an option, a file or a package of a reward is not there or not valid.
    """
    device, gradient = config.runtime.device, objective_class(config.objective).needs_reward_gradients
    rewards = {reward.name: load_reward(reward, device, gradient) for reward in config.rewards}
    others = {reward.name: load_reward(reward, device) for reward in config.evaluation.rewards}
    return rewards, others | rewards


def check_groups(rewards: Mapping[str, Reward], processes: int) -> None:
    """Raise BadInput for a group-wise reward in a run with several processes, which may share a group."""
    for name, reward in rewards.items():
        if reward.groupwise and processes > 1:
            raise BadInput(f"reward {name!r} compares all images of a group: it works in one process, not {processes}")


def check_media(rewards: Mapping[str, Reward], frames: int) -> None:
    """Raise BadInput if a reward scores videos, but the model generates images."""
    for name, reward in rewards.items():
        if reward.media == "video" and frames < 2:
            raise BadInput(f"reward {name!r} scores videos, but model.frames is {frames}: use a video model")


def _check_prompts(rewards: Mapping[str, Reward], texts: list[str]) -> None:
    for name, reward in rewards.items():
        try:
            reward.check_prompts(texts)
        except ValueError as error:
            raise BadInput(f"reward {name!r}: {error}") from error
