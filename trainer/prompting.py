"""Prompts from a run description: their texts, and the categories they are reported in."""

import json
from dataclasses import dataclass
from pathlib import Path

from .config import EvaluationConfig, PromptsConfig
from .errors import BadInput


@dataclass(frozen=True)
class PromptSet:
    """Texts without duplicates, and for each a category ('' where there is none)."""

    texts: list[str]
    categories: list[str]


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
    from .shapes.prompts import balanced_prompts, parse

    texts = balanced_prompts(per_task, held_out)
    return PromptSet(texts, [parse(text).task for text in texts])


def _read(path: Path, field: str) -> PromptSet:
    try:
        lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{field} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    entries = [_entry(line, path, n) for n, line in enumerate(lines, start=1) if line.strip()]
    if not entries:
        raise BadInput(f"{field} {path} holds no prompt")
    seen: dict[str, int] = {}
    for number, (text, _) in enumerate(entries, start=1):
        if text in seen:
            raise BadInput(f"{field} {path} repeats the prompt {text!r} (entries {seen[text]} and {number})")
        seen[text] = number
    return PromptSet([text for text, _ in entries], [category for _, category in entries])


def _entry(line: str, path: Path, number: int) -> tuple[str, str]:
    if path.suffix.lower() != ".jsonl":
        return line.strip(), ""
    try:
        record = json.loads(line)
        text, category = record["prompt"], record.get("category", "")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} line {number} is not a JSON object with 'prompt'") from error
    if not isinstance(text, str) or not text.strip() or not isinstance(category, str):
        raise BadInput(f"{path} line {number}: 'prompt' must be a text that is not empty, and 'category' a text")
    return text.strip(), category
