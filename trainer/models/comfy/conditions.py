"""Conditions as ComfyUI has them: an entry per prompt, with whatever its text encoders and nodes gave."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import BadInput
from ..base import Conditions

Entry = dict[str, Any]
"""By name: tensors (one row where they are of one prompt), numbers, texts, None, lists and dicts of them."""


@dataclass(frozen=True)
class EntryConditions(Conditions):
    """Conditions that need not have equal shapes, so that texts of any length go as they are.

    Attributes:
        tensors: unused.
        entries: the distinct ones.
        index: `[N]` long on the CPU, the entry of each row.
    """

    tensors: dict[str, Tensor]
    entries: tuple[Entry, ...] = ()
    index: Tensor = None

    @classmethod
    def of(cls, entries: list[Entry]) -> "EntryConditions":
        """One row per entry."""
        return cls({}, tuple(entries), torch.arange(len(entries)))

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> "EntryConditions":
        kept, place = self.index[index.cpu()].unique(return_inverse=True)
        return EntryConditions({}, tuple(self.entries[i] for i in kept.tolist()), place)

    def to(self, device: torch.device) -> "EntryConditions":
        moved: dict[int, Tensor] = {}

        def move(value: Tensor) -> Tensor:
            if id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved[id(value)]

        return EntryConditions({}, tuple(mapped(entry, move) for entry in self.entries), self.index)

    def joined(self, other: "EntryConditions") -> "EntryConditions":
        index = torch.cat([self.index, other.index + len(self.entries)])
        return EntryConditions({}, (*self.entries, *other.entries), index)

    def with_pictures_of(self, other: Conditions) -> "EntryConditions":
        return self

    def groups(self) -> Iterator[tuple[Tensor, Entry]]:
        """The rows of each entry, and a copy of it, because models scale some of it in place.

        Entries are not stacked: some models take sums over all that they are given, such as its number of tokens.
        """
        for number, entry in enumerate(self.entries):
            rows = (self.index == number).nonzero().flatten()
            if len(rows):
                yield rows, mapped(entry, Tensor.clone)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(part, change) for part in value]
    return value


# ------------------------------------------------------------------------------------------------------------ files


def check_entry(entry: Entry) -> None:
    """
    Raises:
        BadInput: it carries something that is no data, such as a ControlNet.
    """

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            for part in value.values():
                walk(part, name)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part, name)
        elif not (value is None or isinstance(value, Tensor | bool | int | float | str)):
            raise BadInput(f"conditioning carries {name!r} ({type(value).__name__}), which training cannot follow")

    for name, value in entry.items():
        walk(value, name)


def packed(entries: tuple[Entry, ...]) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, each once, and JSON that says where they belong."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = f"t{len(names)}"
                tensors[names[id(value)]] = value.detach().cpu().contiguous().clone()
            return {"tensor": names[id(value)]}
        if isinstance(value, dict):
            return {"dict": {name: pack(part) for name, part in value.items()}}
        if isinstance(value, list | tuple):
            return {"list": [pack(part) for part in value]}
        return {"value": value}

    return tensors, json.dumps([pack(entry) for entry in entries])


def unpacked(tensors: dict[str, Tensor], text: str) -> list[Entry]:
    """The inverse of `packed`.

    Raises:
        KeyError, TypeError, ValueError: it is not of that form.
    """

    def unpack(node: dict) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {name: unpack(part) for name, part in value.items()}
        if kind == "list":
            return [unpack(part) for part in value]
        return value

    return [unpack(node) for node in json.loads(text)]
