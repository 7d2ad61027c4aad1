"""The run directory: files whole or not at all, one description, one writer."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Forks, assert_same_tensors, lora_of, results_of, write_description

from trainer.config import RunConfig, parse_config
from trainer.runs.directory import Checkpoint, RunDirectory, description_hash
from trainer.utils.errors import BadInput
from trainer.utils.files import remove_leftovers, write_atomically, write_json


@pytest.fixture
def config(tiny_description: dict) -> RunConfig:
    return parse_config(tiny_description)


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDirectory:
    return RunDirectory.open(tmp_path / "run", config, ["train", "x.yaml"])


# ------------------------------------------------------------------------------------------------------ whole files


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    file = tmp_path / "folder" / "status.json"
    write_atomically(file, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new and longer")
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file], "no temporary file stays"


def test_write_replaces_and_is_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"text": "Grüße"})
    write_json(file, {"text": "neu"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"text": "neu"}
    assert file.stat().st_mode & 0o777 == 0o644


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    names = [".lora.safetensors.x1.tmp", "checkpoints/.000001.safetensors.y.tmp"]
    kept = ["notes.tmp", ".hidden", "checkpoints/000001.safetensors"]
    (tmp_path / "checkpoints").mkdir()
    for name in names + kept:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_status_keeps_fields_and_survives_a_broken_file(run: RunDirectory) -> None:
    assert run.status() == {}
    run.write_status("running", iteration=3, error=None)
    run.write_status("stopped")
    status = run.status()
    assert (status["state"], status["iteration"], status["pid"]) == ("stopped", 3, os.getpid())
    (run.path / "status.json").write_text('{"state": "runn')
    assert run.status() == {}
    run.write_status("running")
    assert run.status()["state"] == "running"


@pytest.mark.parametrize("half", ['{"iteration": 3, "rew', '{"iteration"', "\0\0\0\0", ""])
def test_events_survive_a_half_written_last_line(run: RunDirectory, half: str) -> None:
    for iteration in (1, 2):
        run.append_event({"iteration": iteration})
    with (run.path / "events.jsonl").open("a") as file:
        file.write(half)
    assert [event["iteration"] for event in run.events()] == [1, 2]
    run.keep_events(1)
    run.append_event({"iteration": 2, "again": True})
    assert run.events() == [{"iteration": 1}, {"iteration": 2, "again": True}]


# --------------------------------------------------------------------------------------------------------- identity


def test_description_is_kept_with_versions_and_command(run: RunDirectory, config: RunConfig) -> None:
    import yaml

    record = yaml.safe_load((run.path / "run.yaml").read_text())
    assert record["command"] == ["train", "x.yaml"]
    assert record["hash"] == description_hash(config)
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert RunDirectory.attach(run.path).config() == config


def test_hash_stands_for_the_description(tiny_description: dict) -> None:
    first = description_hash(parse_config(tiny_description))
    tiny_description["rollout"]["kernel"] = "dance"  # the default, written out
    assert description_hash(parse_config(tiny_description)) == first
    tiny_description["optimizer"]["learning_rate"] = 2e-3
    assert description_hash(parse_config(tiny_description)) != first


def test_same_description_attaches_again(run: RunDirectory, config: RunConfig) -> None:
    run.write_status("stopped", iteration=7)
    run.release()
    again = RunDirectory.open(run.path, config, [])
    assert again.status()["iteration"] == 7
    again.release()


def test_another_description_is_refused_with_what_changed(run: RunDirectory, tiny_description: dict) -> None:
    run.release()
    tiny_description["rollout"]["eta"] = 0.9
    tiny_description["rewards"][1]["weight"] = 7
    before = (run.path / "run.yaml").read_text()
    with pytest.raises(BadInput) as raised:
        RunDirectory.open(run.path, parse_config(tiny_description), [])
    assert "rollout.eta was 0.5 and is now 0.9" in str(raised.value)
    assert "rewards" in str(raised.value)
    assert "lora" not in str(raised.value).removeprefix(f"run directory {run.path}")
    assert (run.path / "run.yaml").read_text() == before
    assert not run.is_live(), "the lock was given back"


@pytest.mark.parametrize("content", ["", "a: [1", "- 1", "description: 5", b"\xff\xfe\x00", "description: {}"])
def test_damaged_description_is_named(run: RunDirectory, config: RunConfig, content: str | bytes) -> None:
    run.release()
    (run.path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput):
        RunDirectory.attach(run.path).config()
    for _ in range(2):  # the second is not told that the first still has the directory
        with pytest.raises(BadInput) as raised:
            RunDirectory.open(run.path, config, [])
        assert "in use" not in str(raised.value)


def test_foreign_folder_and_file_are_refused(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    with pytest.raises(BadInput, match="not empty and holds no run"):
        RunDirectory.open(folder, config, [])
    assert [p.name for p in folder.iterdir()] == ["holiday.jpg"], "nothing was written"
    with pytest.raises(BadInput, match="is a file"):
        RunDirectory.open(folder / "holiday.jpg", config, [])
    with pytest.raises(BadInput, match="cannot be made"):
        RunDirectory.open(folder / "holiday.jpg" / "run", config, [])
    with pytest.raises(BadInput, match=r"run\.yaml is missing"):
        RunDirectory.attach(folder)


def test_empty_folder_is_taken(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "new").mkdir()
    assert RunDirectory.open(tmp_path / "new", config, []).config() == config


HOLD = """
import sys, time
from pathlib import Path
from trainer.runs.directory import RunDirectory
run = RunDirectory.attach(Path(sys.argv[1]))
run.acquire()
run.write_status("running")
print("held", flush=True)
time.sleep(60)
"""


WATCH = """
import sys, time
from trainer.runs.directory import RunDirectory
run = RunDirectory(sys.argv[1])
print("on", flush=True)
while True:
    run.is_live()
    time.sleep(0.001)
"""


def test_directory_in_use_is_refused_with_the_pid(run: RunDirectory, config: RunConfig) -> None:
    run.release()
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert run.is_live()
        with pytest.raises(BadInput, match=f"in use by process {other.pid}$"):
            RunDirectory.open(run.path, config, [])
    finally:
        other.kill()
        other.wait()
    assert not run.is_live(), "the system gives back the lock of a killed process"
    RunDirectory.open(run.path, config, []).release()


def test_asking_whether_a_run_lives_does_not_get_in_its_way(run: RunDirectory, config: RunConfig) -> None:
    run.release()
    other = subprocess.Popen([sys.executable, "-c", WATCH, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "on\n"
        for _ in range(60):
            RunDirectory.open(run.path, config, []).release()
    finally:
        other.kill()
        other.wait()


# ------------------------------------------------------------------------------------------------------ checkpoints


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
