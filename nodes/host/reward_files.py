"""A reward's options as widgets, and its files in ComfyUI's folders."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import folder_paths
from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ...trainer import rewards as judges
from ...trainer.config import RewardConfig
from . import votes

FOLDER = "rewards"
LIMIT = 2**31
LONG = 60
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def option_widgets(kind: type[judges.Reward]) -> list[io.Input]:
    """A widget per option of a reward; rewards that have nothing to set have none."""
    fields = kind.Options.model_fields.items()
    return [widget for name, field in fields for widget in (votes.widgets(name, field) or [_widget(name, field)])]


def _widget(name: str, field: FieldInfo) -> io.Input:
    default, tip = field.get_default(call_default_factory=True), field.description
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if "reward_file" in extra:
        return _file_widget(name, default, extra["reward_file"], tip)
    if get_origin(field.annotation) is Literal:
        return io.Combo.Input(name, options=list(get_args(field.annotation)), default=default, tooltip=tip)
    if field.annotation is bool:
        return io.Boolean.Input(name, default=default, tooltip=tip)
    if field.annotation is int:
        return io.Int.Input(name, default=default, tooltip=tip, **_range(field))
    if field.annotation is float:
        return io.Float.Input(name, default=default, step=0.01, round=False, tooltip=tip, **_range(field))
    if field.annotation == list[str]:
        return io.String.Input(name, default="\n".join(default), multiline=True, tooltip=f"{tip} One per line.")
    text = default or ""
    return io.String.Input(name, default=text, multiline=len(text) > LONG or "\n" in text, tooltip=tip)


def _range(field: FieldInfo) -> dict[str, float]:
    """The widget's limits; an open one is left to the option's own check."""
    found = {"min": -LIMIT, "max": LIMIT}
    for rule in field.metadata:
        for key, end in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if getattr(rule, key, None) is not None:
                found[end] = getattr(rule, key)
    return found


def option_values(kind: type[judges.Reward], widgets: dict[str, Any]) -> dict[str, Any]:
    """The options that the widgets stand for: texts of several lines become lists where a list is wanted."""
    widgets = votes.chosen(widgets)
    lists = {name for name, field in kind.Options.model_fields.items() if field.annotation == list[str]}
    return {name: _lines(value) if name in lists else value for name, value in widgets.items()}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _file_widget(name: str, default: str, rule: dict[str, Any], tip: str | None) -> io.Input:
    """The files of models/rewards that fit; folders too where the reward takes one."""
    files = [Path(file) for file in folder_paths.get_filename_list(FOLDER)]
    found = [file for file in files if file.suffix.lower() in rule["suffixes"]]
    if rule["folder"]:
        found += {parent for file in files for parent in file.parents if parent != Path()}
    names = sorted(path.as_posix() for path in found)
    return io.Combo.Input(name, options=[default, *(n for n in names if n != default)], default=default, tooltip=tip)


def with_files(config: RewardConfig) -> RewardConfig:
    """The same reward, its files found in ComfyUI's folders.

    Raises:
        BadInput: a file is not there, or an option is not accepted.
    """
    config = votes.with_paths(config)
    config = judges.with_files_from(config, map(Path, folder_paths.get_folder_paths(FOLDER)))
    judges.load_reward(config)  # looks at options and files, and reads no weights
    return config
