"""Prompts from a run description: their texts, the categories they are reported in, and their pictures."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from ..config import EvaluationConfig, PromptsConfig
from ..utils.errors import BadInput


@dataclass(frozen=True)
class PromptSet:
    """Texts without duplicates, and for each a category ('' where there is none) and a first frame or source image."""

    texts: list[str]
    categories: list[str]
    pictures: list[Path | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.pictures:
            object.__setattr__(self, "pictures", [None] * len(self.texts))


def training_prompts(config: PromptsConfig) -> PromptSet:
    """The prompts a run trains on.

    Raises:
        BadInput: a file that cannot be read, is empty or repeats a prompt.
    """
    if config.shapes:
        return _shapes(config.shapes, held_out=False)
    return (
        _read(Path(config.file), "prompts.file") if config.file else PromptSet(config.texts, [""] * len(config.texts))
    )


def evaluation_prompts(config: EvaluationConfig) -> PromptSet:
    """The held-out prompts; may be none."""
    if config.shapes:
        return _shapes(config.shapes, held_out=True)
    if config.file:
        return _read(Path(config.file), "evaluation.file")
    return PromptSet(config.texts, [""] * len(config.texts))


def _shapes(per_task: int, held_out: bool) -> PromptSet:
    from ..shapes.prompts import balanced_prompts, parse

    texts = balanced_prompts(per_task, held_out)
    return PromptSet(texts, [parse(text).task for text in texts])


def _read(path: Path, field: str) -> PromptSet:
    try:
        text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{field} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    entries = _csv(text, path) if path.suffix.lower() == ".csv" else _lines(text, path)
    if not entries:
        raise BadInput(f"{field} {path} holds no prompt")
    seen: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        if entry[0] in seen:
            raise BadInput(f"{field} {path} repeats the prompt {entry[0]!r} (entries {seen[entry[0]]} and {number})")
        seen[entry[0]] = number
    return PromptSet(*map(list, zip(*entries, strict=True)))


Entry = tuple[str, str, Path | None]
"""Text, category and picture of a prompt."""


def _lines(text: str, path: Path) -> list[Entry]:
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path.suffix.lower() != ".jsonl":
        return [(line.strip(), "", None) for _, line in lines]
    return [_json_entry(line, path, number) for number, line in lines]


def _json_entry(line: str, path: Path, number: int) -> Entry:
    try:
        record = json.loads(line)
        fields = record["prompt"], record.get("category", ""), record.get("image", "")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} line {number} is not a JSON object with 'prompt'") from error
    return _entry(*fields, path, number)


def _csv(text: str, path: Path) -> list[Entry]:
    table = csv.DictReader(io.StringIO(text), strict=True)
    columns = [name.strip() for name in table.fieldnames or []]
    if "prompt" not in columns or not set(columns) <= {"prompt", "category", "image"}:
        raise BadInput(f"{path} has the columns {', '.join(columns)}: it takes prompt, and may have category and image")
    table.fieldnames = columns
    try:
        rows = [(table.line_num, row) for row in table]
    except csv.Error as error:
        raise BadInput(f"{path} line {table.line_num} is not CSV: {error}") from error
    for number, row in rows:
        if None in row or None in row.values():
            raise BadInput(f"{path} line {number} does not have {len(columns)} columns")
    return [_entry(row["prompt"], row.get("category", ""), row.get("image", ""), path, n) for n, row in rows]


def _entry(text: object, category: object, picture: object, path: Path, number: int) -> Entry:
    if not isinstance(text, str) or not text.strip() or not isinstance(category, str) or not isinstance(picture, str):
        raise BadInput(
            f"{path} line {number}: 'prompt' must be a text that is not empty, and 'category' and 'image' texts"
        )
    file = path.parent / picture.strip() if picture.strip() else None
    if file is not None and not file.is_file():
        raise BadInput(f"{path} line {number}: there is no image {str(file)!r}")
    return text.strip(), category.strip(), file
