"""A long run needs no more memory than a short one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MEASURE = """
import gc, json, sys
from pathlib import Path
import psutil, torch
torch.set_num_threads(1)
from trainer.config import parse_config
from trainer.utils.distributed import Processes
from trainer.loop import Trainer
from trainer.runs.directory import RunDirectory

config = parse_config(json.loads(sys.argv[1]))
run = RunDirectory.open(Path(sys.argv[2]), config, []) if len(sys.argv) > 2 else None
sizes = []

def listen(event):
    if event["iteration"] >= 100 and event["iteration"] % 25 == 0:
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)

Trainer(config, run, Processes("cpu"), listen).train()
print(json.dumps(sizes))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True], ids=["nothing kept", "run directory"])
def test_memory_stays_flat_over_500_iterations(tiny_sd3: Path, tmp_path: Path, kept: bool) -> None:
    description = {
        "model": {"path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 3, "shift": 1.0, "eta": 0.5, "group_size": 2, "prompts_per_iteration": 1},
        "rewards": [{"name": "brightness"}],
        "lora": {"rank": 2, "alpha": 2, "ema_decay": 0.9},
        "runtime": {"iterations": 600, "device": "cpu", "samples_every": 0, "checkpoint_every": 5},
    }
    place = [tmp_path / "run"] if kept else []
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(description), *place],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 21, "iterations 100 to 600"
    assert max(sizes) <= 1.02 * sizes[0], [round(size / 2**20, 1) for size in sizes]
