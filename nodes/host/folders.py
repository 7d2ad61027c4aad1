"""Folders of runs, votes, LoRAs and diffusers models."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...trainer.config.model import BOTH, HIGH, LOW
from ...trainer.utils.errors import BadInput
from ...trainer.utils.files import write_atomically
from ...trainer.utils.names import check_name

_PUBLISHED = rf"_(?P<iteration>\d+)(_(?P<network>{HIGH}|{LOW}))?(?P<copy>-\d+)?\.safetensors"
"""What follows the name of a run in the name of a LoRA file of it."""


def votes_folder() -> Path:
    """The folder of all collections of votes."""
    return Path(folder_paths.get_output_directory()).resolve() / "dancegrpo" / "votes"


def runs_folder() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / "dancegrpo" / "runs"


def run_folder(name: str) -> Path:
    """The folder of a run, which may not exist yet.

    Raises:
        BadInput: the name is invalid.
    """
    return runs_folder() / check_name(name)


def _loras_root() -> Path:
    return Path(folder_paths.get_output_directory()).resolve() / "loras"


def register_loras() -> None:
    """Add `output/loras` to ComfyUI's LoRA folders, if it is not one yet."""
    listed = {Path(folder).resolve() for folder in folder_paths.get_folder_paths("loras")}
    if _loras_root() not in listed:
        folder_paths.add_model_folder_path("loras", str(_loras_root()))


def publish_loras(source: Path, name: str) -> list[str]:
    """Copy a run's LoRA to where ComfyUI lists it, unless it is there already; never overwrites another file.

    Returns:
        its name in ComfyUI's list of LoRAs; two, for high and for low noise, if the run trains two networks.

    Raises:
        BadInput: the file is damaged, or there are too many LoRAs of this name.
    """
    record = _metadata(source)
    stem = f"{name}_{record['iteration']}"
    graph = record.get("description", {}).get("model", {}).get("graph") or {}
    trained = (graph.get("low_noise") or {}).get("trained")
    if trained != BOTH:
        return [_publish(source.read_bytes(), stem if trained is None else f"{stem}_{trained}")]
    return [_publish(_part(source, network), f"{stem}_{network}") for network in (HIGH, LOW)]


def _publish(content: bytes, stem: str) -> str:
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
    raise BadInput(f"there are too many LoRAs named {stem} in output/loras/dancegrpo: move or delete some")


def _part(source: Path, network: str) -> bytes:
    """The LoRA file of one of two networks, out of the run's file for both."""
    from safetensors import safe_open
    from safetensors.torch import save

    start = f"{network}."
    with safe_open(source, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
        return save({name.removeprefix(start): file.get_tensor(name) for name in names}, file.metadata())


def published_loras(name: str) -> list[Path]:
    """The LoRA files that `publish_loras` has written for a run."""
    own = re.compile(re.escape(name) + _PUBLISHED)
    return sorted(path for path in (_loras_root() / "dancegrpo").glob("*.safetensors") if own.fullmatch(path.name))


def newest_loras(name: str) -> list[str]:
    """The names of a run's newest LoRA in ComfyUI's list; two, for high and for low noise, of two networks."""
    own, files = re.compile(re.escape(name) + _PUBLISHED), published_loras(name)
    if not files:
        return []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    parts = own.fullmatch(newest.name)
    found = [newest.name]
    if parts["network"] is not None:
        found = [f"{name}_{parts['iteration']}_{network}{parts['copy'] or ''}.safetensors" for network in (HIGH, LOW)]
        found = [file for file in found if newest.with_name(file).is_file()]
    return [os.path.join("dancegrpo", file) for file in found]  # noqa: PTH118 - as ComfyUI writes names in its lists


def _metadata(lora: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(lora, framework="pt") as file:
            record = json.loads(file.metadata()["dancegrpo"])
        return record | {"iteration": int(record["iteration"])}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{lora} is damaged: its metadata with the iteration cannot be read") from error


def diffusers_folders() -> dict[str, Path]:
    """The diffusers folders in ComfyUI's model folders, by the name that is shown to the user."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for name, folder in _below(Path(root)):
            found.setdefault(name, folder)
    return dict(sorted(found.items()))


def _below(root: Path) -> Iterator[tuple[str, Path]]:
    """Folders below `root` with a model_index.json, without searching inside them or following a link twice."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in visited or "model_index.json" in files:
            subfolders.clear()
        if real not in visited and "model_index.json" in files:
            yield os.path.relpath(folder, root), real
        visited.add(real)
