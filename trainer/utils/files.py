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


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a process that was killed."""
    for leftover in folder.rglob(".*.tmp"):
        if leftover.is_file():
            leftover.unlink(missing_ok=True)
