"""A run says what it will take when it starts, corrects it, and is otherwise the same run."""

from pathlib import Path

import pytest
import torch

from trainer.config import parse_config
from trainer.estimate import pace
from trainer.loop import Trainer
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes


def train(description: dict, folder: Path) -> tuple[Trainer, list[str]]:
    notes: list[str] = []
    run = RunDirectory(folder)
    config = parse_config(description)
    run.open(config, ["test"])
    try:
        trainer = Trainer(config, run, Processes("cpu"), lambda event: notes.extend(filter(None, [event.get("note")])))
        trainer.train()
    finally:
        run.release()
    return trainer, notes


def test_it_is_said_once_and_corrected_once(tiny_description: dict, tmp_path: Path) -> None:
    tiny_description["runtime"]["iterations"] = 12
    trainer, notes = train(tiny_description, tmp_path / "run")
    assert len(notes) == 2
    assert notes[0].startswith("estimate: ") and "free on this computer's RAM" in notes[0]
    assert notes[1].startswith("estimate corrected: ") and notes[1].endswith("left")
    seconds = [event["seconds"]["total"] for event in trainer.run.events()]
    estimate = trainer.run.status()["estimate"]
    assert estimate["corrected"] is True
    assert estimate["iteration"] == pytest.approx(sum(seconds[1 : pace.FIRST]) / (pace.FIRST - 1))
    assert estimate["left"] >= 8 * estimate["iteration"]


def test_the_run_is_the_same_without_it(
    tiny_description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_description["runtime"]["iterations"] = 10
    with_it, notes = train(tiny_description, tmp_path / "with")
    monkeypatch.setattr(pace, "FEWEST", 11)
    without, none = train(tiny_description, tmp_path / "without")
    assert notes and not none
    for one, other in zip(with_it.policy.parameters.values(), without.policy.parameters.values(), strict=True):
        assert torch.equal(one, other)


def test_an_estimate_that_fails_does_not_end_the_run(
    tiny_description: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(pace, "measure", fail)
    tiny_description["runtime"]["iterations"] = 10
    trainer, notes = train(tiny_description, tmp_path / "run")
    assert trainer.run.status()["state"] == "finished" and not notes
    assert "could not be estimated (KeyError" in capsys.readouterr().err
