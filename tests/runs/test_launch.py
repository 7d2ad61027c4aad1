"""Runs in the background as seen by who started them; the trainer is replaced by processes that do nothing."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from trainer.config import parse_config
from trainer.runs import launch
from trainer.runs.directory import RunDirectory

CONFIG = parse_config({"prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]})
SLEEP = "import time; time.sleep(60)"
FAMILY = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunDirectory]:
    def start(code: str) -> RunDirectory:
        monkeypatch.setattr(launch, "command", lambda arguments: [sys.executable, "-c", code, *arguments])
        run = RunDirectory(tmp_path / "run").open(CONFIG, ["test"])
        launch.start_run(run, processes=2, gpus=[3])
        run.release()
        return run

    return start


def processes_of(run: RunDirectory) -> list[psutil.Process]:
    root = psutil.Process(run.status()["launcher"]["pid"])
    return [root, *root.children(recursive=True)]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_is_on_before_its_process_holds_the_lock(started) -> None:
    run = started(SLEEP)
    assert not run.is_locked_elsewhere()
    assert launch.is_running(run)
    status = run.status()
    assert (status["state"], status["processes"], status["gpus"]) == ("starting", 2, [3])
    assert processes_of(run)[0].cmdline()[-4:] == ["resume", str(run.path), "--processes", "2"]
    launch.stop(run)


def test_what_a_folder_is_called_reaches_no_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import pathlib, sys; pathlib.Path('said').write_text(sys.argv[2])"
    monkeypatch.setattr(launch, "command", lambda arguments: [sys.executable, "-c", code, *arguments])
    run = RunDirectory(tmp_path / "$(touch owned); touch owned & `touch owned`").open(CONFIG, ["test"])
    launch.start_run(run)
    run.release()
    until(lambda: not launch.is_running(run))
    assert (tmp_path / "said").read_text() == str(run.path)
    assert not list(tmp_path.rglob("owned"))


def test_stop_ends_every_process_of_one_that_is_only_starting(started) -> None:
    run = started(FAMILY)
    until(lambda: len(processes_of(run)) == 2)
    family = processes_of(run)
    begun = time.monotonic()
    assert launch.stop(run, grace=300)
    assert time.monotonic() - begun < 100, "it waited for a process that cannot listen yet"
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    assert run.status()["state"] == "stopped"
    assert not run.stop_requested()
    assert not launch.is_running(run)
    assert not launch.stop(run)


def test_one_that_ended_is_not_running_and_leaves_nothing_in_the_process_table(started) -> None:
    run = started("pass")
    pid = run.status()["launcher"]["pid"]
    until(lambda: not launch.is_running(run))
    assert not psutil.pid_exists(pid)


def test_another_process_of_the_same_number_is_not_the_run(started) -> None:
    run = started(SLEEP)
    launcher = run.status()["launcher"]
    run.write_status("starting", launcher={**launcher, "created": launcher["created"] - 1000})
    assert not launch.is_running(run)
    run.write_status("starting", launcher=launcher)
    launch.stop(run)


def test_a_stop_keeps_what_the_run_said_last(started) -> None:
    run = started(SLEEP)
    run.write_status("finished")
    launch.stop(run)
    assert run.status()["state"] == "finished"


def test_asking_whether_a_run_lives_makes_no_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "none")
    assert run.is_locked_elsewhere() is False
    assert not launch.is_running(run)
    assert list(tmp_path.iterdir()) == []
