"""The paper's columns: which rewards have one, in which order, and in which scale."""

import json
from pathlib import Path

import pytest
import torch

from trainer.config import RewardConfig
from trainer.evaluation.comparison import ModelScores, compared, text_table
from trainer.evaluation.paper_table import paper_columns, paper_table
from trainer.rewards.qwen.videoalign import scaled
from trainer.rewards.registry import REWARDS


def rewards(*names: str) -> list[RewardConfig]:
    return [RewardConfig(name=name) for name in names]


def judged(scores: dict[str, list[float]]) -> dict:
    """The statistics of two models with one image for each of two prompts; the second scores 1 higher."""
    values = {name: torch.tensor(column).double()[:, None] for name, column in scores.items()}
    looks = {"brightness": torch.full((2, 1), 0.5)}
    higher = {name: column + 1 for name, column in values.items()}
    images = torch.zeros(1, 3, 8, 8)
    return compared([ModelScores("base", values, looks, images), ModelScores("mine", higher, looks, images)])


def test_columns_have_the_papers_names_in_the_papers_order() -> None:
    given = rewards("videoalign-ta", "geneval-like", "brightness", "clip", "videoalign-vq", "hps-v2.1", "imagereward")
    given += rewards("videoalign-mq", "pickscore", "shapes")
    given.append(RewardConfig(name="mllm-rubric", options={"model": "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"}))
    found = paper_columns(given)
    expected = [
        "HPS-v2.1",
        "CLIP Score",
        "Pick-a-Pic",
        "GenEval-like",
        "ImageReward",
        "Unified Reward",
        "VQ",
        "MQ",
        "TA",
    ]
    assert list(found.values()) == expected
    assert found["pickscore"] == "Pick-a-Pic"
    assert set(found) <= set(REWARDS)


@pytest.mark.parametrize(
    "other",
    [
        RewardConfig(name="hps-v2.1", threshold=0.28),
        RewardConfig(name="pickscore", options={"scale": "official"}),
        RewardConfig(name="mllm-rubric", options={"model": "Qwen3-VL"}),
        RewardConfig(name="brightness"),
    ],
    ids=lambda reward: reward.name,
)
def test_other_quantities_have_no_column(other: RewardConfig) -> None:
    record = judged({other.name: [0.1, 0.3]})
    assert paper_table(record, [other]) is None
    assert "DanceGRPO" not in text_table({**record, "paper": None})


def test_means_are_those_of_the_comparison() -> None:
    record = judged({"clip": [0.3, 0.5], "brightness": [0.1, 0.2], "hps-v2.1": [0.25, 0.35]})
    table = paper_table(record, rewards("clip", "brightness", "hps-v2.1"))
    assert table["columns"] == ["HPS-v2.1", "CLIP Score"]
    assert [row["name"] for row in table["rows"]] == ["base", "mine"]
    assert table["rows"][0]["means"] == pytest.approx([0.3, 0.4])
    assert table["rows"][1]["means"] == pytest.approx([1.3, 1.4])
    text = text_table({**record, "paper": table}).split("as in DanceGRPO's tables")[1]
    heading, base, mine, note = text.splitlines()
    assert heading.split() == ["HPS-v2.1", "CLIP", "Score"]
    assert (base.split(), mine.split()) == (["base", "0.300", "0.400"], ["mine", "1.300", "1.400"])
    assert "DFN5B" in note


def test_videoalign_is_in_the_scale_before_normalization() -> None:
    raw = torch.tensor([[4.51, 1.37, 1.75], [7.03, 3.85, 1.59]])
    normalized = torch.stack([scaled(scores, "normalized") for scores in raw])
    names = ("videoalign-vq", "videoalign-mq", "videoalign-ta")
    for columns, options in ((normalized, {}), (raw, {"scale": "raw"})):
        record = judged({name: columns[:, i].tolist() for i, name in enumerate(names)})
        table = paper_table(record, [RewardConfig(name=name, options=options) for name in names])
        assert table["rows"][0]["means"] == pytest.approx(raw.mean(0).tolist(), abs=1e-4)


def test_a_mean_that_is_missing_is_a_dash() -> None:
    record = judged({"clip": [float("nan"), float("nan")]})
    table = paper_table(record, rewards("clip"))
    assert table["rows"][0]["means"] == [None]
    assert text_table({**record, "paper": table}).splitlines()[-2].split() == ["mine", "-"]


def test_evaluate_prints_and_stores_the_columns(
    tiny_description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in of the name `clip`: the real ones have gigabytes of weights."""
    from trainer.cli import main
    from trainer.rewards.colorfulness import Colorfulness

    class StandIn(Colorfulness):
        name = "clip"

    monkeypatch.setitem(REWARDS, "clip", StandIn)
    tiny_description["evaluation"] |= {"rewards": [{"name": "clip"}]}
    (tmp_path / "d.json").write_text(json.dumps(tiny_description))
    assert main(["evaluate", str(tmp_path / "d.json"), "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["paper"]["columns"] == ["CLIP Score"]
    mean = record["models"][0]["rewards"]["clip"]["estimate"]["mean"]
    assert record["paper"]["rows"] == [{"name": "base", "means": [mean]}]
    assert "CLIP Score" in (tmp_path / "out" / "comparison.txt").read_text()
