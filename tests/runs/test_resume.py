"""Stopped, killed, out of disk: what was learned stays, and going on gives what not stopping would have given."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import PROMPTS, ROOT, Child, Forks, assert_same_tensors, lora_of, results_of, write_description
from safetensors.torch import load_file

from trainer import train
from trainer.runs.directory import RunDirectory
from trainer.runs.launch import is_running, kill_tree, stop
from trainer.utils.errors import RunFailed

ITERATIONS = 80


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd3: Path, program: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in `run`, and its description beside it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    description = {
        "model": {"path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": PROMPTS},
        "rollout": {"steps": 4, "shift": 1.0, "eta": 0.5, "group_size": 4, "prompts_per_iteration": 2},
        "rewards": [{"name": "brightness"}, {"name": "colorfulness", "weight": 0.5}],
        "objective": {"updates": 2},
        "lora": {"rank": 4, "alpha": 8, "ema_decay": 0.5},
        "optimizer": {"learning_rate": 1e-3, "warmup": 10, "schedule": "linear"},
        "evaluation": {"texts": ["a green circle", "a red square"], "images_per_prompt": 2, "every": 10},
        "runtime": {"iterations": ITERATIONS, "seed": 3, "device": "cpu", "samples_every": 20},
    }
    code, output = program.run("train", write_description(folder / "run.json", description), "--output", folder / "run")
    assert code == 0, output
    assert len(results_of(folder / "run")) == ITERATIONS
    return folder


def wait_for(condition: Callable[[], bool], child: Child, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, child.output
        time.sleep(0.01)


def events(run: Path) -> int:
    file = run / "events.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def assert_same_run(run: Path, reference: Path) -> None:
    """Losses, rewards and everything else of every iteration, held-out scores, LoRA, best LoRA: bit for bit."""
    assert results_of(run) == results_of(reference)
    assert_same_tensors(lora_of(run), lora_of(reference))
    assert_same_tensors(lora_of(run, "best.safetensors"), lora_of(reference, "best.safetensors"))
    scores = [[e["rewards"] for e in RunDirectory(r).summary()["evaluations"]] for r in (run, reference)]
    assert scores[0] == scores[1]


def assert_nothing_half_written(run: Path) -> None:
    for path in run.rglob("*"):
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".tmp":
            assert path.name.startswith(".")
    # A last line may be cut short; those before it are whole.
    for line in (run / "events.jsonl").read_text().split("\n")[:-1] if (run / "events.jsonl").exists() else []:
        json.loads(line)


def test_stopped_and_resumed_gives_the_run_that_was_not_stopped(
    uninterrupted: Path, program: Forks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ways = {
        "stop command": lambda child: stop(RunDirectory(run), grace=120),
        "stop file": lambda child: (run / "stop").touch(),
        "SIGTERM": lambda child: child.signal(signal.SIGTERM),
        "SIGINT": lambda child: child.signal(signal.SIGINT),
    }
    child = program.start("train", uninterrupted / "run.json", "--output", run)
    for number, (way, ask) in enumerate(ways.items()):
        before = events(run)
        wait_for(lambda before=before: events(run) >= before + 3, child)
        ask(child)
        assert child.wait(60) == 0, f"{way}: {child.output}"
        status = RunDirectory(run).status()
        assert status["state"] == "stopped", way
        assert RunDirectory(run).summary()["state"] == "stopped"
        assert 3 * number <= status["iteration"] < ITERATIONS, way
        assert_nothing_half_written(run)
        child = program.start("resume", run)
    assert child.wait() == 0, child.output
    assert_same_run(run, uninterrupted / "run")


def test_stop_while_the_run_starts_is_not_forgotten(uninterrupted: Path, program: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = program.start("train", uninterrupted / "run.json", "--output", run)
    wait_for((run / "status.json").exists, child)
    (run / "stop").touch()
    assert child.wait(60) == 0, child.output
    assert RunDirectory(run).status()["state"] == "stopped"
    assert events(run) == 0


def test_stop_between_checkpoints_keeps_the_iterations_done(
    tiny_description: dict, program: Forks, tmp_path: Path
) -> None:
    tiny_description["runtime"] |= {"iterations": 30, "checkpoint_every": 7}
    file = write_description(tmp_path / "run.json", tiny_description)
    code, output = program.run("train", file, "--output", tmp_path / "whole")
    assert code == 0, output
    run = tmp_path / "run"
    child = program.start("train", file, "--output", run)
    wait_for(lambda: events(run) >= 10, child)
    (run / "stop").touch()
    assert child.wait(60) == 0, child.output
    done = RunDirectory(run).status()["iteration"]
    assert RunDirectory(run).load_checkpoint()[0].state["iteration"] == done
    code, output = program.run("resume", run)
    assert code == 0, output
    assert f"iteration {done + 1}/30" in output
    assert f"iteration {done}/30" not in output
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_twenty_random_moments_nothing_is_lost(uninterrupted: Path, program: Forks, tmp_path: Path) -> None:
    """SIGKILL at start-up, in rollout, update and saving; then whatever is on disk is whole, and going on works.

    Most lives end at a random call of a function of one phase, so that every phase is hit; some after a random time.
    """
    run, rng = tmp_path / "run", random.Random(0)
    lives = ["time", "predict", "flush", "backward", "move", "optimizer", "start", "flush", "events", "move"] * 2
    seen_leftovers, reached = 0, 0
    for life, phase in enumerate(lives):
        arguments = (
            ("resume", run) if (run / "run.yaml").exists() else ("train", uninterrupted / "run.json", "--output", run)
        )
        before = events(run)
        if phase in ("start", "time"):
            child, end = program.start(*arguments), time.monotonic() + rng.uniform(0, 1.0 if phase == "start" else 3)
            while time.monotonic() < end and events(run) < before + 4:  # a fast machine must not run to the end
                time.sleep(0.005)
            child.signal(signal.SIGKILL)
        elif phase == "events":
            child = program.start(*arguments)
            wait_for(lambda before=before: events(run) >= before + 2, child)
            time.sleep(rng.uniform(0, 0.05))
            child.signal(signal.SIGKILL)
        else:
            limit = {"predict": 30, "backward": 10, "optimizer": 8, "flush": 14, "move": 14}[phase]
            child = program.start(*arguments, die=(phase, rng.randint(1, limit)))
        assert child.wait(60) == -signal.SIGKILL, f"life {life} ({phase}) ended by itself:\n{child.output}"
        assert_nothing_half_written(run)
        assert RunDirectory(run).is_locked_elsewhere() is False
        seen_leftovers += len(list(run.rglob(".*.tmp")))
        iteration = RunDirectory(run).status().get("iteration", 0)
        assert iteration >= reached, "no life loses what was saved"
        reached = iteration
    assert 10 < reached < ITERATIONS
    assert seen_leftovers, "some were killed while they wrote"
    code, output = program.run("resume", run)
    assert code == 0, output
    assert not list(run.rglob(".*.tmp")), "leftovers are cleaned up"
    assert_same_run(run, uninterrupted / "run")


FAMILY = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def test_a_process_is_ended_with_its_children() -> None:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    kill_tree(parent.pid)
    assert parent.wait(60) is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    kill_tree(parent.pid)  # gone already: no error


def test_full_disk_is_one_sentence_and_costs_nothing(uninterrupted: Path, program: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = program.start("train", uninterrupted / "run.json", "--output", run)
    wait_for(lambda: events(run) >= 3, child)
    (run / "stop").touch()
    assert child.wait(60) == 0
    saved = {path: path.read_bytes() for path in RunDirectory(run).checkpoints()}
    limit = min(len(content) for content in saved.values()) - 1  # a checkpoint does not fit any more
    code, output = program.run("resume", run, file_size=limit)
    assert code == 1, output
    failures = [line for line in output.splitlines() if line.startswith("failed:")]
    assert len(failures) == 1
    assert os.strerror(27) in failures[0], "File too large"
    assert "Traceback" not in output
    assert RunDirectory(run).status()["state"] == "failed"
    assert "File too large" in RunDirectory(run).status()["error"]
    assert {path: path.read_bytes() for path in RunDirectory(run).checkpoints()} == saved
    assert_nothing_half_written(run)
    assert not list(run.rglob(".*.tmp"))
    code, output = program.run("resume", run)
    assert code == 0, output
    assert_same_run(run, uninterrupted / "run")


STUBBORN = """
import os, sys, time
from trainer.runs.launch import identity
from trainer.runs.directory import RunDirectory
run = RunDirectory.existing(sys.argv[1])
run.acquire()
run.write_status("running", launcher=identity(os.getpid()))
print("held", flush=True)
time.sleep(60)
"""


def test_run_that_does_not_stop_in_time_is_ended(uninterrupted: Path, tmp_path: Path) -> None:
    run = RunDirectory(shutil.copytree(uninterrupted / "run", tmp_path / "run"))
    other = subprocess.Popen([sys.executable, "-c", STUBBORN, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert stop(run, grace=0.5)
    assert other.wait(60) is not None
    assert (run.status()["state"], is_running(run), run.stop_requested()) == ("stopped", False, False)
    assert not stop(run), "it was not running any more"


def test_forced_end_is_a_failure_only_when_nobody_asked(uninterrupted: Path, tmp_path: Path) -> None:
    """What the parent of several processes makes of their end."""
    ranks = SimpleNamespace(failures=SimpleNamespace(reports=list), killed_by={})
    run = RunDirectory(shutil.copytree(uninterrupted / "run", tmp_path / "run"))
    run.write_status("running")
    run.request_stop()
    assert train._verdict(run, ranks, [-9, -9]) == 0
    assert run.status()["state"] == "stopped"
    run.stop_file.unlink()
    run.write_status("running", error=None)
    with pytest.raises(RunFailed, match="the training processes exited unexpectedly"):
        train._verdict(run, ranks, [0, 0])
    assert run.status()["state"] == "failed"
