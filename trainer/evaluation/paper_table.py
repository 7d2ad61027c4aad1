"""Means of a comparison under the column names of DanceGRPO's tables (arXiv 2505.07818)."""

import re
from collections.abc import Iterable, Sequence

from ..config import RewardConfig
from ..rewards.qwen.videoalign import MEAN, STD

UNIFIED = "Unified Reward"
COLUMNS = {
    "hps-v2.1": "HPS-v2.1",
    "clip": "CLIP Score",
    "pickscore": "Pick-a-Pic",
    "geneval-like": "GenEval-like",
    "imagereward": "ImageReward",
    "videoalign-vq": "VQ",
    "videoalign-mq": "MQ",
    "videoalign-ta": "TA",
}
"""Columns by reward, in the order of the tables, Unified Reward after those for images."""
NOTES = {
    "CLIP Score": "the paper's with the model DFN5B-CLIP-ViT-H-14-378",
    "GenEval-like": "GenEval's checks with another detector: not comparable with the paper's GenEval",
    UNIFIED: "ratings scaled to 0 to 1",
}


def paper_columns(rewards: Iterable[RewardConfig]) -> dict[str, str]:
    """The paper's column of each reward that has one, by reward, in the order of the paper's tables.

    Left out are rewards with a threshold, a PickScore times its logit scale, and language models other than
    UnifiedReward, whose scores are other quantities than the paper's.
    """
    order = [*list(COLUMNS.values())[:5], UNIFIED, *list(COLUMNS.values())[5:]]
    found = {reward.name: _column(reward) for reward in rewards}
    return {name: column for name, column in sorted(found.items(), key=lambda e: _place(e[1], order)) if column}


def _place(column: str | None, order: Sequence[str]) -> int:
    return order.index(column) if column else len(order)


def _column(reward: RewardConfig) -> str | None:
    if reward.threshold is not None:
        return None
    if reward.name == "pickscore" and reward.options.get("scale") == "official":
        return None
    if reward.name == "mllm-rubric":
        model = re.sub(r"[^a-z]", "", str(reward.options.get("model", "")).lower())
        return UNIFIED if "unifiedreward" in model else None
    return COLUMNS.get(reward.name)


def paper_table(record: dict, rewards: Iterable[RewardConfig]) -> dict | None:
    """The means of all models in the paper's columns and scales, or None where no reward has a column.

    VideoAlign's scores are converted to those before normalization, in which the paper states them.

    Args:
        record: returned by `comparison.compared`.
        rewards: the rewards that scored, with their options.

    Returns:
        `columns`, and `rows` with `name` and `means`, None where nothing was scored.
    """
    rewards = list(rewards)
    columns = paper_columns(rewards)
    if not columns:
        return None
    scale = {reward.name: reward.options.get("scale", "normalized") for reward in rewards}
    rows = []
    for model in record["models"]:
        means = {name: model["rewards"][name]["estimate"]["mean"] for name in columns}
        rows.append({"name": model["name"], "means": [_in_paper(columns[n], m, scale[n]) for n, m in means.items()]})
    return {"columns": list(columns.values()), "rows": rows}


def _in_paper(column: str, mean: float | None, scale: str) -> float | None:
    if mean is None or column not in MEAN or scale == "raw":
        return mean
    return mean * STD[column] + MEAN[column]


def paper_text(table: dict) -> str:
    """The table as text.

    Args:
        table: returned by `paper_table`.
    """
    title = "as in DanceGRPO's tables"
    width = max(len(title), *(len(row["name"]) + 2 for row in table["rows"])) + 2
    lines = [f"{title:{width}s}" + "".join(f"{column:>14s}" for column in table["columns"])]
    for row in table["rows"]:
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in row["means"]]
        lines.append(f"{'  ' + row['name']:{width}s}" + "".join(f"{cell:>14s}" for cell in cells))
    lines += [f"  {column}: {NOTES[column]}" for column in table["columns"] if column in NOTES]
    return "\n".join(lines)
