"""Writes and moves files atomically."""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it to disk, and rename it to `path`.

    Raises:
        OSError: the disk is full or not writable; an existing file at `path` is not changed.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A writable file that is renamed to `path` at the end of the block, and deleted if the block raises.

    Raises:
        OSError: the disk is full or not writable; an existing file at `path` is not changed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        _replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _replace(temporary: str, path: Path) -> None:
    """Rename, with retries on Windows, where it fails while another process has the old file open."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            os.replace(temporary, path)
            return
        except PermissionError:
            time.sleep(0.1)
    os.replace(temporary, path)


def move_file(source: Path, target: Path) -> None:
    """Move a file atomically, even to another disk.

    Raises:
        OSError: the disk is full or not writable; both files are not changed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _replace(str(source), target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as content, atomic_file(target) as file:
            shutil.copyfileobj(content, file)
        source.unlink()


def is_whole_safetensors(path: Path) -> bool:
    """Whether a safetensors file has the length that its header says; its numbers are not looked at."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(length)) if length <= size else None
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + length + max(ends) == size
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return False


def write_json(path: Path, data: Any) -> None:
    """Write JSON; file names in it that are not UTF-8, and other unpaired surrogates, are escaped.

    Raises:
        OSError: see `write_atomically`.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a process that was killed."""
    for leftover in folder.rglob(".*.tmp"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
