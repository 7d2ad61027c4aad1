"""Reads and appends the lines of a collection's files, items.jsonl and votes.csv."""

import csv
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..utils.errors import BadInput

COLUMNS = ("better", "worse", "tie", "skip", "undo", "id", "time")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGE = re.compile(r"\w[\w .()+-]{0,120}", re.ASCII)
_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

Kind = Literal["winner", "tie", "skip"]


@dataclass(frozen=True)
class CollectedImage:
    """An image of a collection.

    Attributes:
        image: its file name in `images/`.
        source: where it came from, in words.
    """

    image: str
    prompt: str
    source: str


@dataclass(frozen=True)
class Vote:
    """A vote on a pair. For ties and skipped pairs the order of `better` and `worse` has no meaning.

    Attributes:
        id: empty in a hand-written file.
    """

    better: str
    worse: str
    kind: Kind = "winner"
    id: str = ""


@dataclass(frozen=True)
class Undo:
    """Cancels a vote.

    Attributes:
        vote: id of the vote.
        id: id of the undo itself.
    """

    vote: str
    id: str


def is_image_name(name: str) -> bool:
    """Whether it is a valid image file name, without path separators."""
    return _IMAGE.fullmatch(name) is not None and name.lower().endswith(SUFFIXES) and ".." not in name


def check_id(id: object) -> None:
    """Raise BadInput unless it is a valid id for a vote."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise BadInput(f"id {str(id)[:80]!r} is invalid: use 1 to 64 letters, digits, '-', '_' and '.'")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers, counted from 1; none if the file does not exist."""
    if not path.is_file() or path.is_symlink():
        return
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig", "replace").split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def header(line: str) -> tuple[str, ...] | None:
    """The column names, if the line is a header."""
    columns = tuple(name.strip() for name in line.split(","))
    return columns if {"better", "worse"} <= set(columns) else None


def read_row(line: str, columns: tuple[str, ...], files: set[str]) -> tuple[Vote | Undo | None, str]:
    """Parse a row of `votes.csv`; returns None and the reason if it is invalid.

    Args:
        columns: column names of the file.
        files: names of the images in the collection.
    """
    try:
        values = next(csv.reader([line], strict=True))
    except csv.Error as error:
        return None, f"it is not CSV ({error})"
    if len(values) != len(columns):
        return None, f"it has {len(values)} columns, but the header has {len(columns)}"
    row = {column: value.strip() for column, value in zip(columns, values, strict=True)}
    if row.get("id") and not _ID.fullmatch(row["id"]):
        return None, f"{row['id'][:80]!r} is not a valid id"
    if row.get("undo"):
        sound = row.get("id") and not row["better"] and not row["worse"]
        return (Undo(row["undo"], row["id"]), "") if sound else (None, "an undo row must have an id and no images")
    marks = {kind: row.get(kind, "") for kind in ("tie", "skip")}
    if any(mark not in ("", "0", "1") for mark in marks.values()) or marks["tie"] == marks["skip"] == "1":
        return None, "tie and skip must be 1, 0 or empty, and not both 1"
    if row["better"] == row["worse"]:
        return None, "both images are the same"
    for name in (row["better"], row["worse"]):
        if name not in files:
            return None, f"there is no image {name[:80]!r}"
    kind: Kind = "tie" if marks["tie"] == "1" else "skip" if marks["skip"] == "1" else "winner"
    return Vote(row["better"], row["worse"], kind, row.get("id", "")), ""


def read_item(line: str, files: set[str]) -> tuple[CollectedImage | None, str]:
    """Parse a line of `items.jsonl`; returns None and the reason if it is invalid."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "it is not JSON"
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        return None, "it has no image name"
    if record["image"] not in files:
        return None, f"there is no image {record['image'][:80]!r}"
    prompt, source = record.get("prompt", ""), record.get("source", "")
    if not isinstance(prompt, str) or not isinstance(source, str):
        return None, "prompt and source must be text"
    return CollectedImage(record["image"], prompt, source), ""


def csv_line(values: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ appending


def append(path: Path, lines: list[str]) -> None:
    """Append lines and flush them to disk, either all or none of them. The caller holds the lock.

    Raises:
        OSError: the disk is full or not writable.
    """
    created = not path.exists()
    with path.open("ab+", buffering=0) as file:  # a buffer would be flushed on closing, even after an error
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        whole = file.read(1) in (b"", b"\n")
        content = ("" if whole else "\n") + "".join(f"{line}\n" for line in lines)
        try:
            if file.write(content.encode()) != len(content.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    if created:
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush the directory entries of new files to disk; not needed on Windows."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
