"""Objectives: how scored samples become a loss. To add one, write a class in a file here and add it to `OBJECTIVES`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from ..utils.errors import shorten
from .awm import Awm
from .base import Objective, ObjectiveOptions
from .dpo import Dpo
from .grpo import Grpo
from .nft import Nft
from .reward_gradient import RewardGradient

if TYPE_CHECKING:
    from ..config import RunConfig

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (Grpo, Nft, Awm, Dpo, RewardGradient)
}
DEFAULT = Grpo.name


def objective_class(options: ObjectiveOptions) -> type[Objective]:
    """The class that options stand for."""
    return OBJECTIVES[options.name].variant(options)


def make_objective(config: RunConfig) -> Objective:
    """The objective that a run description names; nothing is loaded."""
    return objective_class(config.objective)(config)


def _options(value: Any) -> Any:
    """Validate the options of the objective `name`, by default `DEFAULT`."""
    if isinstance(value, ObjectiveOptions):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"objective must be a section such as {{name: grpo}}, but it is {shorten(value)}")
    name = value.get("name", DEFAULT)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown: choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name].Options.model_validate(value)


ObjectiveSection = Annotated[SerializeAsAny[ObjectiveOptions], BeforeValidator(_options)]
"""Type of the section `objective` of a run description: the options of the objective that `name` selects."""

__all__ = [
    "DEFAULT",
    "OBJECTIVES",
    "Objective",
    "ObjectiveOptions",
    "ObjectiveSection",
    "make_objective",
    "objective_class",
]
