"""Types of the sockets of this pack. Their values are parts of a run description, not loaded models."""

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..trainer.config import RewardConfig
from ..trainer.utils.errors import BadInput

CATEGORY = "DanceGRPO"

RewardType = io.Custom("REWARD")
"""A `Rewards`."""
ModelType = io.Custom("GRPO_MODEL")
"""A `Model`."""
SettingsType = io.Custom("GRPO_SETTINGS")
"""A `Settings`."""
ObjectiveType = io.Custom("GRPO_OBJECTIVE")
"""An `Objective`."""
RunType = io.Custom("GRPO_RUN")
"""The name of a run on disk."""


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to rebuild a connected MODEL without its weights.

    Attributes:
        kind: its class, a subclass of ComfyUI's `BaseModel`.
        config: its `model_config`.
        sampling: its `model_sampling`, including changes by ModelSampling nodes.
    """

    kind: type
    config: Any
    sampling: Any

    @classmethod
    def of(cls, model: Any) -> "ModelSpec":
        return cls(type(model.model), model.model.model_config, model.get_model_object("model_sampling"))


@dataclass(frozen=True)
class Model:
    """The base model of a run.

    Attributes:
        section: the `model` section of a run description, such as `{"family": "sd3", "path": "embedded"}`.
        spec: for a connected MODEL; None for a diffusers folder or the demo model.
    """

    section: dict
    spec: ModelSpec | None = None


@dataclass(frozen=True)
class Settings:
    """Sections of a run description.

    Attributes:
        sections: plain data by name of the section.
        preset: name of the preset they come from, if any.
        given: of preset auto, the sections with what its overrides set, and nothing else.
    """

    sections: dict[str, dict]
    preset: str | None = None
    given: dict | None = None


class Objective(dict):
    """The `objective` section of a run description."""


@dataclass(frozen=True)
class Rewards:
    """The `rewards` list of a run description."""

    rewards: tuple[RewardConfig, ...]

    def description(self) -> list[dict]:
        """Plain data for a run description, without values that equal their defaults."""
        return [reward.model_dump(mode="json", exclude_defaults=True) for reward in self.rewards]


def connected(value: object, kind: type, field: str) -> None:
    """Check that a value comes from a link: a workflow in API format can put any literal in its place.

    Raises:
        BadInput: the value was not made by a node of this pack.
    """
    if not isinstance(value, kind):
        raise BadInput(f"{field} must be connected to a node of this pack; it is a {type(value).__name__} instead")
