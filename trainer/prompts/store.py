"""Files of encoded prompts (conditions), written while prompts are encoded, and read row by row.

Such a file is a safetensors file with two uint8 tensors: `data` is the concatenation of all tensors, and `index` is
JSON with the offset of each tensor and the prompt that it belongs to. A file of any size can therefore be written
sequentially with one batch in memory, and a row can be read without the rest.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..models.base import Conditions, filled, is_tokens
from ..models.comfy.conditions import EntryConditions, as_data, from_data
from ..utils.errors import BadInput
from ..utils.files import atomic_file
from .text import Key

_ALIGNMENT = 8
_HEADER = 512
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- writing


def write_conditions(
    path: Path, keys: list[Key], batches: Iterable[Conditions], *, announce: Callable[[int], None] = lambda size: None
) -> None:
    """Write batches of conditions while they are produced.

    Args:
        path: the file, which is created once all batches are written.
        keys: the prompt of each row.
        batches: iterable of `Conditions` or `EntryConditions`, with one row per key in total.
        announce: called after the first batch with the estimated size of the file in bytes; may raise.

    Raises:
        OSError: the disk is full or not writable.
        Exception: raised by `batches`. In both cases no file is left behind.
    """
    with atomic_file(path) as file:
        writer = _Writer(file)
        rows = 0
        for batch in batches:
            writer.add(batch)
            if rows == 0:
                announce(writer.size * len(keys) // len(batch))
            rows += len(batch)
        if rows != len(keys):
            raise ValueError(f"{rows} rows of conditions for {len(keys)} prompts")
        writer.finish(keys)


class _Writer:
    """Writes the data of a file, then its index and its header."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, 0
        self.batches: list[dict[str, Any]] = []
        self.known: dict[bytes, dict[str, Any]] = {}
        file.write(bytes(_HEADER))

    def add(self, batch: Conditions) -> None:
        if isinstance(batch, EntryConditions):
            for number in batch.index.tolist():
                self.batches.append({"rows": 1, "entry": as_data(batch.entries[number], self._once)})
        elif batch.lengths is None:
            self._add_tensors(batch)
        else:
            for row in range(len(batch)):
                (_, alone), *_ = batch.rows(torch.tensor([row])).by_length()
                self._add_tensors(alone)

    def _add_tensors(self, batch: Conditions) -> None:
        tensors = {name: self._write(value) for name, value in batch.tensors.items()}
        self.batches.append({"rows": len(batch), "tensors": tensors})

    def _once(self, value: Tensor) -> dict[str, Any]:
        """Write a tensor unless an equal one was written, such as a reference image shared by all prompts."""
        content = _content(value)
        digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + content).digest()
        if digest not in self.known:
            self.known[digest] = self._write(value)
        return self.known[digest]

    def _write(self, value: Tensor) -> dict[str, Any]:
        start, content = self.size, _content(value)
        self.file.write(content)
        self.file.write(bytes(-len(content) % _ALIGNMENT))
        self.size += len(content) + -len(content) % _ALIGNMENT
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "start": start}

    def finish(self, keys: list[Key]) -> None:
        index = json.dumps({"keys": keys, "batches": self.batches}).encode()
        self.file.write(index)
        end = self.size + len(index)
        entries = {
            "data": {"dtype": "U8", "shape": [self.size], "data_offsets": [0, self.size]},
            "index": {"dtype": "U8", "shape": [len(index)], "data_offsets": [self.size, end]},
        }
        self.file.seek(0)
        self.file.write(struct.pack("<Q", _HEADER - 8) + json.dumps(entries).encode().ljust(_HEADER - 8))


def _content(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


# ------------------------------------------------------------------------------------------------------------- reading


class ConditionsFile:
    """A file of conditions, open for reading.

    Attributes:
        keys: the prompt of each row.
        longest: by name, the largest size along dimension 1.

    Raises:
        BadInput: it cannot be read, or is not a conditions file.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            index = json.loads(self.file.get_tensor("index").numpy().tobytes())
            self.data = self.file.get_slice("data")
            self.keys: list[Key] = [(str(text), str(digest)) for text, digest in index["keys"]]
            self.batches: list[dict[str, Any]] = index["batches"]
            self.locations = [(batch, row) for batch, part in enumerate(self.batches) for row in range(part["rows"])]
            self.has_entries = any("entry" in batch for batch in self.batches)
            self.longest = _longest(self.batches)
            self.size = self.data.get_shape()[0]
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise BadInput(f"conditions file {path} cannot be read: {reason}") from error
        if len(self.locations) != len(self.keys):
            raise BadInput(f"conditions file {path} is damaged: it does not have one row per prompt")

    def entry(self, row: int, known: dict[int, Tensor]) -> dict[str, Any]:
        """A row of conditions of a ComfyUI graph.

        Args:
            known: cache of the tensors that have been read, by offset.
        """
        data = self.batches[self.locations[row][0]]["entry"]
        return self._checked(lambda: from_data(data, lambda part: self._read_once(part, known)))

    def tensors(self, row: int) -> dict[str, Tensor]:
        """A row of conditions, `[1, ...]` by name."""
        batch, number = self.locations[row]
        parts = self.batches[batch]["tensors"]
        return self._checked(lambda: {name: self._read(part, number) for name, part in parts.items()})

    def _checked(self, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return read()
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise BadInput(f"conditions file {self.path} is damaged: {error}") from error

    def _read_once(self, part: dict[str, Any], known: dict[int, Tensor]) -> Tensor:
        if part["start"] not in known:
            known[part["start"]] = self._read(part)
        return known[part["start"]]

    def _read(self, part: dict[str, Any], row: int | None = None) -> Tensor:
        """A tensor, or one row of it, `[1, ...]`."""
        dtype, shape, start = _DTYPES[part["dtype"]], list(part["shape"]), part["start"]
        if row is not None:
            shape[0] = 1
        size = dtype.itemsize
        for length in shape:
            size *= length
        start += size * (row or 0)
        if not (0 <= start <= start + size <= self.size):
            raise ValueError(f"a tensor lies outside the data, at byte {start}")
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        return self.data[start : start + size].clone().view(dtype).view(shape)


def _longest(batches: list[dict[str, Any]]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for batch in batches:
        for name, part in batch.get("tensors", {}).items():
            longest[name] = max(longest.get(name, 0), part["shape"][1])
    return longest


@dataclass(frozen=True)
class StoredConditions:
    """Conditions of N prompts on disk; rows are read on demand.

    Attributes:
        files: the conditions files, all of the same kind.
        locations: for each row, the index of its file and the row within the file.
    """

    files: tuple[ConditionsFile, ...]
    locations: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, files: list[ConditionsFile]) -> "StoredConditions":
        """All rows of the files, in order."""
        return cls(tuple(files), tuple((f, row) for f, file in enumerate(files) for row in range(len(file.keys))))

    def __len__(self) -> int:
        return len(self.locations)

    @property
    def keys(self) -> list[Key]:
        return [self.files[file].keys[row] for file, row in self.locations]

    @property
    def has_entries(self) -> bool:
        """Whether these are `EntryConditions`, of a ComfyUI graph."""
        return any(file.has_entries for file in self.files)

    @property
    def is_masked(self) -> bool:
        """Whether the model gets an attention mask for padding tokens."""
        return any("mask" in file.longest for file in self.files)

    @property
    def is_ragged(self) -> bool:
        """Whether the model gets different numbers of tokens for different rows."""
        shapes = {tuple(sorted(_longest([batch]).items())) for file in self.files for batch in file.batches}
        return not self.is_masked and len(shapes) > 1

    def select(self, rows: list[int]) -> "StoredConditions":
        """Select rows without reading them."""
        return StoredConditions(self.files, tuple(self.locations[row] for row in rows))

    def rows(self, index: Tensor) -> Conditions:
        """Read the rows of `index` (`[N]` long) to the CPU; each distinct row is read once.

        Raises:
            BadInput: the file is damaged.
        """
        chosen, inverse = index.cpu().unique(return_inverse=True)
        locations = [self.locations[row] for row in chosen.tolist()]
        if self.has_entries:
            known: dict[int, dict[int, Tensor]] = {number: {} for number in range(len(self.files))}
            entries = [self.files[file].entry(row, known[file]) for file, row in locations]
            return EntryConditions.of(entries).rows(inverse)
        return self._stacked([self.files[file].tensors(row) for file, row in locations]).rows(inverse)

    def _stacked(self, rows: list[dict[str, Tensor]]) -> Conditions:
        """Concatenate rows, padded with zeros.

        With a mask, rows are padded to the longest row of all files, so that a prompt's prediction does not depend on
        the other prompts of a batch.
        """
        tensors = {}
        for name in rows[0]:
            shown = [row[name] for row in rows]
            length = max(value.shape[1] for value in shown)
            if self.is_masked:
                length = max(file.longest.get(name, 0) for file in self.files)
            tensors[name] = torch.cat([filled(value, length) for value in shown])
        return Conditions(tensors, None if self.is_masked else _lengths(rows))


def _lengths(rows: list[dict[str, Tensor]]) -> Tensor | None:
    """Number of tokens of each row; None if all are equal."""
    found = [max((v.shape[1] for name, v in row.items() if is_tokens(name, v)), default=0) for row in rows]
    return torch.tensor(found) if len(set(found)) > 1 else None


def open_conditions(*paths: Path) -> StoredConditions:
    """The rows of several conditions files, in order.

    Raises:
        BadInput: a file cannot be read, or is not a conditions file.
    """
    return StoredConditions.of([ConditionsFile(path) for path in paths])
