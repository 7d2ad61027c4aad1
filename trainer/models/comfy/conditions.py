"""Conditions in the form of ComfyUI's CONDITIONING: one entry per prompt, with everything encoders and nodes added."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import BadInput
from ..base import Conditions

Entry = dict[str, Any]
"""By name: tensors (with batch size 1), numbers, strings, None, and lists and dicts of these."""

TEXT = (
    "attention_mask",
    "attention_mask_mt5xl",
    "conditioning_byt5small",
    "conditioning_llama3",
    "conditioning_lyrics",
    "conditioning_mt5xl",
    "num_layers_stacked",
    "num_tokens",
    "pooled_output",
    "t5xxl_ids",
    "t5xxl_weights",
    "unprocessed_ltxav_embeds",
)
"""What text encoders put into CONDITIONING beside the embeddings, and other nodes do not."""


@dataclass(frozen=True)
class EntryConditions(Conditions):
    """Conditions of N rows whose shapes may differ, so that prompts of different lengths need no padding.

    Attributes:
        tensors: unused.
        entries: the distinct entries; several rows may share one.
        index: `[N]` long on the CPU, index of each row's entry.
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

    def with_images_of(self, other: Conditions) -> "EntryConditions":
        return self

    def groups(self) -> Iterator[tuple[Tensor, Entry]]:
        """Each entry with the indices of its rows. Entries are copied, because some models change them in place.

        Different entries are not batched, because some models reduce over the whole batch, for example to count tokens.
        """
        for number, entry in enumerate(self.entries):
            rows = (self.index == number).nonzero().flatten()
            if len(rows):
                yield rows, mapped(entry, Tensor.clone)


def alike(a: Any, b: Any) -> bool:
    """Whether nested values have the same names, tensors of the same shapes, and otherwise equal values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(part, b[name]) for name, part in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and a == b


def images_of(entry: Entry) -> Entry:
    """What an entry has that does not come from its text: reference latents, first frames, masks, guidance."""
    return {name: value for name, value in entry.items() if name != "cross_attn" and name not in TEXT}


def own_images(entry: Entry, other: Entry) -> Entry:
    """Those of an entry's images whose kind another entry lacks."""
    return {name: value for name, value in images_of(entry).items() if name not in other}


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
        BadInput: it contains an object that cannot be stored, such as a ControlNet.
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
                f"conditioning contains {name!r} ({type(value).__name__}), which cannot be stored for training: "
                "disconnect the node that adds it"
            )

    for name, value in entry.items():
        walk(value, name)


def as_data(value: Any, tensor: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Convert an entry to JSON data, with a type label for each value; `from_data` is the inverse.

    Args:
        tensor: returns the JSON data for a tensor.
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
        AttributeError, KeyError, TypeError, ValueError: the data is malformed.
    """
    ((kind, value),) = data.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {name: from_data(part, tensor) for name, part in value.items()}
    if kind == "list":
        return [from_data(part, tensor) for part in value]
    return value
