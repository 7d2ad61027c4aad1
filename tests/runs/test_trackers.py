"""Trackers: what TensorBoard reads, what wandb is told, and one of somebody's own."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import PartialState

from trainer.config import RunConfig, parse_config
from trainer.runs import trackers
from trainer.runs.directory import RunDirectory
from trainer.runs.trackers import TRACKERS, Tracker, Trackers, check_trackers, flat
from trainer.utils.errors import BadInput


def config(*names: str, **runtime: object) -> RunConfig:
    settings = {"trackers": list(names), **runtime}
    return parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}], "runtime": settings})


EVENT = {
    "iteration": 3,
    "rewards": {"brightness": {"mean": 0.5, "std": 0.25, "group_std": None}},
    "objective": {"kl": 0.125},
    "loss": -0.5,
    "seconds": {"rollout": 1.5, "total": 2.0},
}
RECORD = {"iteration": 3, "seconds": 9.0, "rewards": {"brightness": 0.75}, "categories": {"brightness": {"one": 0.5}}}
IMAGES = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])


def record(run: RunDirectory, description: RunConfig) -> None:
    PartialState(cpu=True)
    all_trackers = Trackers(run, description)
    all_trackers.begin(2)
    all_trackers.event(EVENT)
    all_trackers.evaluation(RECORD)
    all_trackers.images("evaluation", IMAGES, ["a red circle", "a blue square"], 3)
    all_trackers.close()


def test_numbers_get_names_with_slashes() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2.5, "e": None}}, "f": True, "g": "text"}) == {"a/b": 1, "a/c/d": 2.5}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    description = config("tensorboard")
    record(RunDirectory(tmp_path / "run").open(description, []), description)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = {tag: [(s.step, s.value) for s in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalars == {
        "rewards/brightness/mean": [(3, 0.5)],
        "rewards/brightness/std": [(3, 0.25)],
        "objective/kl": [(3, 0.125)],
        "loss": [(3, -0.5)],
        "seconds/rollout": [(3, 1.5)],
        "seconds/total": [(3, 2.0)],
        "evaluation/rewards/brightness": [(3, 0.75)],
        "evaluation/categories/brightness/one": [(3, 0.5)],
    }
    (image,) = read.Images("samples/evaluation")
    assert (image.step, image.height) == (3, 8)
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert texts["samples/evaluation/prompts/text_summary"] == "1. a red circle\n1. a blue square"
    assert description.to_yaml() in texts["description/text_summary"]


class FakeWandb(SimpleNamespace):
    """Stands for the package wandb, which need not be installed: keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(settings=None, logged=[], finished=False)
        self.config = SimpleNamespace(update=lambda values, allow_val_change: setattr(self, "described", values))

    def init(self, **settings: object) -> "FakeWandb":
        self.settings = settings
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True

    @staticmethod
    def Image(pixels: np.ndarray, caption: str) -> tuple:
        return pixels.shape, int(pixels.max()), caption


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_is_offline_unless_a_setting_says_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    description = config("wandb", **({} if mode == "offline" else {"wandb_mode": "online"}))
    run = RunDirectory(tmp_path / "run").open(description, [])
    record(run, description)
    assert (fake.settings["mode"], fake.settings["dir"], fake.settings["name"]) == (mode, str(run.path), "run")
    assert fake.described == description.model_dump(mode="json")
    assert fake.logged[0] == (3, flat({k: v for k, v in EVENT.items() if k != "iteration"}))
    logged = [((8, 8, 3), 0, "a red circle"), ((8, 8, 3), 255, "a blue square")]
    assert fake.logged[2] == (3, {"samples/evaluation": logged})
    assert fake.finished


class Memory(Tracker):
    """A throw-away tracker."""

    name, package = "memory", "json"
    kept: ClassVar[list] = []

    def __init__(self, run: RunDirectory, config: RunConfig, iteration: int) -> None:
        self.kept.append(("open", run.path.name, iteration))

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        self.kept.append(("scalars", iteration, values["loss"] if "loss" in values else sorted(values)))

    def images(self, tag: str, images: np.ndarray, captions: list[str], iteration: int) -> None:
        self.kept.append((tag, images.shape, images.dtype, captions, iteration))

    def close(self) -> None:
        self.kept.append("closed")


def test_a_tracker_of_somebody_s_own_is_one_class_and_one_registration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRACKERS, "memory", Memory)
    monkeypatch.setattr(Memory, "kept", [])
    description = config("memory")
    check_trackers(description)
    record(RunDirectory(tmp_path / "run").open(description, []), description)
    assert Memory.kept == [
        ("open", "run", 2),
        ("scalars", 3, -0.5),
        ("scalars", 3, ["evaluation/categories/brightness/one", "evaluation/rewards/brightness"]),
        ("samples/evaluation", (2, 8, 8, 3), np.dtype("uint8"), ["a red circle", "a blue square"], 3),
        "closed",
    ]


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Broken(Memory):
        def scalars(self, values: dict[str, float], iteration: int) -> None:
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Memory, "kept", [])
    monkeypatch.setitem(TRACKERS, "memory", Broken)
    description = config("memory")
    record(RunDirectory(tmp_path / "run").open(description, []), description)
    warning = "warning: tracker memory failed (no route to host); the run continues without it\n"
    assert capsys.readouterr().err == warning, "once"
    assert Memory.kept == [("open", "run", 2)]


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(config())
    with pytest.raises(BadInput, match=r"^runtime.trackers: 'tensorbord' is unknown; choose from tensorboard, wandb$"):
        check_trackers(config("tensorbord"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"^runtime.trackers: wandb needs the package wandb: run `pip install wandb`$"):
        check_trackers(config("wandb"))
