"""Objectives and their updater around any model, without a run: for tests that look at gradients."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Load = Callable[[str], ModuleType]


def updater_for(model: Any, options: dict, load: Load = importlib.import_module, **sections: dict) -> Any:
    """An updater whose policy has put a LoRA into the model.

    Args:
        options: of the section `objective`.
        load: gives a module of the trainer by its name.
        sections: other sections of the run description.
    """
    data = {"prompts": {"texts": ["any"]}, "rewards": [{"name": "brightness"}], "objective": options, **sections}
    config = load("trainer.config").parse_config(data)
    objective = load("trainer.objectives").make_objective(config)
    policy = load("trainer.policy").Policy(model, config, objective.keeps_old_weights)
    processes = load("trainer.utils.distributed").Processes("cpu")
    resources = load("trainer.objectives.base").Resources(model, policy, {}, None, processes)
    objective.setup(resources)
    execution = load("trainer.rollout").Execution()
    return load("trainer.objectives.updater").Updater(objective, model, policy, processes, execution)


def with_options(updater: Any, options: dict, load: Load = importlib.import_module) -> Any:
    """The updater with other options of its objective, on the same policy."""
    objective = updater.objective
    kind = type(objective.options)
    objective.options = kind.model_validate(objective.options.model_dump() | options)
    return updater


def rollout_of(
    plan: Any,
    prompting: Any,
    trajectories: Any,
    prompt_of: Tensor,
    advantages: list[float],
    load: Load = importlib.import_module,
    dtype: torch.dtype = torch.float32,
    optimizer_steps: int = 1,
) -> Any:
    """What an iteration would train on, all of whose images are in this process.

    Args:
        optimizer_steps: made since the rollout.
    """
    groups = [prompt_of[:i].tolist().count(p) for i, p in enumerate(prompt_of.tolist())]
    members = list(zip(prompt_of.tolist(), groups, strict=True))
    values = torch.zeros(max(p for p, _ in members) + 1, max(g for _, g in members) + 1, dtype=dtype)
    for member, value in zip(members, advantages, strict=True):
        values[member] = value
    base = load("trainer.objectives.base")
    return base.RolloutBatch(
        iteration=0,
        plan=plan,
        prompting=prompting,
        members=members,
        prompt_of=prompt_of,
        texts=["any"] * len(members),
        trajectories=trajectories,
        advantages=load("trainer.objectives.advantage").Advantages(
            values, torch.zeros(len(values), dtype=torch.bool), torch.zeros_like(values, dtype=torch.bool), {}
        ),
        active=torch.ones_like(values, dtype=torch.bool),
        optimizer_steps=optimizer_steps,
    )


def items_of(rollout: Any, pairs: list[tuple[int, int]], load: Load = importlib.import_module) -> list:
    """Items for (index of an image in this process, step)."""
    item = load("trainer.objectives.base").TrainingItem
    return [item(rollout.members[i], step) for i, step in pairs]


def gradients_of(updater: Any) -> dict[str, Tensor]:
    """The gradients that have been accumulated, taken away from the parameters."""
    found = {}
    for name, parameter in updater.policy.parameters.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return found


class InFloat64(TorchDispatchMode):
    """Inside, what a network computes in float32 whatever it is given (positions, norms) is computed in float64."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), keywords: dict | None = None) -> Any:
        keywords = {name: wide(value) for name, value in (keywords or {}).items()}
        return function(*map(wide, arguments), **keywords)


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, list | tuple):
        return [wide(part) for part in value]
    return torch.float64 if value is torch.float32 else value
