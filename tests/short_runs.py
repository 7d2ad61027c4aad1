"""Short runs in this process. Not in `learning`: checks inside ComfyUI import that without the package `trainer`."""

from pathlib import Path

import pytest
import torch

from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.rewards.brightness import Brightness
from trainer.runs.directory import RunDirectory
from trainer.utils.distributed import Processes


def train(data: dict, path: Path | None = None) -> tuple[Trainer, list[dict]]:
    """The trainer after a run in this process, and the events of its iterations."""
    config, events = parse_config(data), []
    run = None if path is None else RunDirectory(path).open(config, [])
    trainer = Trainer(config, run, Processes("cpu"), events.append)
    trainer.train()
    if run is not None:
        run.release()
    return trainer, [event for event in events if "objective" in event]


def assert_constant_changes_nothing(data: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with and without 16 added to every brightness; both must have learned the same."""
    plain, _ = train(data)
    score = Brightness.score
    monkeypatch.setattr(Brightness, "score", lambda self, *given: score(self, *given) + 16)
    raised, events = train(data)
    assert events[0]["rewards"]["brightness"]["mean"] > 16
    for name, value in plain.policy.tensors().items():
        if name.endswith("exp_avg"):
            torch.testing.assert_close(raised.policy.tensors()[name], value, rtol=1e-2, atol=1e-5)
