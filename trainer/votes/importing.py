"""Imports images and votes from folders into a collection, and exports a collection as a ZIP file."""

import csv
import hashlib
import io
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import BadInput
from ..utils.media import open_image
from .records import SUFFIXES, Vote
from .store import Collection

if TYPE_CHECKING:
    from PIL import Image

PAIRS_PER_FAVOURITE = 4
MOST_FILES = 10_000
_BATCH = 32
"""Images added per batch; an interrupted import keeps the batches that were added."""


@dataclass
class Imported:
    """Result of an import.

    Attributes:
        new, known: number of images that were added, and that were in the collection already.
        votes: number of votes that were added.
        complaints: a warning for each file that was skipped.
    """

    new: int = 0
    known: int = 0
    votes: int = 0
    complaints: list[str] = field(default_factory=list)


def import_folder(collection: Collection, folder: Path, prompt: str = "", source: str = "") -> Imported:
    """Add the images of a folder, without subfolders.

    Args:
        prompt: prompt of the images that have no text file of the same name, such as `fox.txt` for `fox.png`.
        source: where the images come from, in words; by default the name of the folder.

    Raises:
        BadInput: the folder does not exist or has no images.
        OSError: the disk is full or not writable.
    """
    result = Imported()
    _add(collection, _image_files(folder), prompt, source or folder.name, result)
    return result


def import_favourites(collection: Collection, better: Path, worse: Path, prompt: str = "") -> Imported:
    """Add the images of two folders, and votes for those of the first over those of the second.

    Each image of `better` gets votes over up to `PAIRS_PER_FAVOURITE` images of `worse`, which are used about equally
    often. Importing the same folders again adds nothing.

    Raises:
        BadInput: a folder does not exist or has no images, or an image is in both folders.
        OSError: the disk is full or not writable.
    """
    result = Imported()
    files = _image_files(better), _image_files(worse)
    liked = _add(collection, files[0], prompt, f"favourites {better.name}", result)
    others = _add(collection, files[1], prompt, f"others {worse.name}", result)
    if shared := set(liked) & set(others):
        raise BadInput(f"{len(shared)} images are in both {better.name} and {worse.name}: remove them from one folder")
    pairs = balanced_pairs(sorted(set(liked)), sorted(set(others)))
    result.votes = collection.record([Vote(*pair, id=f"favourite-{_digest(pair)}") for pair in pairs])
    return result


def balanced_pairs(better: list[str], worse: list[str]) -> list[tuple[str, str]]:
    """Pair each element of `better` with up to `PAIRS_PER_FAVOURITE` of `worse`, using those about equally often."""
    count = len(worse)
    # A step that is coprime to the length visits each element of `worse` once before repeating.
    step = next((n for n in range(len(better), len(better) + count + 1) if math.gcd(n, count) == 1), 0)
    turns = range(min(PAIRS_PER_FAVOURITE, count))
    return [(one, worse[(index + turn * step) % count]) for turn in turns for index, one in enumerate(better)]


def _digest(pair: tuple[str, str]) -> str:
    return hashlib.sha256(" ".join(pair).encode()).hexdigest()[:24]


def export(collection: Collection, file: Path) -> None:
    """Write a ZIP file with `images/`, `items.jsonl`, and `votes.csv` with the valid votes and their prompts.

    Raises:
        OSError: the disk is full or not writable; an existing file is not changed.
    """
    items, votes = collection.items()[0], collection.vote_log().votes
    prompts = {item.image: item.prompt for item in items}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["better", "worse", "tie", "skip", "prompt"])
    for vote in votes:
        marks = [int(vote.kind == kind) for kind in ("tie", "skip")]
        writer.writerow([vote.better, vote.worse, *marks, prompts.get(vote.better, "")])
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("votes.csv", table.getvalue())
            archive.writestr("items.jsonl", "".join(json.dumps(vars(item)) + "\n" for item in items))
            for name in sorted({item.image for item in items} | {n for v in votes for n in (v.better, v.worse)}):
                archive.write(collection.images / name, f"images/{name}")
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ------------------------------------------------------------------------------------------------------------- reading


def _image_files(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name. Symbolic links are ignored, because they may point outside.

    Raises:
        BadInput: the folder does not exist, or has no images or too many.
    """
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder.name!r} to import images from")
    with os.scandir(folder) as entries:
        found = sorted(
            e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file(follow_symlinks=False)
        )
    if not found:
        raise BadInput(f"folder {folder.name!r} has no images: {', '.join(SUFFIXES)} files can be imported")
    if len(found) > MOST_FILES:
        raise BadInput(f"folder {folder.name!r} has {len(found)} images: import at most {MOST_FILES} at a time")
    return [folder / name for name in found]


def _add(collection: Collection, files: list[Path], prompt: str, source: str, result: Imported) -> list[str]:
    """Add image files to the collection, and to the count; returns their names in it."""
    names: list[str] = []
    for start in range(0, len(files), _BATCH):
        added = collection.add(_read(files[start : start + _BATCH], prompt, source, result.complaints))
        result.new += added.new
        result.known += len(added.names) - added.new
        names += added.names
    if not names:
        raise BadInput(f"no image of {files[0].parent.name!r} can be read: {result.complaints[-1]}")
    return names


def _read(
    files: list[Path], prompt: str, source: str, complaints: list[str]
) -> Iterator[tuple["Image.Image", str, str]]:
    for file in files:
        try:
            image = open_image(file, file.name)
        except BadInput as error:
            complaints.append(f"{file.name} was skipped: {error}")
            continue
        yield image, _caption(file) or prompt, f"{source}: {file.name}"


def _caption(file: Path) -> str:
    """The content of the `.txt` file of the same name as an image; empty if there is none."""
    text = file.with_suffix(".txt")
    if text.is_symlink() or not text.is_file():
        return ""
    with text.open("rb") as stream:
        return stream.read(40_000).decode("utf-8-sig", "replace").strip()
