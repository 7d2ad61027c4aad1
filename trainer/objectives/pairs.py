"""Preference pairs, a better and a worse image with their prompt, for offline preference objectives."""

import csv
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..prompts.text import check_text, clean
from ..utils.documents import read_text
from ..utils.errors import BadInput
from ..utils.media import check_image
from ..votes.store import Collection

FEWEST = 2
"""Smallest number of pairs for training."""
COLUMNS = {"better", "worse", "prompt"}


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt, of which the first is preferred."""

    better: Path
    worse: Path
    prompt: str


@dataclass(frozen=True)
class Pairs:
    """
    Attributes:
        name: name of the collection or file.
        pairs: usable pairs, in the order of the votes.
        left_out: number of unusable votes, by reason.
    """

    name: str
    pairs: list[Pair]
    left_out: dict[str, int]

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts."""
        return list(dict.fromkeys(pair.prompt for pair in self.pairs))

    @property
    def files(self) -> list[Path]:
        """The distinct image files."""
        return list(dict.fromkeys(file for pair in self.pairs for file in (pair.better, pair.worse)))

    def digest(self) -> str:
        """A digest of the pairs and their order, independent of the location of the files."""
        rows = [(pair.better.name, pair.worse.name, pair.prompt) for pair in self.pairs]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def sentence(self) -> str:
        """A clause with the number of pairs, and of votes that are not used, by reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.pairs)} pairs of {self.name}" + (f"; not used: {reasons}" if reasons else "")


def read_pairs(path: Path) -> Pairs:
    """The pairs of a collection of votes, or of a CSV file with the columns `better`, `worse` and `prompt`.

    Votes without a winner, votes on images of different prompts or without a prompt, and images that are missing or
    cannot be read are ignored and counted. Image names of a CSV file are relative to its folder.

    Raises:
        BadInput: the collection or file does not exist, or has too few usable pairs.
    """
    rows, left_out = _rows_of_file(path) if path.is_file() else _rows_of_collection(path)
    sound: dict[Path, bool] = {}
    pairs = []
    for pair in rows:
        if not clean(pair.prompt):
            left_out["without a prompt"] += 1
        elif all(_is_sound(file, sound) for file in (pair.better, pair.worse)):
            pairs.append(Pair(pair.better, pair.worse, clean(pair.prompt)))
        else:
            left_out["with an image that is missing or cannot be read"] += 1
    found = Pairs(path.name, pairs, dict(left_out))
    if len(pairs) < FEWEST:
        raise BadInput(
            f"there are {found.sentence()}: at least {FEWEST} are needed, and a few dozen to be useful. A pair is a "
            "vote with a winner on two images of one prompt"
        )
    for prompt in found.prompts:
        check_text(prompt, f"{path.name}: a prompt")
    return found


def _is_sound(file: Path, known: dict[Path, bool]) -> bool:
    """Whether the file is an image, by its header. Symbolic links are refused, because they may point outside."""
    if file not in known:
        try:
            check_image(file)
            known[file] = not file.is_symlink()
        except BadInput:
            known[file] = False
    return known[file]


def _rows_of_collection(folder: Path) -> tuple[list[Pair], Counter]:
    collection = Collection(folder)
    prompts = {item.image: item.prompt for item in collection.items()[0]}
    vote_log, left_out, rows = collection.vote_log(), Counter(), []
    left_out["votes on a line that cannot be read or names an image that is missing"] = len(vote_log.complaints)
    for vote in vote_log.votes:
        if vote.kind != "winner":
            left_out["ties" if vote.kind == "tie" else "skipped pairs"] += 1
        elif prompts[vote.better] != prompts[vote.worse]:
            left_out["between images of different prompts"] += 1
        else:
            rows.append(Pair(collection.images / vote.better, collection.images / vote.worse, prompts[vote.better]))
    return rows, +left_out


def _rows_of_file(path: Path) -> tuple[list[Pair], Counter]:
    if path.suffix.lower() != ".csv":
        raise BadInput(f"{path} is neither a collection of votes nor a .csv file of pairs")
    table = csv.DictReader(io.StringIO(read_text(path, str(path)), newline=""), strict=True)
    try:
        if not set(table.fieldnames or ()) >= COLUMNS:
            raise BadInput(f"{path} must have the columns better, worse and prompt")
        rows = [[row[name] or "" for name in ("better", "worse", "prompt")] for row in table]
    except csv.Error as error:
        raise BadInput(f"{path} line {max(table.reader.line_num, 1)} is not CSV: {error}") from error
    return [Pair(path.parent / better, path.parent / worse, prompt) for better, worse, prompt in rows], Counter()
