"""Rounds: train, vote on what the run makes now, train again."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.cli import main
from trainer.config import parse_config
from trainer.loop import Trainer
from trainer.runs.directory import RunDirectory
from trainer.runs.sample_grids import read_samples
from trainer.runs.vote_import import import_run
from trainer.utils.distributed import Processes
from trainer.utils.errors import BadInput
from trainer.votes import store
from trainer.votes.records import Vote


@pytest.fixture(scope="module")
def finished(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with images of its samples at iterations 0 and 2."""
    data = {
        "model": {"family": "sd3", "path": str(tiny_sd3), "height": 16, "width": 8},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 3, "shift": 1.0, "eta": 0.5, "group_size": 3, "prompts_per_iteration": 2},
        "rewards": [{"name": "brightness"}],
        "evaluation": {"texts": ["a green circle"], "images_per_prompt": 1, "every": 2},
        "runtime": {"iterations": 3, "device": "cpu", "samples_every": 2},
    }
    config = parse_config(data)
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "round one").open(config, [])
    Trainer(config, run, Processes("cpu")).train()
    run.release()
    return run


def test_the_newest_samples_enter_as_they_were_made_with_their_prompts(finished: RunDirectory, tmp_path: Path) -> None:
    collection = store.create(tmp_path, "mine")
    done = import_run(collection, finished)
    assert (done.new, done.known) == (6, 0)
    items, complaints = collection.items()
    assert complaints == []
    assert sorted({item.prompt for item in items}) == ["a blue square", "a red circle"]
    assert {item.source for item in items} == {"run round one, rollout at iteration 2"}
    image = finished.path / "samples" / "rollout_000002.png"
    grid = np.asarray(Image.open(image).convert("RGB"))
    for item, sample in zip(items, read_samples(image), strict=True):
        stored = np.asarray(Image.open(collection.images / item.image))
        left, top, right, bottom = sample.box
        cell = grid[top:bottom, left:right]
        factor = cell.shape[0] // 16
        assert factor > 1
        assert stored.shape == (16, 8, 3)
        assert (cell == stored.repeat(factor, 0).repeat(factor, 1)).all()
    again = import_run(collection, finished)
    assert (again.new, again.known) == (0, 6)
    assert import_run(collection, finished, iteration=0).new == 6
    import_run(collection, finished, "evaluation", 0)
    assert collection.items()[0][-1].prompt == "a green circle"


def test_a_second_round_trains_on_votes_on_the_first(
    finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["collect", str(finished.path), str(tmp_path / "second")]) == 0
    assert "6 images added to" in capsys.readouterr().out
    collection = store.find(tmp_path, "second")
    of: dict[str, list[str]] = {}
    for item in collection.items()[0]:
        of.setdefault(item.prompt, []).append(item.image)
    collection.record([Vote(*names[:2], id=str(i)) for i, names in enumerate(of.values())])
    data = finished.config().model_dump(mode="json")
    data |= {"objective": {"name": "dpo", "collection": str(collection.folder)}, "prompts": {}, "rewards": []}
    data["lora"]["start_from"] = str(finished.lora_file)
    trainer = Trainer(parse_config(data), None, Processes("cpu"))
    assert trainer.train()["state"] == "finished"


@pytest.mark.parametrize(
    ("kind", "iteration", "says"),
    [
        ("rollout", 1, "no rollout samples at iteration 1: choose one of 0, 2"),
        ("../x", None, "choose one of rollout, evaluation"),
    ],
)
def test_what_a_run_does_not_have_is_said(
    finished: RunDirectory, tmp_path: Path, kind: str, iteration: int | None, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        import_run(store.create(tmp_path, "mine"), finished, kind, iteration)


def test_cells_that_lie_outside_their_image_are_left_out(finished: RunDirectory, tmp_path: Path) -> None:
    import shutil

    copy = RunDirectory(Path(shutil.copytree(finished.path, tmp_path / "copy")))
    cells = copy.path / "samples" / "rollout_000002.json"
    cells.write_text('{"cells": [{"prompt": "x", "seed": "1", "scores": {}, "box": [0, 0, 100000000, 100000000]}]}')
    with pytest.raises(
        BadInput, match="rollout_000002.png of run 'copy' is missing or damaged: choose another iteration"
    ):
        import_run(store.create(tmp_path, "mine"), copy)
