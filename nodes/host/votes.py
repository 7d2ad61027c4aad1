"""Collections of votes in ComfyUI's output folder, and the widgets with which Load Reward chooses one."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ...trainer.config import RewardConfig
from ...trainer.utils.errors import BadInput
from ...trainer.votes import store

PIXELS, CLIP_LARGE = "pixels", "clip-vit-l"
CLIP_LARGE_FILE = "aesthetic/clip-vit-large-patch14.safetensors"
"""Where the reward aesthetic has the same network, in models/rewards."""
NONE_YET = "(none yet: make one with Collect for Voting)"
TYPED = "collection_name"


def votes_folder() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / "dancegrpo" / "votes"


def backbones() -> list[str]:
    """Names of the backbones that can be chosen, `pixels` first."""
    found = [PIXELS] + ([CLIP_LARGE] if _clip_large() else [])
    return [*found, *folder_paths.get_filename_list("clip_vision")]


def backbone_file(name: str) -> str:
    """The path of a backbone's file; `pixels`, which has none, is returned as it is.

    Raises:
        BadInput: there is no such backbone.
    """
    if name not in backbones():
        raise BadInput(
            f"backbone {str(name)[:80]!r} is unknown: choose {PIXELS} or a CLIP or SigLIP file of models/clip_vision"
            + (f"; {CLIP_LARGE} is models/rewards/{CLIP_LARGE_FILE}, which is missing" if name == CLIP_LARGE else "")
        )
    if name == PIXELS:
        return name
    return _clip_large() if name == CLIP_LARGE else folder_paths.get_full_path_or_raise("clip_vision", name)


def _clip_large() -> str | None:
    return folder_paths.get_full_path("rewards", CLIP_LARGE_FILE)


# --------------------------------------------------------------------------------------------------------- Load Reward


def widgets(name: str, field: FieldInfo) -> list[io.Input]:
    """The widgets of an option that names a collection or a backbone; none for other options."""
    extra = field.json_schema_extra
    kind = extra.get("votes") if isinstance(extra, dict) else None
    if kind == "backbone":
        return [io.Combo.Input(name, options=backbones(), default=PIXELS, tooltip=field.description)]
    if kind != "collection":
        return []
    known = store.names(votes_folder()) or [NONE_YET]
    typed = "Instead of the list: the name of a collection that is not in it yet. Usually empty."
    return [
        io.Combo.Input(name, options=known, default=known[0], tooltip=field.description),
        io.String.Input(TYPED, default="", optional=True, tooltip=typed),
    ]


def chosen(values: dict[str, Any]) -> dict[str, Any]:
    """The options that the widgets stand for: a typed name takes the place of the list's."""
    typed = values.get(TYPED)
    options = {name: value for name, value in values.items() if name != TYPED}
    return options | {"collection": typed.strip()} if isinstance(typed, str) and typed.strip() else options


def with_paths(config: RewardConfig) -> RewardConfig:
    """The same reward with the paths of its collection and backbone; rewards without votes are returned unchanged.

    Raises:
        BadInput: a name cannot be one, or there is nothing of that name.
    """
    options = dict(config.options)
    if config.name != "preference":
        return config
    if options.get("collection", NONE_YET) in ("", NONE_YET):
        raise BadInput("there is no collection of votes yet: make one with Collect for Voting, and vote on its pairs")
    options["collection"] = str(store.find(votes_folder(), options["collection"]).folder)
    options["backbone"] = backbone_file(options.get("backbone", PIXELS))
    return config.model_copy(update={"options": options})


def fingerprint(reward: Any) -> str:
    """Changes with the votes of a collection, so that ComfyUI does not reuse scores from before them."""
    if not isinstance(reward, dict) or reward.get("reward") != "preference":
        return ""
    name = chosen({key.removeprefix("reward."): value for key, value in reward.items()}).get("collection")
    try:
        return str(store.find(votes_folder(), name).votes_file.stat().st_mtime_ns)
    except (BadInput, OSError):
        return ""
