"""What flows between the nodes of this pack: parts of a run description, never loaded objects."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..trainer.config import RewardConfig
from ..trainer.utils.errors import BadInput

CATEGORY = "DanceGRPO"

RewardType = io.Custom("REWARD")
"""A `Judges`."""
ModelType = io.Custom("GRPO_MODEL")
"""A `Model`."""
SettingsType = io.Custom("GRPO_SETTINGS")
"""A `Settings`."""
RunType = io.Custom("GRPO_RUN")
"""Names a run on disk."""


class Model(dict):
    """The `model` section of a run description, such as `{"family": "sd3", "path": "embedded"}`."""


class Settings(dict):
    """Sections of a run description."""


@dataclass(frozen=True)
class Judges:
    """The `rewards` list of a run description."""

    rewards: tuple[RewardConfig, ...]

    def description(self) -> list[dict]:
        """Plain data for a run description; what is at its default is left out."""
        return [reward.model_dump(mode="json", exclude_defaults=True) for reward in self.rewards]


def connected(value: object, kind: type, field: str) -> None:
    """A workflow in API format may hold anything in place of a link, such as a model with paths of its choice.

    Raises:
        BadInput: the value was not made by a node of this pack.
    """
    if not isinstance(value, kind):
        raise BadInput(f"{field} must be connected to a node of this pack; it holds {type(value).__name__} data")
