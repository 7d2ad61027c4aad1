"""The widgets for a reward's options, and the reward's files in ComfyUI's folders."""

from pathlib import Path
from typing import Any

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
from .widgets import field_widget

FOLDER = "rewards"
LONG = 60
CLIP_LARGE = "clip-vit-l"
"""The backbone name for the CLIP ViT-L/14 file of the reward `aesthetic`."""
folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def option_widgets(kind: type[reward_models.Reward]) -> list[io.Input]:
    """A widget per option of a reward; all are optional, so that a graph in API format need not name them."""
    widgets = [option_widget(name, field) for name, field in kind.Options.model_fields.items()]
    for widget in widgets:
        widget.optional = True
    return widgets


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
    if (widget := field_widget(name, field)) is not None:
        return widget
    if field.annotation == list[str]:
        return io.String.Input(name, default="\n".join(default), multiline=True, tooltip=f"{tip} One per line.")
    text = default or ""
    return io.String.Input(name, default=text, multiline=len(text) > LONG or "\n" in text, tooltip=tip)


def option_values(kind: type[reward_models.Reward], widgets: dict[str, Any]) -> dict[str, Any]:
    """The options from the widgets' values; for list options, multi-line text becomes a list."""
    lists = {name for name, field in kind.Options.model_fields.items() if field.annotation == list[str]}
    return {name: prompt_lines(value) if name in lists else value for name, value in widgets.items()}


def _file_widget(name: str, default: str, rule: dict[str, Any], tip: str | None) -> io.Input:
    """A list of the files in models/rewards with a suitable extension, and of folders if the option accepts one.

    As in core's loaders, only existing files are listed, and ComfyUI refuses other names. If the default file is
    missing, an entry says where to put it.
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
    """The same reward with absolute paths of its files in ComfyUI's folders.

    Raises:
        BadInput: a file is missing, or an option is not accepted.
    """
    if config.name == Preference.name:
        config = _with_votes(config)
    config = reward_models.with_files_from(config, map(Path, folder_paths.get_folder_paths(FOLDER)))
    reward_models.load_reward(config)  # checks options and files without reading weights
    return config


def _with_votes(config: RewardConfig) -> RewardConfig:
    """The reward with the paths of its collection and its backbone.

    Raises:
        BadInput: there is no such collection or file.
    """
    options = dict(config.options)
    options["collection"] = collection_folder(options.get("collection", COLLECTION))
    options["backbone"] = backbone_file(options.get("backbone", PIXELS))
    return config.model_copy(update={"options": options})


def backbone_file(name: object) -> str:
    """The path of a backbone's file; `pixels` has no file and is returned unchanged.

    Raises:
        BadInput: there is no such file in ComfyUI's folders.
    """
    if name == PIXELS:
        return PIXELS
    if name == CLIP_LARGE:
        return _clip_large()
    if name not in folder_paths.get_filename_list("clip_vision"):
        raise BadInput(f"backbone {str(name)[:80]!r} is not in models/clip_vision: put it there, or choose {PIXELS}")
    return folder_paths.get_full_path_or_raise("clip_vision", str(name))


def _clip_large() -> str:
    default = reward_models.REWARDS["aesthetic"].Options.model_fields["tower"].default
    for folder in folder_paths.get_folder_paths(FOLDER):
        if (Path(folder) / default).is_file():
            return str(Path(folder) / default)
    raise BadInput(f"backbone {CLIP_LARGE}: put the file at models/rewards/{default}, or choose {PIXELS}")


def votes_fingerprint(reward: object) -> str:
    """A fingerprint that changes with the votes of a collection, so that ComfyUI does not reuse outdated scores.

    Args:
        reward: the widget values of a reward, as ComfyUI passes them.
    """
    if not isinstance(reward, dict) or reward.get("reward") != Preference.name:
        return ""
    name = {key.removeprefix("reward."): value for key, value in reward.items()}.get("collection") or COLLECTION
    try:
        file = store.find(votes_folder(), name).votes_file.stat()
    except (BadInput, OSError):
        return ""
    return f"{file.st_mtime_ns} {file.st_size}"
