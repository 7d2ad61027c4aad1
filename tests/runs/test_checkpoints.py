"""Checkpoints: complete or refused; and a run goes on, whatever happened to the files of its directory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Forks, assert_same_tensors, lora_of, results_of, write_description

from trainer.config import parse_config
from trainer.runs.directory import Checkpoint, RunDirectory


@pytest.fixture
def run(tmp_path: Path, tiny_description: dict) -> RunDirectory:
    return RunDirectory(tmp_path / "run").open(parse_config(tiny_description), ["train", "x.yaml"])


def numbered(iteration: int) -> Checkpoint:
    return Checkpoint({"a": torch.full((3, 2), float(iteration)), "b": torch.tensor(1.5)}, {"iteration": iteration})


def flip(path: Path, place: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "header cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "flipped byte": lambda path: flip(path, -3),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def test_only_the_newest_checkpoints_are_kept(run: RunDirectory) -> None:
    for iteration in range(6):
        run.save_checkpoint(iteration, numbered(iteration), keep=3)
    assert [path.name for path in run.checkpoints()] == [f"{i:06d}.safetensors" for i in (3, 4, 5)]
    checkpoint, complaints = run.load_checkpoint()
    assert complaints == []
    assert checkpoint.state == {"iteration": 5}
    assert_same_tensors(checkpoint.tensors, numbered(5).tensors)


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_newest_checkpoint_falls_back_to_the_one_before(run: RunDirectory, damage: str) -> None:
    for iteration in (1, 2):
        run.save_checkpoint(iteration, numbered(iteration), keep=2)
    DAMAGE[damage](run.checkpoints()[-1])
    checkpoint, complaints = run.load_checkpoint()
    assert checkpoint.state == {"iteration": 1}
    assert len(complaints) == 1
    assert "000002.safetensors is corrupt" in complaints[0]
    DAMAGE[damage](run.checkpoints()[0])
    checkpoint, complaints = run.load_checkpoint()
    assert checkpoint is None
    assert len(complaints) == 2


def test_no_changed_bit_goes_unnoticed(run: RunDirectory) -> None:
    """Three bits of every byte: tensors, their names and shapes, and the plain data of the state."""
    run.save_checkpoint(12, numbered(12), keep=2)
    path = run.checkpoints()[0]
    sound = path.read_bytes()
    original, _ = run.load_checkpoint()
    for place in range(len(sound)):
        for bit in (0, 3, 5):
            data = bytearray(sound)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            found, _ = run.load_checkpoint()
            if found is not None:  # only what does not change what is read, such as blanks in the header
                assert found.state == original.state, (place, bit)
                assert {k: (v.dtype, v.shape) for k, v in found.tensors.items()} == {
                    k: (v.dtype, v.shape) for k, v in original.tensors.items()
                }, (place, bit)
                assert_same_tensors(found.tensors, original.tensors)


def test_checkpoints_after_a_corrupt_one_are_not_removed_as_old(run: RunDirectory) -> None:
    for iteration in (3, 4):
        run.save_checkpoint(iteration, numbered(iteration), keep=2)
    for path in run.checkpoints():
        path.write_bytes(b"")
    run.save_checkpoint(0, numbered(0), keep=2)
    run.save_checkpoint(1, numbered(1), keep=2)
    assert run.load_checkpoint()[0].state == {"iteration": 1}


@pytest.fixture(scope="module")
def finished(tiny_sd3: Path, program: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of four iterations, in `run`, and its description beside it."""
    folder = tmp_path_factory.mktemp("finished")
    description = {
        "model": {"path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 4, "shift": 1.0, "eta": 0.5, "group_size": 4, "prompts_per_iteration": 2},
        "rewards": [{"name": "brightness"}],
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"learning_rate": 1e-3},
        "runtime": {"iterations": 4, "device": "cpu"},
    }
    file = write_description(folder / "run.json", description)
    code, output = program.run("train", file, "--output", folder / "run")
    assert code == 0, output
    return folder


@pytest.mark.parametrize("damage", ["truncated", "flipped byte", "empty"])
def test_run_goes_on_from_the_checkpoint_before_a_corrupt_one(
    finished: Path, program: Forks, tmp_path: Path, damage: str
) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    (run.path / "report" / "summary.json").unlink()  # as if it had been killed before its end
    DAMAGE[damage](run.checkpoints()[-1])
    code, output = program.run("resume", run.path)
    assert code == 0, output
    assert "warning: checkpoint 000004.safetensors is corrupt" in output
    assert "iteration 4/4" in output
    assert "iteration 3/4" not in output
    assert_same_tensors(lora_of(run.path), lora_of(finished / "run"))
    assert results_of(run.path) == results_of(finished / "run")


def test_run_without_a_sound_checkpoint_starts_over_and_keeps_its_lora(
    finished: Path, program: Forks, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    (run.path / "report" / "summary.json").unlink()
    for path in run.checkpoints():
        path.write_bytes(b"")
    learned = lora_of(run.path)
    # Killed right after its first iteration, it has no LoRA better than the old one, and must not have lost that.
    code, _ = program.run("resume", run.path, die=("predict", 6))
    assert code == -9
    kept = [lora_of(run.path, path.name) for path in run.path.glob("lora*.safetensors")]
    assert any(all(torch.equal(lora[name], learned[name]) for name in learned) for lora in kept)
    code, output = program.run("resume", run.path)
    assert code == 0, output
    assert_same_tensors(lora_of(run.path), learned)
    assert results_of(run.path) == results_of(finished / "run")


# -------------------------------------------------------------------------------------------- damage to a finished run


def test_a_finished_run_that_is_extended_is_the_longer_run(finished: Path, program: Forks, tmp_path: Path) -> None:
    run, whole = shutil.copytree(finished / "run", tmp_path / "run"), tmp_path / "whole"
    code, output = program.run("train", finished / "run.json", "--output", whole, "--set", "runtime.iterations=6")
    assert code == 0, output
    code, output = program.run("resume", run, "--iterations", 6)
    assert code == 0, output
    assert "the run is extended from 4 to 6 iterations" in output
    assert "iteration 4/6" not in output, "what was done is not done again"
    assert "iteration 5/6" in output
    assert results_of(run) == results_of(whole)
    assert_same_tensors(lora_of(run), lora_of(whole))
    assert (RunDirectory(run).status()["iterations"], RunDirectory(run).summary()["iterations"]) == (6, 6)
    # The description is another one now, and the shorter one is refused.
    code, output = program.run("train", finished / "run.json", "--output", run)
    assert code == 2
    assert "runtime.iterations was 6 and is now 4" in output


def test_an_extended_run_says_what_its_learning_rate_does(
    program: Forks, tiny_description: dict, tmp_path: Path
) -> None:
    del tiny_description["evaluation"]
    tiny_description["optimizer"]["schedule"] = "linear"
    tiny_description["runtime"] |= {"iterations": 2, "samples_every": 0}
    file, run = write_description(tmp_path / "run.json", tiny_description), tmp_path / "run"
    assert program.run("train", file, "--output", run)[0] == 0
    before = lora_of(run)
    code, output = program.run("train", file, "--output", run, "--set", "runtime.iterations=3")
    assert code == 0, output
    assert "optimizer.schedule: the learning rate now follows the longer run and reaches 0 at its new end" in output
    assert any(not torch.equal(value, before[name]) for name, value in lora_of(run).items()), "it is not 0"


@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_a_finished_run_whose_lora_was_deleted_gives_it_again(
    finished: Path, program: Forks, tmp_path: Path, damage: str
) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    learned, events = lora_of(run.path), results_of(run.path)
    run.lora_file.unlink()
    if damage == "emptied":
        run.lora_file.touch()
    code, output = program.run("resume", run.path)
    assert code == 0, output
    assert "iteration 1/4" not in output, "nothing is trained again"
    assert_same_tensors(lora_of(run.path), learned)
    assert results_of(run.path) == events
    assert run.is_finished()


def test_damaged_files_of_a_run_cost_no_more_than_they_held(finished: Path, program: Forks, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    lines = run.events_file.read_bytes().split(b"\n")
    run.events_file.write_bytes(b"\n".join([lines[0], b"null", lines[2], b"\xff", b""]))
    (run.path / "status.json").write_bytes(b"[1, 2]")
    (run.path / "report" / "summary.json").write_bytes(b"")
    assert [event["iteration"] for event in run.events()] == [1, 3]
    code, output = program.run("status", run.path)
    assert (code, json.loads(output)) == (0, {"live": False})
    code, output = program.run("resume", run.path)
    assert code == 0, output
    assert "warning: events.jsonl had 2 damaged lines, which were removed" in output
    assert run.events_file.read_bytes() == lines[0] + b"\n" + lines[2] + b"\n"
    assert run.is_finished()
    assert_same_tensors(lora_of(run.path), lora_of(finished / "run"))


def test_an_edited_description_is_one_sentence_until_the_original_is_given(
    finished: Path, program: Forks, tmp_path: Path
) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    (run.path / "report" / "summary.json").unlink()
    file = run.path / "run.yaml"
    file.write_text(file.read_text().replace("rank: 4", "rank: 8"))
    code, output = program.run("resume", run.path)
    assert code == 2
    assert len(output.splitlines()) == 1
    assert "run.yaml was edited: its settings do not match its hash" in output
    code, output = program.run("train", finished / "run.json", "--output", run.path)
    assert code == 0, output
    code, output = program.run("resume", run.path)
    assert code == 0, output
    assert_same_tensors(lora_of(run.path), lora_of(finished / "run"))


def test_a_run_resumes_from_another_folder(tiny_description: dict, program: Forks, tmp_path: Path) -> None:
    del tiny_description["evaluation"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red circle\na blue square\n")
    tiny_description["prompts"] = {"file": "prompts.txt"}
    tiny_description["runtime"] |= {"iterations": 1, "samples_every": 0}
    file, run = write_description(tmp_path / "data" / "run.json", tiny_description), tmp_path / "run"
    code, output = program.run("train", file, "--output", run)  # in yet another folder
    assert code == 0, output
    assert RunDirectory(run).config().prompts.file == str(tmp_path / "data" / "prompts.txt")
    code, output = program.run("resume", run, "--iterations", 2)
    assert code == 0, output
