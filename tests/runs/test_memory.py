"""What an iteration holds is known before the start, and a long run needs no more than a short one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_families import CASES

from trainer.check import check_run
from trainer.cli import main
from trainer.config import RunConfig, parse_config
from trainer.models import FAMILIES, latent_numbers, weight_bytes
from trainer.rewards import REWARDS, Threshold, memory_together
from trainer.runs import capacity
from trainer.runs.capacity import check_iteration, iteration_bytes
from trainer.utils.errors import BadInput

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
run = RunDirectory(Path(sys.argv[2])).open(config, [])
sizes = []

def listen(event):
    if event.get("iteration", 0) >= 100 and event["iteration"] % 25 == 0:
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)

Trainer(config, run, Processes("cpu"), listen).train()
print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_memory_stays_flat_over_500_iterations(tiny_sd3: Path, tmp_path: Path) -> None:
    description = {
        "model": {"path": str(tiny_sd3), "height": 16, "width": 16},
        "prompts": {"texts": ["a red circle", "a blue square"]},
        "rollout": {"steps": 3, "shift": 1.0, "eta": 0.5, "group_size": 2, "prompts_per_iteration": 1},
        "rewards": [{"name": "brightness"}],
        "lora": {"rank": 2, "alpha": 2, "ema_decay": 0.9},
        "runtime": {"iterations": 600, "device": "cpu", "samples_every": 0, "checkpoint_every": 5},
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(description), tmp_path / "run"],
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


def config(**rollout: object) -> RunConfig:
    data = {"model": {"height": 64, "width": 32}, "prompts": {"texts": ["a"]}, "rewards": [{"name": "brightness"}]}
    return parse_config({**data, "rollout": {"steps": 11, "group_size": 6, "prompts_per_iteration": 4, **rollout}})


def test_bytes_of_an_iteration() -> None:
    images, pixels, latents = 24, 3 * 64 * 32, 4 * 8 * 4
    # Each of the 10 stochastic steps keeps where it starts and where it ends; then the final latents and the image.
    assert iteration_bytes(config(), 1, latents) == images * 4 * (pixels + 21 * latents)
    largest = 5  # of 24 images in 5 processes
    assert iteration_bytes(config(), 5, latents) == largest * 4 * (pixels + 21 * latents)
    assert iteration_bytes(config(window={"size": 2}), 1, latents) == images * 4 * (pixels + 5 * latents)


@pytest.mark.parametrize(
    ("name", "latents"),
    [("sd", (4, 8, 8)), ("wan", (16, 2, 2, 4))],
)
def test_latents_are_counted_as_the_model_has_them(
    name: str, latents: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    case.build(tmp_path)
    data = {"model": {"family": case.family, "path": str(tmp_path), **case.model}, "prompts": {"texts": ["a"]}}
    parsed = parse_config(data | {"rewards": [{"name": "brightness"}], "rollout": {"steps": 11} | case.rollout})
    family = FAMILIES[case.family]
    assert latent_numbers(family, parsed.model) == math.prod(latents)
    beside = weight_bytes(parsed.model) + family.decode_bytes(parsed.model)
    available = [beside + iteration_bytes(parsed, 1, math.prod(latents))]
    monkeypatch.setattr(capacity, "memory_bytes", lambda device, processes: available[0])
    check_run(parsed, 1)
    available[0] -= 1
    with pytest.raises(BadInput, match="GiB of images and latents"):
        check_run(parsed, 1)


def test_an_iteration_that_cannot_fit_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    need = iteration_bytes(config(), 2, 0)
    monkeypatch.setattr(capacity, "memory_bytes", lambda device, processes: need)
    check_iteration(config(), 2)
    with pytest.raises(BadInput, match=r"prompts_per_iteration 4 x rollout.group_size 6 images of 32 x 64 need"):
        check_iteration(config(), 1)


class Heavy(REWARDS["brightness"]):
    """Has weights."""

    def memory(self) -> int:
        return 3 * 2**30


def test_rewards_and_decoding_count_before_anything_is_loaded(
    tiny_description: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "brightness", Heavy)
    parsed = parse_config(tiny_description)
    family = FAMILIES[parsed.model.family]
    latents = latent_numbers(family, parsed.model)
    beside = iteration_bytes(parsed, 1, latents) + weight_bytes(parsed.model)
    decode = family.decode_bytes(parsed.model)
    assert 0 < decode < Heavy().memory()
    available = [beside + Heavy().memory()]
    monkeypatch.setattr(capacity, "memory_bytes", lambda device, processes: available[0])
    check_run(parsed, 1)
    available[0] -= 1
    with pytest.raises(BadInput, match="while it scores 3.0 GiB more, and it has 3.0 GiB: lower rollout.group_size"):
        check_run(parsed, 1)
    monkeypatch.setattr(Heavy, "memory", lambda self: 0)
    available[0] = beside + decode
    check_run(parsed, 1)
    available[0] -= 1
    with pytest.raises(BadInput, match="model.decode_batch_size"):
        check_run(parsed, 1)


def test_weights_that_rewards_share_count_once() -> None:
    heavy = Heavy()
    assert memory_together([heavy, Heavy(), Threshold(heavy, 0.5)]) == 6 * 2**30
    assert memory_together([]) == 0


def test_a_run_that_cannot_fit_claims_no_directory(tiny_description: dict, tmp_path: Path, capsys: object) -> None:
    file = tmp_path / "run.json"
    tiny_description["rollout"] |= {"group_size": 10_000, "prompts_per_iteration": 1_000_000}
    file.write_text(json.dumps(tiny_description))
    assert main(["train", str(file), "--output", str(tmp_path / "run")]) == 2
    assert "GiB per process, but it has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    for setting in ("rollout.group_size=100000000", "rollout.batch_size=1e21", "lora.alpha=1e308"):
        assert main(["train", str(file), "--output", str(tmp_path / "run"), "--set", setting]) == 2
        assert f"{setting.split('=')[0]} is" in capsys.readouterr().err
    wild = ["--set", "optimizer.weight_decay=1000", "--set", "optimizer.learning_rate=0.01"]
    assert main(["train", str(file), "--output", str(tmp_path / "run"), *wild]) == 2
    assert "weight_decay 1000 times learning_rate 0.01 must be below 1: lower one of them" in capsys.readouterr().err
