"""Where runs and LoRAs lie in ComfyUI's output folder, and which names they may have."""

import json
import os
from pathlib import Path

import folder_paths

from ...trainer.utils.errors import BadInput
from ...trainer.utils.files import write_atomically
from ...trainer.utils.names import check_name


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / "dancegrpo" / "runs"


def run_folder(name: str) -> Path:
    """The folder of a run, which need not exist.

    Raises:
        BadInput: the name cannot be one.
    """
    return runs_folder() / check_name(name)


def _loras_root() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / "loras"


def register_loras() -> None:
    """Let ComfyUI list LoRAs of its output folder, where its own start has not done so."""
    listed = {Path(folder).resolve() for folder in folder_paths.get_folder_paths("loras")}
    if _loras_root() not in listed:
        folder_paths.add_model_folder_path("loras", str(_loras_root()))


def publish_lora(source: Path, name: str) -> str:
    """Copy a run's LoRA to where ComfyUI lists it, unless it is there; never over another file.

    Returns:
        its name in ComfyUI's list of LoRAs.
    """
    content = source.read_bytes()
    stem = f"{name}_{_iteration(source)}"
    for number in range(1, 10_000):
        target = (
            _loras_root() / "dancegrpo" / (f"{stem}.safetensors" if number == 1 else f"{stem}-{number}.safetensors")
        )
        if not target.exists():
            write_atomically(target, content)
        elif target.stat().st_size != len(content) or target.read_bytes() != content:
            continue
        register_loras()
        return os.path.join("dancegrpo", target.name)  # noqa: PTH118 - as ComfyUI writes names in its lists
    raise BadInput(f"there are too many LoRAs of the name {stem}; move some away")


def _iteration(lora: Path) -> int:
    from safetensors import safe_open

    with safe_open(lora, framework="pt") as file:
        return json.loads(file.metadata()["dancegrpo"])["iteration"]


def diffusers_folders() -> dict[str, Path]:
    """The diffusers folders in ComfyUI's model folders, by the name shown."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, _, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                found.setdefault(os.path.relpath(folder, root), Path(folder).resolve())
    return dict(sorted(found.items()))
