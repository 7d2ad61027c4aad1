"""Compares models on the same prompts and noise, as data and as a text table."""

from dataclasses import dataclass, field

from torch import Tensor

from ..runs.sample_grids import Sample
from .intervals import LEVEL, bootstrap, change, win_rate
from .looks import CLIP_DIVERSITY, DIVERSITY
from .paper_table import paper_text

TITLES = {
    "brightness": "mean luma of the images",
    "saturation": "mean saturation of the images",
    DIVERSITY: "diversity within a prompt",
    CLIP_DIVERSITY: "diversity within a prompt (CLIP)",
}


@dataclass(frozen=True)
class ModelScores:
    """Results of one model on the held-out prompts.

    Attributes:
        name: display name.
        scores: by reward, `[prompts, images per prompt]`; NaN where an image has no score.
        looks: image statistics by name, `[prompts, images per prompt]` or, if per prompt, `[prompts, 1]`.
        images: `[N, 3, H, W]` or `[N, F, 3, H, W]` in [0, 1], the first image of some prompts.
        samples: their prompts, seeds and scores.
    """

    name: str
    scores: dict[str, Tensor]
    looks: dict[str, Tensor]
    images: Tensor
    samples: list[Sample] = field(default_factory=list)


def compared(models: list[ModelScores]) -> dict:
    """All statistics as plain data; the first model is the base model, which the others are compared with."""
    base, shape = models[0], next(iter(models[0].scores.values())).shape
    return {
        "prompts": shape[0],
        "images_per_prompt": shape[1],
        "level": LEVEL,
        "models": [_figures(model, None if model is base else base) for model in models],
    }


def _figures(model: ModelScores, base: ModelScores | None) -> dict:
    rewards = {name: {"estimate": bootstrap(values).record()} for name, values in model.scores.items()}
    looks = {name: {"estimate": bootstrap(values).record()} for name, values in model.looks.items()}
    if base is not None:
        for name, values in model.scores.items():
            rewards[name] |= {
                "change": change(values, base.scores[name]).record(),
                "win_rate": win_rate(values, base.scores[name]).record(),
            }
        for name, values in model.looks.items():
            looks[name]["change"] = change(values, base.looks[name]).record()
    return {"name": model.name, "rewards": rewards, "looks": looks}


def text_table(record: dict) -> str:
    """A block per reward and image statistic, with a line per model.

    Args:
        record: returned by `compared`; with an entry `paper`, that table comes last.
    """
    models = record["models"]
    titles = [TITLES.get(name, name) for name in models[0]["looks"]]
    width = max(len(name) for name in [*models[0]["rewards"], *titles, *(f"  {model['name']}" for model in models)])
    lines = [
        f"{record['prompts']} prompts, {record['images_per_prompt']} images each, from the same noise for every model; "
        f"in brackets {record['level']:.0%} intervals (bootstrap over prompts)"
    ]
    for kind in ("rewards", "looks"):
        for name in models[0][kind]:
            blocks = [model[kind][name] for model in models]
            title = TITLES.get(name, name) if kind == "looks" else name
            lines += ["", _heading(title, width, kind == "rewards" and len(models) > 1, len(models) > 1)]
            lines += [_line(model["name"], block, width) for model, block in zip(models, blocks, strict=True)]
    if record.get("paper"):
        lines += ["", paper_text(record["paper"])]
    return "\n".join(lines)


def summary(record: dict) -> str:
    """A line per model: mean, change and win rate of every reward.

    Args:
        record: returned by `compared`.
    """
    lines = []
    for model in record["models"]:
        parts = [f"{name} {_short(block)}" for name, block in model["rewards"].items()]
        lines.append(f"{model['name']}: {', '.join(parts)}")
    return "\n".join(lines)


def _short(block: dict) -> str:
    mean = block["estimate"]["mean"]
    if mean is None:
        return "-"
    if block.get("change", {}).get("mean") is None:
        return f"{mean:.3g}"
    return f"{mean:.3g} ({block['change']['mean']:+.2g}, wins {block['win_rate']['mean']:.0%})"


def _heading(name: str, width: int, wins: bool, changes: bool) -> str:
    columns = [f"{name:{width}s} {'mean':28s}"]
    columns += [f"{'against the base':30s}"] if changes else []
    columns += ["wins against the base"] if wins else []
    return "".join(columns).rstrip()


def _line(name: str, block: dict, width: int) -> str:
    cells = [f"{'  ' + name:{width}s} {_estimate(block['estimate'], '.4f'):28s}"]
    if "change" in block:
        cells.append(f"{_estimate(block['change'], '+.4f'):30s}")
    if "win_rate" in block:
        cells.append(_estimate(block["win_rate"], ".1%"))
    return "".join(cells).rstrip()


def _estimate(record: dict, form: str) -> str:
    mean, low, high = record["mean"], record["low"], record["high"]
    if mean is None:
        return "-"
    return f"{mean:{form}}" if low is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"
