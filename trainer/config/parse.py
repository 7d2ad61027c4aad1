"""Reading run descriptions: files, overrides and presets."""

import copy
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..paths import with_absolute_paths
from ..utils.documents import check_data, parse_document, read_document
from ..utils.errors import BadInput, cut, shorten
from ..utils.section import Section
from .faults import describe
from .sections import RunConfig

PRESETS = Path(__file__).parents[1] / "presets"
AUTO = "auto"
"""The preset that is no file: its settings are chosen for the model and the device (`estimate/automatic.py`)."""


def read_config(path: Path, overrides: list[str] = ()) -> RunConfig:
    """Read a run description from YAML or JSON.

    Args:
        overrides: settings such as `rollout.eta=0.5`, applied in order.

    Relative paths in the file are taken from its folder, those in overrides from the current one.

    Raises:
        BadInput: naming the field, the value and what is accepted.
    """
    return parse_config(with_absolute_paths(read_mapping(path), path.parent), overrides, Path.cwd())


def read_mapping(path: Path) -> dict[str, Any]:
    """The file's content as a mapping, not validated yet."""
    data = read_document(path, f"run description {path}")
    if not isinstance(data, dict):
        raise BadInput(
            f"run description {path} must be a mapping with the sections {', '.join(RunConfig.model_fields)}"
        )
    return data


def parse_config(data: dict[str, Any], overrides: list[str] = (), base: Path | None = None) -> RunConfig:
    """Validate a description given as plain data.

    Args:
        base: folder that relative paths are taken from; None leaves them as they are.

    Raises:
        BadInput: the first few faults, one sentence each.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        _override(data, override)
    check_data(data, "run description")
    if base is not None:
        with_absolute_paths(data, base)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise BadInput(describe(error)) from error


def parse_sections(data: dict[str, Any], overrides: list[str] = ()) -> dict[str, Section]:
    """Validate sections of a description alone, without the others and without what they must have in common.

    Raises:
        BadInput: the first few faults, one sentence each.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        _override(data, override)
    sections, faults = {}, []
    for name, values in data.items():
        if name not in RunConfig.model_fields:
            raise BadInput(f"{name} is not a section; there are {', '.join(RunConfig.model_fields)}")
        try:
            sections[name] = TypeAdapter(RunConfig.model_fields[name].rebuild_annotation()).validate_python(values)
        except ValidationError as error:
            faults.append(describe(error, name))
    if faults:
        raise BadInput("; ".join(faults))
    return sections


def settings(overrides: list[str]) -> dict[str, Any]:
    """Settings such as `dtype=float16` as plain data, applied in order.

    Raises:
        BadInput: one is not of that form.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        _override(data, override)
    return data


def preset(name: str) -> dict[str, Any]:
    """A preset's plain data.

    Raises:
        BadInput: no such preset.
    """
    if name not in preset_names():
        raise BadInput(f"preset {shorten(name)} is unknown; choose one of {', '.join(preset_names())}")
    return read_mapping(PRESETS / f"{name}.yaml")


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or "" in key.strip().split("."):
        raise BadInput(f"setting {shorten(override)} is not of the form section.field=value")
    *parents, last = key.strip().split(".")
    key = cut(key.strip(), 100)
    if len(parents) > 10:
        raise BadInput(f"setting {key} names more sections inside each other than there are")
    value = parse_document(text, f"setting {key}: {shorten(text)}")
    target = data
    for parent in parents:
        if isinstance(target, dict) and target.get(parent) is None:
            target[parent] = {}
        target = target[parent if isinstance(target, dict) else _index(target, parent, key)]
        if not isinstance(target, dict | list):
            raise BadInput(f"setting {key}: {cut(parent, 100)} is not a section")
    target[last if isinstance(target, dict) else _index(target, last, key)] = value


def _index(target: list, text: str, key: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) >= len(target):
        raise BadInput(f"setting {key}: {cut(text, 100)} is not an index below {len(target)}")
    return int(text)
