"""What is printed of a run."""

import io
import sys
from pathlib import Path

import pytest

from trainer.config import parse_config
from trainer.runs import progress
from trainer.runs.directory import RunDirectory
from trainer.runs.progress import Progress, closing, table


def event(iteration: int) -> dict:
    rewards = {"r": {"mean": 0.5, "std": 0.2, "group_std": 0.1}}
    return {"iteration": iteration, "rewards": rewards, "seconds": {"total": 2.0}, "forwards_per_image": 6.0}


def test_lines_of_a_run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    listener = Progress(10, line=lambda event: "clipped 3%")
    listener({"progress": {"phase": "rollout", "done": 2, "total": 10}})
    assert capsys.readouterr().out == "", "not at once"
    now[0] += 31
    listener({"progress": {"phase": "rollout", "done": 3, "total": 10}})
    listener({"progress": {"phase": "rollout", "done": 4, "total": 10}})
    listener(event(4))
    listener({"evaluation": {"iteration": 4, "rewards": {"r": 0.25, "s": None}}})
    assert capsys.readouterr().out.splitlines() == [
        "rollout 3 of 10",
        "iteration 4/10  r 0.5000  2.00 s  clipped 3%  0 min 12 s left",
        "held-out at iteration 4: r 0.2500, s -",
    ]


def test_the_bar_shows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    listener = Progress(10)
    listener(event(3))
    listener({"progress": {"phase": "update", "done": 3, "total": 8}})
    listener.close()
    assert "3/10" in screen.getvalue()
    assert "r 0.5000 update 3/8" in screen.getvalue()


def test_the_end_of_a_run(tmp_path: Path) -> None:
    config = parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]})
    run = RunDirectory(tmp_path / "run").open(config, [])
    run.append_event(event(1))
    run.append_event(event(2))
    run.lora_file.touch()
    summary = {"state": "finished", "iterations": 2, "seconds": 65.0, "eval": {"before": None, "after": None}}
    assert closing(summary, run, lambda events: [f"{len(events)} events"]).splitlines() == [
        "finished: 2 iterations in 1 min 05 s, 2.00 s each",
        "forward passes of the network per image 6.00",
        "2 events",
        f"LoRA      {run.lora_file}",
    ]


def test_the_table_stands_what_is_missing() -> None:
    before = {"rewards": {"r": 0.5, "s": 1.0}, "spread": {"r": 0.25}, "categories": {"r": {"one": 0.5}}}
    after = {"rewards": {"r": 1.0}}
    lines = table({"eval": {"before": before, "after": after}}).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["+0.5000", "+2.00", "-", "-"]
