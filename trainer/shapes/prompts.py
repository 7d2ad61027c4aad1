"""The language of the shapes world: six tasks as GenEval has, their prompts, and a parser for them.

Sources of the task names: GenEval (arXiv 2310.11513), whose six tags are repeated here in miniature.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
NUMBERS = ("one", "two", "three", "four")
RELATIONS = ("to the left of", "to the right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an image of {}", "a poster of {}", "a print of {}")

HELD_OUT_CONTENTS = 5  # attribute binding: one content in five is held out
HELD_OUT_TEMPLATES = 2  # other tasks: two of the six sentences of each content are held out


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one shape, of one colour or (None) of any."""

    shape: str
    color: str | None = None
    count: int = 1

    def text(self) -> str:
        color = f"{self.color} " if self.color else ""
        if self.count > 1:
            return f"{NUMBERS[self.count - 1]} {color}{self.shape}s"
        article = "an" if color.startswith("o") else "a"
        return f"{article} {color}{self.shape}"


@dataclass(frozen=True)
class Prompt:
    """What an image should show: one or more phrases, the first standing in `relation` to the second (or None)."""

    text: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """The GenEval task this prompt belongs to."""
        if self.relation:
            return "position"
        if len(self.phrases) > 1:
            return "color_attr" if any(p.color for p in self.phrases) else "two_object"
        if self.phrases[0].count > 1:
            return "counting"
        return "colors" if self.phrases[0].color else "single_object"


_NAMES = f"(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_PHRASE = re.compile(rf"(?:an?|one) {_NAMES}|({'|'.join(NUMBERS[1:])}) {_NAMES}s")
_JOIN = re.compile(rf" ({'|'.join(RELATIONS)}|and) ")
_TEMPLATE = re.compile("|".join(re.escape(t.replace("{}", "")) for t in TEMPLATES[1:]))


def content_text(phrases: tuple[Phrase, ...], relation: str | None) -> str:
    """The words of a prompt without its template."""
    return f" {relation or 'and'} ".join(phrase.text() for phrase in phrases)


def parse(text: str) -> Prompt:
    """Read a prompt of the shapes world.

    Raises:
        ValueError: the text is not of this world; the message says what is accepted.
    """
    words = " ".join(text.lower().split()).rstrip(".")
    template = _TEMPLATE.match(words)
    parts = _JOIN.split(words[template.end() :] if template else words)
    matches = [_PHRASE.fullmatch(part) for part in parts[::2]]
    relations = [join for join in parts[1::2] if join != "and"]
    phrases = tuple(_phrase(match) for match in matches if match)
    distinct = len({phrase.shape for phrase in phrases}) == len(parts[::2])
    related = not relations or (len(parts) == 3 and all(phrase.count == 1 for phrase in phrases))
    if not distinct or not related:
        raise ValueError(
            f"prompt {text!r} is not one for images of shapes: write, for example, 'a red circle and a blue square', "
            f"'three triangles' or 'a circle above a square' (each shape once; shapes {', '.join(SHAPES)}; "
            f"colours {', '.join(COLORS)})"
        )
    return Prompt(text=text, phrases=phrases, relation=relations[0] if relations else None)


def _phrase(match: re.Match) -> Phrase:
    color, shape, number, colors, shapes = match.groups()
    return Phrase(shape or shapes, color or colors, NUMBERS.index(number) + 1 if number else 1)


def _contents(task: str) -> list[tuple[tuple[Phrase, ...], str | None]]:
    pairs = list(itertools.permutations(SHAPES, 2))
    if task == "single_object":
        return [((Phrase(s),), None) for s in SHAPES]
    if task == "two_object":
        return [((Phrase(a), Phrase(b)), None) for a, b in pairs]
    if task == "counting":
        return [((Phrase(s, count=n),), None) for s in SHAPES for n in (2, 3, 4)]
    if task == "colors":
        return [((Phrase(s, c),), None) for s in SHAPES for c in COLORS]
    if task == "position":
        return [((Phrase(a), Phrase(b)), r) for a, b in pairs for r in RELATIONS]
    colors = list(itertools.permutations(COLORS, 2))
    return [((Phrase(a, c), Phrase(b, d)), None) for a, b in pairs for c, d in colors]


def _is_held_out(task: str, content: str, template: int) -> bool:
    # Attribute binding has contents enough to keep whole contents unseen; the other tasks keep sentences unseen.
    digest = int(hashlib.sha256(f"{task}/{content}".encode()).hexdigest(), 16)
    if task == "color_attr":
        return digest % HELD_OUT_CONTENTS == 0
    return (template + digest) % len(TEMPLATES) < HELD_OUT_TEMPLATES


def prompts(task: str, held_out: bool) -> list[Prompt]:
    """All training (or all held-out) prompts of a task, in a fixed order; the two sets share no text."""
    found = []
    for phrases, relation in _contents(task):
        content = content_text(phrases, relation)
        for index, template in enumerate(TEMPLATES):
            if _is_held_out(task, content, index) == held_out:
                found.append(Prompt(template.format(content), phrases, relation))
    return found


def balanced_prompts(per_task: int, held_out: bool) -> list[str]:
    """Texts of up to `per_task` prompts of each task, evenly spaced through each task's list.

    Args:
        per_task: how many of each task, at least 1.
        held_out: choose from the held-out prompts instead of the training prompts.
    """
    texts: list[str] = []
    for task in TASKS:
        found = prompts(task, held_out)
        count = min(per_task, len(found))
        texts += [found[i * len(found) // count].text for i in range(count)]
    return texts
