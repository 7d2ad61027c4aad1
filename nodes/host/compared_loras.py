"""The LoRAs of a comparison. Of a model with a network for high and one for low noise, a LoRA is a pair of files."""

import json
import re
from pathlib import Path

import folder_paths
from torch import Tensor

from ...trainer.config.model import BOTH, HIGH, LOW
from ...trainer.rewards.files import read_weights
from ...trainer.runs.directory import RunDirectory
from ...trainer.utils.errors import BadInput, shorten
from . import runs

LOW_SOCKET = "low_noise_model"
NETWORKS = {HIGH: "model", LOW: LOW_SOCKET}
"""The sockets of the two networks; a model with one network is at the first."""
Files = dict[str, Path]
"""The files of a LoRA, by the socket of the network that each is for."""
Lora = dict[str, dict[str, Tensor]]
"""The tensors of a LoRA, by the socket of the network that they are for."""
_WORD = re.compile(r"(?<![a-z])(high|low)(?![a-z])", re.IGNORECASE)
_CASES = (str.lower, str.upper, str.title)


def files_of(names: list[str], has_two: bool) -> dict[str, Files]:
    """The files of LoRAs of ComfyUI's list, by the name that each is shown with; checked without reading weights.

    Args:
        names: as in the list; of a pair one name is enough.
        has_two: whether a network for low noise is connected.

    Raises:
        BadInput: one is not in the list, or is for the other kind of model.
    """
    found = (_pair_of(name) if has_two else _alone(name) for name in names)
    files = {tuple(each.values()): each for each in found}.values()
    shown = [_shown(each) for each in files]
    return {
        name if shown.count(name) == 1 else str(next(iter(each.values()))): each
        for name, each in zip(shown, files, strict=True)
    }


def partners(name: str) -> list[str]:
    """A name in ComfyUI's list of LoRAs, and that of the file for the other network, if the name says which it is for.

    The file for high noise is first.
    """
    span = _network_word(name)
    if span is None:
        return [name]
    start, end = span
    case = next((case for case in _CASES if case(name[start:end]) == name[start:end]), str.lower)
    return [f"{name[:start]}{case(network)}{name[end:]}" for network in NETWORKS]


def of_run(name: str, has_two: bool) -> Lora:
    """The newest LoRA of a run.

    Raises:
        BadInput: there is no such run, it has no LoRA yet, or it is for the other kind of model.
    """
    run = check_run(name, has_two)
    weights, trained = read_weights(run.lora_file), _trained(run.lora_file)
    if trained != BOTH:
        return {NETWORKS[trained or HIGH]: weights}
    parts = {network: f"{network}." for network in NETWORKS}
    return {
        NETWORKS[network]: {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        for network, start in parts.items()
    }


def check_run(name: str, has_two: bool) -> RunDirectory:
    """The run of this name, whose LoRA fits the number of networks that are connected; raises as `of_run`."""
    run = runs.existing(name)
    if not run.lora_file.exists():
        raise BadInput(f"run {name!r} has no LoRA yet: wait until its first checkpoint")
    trained = _trained(run.lora_file)
    if trained is not None and not has_two:
        raise _needs_two(f"run {name!r}")
    if trained is None and has_two:
        raise BadInput(f"run {name!r} trained a model with one network: disconnect low_noise_model")
    return run


def _alone(name: str) -> Files:
    file = _listed(name)
    if _trained(file) is not None:
        raise _needs_two(f"LoRA {shorten(name)}")
    return {NETWORKS[HIGH]: file}


def _pair_of(name: str) -> Files:
    """The files of a pair, one of which may be missing where only one network was trained."""
    file, names = _listed(name), partners(name)
    if len(names) == 1:
        raise BadInput(
            f"LoRA {shorten(name)} has neither high nor low in its name: with low_noise_model connected, choose one of "
            "two files such as NAME_high.safetensors and NAME_low.safetensors"
        )
    paths = {network: folder_paths.get_full_path("loras", each) for network, each in zip(NETWORKS, names, strict=True)}
    missing = [each for path, each in zip(paths.values(), names, strict=True) if path is None]
    if missing and _trained(file) == BOTH:
        raise BadInput(f"LoRA {shorten(name)} is one of two files, and {shorten(missing[0])} is not in ComfyUI's list")
    return {NETWORKS[network]: Path(path) for network, path in paths.items() if path is not None}


def _listed(name: str) -> Path:
    file = folder_paths.get_full_path("loras", name)
    if file is None:
        raise BadInput(f"LoRA {name[:100]!r} is not in ComfyUI's list of LoRAs: choose one from the list")
    return Path(file)


def _needs_two(what: str) -> BadInput:
    return BadInput(
        f"{what} is for a model with a network for high and one for low noise: connect them to model and "
        "low_noise_model, as for GRPO Base Model"
    )


def _shown(files: Files) -> str:
    """The name without folder and ending; that of a pair without the word for the network."""
    stem = next(iter(files.values())).stem
    span = _network_word(stem)
    if len(files) == 1 or span is None:
        return stem
    start, end = span
    return f"{stem[:start].rstrip(' _.-')}{stem[end:]}"


def _network_word(name: str) -> tuple[int, int] | None:
    """Where the last word high or low of a name stands."""
    return next((word.span() for word in reversed(list(_WORD.finditer(name)))), None)


def _trained(file: Path) -> str | None:
    """Which of two networks a LoRA of this pack was trained for: high, low or both; None for all other LoRAs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            record = json.loads((opened.metadata() or {}).get("dancegrpo", "{}"))
        trained = record["description"]["model"]["graph"]["low_noise"]["trained"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return trained if trained in (HIGH, LOW, BOTH) else None
