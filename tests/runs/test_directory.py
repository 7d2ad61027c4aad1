"""The run directory: files whole or not at all, one description, one writer."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from safetensors.torch import save_file

from trainer.cli import main
from trainer.config import RunConfig, parse_config
from trainer.runs import launch
from trainer.runs.directory import Checkpoint, RunDirectory, description_hash
from trainer.utils.errors import BadInput, RunFailed


@pytest.fixture
def config(tiny_description: dict) -> RunConfig:
    return parse_config(tiny_description)


@pytest.fixture
def run(tmp_path: Path, config: RunConfig) -> RunDirectory:
    return RunDirectory(tmp_path / "run").open(config, ["train", "x.yaml"])


# ----------------------------------------------------------------------------------------------------------- status


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


@pytest.mark.parametrize("content", [b"null", b"[]", b"5", b"\xff", b"", b"{", b"[" * 100_000])
def test_a_damaged_status_is_an_empty_one(run: RunDirectory, content: bytes) -> None:
    (run.path / "status.json").write_bytes(content)
    assert run.status() == {}
    assert launch.is_running(run) is False
    run.write_status("running", iteration=1)
    assert (run.status()["state"], run.status()["iteration"]) == ("running", 1)


def test_fields_of_the_wrong_type_are_left_out(run: RunDirectory) -> None:
    good = {"state": "failed", "iteration": 3, "iterations": 9, "gpus": [0, 1], "error": "why", "note": {"a": 1}}
    bad = [
        {"state": "gone", "iteration": "3", "iterations": -1, "gpus": [0, "1"], "error": 5, "note": {"a": 1}},
        {"state": ["failed"], "iteration": True, "iterations": 1.5, "gpus": 7, "error": [], "launcher": 5},
        {"state": None, "iteration": None, "launcher": {"host": "x"}, "progress": 3, "processes": "2", "pid": {}},
    ]
    (run.path / "status.json").write_text(json.dumps(good))
    assert run.status() == good
    for fields in bad:
        (run.path / "status.json").write_text(json.dumps(fields))
        assert set(run.status()) <= {"note"}
        assert launch.is_running(run) is False


SUMMARY = {
    "state": "finished",
    "iterations": 2,
    "seconds": 1.0,
    "eval": {"before": {"rewards": {"r": 1.0}}, "after": None},
    "evaluations": [{"iteration": 0, "rewards": {"r": 1.0}}],
}


def test_a_damaged_summary_is_none_and_a_run_without_its_lora_is_not_finished(run: RunDirectory) -> None:
    file = run.path / "report" / "summary.json"
    file.parent.mkdir()
    damaged = [b"", b"{}", b"null", b"[1]", b"\xff", b"{"]
    damaged += [json.dumps({**SUMMARY, key: 5}).encode() for key in ("state", "eval", "evaluations")]
    damaged += [json.dumps({**SUMMARY, "seconds": None}).encode()]
    damaged += [json.dumps({**SUMMARY, "eval": {"before": {"rewards": 5}}}).encode()]
    save_file({"a": torch.ones(3)}, run.lora_file)
    for content in damaged:
        file.write_bytes(content)
        assert (run.summary(), run.is_finished()) == (None, False), content
    file.write_text(json.dumps(SUMMARY))
    assert (run.summary(), run.is_finished()) == (SUMMARY, True)
    whole = run.lora_file.read_bytes()
    for content in (b"", whole[:9], whole[:-1], whole + b"x", b"\xff" * 100, b"\2" + bytes(7) + b"{}"):
        run.lora_file.write_bytes(content)
        assert not run.is_finished(), content
    run.lora_file.unlink()
    assert not run.is_finished()


# --------------------------------------------------------------------------------------------------------- identity


def test_description_is_kept_with_versions_and_command(run: RunDirectory, config: RunConfig) -> None:
    import yaml

    record = yaml.safe_load((run.path / "run.yaml").read_text())
    assert record["command"] == ["train", "x.yaml"]
    assert record["hash"] == description_hash(config)
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert RunDirectory.existing(run.path).config() == config


def test_a_command_line_that_is_not_text_leaves_the_description_readable(tmp_path: Path, config: RunConfig) -> None:
    name = os.fsdecode(b"caf\xe9")  # as Python gives a file name that is not UTF-8
    run = RunDirectory(tmp_path / "run").open(config, ["train", name])
    assert run.config() == config
    assert "caf\\xe9" in (run.path / "run.yaml").read_text(encoding="utf-8")
    run.write_status("failed", error=f"{name} is gone")
    assert run.status()["error"] == f"{name} is gone"
    with pytest.raises(BadInput, match="has a name that is not UTF-8; choose another name"):
        RunDirectory(tmp_path / name).open(config, [])
    assert not (tmp_path / name).exists()


def test_a_run_that_was_refused_before_it_began_holds_its_directory_for_nobody(
    run: RunDirectory, tiny_description: dict
) -> None:
    tiny_description["rollout"]["eta"] = 0.9
    other = parse_config(tiny_description)
    run.write_status("failed", error="the server cannot be reached", bad_input=True)
    run.release()
    assert run.changes(other) == []
    RunDirectory(run.path).open(other, ["train"]).release()
    assert run.config() == other


@pytest.mark.parametrize("what", ["failed while it trained", "has an event", "has a checkpoint"])
def test_a_run_that_began_keeps_its_directory(run: RunDirectory, tiny_description: dict, what: str) -> None:
    tiny_description["rollout"]["eta"] = 0.9
    run.write_status("failed", error="a reward is gone", bad_input=what != "failed while it trained")
    if what == "has an event":
        run.events_file.write_text('{"iteration": 1')
    if what == "has a checkpoint":
        run.save_checkpoint(0, Checkpoint({"a": torch.zeros(1)}, {}), 2)
    run.release()
    with pytest.raises(BadInput, match="rollout.eta was 0.5 and is now 0.9"):
        RunDirectory(run.path).open(parse_config(tiny_description), [])


def test_hash_stands_for_the_description(tiny_description: dict) -> None:
    first = description_hash(parse_config(tiny_description))
    tiny_description["rollout"]["kernel"] = "dance"  # the default, written out
    assert description_hash(parse_config(tiny_description)) == first
    tiny_description["optimizer"]["learning_rate"] = 2e-3
    assert description_hash(parse_config(tiny_description)) != first


def test_same_description_attaches_again(run: RunDirectory, config: RunConfig) -> None:
    run.write_status("stopped", iteration=7)
    run.release()
    again = RunDirectory(run.path).open(config, [])
    assert again.status()["iteration"] == 7
    again.release()


def test_another_description_is_refused_with_what_changed(run: RunDirectory, tiny_description: dict) -> None:
    run.release()
    tiny_description["rollout"]["eta"] = 0.9
    tiny_description["rewards"][1]["weight"] = 7
    before = (run.path / "run.yaml").read_text()
    with pytest.raises(BadInput) as raised:
        RunDirectory(run.path).open(parse_config(tiny_description), [])
    assert "rollout.eta was 0.5 and is now 0.9" in str(raised.value)
    assert "rewards" in str(raised.value)
    assert "lora" not in str(raised.value).removeprefix(f"run directory {run.path}")
    assert (run.path / "run.yaml").read_text() == before
    assert not launch.is_running(run), "the lock was given back"


@pytest.mark.parametrize("content", ["", "a: [1", "- 1", "description: 5", b"\xff\xfe\x00", "description: {}"])
def test_damaged_description_is_named(run: RunDirectory, config: RunConfig, content: str | bytes) -> None:
    run.release()
    (run.path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput):
        RunDirectory.existing(run.path).config()
    for _ in range(2):  # the second is not told that the first still has the directory
        with pytest.raises(BadInput) as raised:
            RunDirectory(run.path).open(config, [])
        assert "in use" not in str(raised.value)


def test_a_run_is_extended_and_not_shortened(run: RunDirectory, tiny_description: dict) -> None:
    run.release()
    (run.path / "report").mkdir()
    (run.path / "report" / "summary.json").write_text(json.dumps(SUMMARY))
    save_file({"a": torch.ones(3)}, run.lora_file)
    lora = run.lora_file.read_bytes()
    assert run.is_finished()
    tiny_description["runtime"]["iterations"] = 9
    longer = parse_config(tiny_description)
    assert run.changes(longer) == []
    again = RunDirectory(run.path).open(longer, ["train"])
    assert again.extended_from == 4
    assert again.config() == longer
    assert not again.is_finished(), "it goes on"
    assert again.lora_file.read_bytes() == lora
    again.release()
    assert RunDirectory(run.path).open(longer, []).extended_from is None
    for iterations, eta in ((8, 0.5), (12, 0.9)):
        tiny_description["runtime"]["iterations"], tiny_description["rollout"]["eta"] = iterations, eta
        with pytest.raises(
            BadInput,
            match="was 9 and is now 8, but can only be raised|rollout.eta was 0.5 and is now 0.9",
        ):
            RunDirectory(run.path).open(parse_config(tiny_description), [])


def test_an_edited_description_is_refused_and_repaired_by_the_original(
    run: RunDirectory, config: RunConfig, tiny_description: dict
) -> None:
    run.release()
    file = run.path / "run.yaml"
    sound = file.read_text()
    file.write_text(sound.replace("learning_rate: 0.001", "learning_rate: 0.5"))
    with pytest.raises(BadInput, match=r"run\.yaml was edited: its settings do not match its hash"):
        run.config()
    tiny_description["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(BadInput, match="was edited"):
        RunDirectory(run.path).open(parse_config(tiny_description), [])
    RunDirectory(run.path).open(config, ["train", "x.yaml"]).release()
    assert file.read_text() == sound


@pytest.mark.parametrize("content", ["", "a: [1", "- 1", "description: 5\nhash: a", b"\xff\xfe\x00", "a: &a 1\nb: *a"])
def test_a_damaged_description_is_repaired_by_the_original(
    run: RunDirectory, config: RunConfig, tiny_description: dict, content: str | bytes
) -> None:
    run.write_status("stopped", description=description_hash(config))
    run.release()
    file = run.path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tiny_description["rollout"]["eta"] = 0.9
    with pytest.raises(BadInput, match="run.yaml"):
        RunDirectory(run.path).open(parse_config(tiny_description), [])
    RunDirectory(run.path).open(config, []).release()
    assert run.config() == config
    assert run.status()["state"] == "stopped"


# -------------------------------------------------------------------------------------------------------- ownership


def everything_that_writes(run: RunDirectory) -> list[Callable[[], object]]:
    checkpoint = Checkpoint({"a": torch.ones(2)}, {})
    return [
        lambda: run.write_status("running"),
        lambda: run.append_event({"iteration": 1}),
        lambda: run.keep_events(0),
        lambda: run.save_checkpoint(1, checkpoint, 2),
        run.stop_requested,
    ]


def test_a_deleted_directory_stays_deleted(run: RunDirectory) -> None:
    run.write_status("running")
    shutil.rmtree(run.path)
    for write in everything_that_writes(run):
        with pytest.raises(RunFailed, match="was deleted during the run"):
            write()
    assert not run.path.exists()
    run.release()


def test_a_directory_that_another_run_has_taken_is_left_alone(run: RunDirectory, config: RunConfig) -> None:
    shutil.rmtree(run.path)
    other = RunDirectory(run.path).open(config, [])
    other.write_status("running", iteration=1)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    for write in everything_that_writes(run):
        with pytest.raises(RunFailed, match="was taken over by another process during the run"):
            write()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    run.release()
    other.write_status("finished")
    assert other.status()["state"] == "finished"
    assert other.is_locked_elsewhere() is False
    assert RunDirectory(run.path).is_locked_elsewhere(), "letting go of the old lock has not let go of the new one"


# -------------------------------------------------------------------------------------------------- a read-only disk


def test_a_read_only_disk_is_a_sentence(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run.write_status("stopped", iteration=3)
    run.release()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(run.path))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    assert main(["status", str(run.path)]) == 0
    assert json.loads(capsys.readouterr().out)["iteration"] == 3
    assert main(["stop", str(run.path)]) == 0
    assert "was not running" in capsys.readouterr().out
    # One that runs, seen through a disk that cannot be written here.
    run.write_status("running", launcher=launch.identity(os.getpid()))
    assert launch.is_running(run)
    assert main(["stop", str(run.path)]) == 2
    assert capsys.readouterr().err == f"error: run directory {run.path} cannot be written: Read-only file system\n"
    assert main(["resume", str(run.path)]) == 2
    assert "cannot be written: Read-only file system" in capsys.readouterr().err


def test_foreign_folder_and_file_are_refused(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    with pytest.raises(BadInput, match="not empty and is not a run"):
        RunDirectory(folder).open(config, [])
    assert [p.name for p in folder.iterdir()] == ["holiday.jpg"], "nothing was written"
    with pytest.raises(BadInput, match="is a file"):
        RunDirectory(folder / "holiday.jpg").open(config, [])
    with pytest.raises(BadInput, match="cannot be created"):
        RunDirectory(folder / "holiday.jpg" / "run").open(config, [])
    with pytest.raises(BadInput, match=r"run\.yaml is missing"):
        RunDirectory.existing(folder)


def test_empty_folder_is_taken(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "new").mkdir()
    assert RunDirectory(tmp_path / "new").open(config, []).config() == config


HOLD = """
import sys, time
from pathlib import Path
from trainer.runs.directory import RunDirectory
run = RunDirectory.existing(Path(sys.argv[1]))
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
    run.is_locked_elsewhere()
    time.sleep(0.001)
"""


def test_directory_in_use_is_refused_with_the_pid(run: RunDirectory, config: RunConfig) -> None:
    run.release()
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        assert launch.is_running(run)
        with pytest.raises(BadInput, match=f"in use by process {other.pid}$"):
            RunDirectory(run.path).open(config, [])
    finally:
        other.kill()
        other.wait()
    assert not launch.is_running(run), "the system gives back the lock of a killed process"
    RunDirectory(run.path).open(config, []).release()


def test_asking_whether_a_run_lives_does_not_get_in_its_way(run: RunDirectory, config: RunConfig) -> None:
    run.release()
    other = subprocess.Popen([sys.executable, "-c", WATCH, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "on\n"
        for _ in range(60):
            RunDirectory(run.path).open(config, []).release()
    finally:
        other.kill()
        other.wait()
