"""Conditions in files: written while prompts are encoded, read row by row when they are needed.

A file of conditions is a safetensors file with two tensors of bytes: `data` holds all tensors one after the other, and
`index` is JSON that says where each of them lies and which prompt it belongs to. So a file of any size is written from
beginning to end with one piece in memory, and a row is read without the rest.
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
    path: Path, keys: list[Key], pieces: Iterable[Conditions], *, announce: Callable[[int], None] = lambda size: None
) -> None:
    """Write pieces of conditions as they come.

    Args:
        path: the file; it appears once all pieces are written.
        keys: the prompt of every row.
        pieces: iterable of `Conditions` or of `EntryConditions`, together one row per key.
        announce: is told the size that the file will have, in bytes, after the first piece; it may raise.

    Raises:
        OSError: the disk is full or not writable.
        Exception: what making the pieces raises. In either case nothing is left behind.
    """
    with atomic_file(path) as file:
        writer = _Writer(file)
        rows = 0
        for piece in pieces:
            writer.add(piece)
            if rows == 0:
                announce(writer.size * len(keys) // len(piece))
            rows += len(piece)
        if rows != len(keys):
            raise ValueError(f"{rows} rows of conditions for {len(keys)} prompts")
        writer.finish(keys)


class _Writer:
    """The data of a file, then its index and its header."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, 0
        self.pieces: list[dict[str, Any]] = []
        self.known: dict[bytes, dict[str, Any]] = {}
        file.write(bytes(_HEADER))

    def add(self, piece: Conditions) -> None:
        if isinstance(piece, EntryConditions):
            for number in piece.index.tolist():
                self.pieces.append({"rows": 1, "entry": as_data(piece.entries[number], self._once)})
        elif piece.lengths is None:
            self._add_tensors(piece)
        else:
            for row in range(len(piece)):
                (_, alone), *_ = piece.rows(torch.tensor([row])).by_length()
                self._add_tensors(alone)

    def _add_tensors(self, piece: Conditions) -> None:
        tensors = {name: self._write(value) for name, value in piece.tensors.items()}
        self.pieces.append({"rows": len(piece), "tensors": tensors})

    def _once(self, value: Tensor) -> dict[str, Any]:
        """Write a tensor where it is not there yet: a reference image, for one, is the same for every prompt."""
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
        index = json.dumps({"keys": keys, "pieces": self.pieces}).encode()
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
        keys: the prompt of every row.
        longest: by name, the largest size along dimension 1.

    Raises:
        BadInput: it cannot be read, or is not a file of conditions.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            index = json.loads(self.file.get_tensor("index").numpy().tobytes())
            self.data = self.file.get_slice("data")
            self.keys: list[Key] = [(str(text), str(digest)) for text, digest in index["keys"]]
            self.pieces: list[dict[str, Any]] = index["pieces"]
            self.locations = [(piece, row) for piece, part in enumerate(self.pieces) for row in range(part["rows"])]
            self.has_entries = any("entry" in piece for piece in self.pieces)
            self.longest = _longest(self.pieces)
            self.size = self.data.get_shape()[0]
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise BadInput(f"conditions file {path} cannot be read: {reason}") from error
        if len(self.locations) != len(self.keys):
            raise BadInput(f"conditions file {path} does not hold one row per prompt")

    def entry(self, row: int, known: dict[int, Tensor]) -> dict[str, Any]:
        """A row of conditions of a ComfyUI graph.

        Args:
            known: tensors that have been read, by their location; new ones are added.
        """
        data = self.pieces[self.locations[row][0]]["entry"]
        return self._checked(lambda: from_data(data, lambda part: self._read_once(part, known)))

    def tensors(self, row: int) -> dict[str, Tensor]:
        """A row of conditions, `[1, ...]` by name."""
        piece, number = self.locations[row]
        parts = self.pieces[piece]["tensors"]
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


def _longest(pieces: list[dict[str, Any]]) -> dict[str, int]:
    longest: dict[str, int] = {}
    for piece in pieces:
        for name, part in piece.get("tensors", {}).items():
            longest[name] = max(longest.get(name, 0), part["shape"][1])
    return longest


@dataclass(frozen=True)
class StoredConditions:
    """Conditions of N prompts that stay in files; what is selected is read.

    Attributes:
        files: of one kind.
        locations: of each row, its file and its row there.
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
        """Whether a mask tells the model which tokens are filling."""
        return any("mask" in file.longest for file in self.files)

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in the number of tokens that the model is given."""
        shapes = {tuple(sorted(_longest([piece]).items())) for file in self.files for piece in file.pieces}
        return not self.is_masked and len(shapes) > 1

    def select(self, rows: list[int]) -> "StoredConditions":
        """Some of the rows, without reading them."""
        return StoredConditions(self.files, tuple(self.locations[row] for row in rows))

    def rows(self, index: Tensor) -> Conditions:
        """Read the rows of `index` (`[N]` long), each once; on the CPU.

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
        """Rows one under the other, filled up with zeros.

        Under a mask always to the longest of all rows, so that a prompt's prediction does not depend on the others.
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
    """Tokens of each row, where they differ."""
    found = [max((v.shape[1] for name, v in row.items() if is_tokens(name, v)), default=0) for row in rows]
    return torch.tensor(found) if len(set(found)) > 1 else None


def open_conditions(*paths: Path) -> StoredConditions:
    """The rows of files of conditions, one file after the other.

    Raises:
        BadInput: one cannot be read, or is not a file of conditions.
    """
    return StoredConditions.of([ConditionsFile(path) for path in paths])
