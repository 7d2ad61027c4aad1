"""The launch on several hosts of docs/many-gpus.md, with two launchers on this one."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Forks, results_of, write_description
from learning import assert_same_learning, newest_checkpoint

from trainer.runs.launch import kill_tree

pytestmark = pytest.mark.slow


def documented(replacements: dict[str, str]) -> list[str]:
    """The command of the section 'Several hosts' with other values."""
    section = (ROOT / "docs" / "many-gpus.md").read_text().split("## Several hosts")[1]
    text = re.search(r"```\n(python -m torch\.distributed\.run.*?)```", section, re.DOTALL)[1]
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return [sys.executable, *shlex.split(text.replace("\\\n", " "))[1:]]


def test_two_launchers_and_a_divided_network_give_the_run_of_one_process(
    tiny_description: dict, program: Forks, tmp_path: Path
) -> None:
    tiny_description["rollout"] |= {"prompts_per_iteration": 3, "group_size": 3}
    tiny_description["objective"] = {"train_steps": "all", "clip_range": 0.1}
    tiny_description["runtime"]["iterations"] = 2
    file = write_description(tmp_path / "run.json", tiny_description)
    code, output = program.run("train", file, "--output", tmp_path / "one")
    assert code == 0, output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = documented(
        {
            "--nproc-per-node 8": "--nproc-per-node 1",
            "HOST0:29500": endpoint,
            "/path/to/trainer/__main__.py": str(ROOT / "trainer" / "__main__.py"),
            "run.yaml": str(file),
            "/shared/runs/my-run": str(tmp_path / "two"),
        }
    )
    command += ["--set", "model.sharded=true"]
    logs = [(tmp_path / f"{i}.log").open("w+") for i in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    launchers = [subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) for log in logs]
    try:
        codes = [launcher.wait(120) for launcher in launchers]
    finally:
        for launcher in launchers:
            kill_tree(launcher.pid)
    output = "".join((tmp_path / f"{i}.log").read_text() for i in range(2))
    assert codes == [0, 0], output
    assert output.count("finished: 2 iterations") == 1, "only the first process of all speaks"
    for ours, theirs in zip(results_of(tmp_path / "one"), results_of(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert_same_learning(newest_checkpoint(tmp_path / "one"), newest_checkpoint(tmp_path / "two"))
