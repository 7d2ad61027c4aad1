"""Figures of an iteration."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from trainer.objectives.advantage import group_advantages
from trainer.runs.metrics import reward_record, without_nan

MEASURE = """
import json, resource, torch
from trainer.runs.metrics import peak_memory
before = peak_memory(torch.device("cpu"))
held = torch.ones(100 * 2**18)  # 100 MiB
after = peak_memory(torch.device("cpu"))
print(json.dumps([before, after, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]))
"""
STARTER = """
import subprocess, sys
held = bytearray(b"x") * (2000 * 2**20)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_this_process_s_own_and_not_its_starter_s() -> None:
    words = [sys.executable, "-c", STARTER, MEASURE]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    before, after, inherited = json.loads(done.stdout)
    assert before < 1500, "MiB; the process that started it holds 2000"
    assert 95 < after - before < 200
    assert inherited >= before


def test_rewards_are_recorded_with_their_std_overall_and_inside_groups() -> None:
    table = {"r": torch.tensor([[0.0, 2.0], [10.0, float("nan")], [4.0, 4.0]], dtype=torch.float64)}
    advantages = group_advantages(table, weights={"r": 1.0})
    record = reward_record(table, advantages)["r"]
    assert record["mean"] == pytest.approx(4.0)
    assert record["std"] == pytest.approx(torch.tensor([0.0, 2.0, 10.0, 4.0, 4.0]).std().item())
    assert record["group_std"] == advantages.spread["r"]
    nothing = reward_record({"r": table["r"] * float("nan")}, advantages)["r"]
    assert nothing == {"mean": None, "std": None, "group_std": 0.0}


def test_numbers_that_json_lacks_become_null() -> None:
    values = {"a": float("nan"), "b": {"c": float("inf"), "d": 1.5}, "e": 3}
    assert without_nan(values) == {"a": None, "b": {"c": None, "d": 1.5}, "e": 3}
