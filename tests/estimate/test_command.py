"""`estimate`: its arithmetic, its memory, and what it advises."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_description

from trainer.check import check_run
from trainer.cli import main
from trainer.config import parse_config
from trainer.estimate import memory
from trainer.estimate.calls import Call
from trainer.estimate.command import run_estimate
from trainer.estimate.forecast import Forecast
from trainer.estimate.measure import Meter
from trainer.loop import Trainer
from trainer.utils.distributed import Processes


def test_seconds_of_calls_are_their_number_times_what_was_measured(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(Trainer(parse_config(tiny_description), None, Processes("cpu")))
    monkeypatch.setattr(meter, "_measure", lambda call: 1.0 + call.rows)  # a second, and one more per row
    calls = {Call("forward", 10): 3, Call("forward", 4): 1, Call("forward", 6): 2, Call("train", 10): 1}
    assert meter.seconds(calls) == pytest.approx({"forward": 3 * 11 + 5 + 2 * 7, "train": 11})


def test_a_call_is_timed_with_as_many_prompts_as_it_has(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's model calls its network once per prompt, so that eight rows of two prompts take two calls of four."""
    meter = Meter(Trainer(parse_config(tiny_description), None, Processes("cpu")))
    asked = []
    monkeypatch.setattr(
        meter.model, "predict_guided", lambda latents, level, conditions, *rest: asked.append(conditions)
    )
    for rows, prompts in ((8, 1), (8, 2), (2, 2), (3, 2)):
        meter._prediction(Call("forward", rows, prompts=prompts))()
        values = torch.cat([value.flatten(1) for value in asked.pop().tensors.values()], 1)
        assert (len(values), len(values.unique(dim=0))) == (rows, prompts)


def test_calls_of_more_prompts_are_interpolated(tiny_description: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(Trainer(parse_config(tiny_description), None, Processes("cpu")))
    monkeypatch.setattr(meter, "_measure", lambda call: float(call.rows + call.prompts))
    calls = {Call("train", 8, prompts=1): 1, Call("train", 8, prompts=3): 1, Call("train", 8, prompts=8): 1}
    assert meter.seconds(calls) == pytest.approx({"train": 9 + 11 + 16})


@pytest.mark.parametrize(
    ("durations", "seconds"),
    [([0.4, 0.3, 0.1, 0.2], 0.2), ([20.0, 13.0], 13.0), ([70.0], 70.0)],
    ids=["short calls three times after a warm-up", "long ones once", "very long ones are not repeated"],
)
def test_how_often_a_call_is_timed(tiny_description: dict, durations: list[float], seconds: float) -> None:
    now, left = [0.0], iter(durations)

    def action() -> None:
        now[0] += next(left)

    meter = Meter(Trainer(parse_config(tiny_description), None, Processes("cpu")), clock=lambda: now[0])
    assert meter._timed(action) == pytest.approx(seconds)
    assert not list(left)


def test_a_forecast_adds_up() -> None:
    found = Forecast("a GPU", 10, {"forward passes": 2.0, "rewards": 0.5}, 20.0, 3, 7.0, {"x": 1}, 5, 9)
    assert found.iteration == 2.5
    assert found.whole == 7 + 25 + 60
    assert found.record()["seconds"]["whole"] == found.whole
    assert found.fits and "it fits" in found.text()
    assert "2.50 s per iteration" in found.line() and "1 min 32 s" in found.line()
    assert not Forecast("a GPU", 10, needed=9, free=5).fits


def test_measuring_changes_nothing_of_the_run(tiny_description: dict) -> None:
    from trainer.estimate.command import measure

    config = parse_config(tiny_description)
    plain, measured = (Trainer(config, None, Processes("cpu")) for _ in range(2))
    forecast = Forecast("here", 4, parts={memory.HELD: 0})
    measure(forecast, measured, check_run(config, 1), 1)
    assert set(forecast.seconds) >= {"forward passes", "forward and backward passes", "decode", "rewards"}
    first, second = plain.iterate(), measured.iterate()
    for event in (first, second):
        del event["seconds"], event["memory_mb"]
    assert first == second
    for one, other in zip(plain.policy.parameters.values(), measured.policy.parameters.values(), strict=True):
        assert torch.equal(one, other)


def test_the_command_prints_and_writes_the_same_figures(
    tiny_description: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    description = write_description(tmp_path / "run.json", tiny_description)
    assert main(["estimate", str(description), "--json", str(tmp_path / "figures.json")]) == 0
    record = json.loads((tmp_path / "figures.json").read_text())
    seconds = record["seconds"]
    assert seconds["iteration"] == pytest.approx(sum(seconds["phases"].values()))
    assert seconds["whole"] == pytest.approx(
        seconds["start"] + 4 * seconds["iteration"] + seconds["evaluations"] * seconds["evaluation"]
    )
    assert record["memory"]["measured"] and record["memory"]["fits"]
    out = capsys.readouterr().out
    assert "it fits" in out and "per iteration" in out
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_not_loaded_and_comes_with_changes(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr("trainer.models.diffusers.family.DiffusersModel.load", None)
    forecast = run_estimate(parse_config(tiny_description, ["model.decode_batch_size=32"]))
    assert not forecast.fits and not forecast.is_measured and forecast.seconds == {}
    assert "it does not fit" in forecast.text() and "not measured" in forecast.text()


def test_changes_save_what_they_say(tiny_description: dict) -> None:
    config = parse_config(tiny_description, ["objective.batch_size=64"])
    checked = check_run(config, 1)
    found = dict(memory.changes(config, checked, 1, on_cpu=False))
    whole = memory.peak(memory.parts(config, checked, 1, False), False)
    for label, saved in found.items():
        changed = parse_config(tiny_description, ["objective.batch_size=64", label])
        assert whole - memory.peak(memory.parts(changed, checked, 1, False), False) == saved > 0
    assert "objective.batch_size=32" in found


def test_bad_input_is_told_before_anything_is_loaded(
    tiny_description: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    description = write_description(tmp_path / "run.json", tiny_description)
    assert main(["estimate", str(description), "--set", "rewards=[{name: nothing}]"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
