"""Conditions as ComfyUI's CONDITIONING: an entry per prompt, with whatever text encoders and nodes put into it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import BadInput
from ..base import Conditions

Entry = dict[str, Any]
"""By name: tensors (with a batch of one where they belong to the prompt), numbers, texts, None, lists and dicts."""


@dataclass(frozen=True)
class EntryConditions(Conditions):
    """Conditions of N rows whose shapes may differ, so that texts of any length need no padding.

    Attributes:
        tensors: unused.
        entries: the distinct entries; several rows may share one.
        index: `[N]` long on the CPU, the entry of each row.
    """

    tensors: dict[str, Tensor]
    entries: tuple[Entry, ...] = ()
    index: Tensor = None

    @classmethod
    def of(cls, entries: list[Entry]) -> "EntryConditions":
        """One row per entry."""
        return cls({}, entries=tuple(entries), index=torch.arange(len(entries)))

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, index: Tensor) -> "EntryConditions":
        kept, inverse = self.index[index.cpu()].unique(return_inverse=True)
        return EntryConditions({}, entries=tuple(self.entries[i] for i in kept.tolist()), index=inverse)

    def to(self, device: torch.device) -> "EntryConditions":
        moved: dict[int, Tensor] = {}

        def move(value: Tensor) -> Tensor:
            if id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved[id(value)]

        return EntryConditions({}, entries=tuple(mapped(entry, move) for entry in self.entries), index=self.index)

    def joined(self, other: "EntryConditions") -> "EntryConditions":
        index = torch.cat([self.index, other.index + len(self.entries)])
        return EntryConditions({}, entries=(*self.entries, *other.entries), index=index)

    def with_pictures_of(self, other: Conditions) -> "EntryConditions":
        return self

    def groups(self) -> Iterator[tuple[Tensor, Entry]]:
        """Each entry with the indices of its rows. Entries are copied, because some models scale them in place.

        Entries are not batched: some models sum over the whole batch, for example to count its tokens.
        """
        for number, entry in enumerate(self.entries):
            rows = (self.index == number).nonzero().flatten()
            if len(rows):
                yield rows, mapped(entry, Tensor.clone)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested lists and dicts in which `change` has been applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(part, change) for part in value]
    return value


# ---------------------------------------------------------------------------------------------------------- plain data


def check_entry(entry: Entry) -> None:
    """
    Raises:
        BadInput: it carries an object that cannot be stored, such as a ControlNet.
    """

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            for part in value.values():
                walk(part, name)
        elif isinstance(value, list | tuple):
            for part in value:
                walk(part, name)
        elif not (value is None or isinstance(value, Tensor | bool | int | float | str)):
            raise BadInput(
                f"conditioning carries {name!r} ({type(value).__name__}), which cannot be stored for training: "
                "disconnect the node that adds it"
            )

    for name, value in entry.items():
        walk(value, name)


def as_data(value: Any, tensor: Callable[[Tensor], Any]) -> dict[str, Any]:
    """An entry as JSON data that `from_data` turns back; every value is labelled with its kind.

    Args:
        tensor: gives the JSON data that stands for a tensor.
    """
    if isinstance(value, Tensor):
        return {"tensor": tensor(value)}
    if isinstance(value, dict):
        return {"dict": {name: as_data(part, tensor) for name, part in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [as_data(part, tensor) for part in value]}
    return {"value": value}


def from_data(data: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """The inverse of `as_data`.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not of that form.
    """
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {name: from_data(part, tensor) for name, part in value.items()}
    if kind == "list":
        return [from_data(part, tensor) for part in value]
    return value
