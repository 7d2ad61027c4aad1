"""Collections of images and votes on disk: append-only, and safe for concurrent processes.

A collection is a folder:

- `images/`: PNG files named by a hash of their pixels, so that equal images are stored once.
- `items.jsonl`: a line per image, `{"image": "3f2a....png", "prompt": "a red fox", "source": "run fox"}`.
- `votes.csv`: a row per vote, with the columns `better,worse,tie,skip,undo,id,time`. Where `tie` or `skip` is 1,
  the order of `better` and `worse` has no meaning. A row with `undo` cancels the vote with that id.

Rows are only ever appended, under a file lock, and are on disk before a call returns. Every vote carries an id that
the caller has chosen. A repeated id is counted once, so a call that got no answer can be repeated. A row that cannot be
read is ignored. A hand-written `votes.csv` needs only the columns `better` and `worse`.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from ..utils.errors import BadInput
from ..utils.files import write_atomically
from ..utils.media import png
from ..utils.names import check_name
from . import records
from .records import COLUMNS, CollectedImage, Undo, Vote

if TYPE_CHECKING:
    from PIL import Image

LONGEST_SIDE = 2048
"""Longest side of stored images in pixels; larger images are scaled down."""
LONGEST_PROMPT = 10_000
PATIENCE = 30.0
"""Seconds to wait for the lock of a collection."""
BIN = ".bin"
"""Folder of deleted collections."""


@dataclass(frozen=True)
class Added:
    """Result of adding images to a collection.

    Attributes:
        names: file names of the images in the collection, in the order given.
        new: number of images that were not in the collection before.
    """

    names: list[str]
    new: int


@dataclass
class VoteLog:
    """The content of `votes.csv`.

    Attributes:
        votes: votes that were not undone, oldest first.
        ids: all votes and undos by id, including votes that were undone.
        complaints: a warning for each row that was ignored.
    """

    votes: list[Vote] = field(default_factory=list)
    ids: dict[str, Vote | Undo] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Number of votes with a winner, of ties, and of skipped pairs."""
        kinds = [vote.kind for vote in self.votes]
        return {"winners": kinds.count("winner"), "ties": kinds.count("tie"), "skips": kinds.count("skip")}


class Collection:
    """A folder of images and votes.

    Raises:
        BadInput: the folder is not a collection.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self.images = self.folder / "images"
        self.items_file, self.votes_file = self.folder / "items.jsonl", self.folder / "votes.csv"
        if self.images.is_symlink() or not self.images.is_dir():
            raise BadInput(f"{self.folder} is not a collection of votes: it has no folder named images")

    # ------------------------------------------------------------------------------------------------------- reading

    def files(self) -> set[str]:
        """Names of the image files. Symbolic links are ignored, because they may point outside."""
        try:
            entries = os.scandir(self.images)
        except FileNotFoundError as error:
            raise BadInput(f"the collection {self.name!r} has been deleted") from error
        with entries:
            return {e.name for e in entries if e.is_file(follow_symlinks=False) and records.is_image_name(e.name)}

    def image_file(self, name: object) -> Path:
        """The file of an image.

        Raises:
            BadInput: the name is invalid, or the file does not exist or is a symbolic link.
        """
        if not isinstance(name, str) or not records.is_image_name(name):
            raise BadInput(f"image {str(name)[:80]!r} is not the name of an image file")
        path = self.images / name
        if path.is_symlink() or not path.is_file():
            raise BadInput(f"image {name!r} is not in the collection {self.name!r}")
        return path

    def items(self) -> tuple[list[CollectedImage], list[str]]:
        """The images in the order in which they were added, and a warning for each line that was ignored.

        Image files without a line in items.jsonl come last, with an empty prompt.
        """
        found, complaints = self._listed()
        rest = sorted(self.files() - {item.image for item in found})
        return [*found, *(CollectedImage(name, "", "") for name in rest)], complaints

    def _listed(self) -> tuple[list[CollectedImage], list[str]]:
        found: dict[str, CollectedImage] = {}
        complaints, files = [], self.files()
        for number, line in records.lines(self.items_file):
            item, reason = records.read_item(line, files)
            if item is None:
                complaints.append(f"items.jsonl, line {number} is ignored: {reason}")
            else:
                found.setdefault(item.image, item)
        return list(found.values()), complaints

    def vote_log(self) -> VoteLog:
        """Read `votes.csv`."""
        found, files, rows = VoteLog(), self.files(), list(records.lines(self.votes_file))
        columns = records.header(rows[0][1]) if rows else None
        for number, line in rows if columns is None else rows[1:]:
            row, reason = records.read_row(line, columns or COLUMNS, files)
            if row is None:
                found.complaints.append(f"votes.csv, line {number} is ignored: {reason}")
            elif row.id == "":
                found.votes.append(row)
            elif row.id not in found.ids:
                found.ids[row.id] = row
                found.votes += [row] if isinstance(row, Vote) else []
        undone = {row.vote for row in found.ids.values() if isinstance(row, Undo)}
        found.votes = [vote for vote in found.votes if vote.id == "" or vote.id not in undone]
        return found

    # ------------------------------------------------------------------------------------------------------- writing

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the collection for writing.

        Raises:
            BadInput: the lock was not free in time, or the collection has been deleted.
        """
        with locked(self.folder):
            if not self.images.is_dir():
                raise BadInput(f"the collection {self.name!r} has been deleted")
            yield

    def add(self, images: Iterable[tuple["Image.Image", str, str]]) -> Added:
        """Add images. An image that is already in the collection keeps its prompt.

        Args:
            images: image, prompt and source of each.

        Raises:
            OSError: the disk is full or not writable.
        """
        given = [
            CollectedImage(self._write(image), prompt[:LONGEST_PROMPT], source) for image, prompt, source in images
        ]
        records.flush_folder(self.images)
        new: dict[str, CollectedImage] = {}
        with self.lock():
            known = {item.image for item in self._listed()[0]}
            for item in given:
                if item.image not in known:
                    new.setdefault(item.image, item)
            records.append(self.items_file, [json.dumps(vars(item)) for item in new.values()])
        return Added([item.image for item in given], len(new))

    def _write(self, image: "Image.Image") -> str:
        """Write an image file unless it exists; returns its name."""
        image = image.convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        path = self.images / f"{digest[:24]}.png"
        if not path.exists():
            write_atomically(path, png(image))
        return path.name

    def record(self, votes: Sequence[Vote]) -> int:
        """Append votes; returns the number of votes whose id is new.

        Raises:
            BadInput: an image is not in the collection, or an id is invalid or belongs to another vote. In this case no
                vote is appended.
            OSError: the disk is full or not writable.
        """
        files = self.files()
        for vote in votes:
            records.check_id(vote.id)
            if vote.better == vote.worse:
                raise BadInput("a vote needs two different images")
            for name in (vote.better, vote.worse):
                if name not in files:
                    raise BadInput(f"image {str(name)[:80]!r} is not in the collection {self.name!r}")
        new: dict[str, Vote] = {}
        with self.lock():
            known = self.vote_log().ids
            for vote in votes:
                if (known | new).get(vote.id, vote) != vote:
                    raise BadInput(f"id {vote.id!r} belongs to another vote: choose a new id for every vote")
                if vote.id not in known:
                    new[vote.id] = vote
            self._append_rows([_row(vote) for vote in new.values()])
        return len(new)

    def undo(self, id: str, vote: str | None = None) -> str | None:
        """Cancel a vote; returns its id, or None if there is no vote to cancel.

        Args:
            id: id of this undo; repeating a call with it has no further effect.
            vote: id of the vote; None for the newest vote that was not undone.

        Raises:
            BadInput: there is no vote with that id, or `id` is invalid or already in use.
            OSError: the disk is full or not writable.
        """
        records.check_id(id)
        with self.lock():
            vote_log = self.vote_log()
            known = vote_log.ids.get(id)
            if known is not None:
                if not isinstance(known, Undo) or vote not in (None, known.vote):
                    raise BadInput(f"id {id!r} belongs to another vote: choose a new id for every undo")
                return known.vote
            if vote is None:
                vote = next((one.id for one in reversed(vote_log.votes) if one.id), None)
            elif not isinstance(vote_log.ids.get(vote), Vote):
                raise BadInput(f"there is no vote with the id {str(vote)[:80]!r}")
            if vote is not None:
                self._append_rows([{"undo": vote, "id": id}])
        return vote

    def _append_rows(self, rows: list[dict[str, str]]) -> None:
        """Append rows, given as values by column, with the current time."""
        if not rows:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        found = list(records.lines(self.votes_file))
        columns = (records.header(found[0][1]) if found else None) or COLUMNS
        if missing := tuple(column for column in COLUMNS if column not in columns):
            # A hand-written file: rewrite it once, with the missing columns added.
            columns += missing
            wider = [records.csv_line(columns), *(line + "," * len(missing) for _, line in found[1:])]
            write_atomically(self.votes_file, "".join(f"{line}\n" for line in wider))
        new = [records.csv_line((row | {"time": now}).get(column, "") for column in columns) for row in rows]
        records.append(self.votes_file, new if found else [records.csv_line(COLUMNS), *new])


def _row(vote: Vote) -> dict[str, str]:
    marks = {kind: "1" if vote.kind == kind else "" for kind in ("tie", "skip")}
    return {"better": vote.better, "worse": vote.worse, **marks, "id": vote.id}


# ---------------------------------------------------------------------------------------------- collections by name


def names(root: Path) -> list[str]:
    """Names of the collections in a folder, sorted."""
    return sorted(path.parent.name for path in root.glob("*/images") if _exists(root, path.parent.name))


def _exists(root: Path, name: str) -> bool:
    try:
        folder = root / check_name(name)
    except BadInput:
        return False
    return (folder / "images").is_dir() and not folder.is_symlink() and not (folder / "images").is_symlink()


def find(root: Path, name: str) -> Collection:
    """
    Raises:
        BadInput: the name is invalid, or there is no such collection.
    """
    if not _exists(root, check_name(name, "collection")):
        known = ", ".join(names(root)) or "none"
        raise BadInput(f"there is no collection named {name!r}; there are: {known}")
    return Collection(root / name)


def create(root: Path, name: str) -> Collection:
    """Create a collection, or open an existing one.

    Raises:
        BadInput: the name is invalid, or the folder exists and is not a collection.
        OSError: the disk is not writable.
    """
    folder = root / check_name(name, "collection")
    if (folder.is_symlink() or folder.exists()) and not _exists(root, name):
        raise BadInput(f"collection {name!r} cannot be created: {folder} exists and is not a collection")
    with locked(folder):
        (folder / "images").mkdir(parents=True, exist_ok=True)
    return find(root, name)


def delete(root: Path, name: str) -> None:
    """Move a collection to the folder of deleted collections; `restore` is the inverse.

    Raises:
        BadInput: there is no collection of that name.
    """
    folder = find(root, name).folder
    with locked(folder):
        if not folder.is_dir():
            return
        (root / BIN).mkdir(exist_ok=True)
        # The time makes the name unique, and tells `restore` which collection was deleted last.
        folder.rename(root / BIN / f"{name}.{time.time_ns()}")


def restore(root: Path, name: str) -> Collection:
    """Restore the most recently deleted collection of that name.

    Raises:
        BadInput: there is no deleted collection of that name, or a collection of that name exists.
    """
    folder = root / check_name(name, "collection")
    with locked(folder):
        if folder.exists():
            raise BadInput(f"there is already a collection named {name!r}: delete or rename it first")
        deleted = [path for path in (root / BIN).glob("*") if path.stem == name and path.suffix[1:].isdigit()]
        if not deleted:
            raise BadInput(f"there is no deleted collection named {name!r}")
        max(deleted, key=lambda path: int(path.suffix[1:])).rename(folder)
    return find(root, name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a collection. The lock file is outside the folder, so that the folder can be moved.

    Raises:
        BadInput: the lock was not free within `PATIENCE` seconds.
    """
    locks = folder.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{folder.name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=0.01)
    except Timeout as error:
        raise BadInput(f"the collection {folder.name!r} is in use by another process: try again") from error
    try:
        yield
    finally:
        lock.release()
