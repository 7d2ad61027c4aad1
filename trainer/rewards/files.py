"""The files of rewards: how an option names one, where it is looked for, and how weights are read from it."""

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pydantic.fields import FieldInfo
from torch import Tensor, nn

from ..config import Section
from ..utils.errors import BadInput

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_UNPICKLING = torch.serialization.pickle.UnpicklingError


@dataclass(frozen=True)
class FileRule:
    """What an option that names a file accepts.

    Attributes:
        suffixes: endings of a file's name.
        folder: whether a folder is accepted too.
    """

    suffixes: tuple[str, ...]
    folder: bool = False

    @property
    def weights(self) -> bool:
        """Whether it names a file of weights."""
        return self.suffixes == WEIGHTS


def file_option(default: str, description: str, suffixes: tuple[str, ...] = WEIGHTS, folder: bool = False) -> Any:
    """The field of an option that names a file, or a folder.

    Args:
        default: its usual path under `models/rewards/`; empty if there is none.
        description: what it is and where it comes from.
    """
    rule = {"suffixes": list(suffixes), "folder": folder}
    return Field(default, description=description, json_schema_extra={"reward_file": rule})


def file_rule(field: FieldInfo) -> FileRule | None:
    """What a field accepts, if it names a file."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "reward_file" not in extra:
        return None
    return FileRule(tuple(extra["reward_file"]["suffixes"]), extra["reward_file"]["folder"])


def locate(name: str, folders: Iterable[Path]) -> Path | None:
    """The first file or folder of that name inside one of the folders.

    A name cannot lead out of them; a symbolic link inside them may, as for ComfyUI's other models.

    Args:
        name: relative path, such as `hpsv2/HPS_v2.1_compressed.pt`.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    for folder in folders:
        if (folder / path).exists():
            return (folder / path).absolute()
    return None


def located(options: Section, reward: str, folders: Iterable[Path]) -> dict[str, Any]:
    """The options as plain data, with every file's name replaced by its full path inside one of the folders.

    Raises:
        BadInput: a file is in none of them.
    """
    data, folders = options.model_dump(), list(folders)
    for name, field in type(options).model_fields.items():
        if file_rule(field) is None or not data[name]:
            continue
        path = locate(data[name], folders)
        if path is None:
            searched = " or ".join(str(folder) for folder in folders) or "any folder: none was given"
            raise BadInput(f"reward {reward!r}: {name} {data[name]!r} is not in {searched}; {field.description}")
        data[name] = str(path)
    return data


def check_files(options: Section, reward: str) -> None:
    """Raise BadInput if an option names a file that does not exist or is of another type."""
    for name, field in type(options).model_fields.items():
        rule, value = file_rule(field), getattr(options, name)
        if rule is None or not value:
            continue
        path = Path(value)
        setting = f"reward {reward!r}: {name} {value!r}"
        if not path.exists():
            raise BadInput(f"{setting} does not exist; {field.description}")
        if path.is_dir() and not rule.folder:
            raise BadInput(f"{setting} is a folder, but a file is expected: {', '.join(rule.suffixes)}")
        if path.is_file() and path.suffix.lower() not in rule.suffixes:
            raise BadInput(f"{setting} has the wrong type of file: {', '.join(rule.suffixes)} is expected")


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise BadInput unless the file's SHA-256 begins with `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise BadInput(f"{what} {path} is not the original: its sha256 is {found[:16]}..., expected {expected}...")


# ------------------------------------------------------------------------------------------------------------- weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch file; nothing in the file is executed.

    Raises:
        BadInput: it cannot be read, holds more than plain data, or holds no tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNPICKLING as error:
        raise BadInput(f"{path} is damaged or holds more than plain weights, and is not read for safety") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path} cannot be read as weights, it may be cut short: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(_is_weight(*entry) for entry in found.items()):
        raise BadInput(f"{path} holds no mapping from names to tensors")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""  # written by distributed training
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def stored_elements(path: Path, start: str = "") -> int:
    """How many numbers the tensors of a file of weights hold.

    Args:
        start: count only tensors whose names start with this.

    Raises:
        BadInput: it cannot be read.
    """
    if path.suffix.lower() != ".safetensors":
        return sum(value.numel() for key, value in read_weights(path).items() if key.startswith(start))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if key.startswith(start)]  # noqa: SIM118
            return sum(math.prod(file.get_slice(key).get_shape()) for key in names)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read as weights, it may be cut short: {error}") from error


def rename(weights: dict[str, Tensor], rule: Callable[[str], str | None], path: Path, what: str) -> dict[str, Tensor]:
    """Weights under other names.

    Args:
        rule: the new name of a key; an empty one drops it, None says that it does not belong there.

    Raises:
        BadInput: a key does not belong there.
    """
    names = {key: rule(key) for key in weights}
    strangers = [key for key, name in names.items() if name is None]
    if strangers:
        raise BadInput(f"{path} is not {what}: it holds {_some(strangers)}, which does not belong there")
    return {name: weights[key] for key, name in names.items() if name}


def fill(
    module: nn.Module,
    weights: dict[str, Tensor],
    path: Path,
    what: str,
    dtype_of: Callable[[str], torch.dtype] = lambda key: torch.float32,
) -> None:
    """Give a module its weights; every key must be there, and no other.

    Args:
        dtype_of: the type that a tensor of that name is converted to.

    Raises:
        BadInput: a key is missing or too many, or has another shape.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in weights]:
        raise BadInput(f"{path} is not {what}: it lacks {_some(missing)}")
    if extra := [key for key in weights if key not in expected]:
        raise BadInput(f"{path} is not {what}: it holds {_some(extra)}, which does not belong there")
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            found, wanted = list(weights[key].shape), list(value.shape)
            raise BadInput(f"{path} is not {what}: {key} has the shape {found}, expected {wanted}")
        if weights[key].is_complex() or weights[key].is_floating_point() != value.is_floating_point():
            raise BadInput(f"{path} is not {what}: {key} is of type {weights[key].dtype}, expected {value.dtype}")
    full = {key: value.to(dtype_of(key)) if value.is_floating_point() else value for key, value in weights.items()}
    module.load_state_dict(full, strict=True, assign=True)


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters take no memory until `fill` gives them; its buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return factory()


def _some(keys: list[str]) -> str:
    """The first of a list of keys, shortened, in one line."""
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in key[:80]) for key in keys[:3])
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
