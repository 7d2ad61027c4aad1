"""What a run writes: progress at a bounded rate, and never a LoRA that is not finite."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.config import parse_config
from trainer.runs import recorder
from trainer.runs.directory import RunDirectory
from trainer.runs.recorder import Recorder
from trainer.runs.sample_grids import Sample
from trainer.utils.errors import RunFailed

CONFIG = parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]})


class Weights:
    """Stands for the policy: one weight."""

    modules = ("layer",)

    def __init__(self, value: float) -> None:
        self.weight = torch.tensor([1.0, value])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"lora/layer": self.weight}

    def result(self) -> dict[str, torch.Tensor]:
        return {"layer": self.weight}

    def save_lora(self, path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        path.write_text(str(weights["layer"].tolist()))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run").open(CONFIG, [])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_reaches_status_and_listener_at_a_bounded_rate(run: RunDirectory, clock: list[float]) -> None:
    heard, written = [], []
    recorder_ = Recorder(run, CONFIG, None, writes=True, listener=heard.append)
    recorder_.status("running", 3)
    write = run.write_status
    run.write_status = lambda state, **fields: (
        written.append((fields["progress"] or {}).get("done")) or write(state, **fields)
    )
    for step in range(101):  # a step takes 0.05 s
        recorder_.progress("rollout", step, 100)
        clock[0] = 0.05 * (step + 1)
    assert written == [0, 20, 40, 60, 80, 100], "once a second"
    assert 20 <= len(heard) <= 26, "five times a second at most, whatever the clock rounds"
    assert heard[0] == {"progress": {"phase": "rollout", "done": 0, "total": 100}}
    status = run.status()
    assert status["progress"] == {"phase": "rollout", "done": 100, "total": 100}
    assert (status["state"], status["iteration"]) == ("running", 3), "the rest of the status stays"
    recorder_.status("running", 4)
    assert run.status()["progress"] is None


def test_progress_of_a_process_that_does_not_write_is_free(run: RunDirectory) -> None:
    heard = []
    Recorder(run, CONFIG, None, writes=False, listener=heard.append).progress("update", 1, 8)
    assert (run.status(), heard) == ({}, [])
    Recorder(None, CONFIG, None, writes=True, listener=heard.append).progress("update", 1, 8)
    assert len(heard) == 1, "a run that keeps nothing still has a listener"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("writes", [True, False])
def test_weights_that_are_not_finite_are_never_written(run: RunDirectory, bad: float, writes: bool) -> None:
    Recorder(run, CONFIG, Weights(2.0), writes=True).newest(1, {"iteration": 1})
    with pytest.raises(RunFailed, match="a weight of the LoRA is not finite after iteration 2"):
        Recorder(run, CONFIG, Weights(bad), writes=writes).newest(2, {"iteration": 2})
    assert run.lora_file.read_text() == "[1.0, 2.0]"
    assert run.load_checkpoint()[0].state == {"iteration": 1}
    Recorder(run, CONFIG, Weights(bad), writes=writes).best(2, Weights(bad).result())
    assert not (run.path / "best.safetensors").exists()


def test_a_run_that_lost_its_directory_writes_nothing(run: RunDirectory) -> None:
    import shutil

    recorder_ = Recorder(run, CONFIG, Weights(2.0), writes=True)
    shutil.rmtree(run.path)
    images = torch.zeros(1, 3, 8, 8)
    record = {"iteration": 0, "rewards": {"brightness": 0.0}}
    for write in (
        lambda: recorder_.status("running", 1),
        lambda: recorder_.progress("rollout", 1, 2),
        lambda: recorder_.event({"iteration": 1}),
        lambda: recorder_.rollout_grid(images, 0, [Sample("a")]),
        lambda: recorder_.evaluation(record, images, [Sample("a")]),
        lambda: recorder_.best(1, Weights(2.0).result()),
        lambda: recorder_.newest(1, {}),
        lambda: recorder_.begin(0),
        lambda: recorder_.finish("finished", 1, 1.0, [], None),
    ):
        with pytest.raises(RunFailed, match="was deleted during the run"):
            write()
    assert not run.path.exists()
