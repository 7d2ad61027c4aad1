"""Files of rewards: options for file names, searching for files, and loading weights."""

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
    """The files that an option accepts.

    Attributes:
        suffixes: accepted file extensions.
        folder: whether a folder is accepted, too.
    """

    suffixes: tuple[str, ...]
    folder: bool = False

    @property
    def weights(self) -> bool:
        """Whether it is a file of weights."""
        return self.suffixes == WEIGHTS


def file_option(default: str, description: str, suffixes: tuple[str, ...] = WEIGHTS, folder: bool = False) -> Any:
    """The pydantic field of an option for a file or folder.

    Args:
        default: usual path under `models/rewards/`; empty if there is none.
        description: what the file is and where to get it.
    """
    rule = {"suffixes": list(suffixes), "folder": folder}
    return Field(default, description=description, json_schema_extra={"reward_file": rule})


def file_rule(field: FieldInfo) -> FileRule | None:
    """The file rule of a field, or None if it is not a file option."""
    extra = field.json_schema_extra
    if not isinstance(extra, dict) or "reward_file" not in extra:
        return None
    return FileRule(tuple(extra["reward_file"]["suffixes"]), extra["reward_file"]["folder"])


def locate(name: str, folders: Iterable[Path]) -> Path | None:
    """The first file or folder with this relative path in the folders.

    The path cannot leave the folders, except through symbolic links inside them, as for ComfyUI's other models.

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
    """The options as plain data, with file names replaced by absolute paths in one of the folders.

    Raises:
        BadInput: a file is in none of the folders.
    """
    data, folders = options.model_dump(), list(folders)
    for name, field in type(options).model_fields.items():
        if file_rule(field) is None or not data[name]:
            continue
        path = locate(data[name], folders)
        if path is None:
            searched = " or ".join(str(folder) for folder in folders) or "any folder (give one with --files)"
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
        if path.is_file() and not rule.suffixes:
            raise BadInput(f"{setting} is a file, but a folder is expected")
        if path.is_file() and path.suffix.lower() not in rule.suffixes:
            raise BadInput(f"{setting} has the wrong file type: choose a file of type {', '.join(rule.suffixes)}")


def check_sha256(path: Path, expected: str, what: str) -> None:
    """Raise BadInput unless the file's SHA-256 begins with `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(expected):
        raise BadInput(f"{what} {path} is not the original file: sha256 {found[:16]}..., expected {expected}...")


# ------------------------------------------------------------------------------------------------------------- weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors or PyTorch file, without executing code from it.

    Raises:
        BadInput: it cannot be read, contains more than plain data, or has no tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _UNPICKLING as error:
        raise BadInput(f"{path} is damaged or contains more than weights; it is not loaded for safety") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{path} cannot be loaded as weights; it may be incomplete: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not found or not all(_is_weight(*entry) for entry in found.items()):
        raise BadInput(f"{path} does not contain a state dict (names and tensors)")
    prefix = "module." if all(key.startswith("module.") for key in found) else ""  # written by distributed training
    return {key.removeprefix(prefix): value for key, value in found.items()}


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided


def stored_elements(path: Path, start: str = "") -> int:
    """Number of elements of the tensors in a file of weights.

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
        raise BadInput(f"{path} cannot be loaded as weights; it may be incomplete: {error}") from error


def rename(weights: dict[str, Tensor], rule: Callable[[str], str | None], path: Path, what: str) -> dict[str, Tensor]:
    """Rename the keys of a state dict.

    Args:
        rule: returns the new name of a key, '' to drop it, or None for an unexpected key.

    Raises:
        BadInput: there are unexpected keys.
    """
    names = {key: rule(key) for key in weights}
    strangers = [key for key, name in names.items() if name is None]
    if strangers:
        raise BadInput(f"{path} is not {what}: unexpected keys {_some(strangers)}")
    return {name: weights[key] for key, name in names.items() if name}


def fill(
    module: nn.Module,
    weights: dict[str, Tensor],
    path: Path,
    what: str,
    dtype_of: Callable[[str], torch.dtype] = lambda key: torch.float32,
) -> None:
    """Load a state dict into a module; the keys must match exactly.

    Args:
        dtype_of: returns the dtype that a tensor is converted to, by its name.

    Raises:
        BadInput: a key is missing or unexpected, or has another shape or dtype.
    """
    expected = module.state_dict()
    if missing := [key for key in expected if key not in weights]:
        raise BadInput(f"{path} is not {what}: missing keys {_some(missing)}")
    if extra := [key for key in weights if key not in expected]:
        raise BadInput(f"{path} is not {what}: unexpected keys {_some(extra)}")
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            found, wanted = list(weights[key].shape), list(value.shape)
            raise BadInput(f"{path} is not {what}: {key} has the shape {found}, expected {wanted}")
        if weights[key].is_complex() or weights[key].is_floating_point() != value.is_floating_point():
            raise BadInput(f"{path} is not {what}: {key} has the dtype {weights[key].dtype}, expected {value.dtype}")
    full = {key: value.to(dtype_of(key)) if value.is_floating_point() else value for key, value in weights.items()}
    module.load_state_dict(full, strict=True, assign=True)


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    """Create a module whose parameters are on the meta device until `fill` loads them; buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return factory()


def _some(keys: list[str]) -> str:
    """The first of a list of keys, shortened, in one line."""
    shown = ", ".join("".join(c if c.isprintable() else "?" for c in key[:80]) for key in keys[:3])
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
