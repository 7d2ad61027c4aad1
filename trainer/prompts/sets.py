"""The prompts of a run, with images and categories, from the run description or from files.

File formats, by extension:

- `.txt` or none: one prompt per line; blank lines and lines that begin with `#` are ignored.
- `.csv`: a header with `prompt` and, optionally, `category` and `image`.
- `.jsonl`: a JSON object per line with `prompt` and, optionally, `category` and `image`.
- `.json`: a list of such objects, or of strings.

`image` is the path of a first frame or source image, relative to the file.
"""

import csv
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EvaluationConfig, PromptsConfig, RunConfig
from ..utils.documents import parse_json, read_text
from ..utils.errors import BadInput, cut, shorten
from ..utils.media import check_image
from .forms import COLUMNS, is_json, other_form
from .text import Key, check_text, clean, first_repeated, prompt_lines, same_text, without_weights

if TYPE_CHECKING:
    from ..objectives import Objective

MAX_BYTES = 256 * 2**20
"""Largest size of a prompt file in bytes."""


@dataclass(frozen=True)
class PromptSet:
    """N prompts without duplicates. An edit instruction may occur several times with different images.

    Attributes:
        texts: the prompts for the diffusion model.
        categories: groups for evaluation; '' for none.
        images: first frame or source image of each prompt, or None.
        digests: digests of these image files, or of other conditions that are a prompt's own, or ''.
        scored: the prompts for reward models: `texts`, without ComfyUI's prompt weights if these are enabled.
    """

    texts: list[str]
    categories: list[str]
    images: list[Path | None] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.texts)
        for name, default in (("images", [None] * count), ("digests", [""] * count), ("scored", self.texts)):
            if not getattr(self, name):
                object.__setattr__(self, name, default)

    @property
    def keys(self) -> list[Key]:
        return list(zip(self.texts, self.digests, strict=True))

    def identity(self, number: int) -> tuple[str, ...]:
        """The key of a prompt for its evaluation noise, which does not depend on the set or on file locations."""
        digest = self.digests[number]
        return (self.texts[number], digest) if digest else (self.texts[number],)


def read_prompts(config: RunConfig, objective: "Objective | None" = None) -> tuple[PromptSet, PromptSet]:
    """Training prompts and held-out prompts, of which there may be none.

    Args:
        objective: which may bring training prompts of its own; None makes the one that the description names.

    Raises:
        BadInput: as `training_prompts`; or a held-out prompt is also trained on; or the objective's data is not there.
    """
    from ..objectives import make_objective

    weighted = config.prompts.weight_syntax
    training = (objective or make_objective(config)).training_prompts() or training_prompts(config.prompts)
    held_out = evaluation_prompts(config.evaluation, weighted)
    if weighted:
        without_weights(config.prompts.negative)
    check_held_out(training, held_out)
    return training, held_out


def check_held_out(training: PromptSet, held_out: PromptSet) -> None:
    """Raise BadInput if a held-out prompt (with its image, if any) is also a training prompt."""
    known = {(same_text(text), digest) for text, digest in training.keys}
    for text, digest in held_out.keys:
        if (same_text(text), digest) in known:
            raise BadInput(f"held-out prompt {shorten(text)} is also a training prompt: remove it from one of them")


def training_prompts(config: PromptsConfig) -> PromptSet:
    """The prompts a run trains on.

    Raises:
        BadInput: a file cannot be read, has no prompts or duplicates, or an image cannot be used.
    """
    return _prompts(config, "prompts", held_out=False, weighted=config.weight_syntax)


def evaluation_prompts(config: EvaluationConfig, weighted: bool = False) -> PromptSet:
    """The held-out prompts; may be none.

    Args:
        weighted: whether they may contain ComfyUI's prompt weights.
    """
    return _prompts(config, "evaluation", held_out=True, weighted=weighted)


def _prompts(config: PromptsConfig | EvaluationConfig, section: str, held_out: bool, weighted: bool) -> PromptSet:
    if config.shapes:
        return _shapes(config.shapes, held_out)
    if config.file:
        return _as_set(_read(Path(config.file), f"{section}.file {config.file}"), weighted)
    digests = config.digests or [""] * len(config.texts)
    entries = [_Entry(text, digest=digest) for text, digest in zip(config.texts, digests, strict=True)]
    return _as_set(entries, weighted)


def _shapes(per_task: int, held_out: bool) -> PromptSet:
    from ..shapes.prompts import balanced_prompts, parse

    texts = balanced_prompts(per_task, held_out)
    return PromptSet(texts, [parse(text).task for text in texts])


# --------------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Entry:
    text: str
    category: str = ""
    image: Path | None = None
    digest: str = ""


def _as_set(entries: list[_Entry], weighted: bool) -> PromptSet:
    texts = [entry.text for entry in entries]
    return PromptSet(
        texts,
        [entry.category for entry in entries],
        [entry.image for entry in entries],
        [entry.digest for entry in entries],
        [without_weights(text) for text in texts] if weighted else texts,
    )


def _read(path: Path, what: str) -> list[_Entry]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise BadInput(f"{what}: prompts are read from .txt (one per line), .csv, .jsonl and .json files")
    if path.exists() and not path.is_file():
        raise BadInput(f"{what} is not a file")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{what} is larger than {MAX_BYTES >> 20} MiB")
    entries = _READERS[suffix](read_text(path, what), path)
    if not entries:
        raise BadInput(f"{what} contains no prompts")
    if pair := first_repeated((same_text(entry.text), entry.digest) for entry in entries):
        numbers = f"entries {pair[0] + 1} and {pair[1] + 1}"
        with_image = " with the same image" if entries[pair[0]].image else ""
        raise BadInput(f"{what} repeats the prompt {shorten(entries[pair[0]].text)}{with_image} ({numbers})")
    return entries


def _read_lines(text: str, path: Path) -> list[_Entry]:
    if form := other_form(text):
        raise BadInput(f"{path} {form[0]}: {form[1]}; a .txt file must have one prompt per line")
    return [_Entry(line) for line in prompt_lines(text)]


def _read_json_lines(text: str, path: Path) -> list[_Entry]:
    images = _Images(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and not is_json(lines[0][1]) and is_json(text):
        raise BadInput(
            f"{path} is one JSON text over several lines: rename it to .json, or put one object on each line"
        )
    return [_json_entry(parse_json(line, f"{path} line {n}"), f"{path} line {n}", images) for n, line in lines]


def _read_json(text: str, path: Path) -> list[_Entry]:
    records, images = parse_json(text, str(path)), _Images(path)
    if not isinstance(records, list):
        raise BadInput(f"{path} is not a JSON list of prompts")
    return [_json_entry(record, f"{path} entry {n}", images) for n, record in enumerate(records, start=1)]


def _json_entry(record: Any, where: str, images: "_Images") -> _Entry:
    if isinstance(record, str):
        return _entry(record, "", "", where, images)
    if not isinstance(record, dict) or "prompt" not in record:
        raise BadInput(f"{where} is not a JSON object with 'prompt'")
    return _entry(record["prompt"], record.get("category", ""), record.get("image", ""), where, images)


def _read_csv(text: str, path: Path) -> list[_Entry]:
    table, images = csv.DictReader(io.StringIO(text, newline=""), strict=True), _Images(path)
    try:
        columns = [name.strip() for name in table.fieldnames or []]
        table.fieldnames = columns
        if "prompt" not in columns or not set(columns) <= COLUMNS or len(set(columns)) < len(columns):
            names = cut(", ".join(columns), 200) or "(none)"
            raise BadInput(
                f"{path} has the columns {names}: it needs prompt and, optionally, category and image, each once, "
                "separated by commas"
            )
        rows = [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise BadInput(f"{path} line {max(table.reader.line_num, 1)} is not CSV: {error}") from error
    for number, row in rows:
        if None in row or None in row.values():
            raise BadInput(f"{path} line {number} does not have {len(columns)} columns")
    return [
        _entry(row["prompt"], row.get("category", ""), row.get("image", ""), f"{path} line {number}", images)
        for number, row in rows
    ]


def _entry(text: Any, category: Any, image: Any, where: str, images: "_Images") -> _Entry:
    if not isinstance(text, str) or not clean(text) or not isinstance(category, str) or not isinstance(image, str):
        raise BadInput(f"{where}: 'prompt' must be a non-empty string, 'category' and 'image' must be strings")
    check_text(text, where)
    name = image.strip()
    return _Entry(clean(text), clean(category), *(images.find(name, where) if name else ()))


class _Images:
    """Checks the images of a prompt file, and identifies them by their content.

    Args:
        path: of the prompt file.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.known: dict[str, tuple[Path, str]] = {}

    def find(self, name: str, where: str) -> tuple[Path, str]:
        """An image's path and digest.

        Raises:
            BadInput: the image does not exist or cannot be read.
        """
        if name not in self.known:
            file = self.folder / name
            if "\0" in name or not file.is_file():
                raise BadInput(f"{where}: there is no image {shorten(str(file))}")
            check_image(file, f"{where}: image {cut(str(file), 200)}")
            self.known[name] = file, hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        return self.known[name]


_READERS = {"": _read_lines, ".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_json_lines, ".json": _read_json}
