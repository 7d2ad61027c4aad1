"""What flows between the nodes of this pack: parts of a run description, never loaded objects."""

from dataclasses import dataclass

from comfy_api.latest import io

from ..trainer.config import RewardConfig

CATEGORY = "DanceGRPO"

RewardType = io.Custom("REWARD")
"""A `Judges`."""
ModelType = io.Custom("GRPO_MODEL")
"""A dict: the `model` section of a run description, such as `{"family": "sd3", "path": "embedded"}`."""
SettingsType = io.Custom("GRPO_SETTINGS")
"""A dict: sections of a run description."""
RunType = io.Custom("GRPO_RUN")
"""Names a run on disk."""


@dataclass(frozen=True)
class Judges:
    """The `rewards` list of a run description."""

    rewards: tuple[RewardConfig, ...]

    def description(self) -> list[dict]:
        """Plain data for a run description; what is at its default is left out."""
        return [reward.model_dump(mode="json", exclude_defaults=True) for reward in self.rewards]
