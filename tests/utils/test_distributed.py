"""Several processes give the run of one."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, Forks, results_of, run_program, write_description
from learning import assert_same_learning, newest_checkpoint

from trainer.rewards.brightness import Brightness
from trainer.rewards.remote.server import RewardServer
from trainer.runs import launch
from trainer.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

VARIANTS = {
    # 12 images over 2 processes: the second group is split between them. Plainer runs: test_families.py.
    "updates, best of n, KL": {
        "rollout": {"window": {"size": 2, "position": "random"}},
        "objective": {"updates": 2, "kl_weight": 0.5},
        "advantage": {"best_of_n": 2},
        "lora": {"ema_decay": 0.5},
    },
    "Flow-DPPO, a window per prompt": {
        "rollout": {"window": {"size": 2, "position": "per-prompt"}},
        "objective": {"updates": 3, "ratio": "dppo", "divergence_limit": 1e-3, "step_weights": "flash"},
    },
    "GARDO": {
        "objective": {"kl_weight": 5.0, "kl_reference": "moving", "kl_reference_every": 2, "kl_share": 0.5},
        "evaluation": {"rewards": [{"name": "sharpness"}]},
    },
    "nft": {"objective": {"name": "nft", "old_decay_growth": 0.2}},
    "awm": {"objective": {"name": "awm", "trust_weight": 1.0, "trust_decay_growth": 0.2, "kl_weight": 0.01}},
    "dpo": {"objective": {"name": "dpo", "updates": 3, "winner_weight": 0.1}},
    "a server scores": {"rollout": {"batch_size": 4}, "objective": {"updates": 3}},
    "reward gradient": {"objective": {"name": "reward-gradient", "method": "draft-lv", "kl_weight": 0.1}},
}


def description(tiny_description: dict, variant: str) -> dict:
    tiny_description["rollout"] |= {"prompts_per_iteration": 3, "group_size": 4}
    tiny_description["objective"] = {}
    if "name" not in VARIANTS[variant]["objective"]:
        tiny_description["objective"] = {"train_steps": "all", "clip_range": 0.1}
    del tiny_description["lora"]["ema_decay"]
    for section, settings in VARIANTS[variant].items():
        tiny_description[section] = tiny_description.get(section, {}) | settings
    tiny_description["runtime"] |= {"iterations": 5}
    return tiny_description


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that scores brightness."""
    serving = RewardServer(Brightness(), "127.0.0.1", 0, torch.device("cpu"))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/score"
    serving.shutdown()
    serving.server_close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_give_the_run_of_one(
    tiny_description: dict, program: Forks, tmp_path: Path, variant: str, server: str
) -> None:
    described = description(tiny_description, variant)
    if variant == "a server scores":  # one process samples in two parts, the other in one
        described["rewards"] = [{"name": "external", "options": {"url": server}}]
    file = write_description(tmp_path / "run.json", described)
    one, two = tmp_path / "one", tmp_path / "two"
    code, output = program.run("train", file, "--output", one)
    assert code == 0, output
    done = run_program("train", file, "--output", two, "--processes", 2, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: 5 iterations") == 1, "only the first process speaks"
    alone, shared = results_of(one), results_of(two)
    assert len(alone) == len(shared) == 5
    for ours, theirs in zip(alone, shared, strict=True):
        counts = {"actions", "items", "pairs"} & ours["objective"].keys()
        assert all(ours["objective"][name] == theirs["objective"][name] > 0 for name in counts)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        for name, value in ours["rewards"].items():
            assert value == pytest.approx(theirs["rewards"][name], abs=1e-5)
        assert ours["objective"].keys() == theirs["objective"].keys()
        figures = {name: value for name, value in ours["objective"].items() if value is not None}
        for name in figures.keys() - {"rollout_deviation", "accuracy"}:
            assert figures[name] == pytest.approx(theirs["objective"][name], rel=1e-3, abs=1e-5), name
    assert_same_learning(newest_checkpoint(one), newest_checkpoint(two))
    assert RunDirectory(two).summary()["eval"]["after"]["rewards"] == pytest.approx(
        RunDirectory(one).summary()["eval"]["after"]["rewards"], abs=1e-5
    )


def test_stop_ends_every_process_and_one_process_can_go_on(
    tiny_description: dict, program: Forks, tmp_path: Path
) -> None:
    tiny_description["runtime"] |= {"iterations": 2000, "samples_every": 0, "checkpoint_every": 5}
    tiny_description["evaluation"]["every"] = 0
    file, run = write_description(tmp_path / "run.json", tiny_description), tmp_path / "run"
    parent = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", file, "--output", run, "--processes", "2"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while RunDirectory(run).status().get("iteration", 0) < 5:
            assert parent.poll() is None, parent.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 2, "its two ranks"
        assert launch.stop(RunDirectory(run), grace=120), "a slow machine needs more than the usual eight seconds"
        assert parent.wait(60) == 0, parent.stdout.read()
        gone, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    finally:
        for process in psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []:
            process.kill()
        parent.kill()
        parent.stdout.close()
    status = RunDirectory(run).status()
    assert status["state"] == "stopped"
    done = status["iteration"]
    child = program.start("resume", run)
    deadline = time.monotonic() + 120
    while RunDirectory(run).status().get("iteration", 0) < done + 10:
        assert time.monotonic() < deadline, child.output
        time.sleep(0.05)
    (run / "stop").touch()
    assert child.wait(60) == 0
    assert [event["iteration"] for event in results_of(run)] == list(range(1, len(results_of(run)) + 1))
