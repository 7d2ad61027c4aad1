"""Several processes: a failure says what and where, all ranks end at once, and none outlives its launcher."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, write_description

from trainer.runs.directory import RunDirectory
from trainer.runs.launch import kill_tree

pytestmark = pytest.mark.slow

STUB = ROOT / "tests" / "rank_stub.py"


class Stubs:
    """Real processes of the program whose trainers do as they are told; see rank_stub.py."""

    def __init__(self, folder: Path) -> None:
        self.run, self.log = RunDirectory(folder / "run"), folder / "log.txt"
        description = {"prompts": {"texts": ["a", "b"]}, "rewards": [{"name": "brightness"}]}
        description["runtime"] = {"device": "cpu"}
        self.file = write_description(folder / "run.json", description)
        self.started: list[subprocess.Popen] = []

    def start(self, behaviour: str, launcher: tuple[object, ...] = (), processes: int = 2) -> subprocess.Popen:
        words = [sys.executable, *launcher, STUB, "train", self.file, "--output", self.run.path]
        words += [] if launcher else ["--processes", processes]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [str(word) for word in words],
                env={**os.environ, "BEHAVIOUR": behaviour, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def end(self, behaviour: str, **options: object) -> tuple[int, str]:
        """Exit code and last line; a rank that is left waits for 1000 seconds."""
        process = self.start(behaviour, **options)
        code = process.wait(600)
        assert not self.alive(), self.output
        return code, self.output.splitlines()[-1]

    def ranks(self, count: int = 2) -> list[psutil.Process]:
        """The ranks, once all of them train."""
        end = time.monotonic() + 600
        while len(found := re.findall(r"rank \d is (\d+)", self.output)) < count:
            assert time.monotonic() < end, self.output
            time.sleep(0.05)
        return [psutil.Process(int(pid)) for pid in found]

    def alive(self) -> list[int]:
        pids = [int(pid) for pid in re.findall(r"rank \d is (\d+)", self.output)]
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    def wait_until_gone(self) -> None:
        end = time.monotonic() + 300
        while self.alive():
            assert time.monotonic() < end, "a rank outlives its launcher"
            time.sleep(0.05)

    @property
    def output(self) -> str:
        return self.log.read_text()


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    stubs = Stubs(tmp_path)
    yield stubs
    for process in stubs.started:
        kill_tree(process.pid)
    for pid in stubs.alive():
        os.kill(pid, signal.SIGKILL)


def test_a_failure_in_one_rank_ends_all_and_is_named(stubs: Stubs) -> None:
    """The other rank hangs, as it would in NCCL."""
    code, line = stubs.end("fail,hang")
    assert (code, line) == (
        1,
        f"failed: rank 1: the judge answers 400 (details in {stubs.run.path / 'error-1.txt'})",
    )
    status = stubs.run.status()
    assert (status["state"], status["error"]) == ("failed", "rank 1: the judge answers 400")
    assert "Traceback" in (stubs.run.path / "error-1.txt").read_text()
    assert "Traceback" not in stubs.output


def test_the_first_cause_is_named_and_not_what_follows_from_it(stubs: Stubs) -> None:
    """The other rank notices that its peer is gone, and says so."""
    code, line = stubs.end("die,collective")
    sentence = "rank 1 was killed by SIGKILL; the system does this when memory runs out"
    assert (code, line) == (1, f"failed: {sentence}")
    assert (stubs.run.status()["state"], stubs.run.status()["error"]) == ("failed", sentence)


def test_what_all_ranks_say_is_said_once_without_a_rank(stubs: Stubs) -> None:
    sentence = "lora.targets: 'x' matches no linear layer"
    assert stubs.end("refuse") == (2, f"error: {sentence}")
    assert stubs.output.count(sentence) == 1
    assert (stubs.run.status()["error"], stubs.run.status()["bad_input"]) == (sentence, True)


def test_ranks_that_do_not_listen_are_ended_soon_after_a_signal(stubs: Stubs) -> None:
    process = stubs.start("hang")
    stubs.ranks()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, stubs.output
    assert not stubs.alive()
    assert stubs.run.status()["state"] == "stopped"
    assert "failed" not in stubs.output


def test_no_rank_outlives_a_killed_group_of_processes(stubs: Stubs) -> None:
    process = stubs.start("hang")
    stubs.ranks()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    stubs.wait_until_gone()


def test_under_torchrun_a_failure_is_named_and_a_killed_launcher_leaves_no_rank(stubs: Stubs) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    code, _ = stubs.end("fail,hang", launcher=launcher)
    assert code == 1
    assert (stubs.run.status()["state"], stubs.run.status()["error"]) == ("failed", "rank 1: the judge answers 400")
    assert "failed: rank 1: the judge answers 400" in stubs.output
    process = stubs.start("hang", launcher=launcher)
    stubs.ranks()
    process.kill()
    process.wait(60)
    stubs.wait_until_gone()


CHILD = """
import json, os, sys, time
from trainer.runs.lifeline import tie_to_parent
tie_to_parent(use_signal=json.loads(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(1000)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}, sys.argv[1]])"


@pytest.mark.parametrize("use_signal", [True, False], ids=["by the kernel", "by a thread"])
def test_a_process_ends_with_its_parent(use_signal: bool) -> None:
    words = [sys.executable, "-c", PARENT, json.dumps(use_signal)]
    parent = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(60)
    psutil.wait_procs([child], timeout=300)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_whose_parent_was_gone_before_does_not_start(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CHILD, "true"]
    environment = {**os.environ, "DANCEGRPO_PARENT": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (1, "")
