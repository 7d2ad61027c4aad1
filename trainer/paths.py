"""Relative paths of a run description, made absolute, so that a run can be resumed from anywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIELDS = (
    ("model", "path"),
    ("model", "network_file"),
    ("prompts", "file"),
    ("prompts", "conditions"),
    ("evaluation", "file"),
    ("lora", "start_from"),
    ("objective", "collection"),
)
"""Settings that name a file or folder; rewards mark their own options."""
NOT_PATHS = {("model", "path"): "embedded"}


def with_absolute_paths(description: Any, base: Path) -> Any:
    """The description, not validated yet, with every relative path taken from `base`; changes it in place."""
    for holder, key, plain in _paths(description):
        value = holder.get(key)
        if isinstance(value, str) and value and value != plain and "\0" not in value:
            path = Path(value).expanduser() if value.startswith("~/") else Path(value)
            holder[key] = str((base / path).absolute())  # links stay: what they point to may have another suffix
    return description


def _paths(description: Any) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """Where paths may stand: a mapping, its key, and a value that is not a path."""
    if not isinstance(description, dict):
        return
    for section, key in FIELDS:
        if isinstance(holder := description.get(section), dict):
            yield holder, key, NOT_PATHS.get((section, key))
    evaluation = description.get("evaluation")
    for rewards in (description.get("rewards"), evaluation.get("rewards") if isinstance(evaluation, dict) else None):
        for reward in rewards if isinstance(rewards, list) else ():
            yield from _reward_paths(reward)


def _reward_paths(reward: Any) -> Iterator[tuple[dict[str, Any], str, None]]:
    from .rewards import REWARDS
    from .rewards.files import file_rule

    if not isinstance(reward, dict) or not isinstance(options := reward.get("options"), dict):
        return
    name = reward.get("name")
    if not isinstance(name, str) or name not in REWARDS:
        return
    for key, field in REWARDS[name].Options.model_fields.items():
        if file_rule(field) is not None:
            yield options, key, None
