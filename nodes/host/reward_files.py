"""A reward's options as widgets, and its files in ComfyUI's folders."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import folder_paths
from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ...trainer import rewards as reward_models
from ...trainer.config import RewardConfig
from ...trainer.prompts.text import prompt_lines
from ...trainer.rewards.preference import PIXELS, Preference
from ...trainer.utils.errors import BadInput
from ...trainer.votes import store
from .folders import votes_folder
from .vote_collections import COLLECTION, collection_folder

FOLDER = "rewards"
LIMIT = 2**31
LONG = 60
CLIP_LARGE = "clip-vit-l"
"""Stands for the CLIP ViT-L/14 file of the reward aesthetic."""
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def option_widgets(kind: type[reward_models.Reward]) -> list[io.Input]:
    """A widget per option of a reward."""
    return [option_widget(name, field) for name, field in kind.Options.model_fields.items()]


def option_widget(name: str, field: FieldInfo) -> io.Input:
    """The widget of an option, with its default, range and description."""
    default, tip = field.get_default(call_default_factory=True), field.description
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if "reward_file" in extra:
        return _file_widget(name, default, extra["reward_file"], tip)
    if extra.get("votes") == "collection":
        return io.String.Input(name, default=COLLECTION, tooltip=tip)
    if extra.get("votes") == "backbone":
        names = [PIXELS, CLIP_LARGE, *folder_paths.get_filename_list("clip_vision")]
        return io.Combo.Input(name, options=names, default=PIXELS, tooltip=tip)
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
    """The widget's limits; where there is none, the option's own check applies."""
    found = {"min": -LIMIT, "max": LIMIT}
    for rule in field.metadata:
        for key, end in (("ge", "min"), ("gt", "min"), ("le", "max"), ("lt", "max")):
            if getattr(rule, key, None) is not None:
                found[end] = getattr(rule, key)
    return found


def option_values(kind: type[reward_models.Reward], widgets: dict[str, Any]) -> dict[str, Any]:
    """The options that the widgets stand for: texts of several lines become lists where a list is wanted."""
    lists = {name for name, field in kind.Options.model_fields.items() if field.annotation == list[str]}
    return {name: prompt_lines(value) if name in lists else value for name, value in widgets.items()}


def _file_widget(name: str, default: str, rule: dict[str, Any], tip: str | None) -> io.Input:
    """The files of models/rewards that fit; folders too where the reward takes one.

    As with core's loaders, only what is there is listed, and ComfyUI refuses any other name at its own widget. What is
    listed in place of a missing file tells where to put it.
    """
    files = [Path(file) for file in folder_paths.get_filename_list(FOLDER)]
    found = {file for file in files if file.suffix.lower() in rule["suffixes"]}
    if rule["folder"]:
        found |= {parent for file in files for parent in file.parents if parent != Path()}
    names = sorted(path.as_posix() for path in found - {Path(default)})
    usual = [default] if not default or Path(default) in found else []
    hint = [] if usual else [f"(missing: put it at models/rewards/{default})"]
    return io.Combo.Input(name, options=[*usual, *names, *hint], default=default, tooltip=tip)


def with_files(config: RewardConfig) -> RewardConfig:
    """The same reward with full paths of its files in ComfyUI's folders.

    Raises:
        BadInput: a file is missing, or an option is not accepted.
    """
    if config.name == Preference.name:
        config = _with_votes(config)
    config = reward_models.with_files_from(config, map(Path, folder_paths.get_folder_paths(FOLDER)))
    reward_models.load_reward(config)  # looks at options and files, and reads no weights
    return config


def _with_votes(config: RewardConfig) -> RewardConfig:
    """The reward with the folder of its collection and the file of its backbone.

    Raises:
        BadInput: there is no such collection or file.
    """
    options = dict(config.options)
    options["collection"] = collection_folder(options.get("collection", COLLECTION))
    options["backbone"] = backbone_file(options.get("backbone", PIXELS))
    return config.model_copy(update={"options": options})


def backbone_file(name: object) -> str:
    """The file of a backbone; `pixels`, which needs none, as it is.

    Raises:
        BadInput: there is no such file in ComfyUI's folders.
    """
    if name == PIXELS:
        return PIXELS
    if name == CLIP_LARGE:
        return _clip_large()
    if name not in folder_paths.get_filename_list("clip_vision"):
        raise BadInput(f"backbone {str(name)[:80]!r} is not in models/clip_vision: choose {PIXELS}, or put it there")
    return folder_paths.get_full_path_or_raise("clip_vision", str(name))


def _clip_large() -> str:
    default = reward_models.REWARDS["aesthetic"].Options.model_fields["tower"].default
    for folder in folder_paths.get_folder_paths(FOLDER):
        if (Path(folder) / default).is_file():
            return str(Path(folder) / default)
    raise BadInput(f"backbone {CLIP_LARGE}: put the file at models/rewards/{default}, or choose {PIXELS}")


def votes_fingerprint(reward: object) -> str:
    """Changes with the votes of a collection, so that ComfyUI does not reuse scores from before them.

    Args:
        reward: the widgets of a reward, as ComfyUI hands them over.
    """
    if not isinstance(reward, dict) or reward.get("reward") != Preference.name:
        return ""
    name = {key.removeprefix("reward."): value for key, value in reward.items()}.get("collection", COLLECTION)
    try:
        file = store.find(votes_folder(), name).votes_file.stat()
    except (BadInput, OSError):
        return ""
    return f"{file.st_mtime_ns} {file.st_size}"
