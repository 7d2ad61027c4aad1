"""Metrics of an iteration: time per phase, rewards, memory."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..objectives.advantage import Advantages


class Clock:
    """Measures the seconds per phase, and the total since it was created."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started


def reward_record(table: dict[str, Tensor], advantages: Advantages) -> dict[str, dict[str, float | None]]:
    """Per reward: mean and std over all images, and the mean std within a group."""
    return {name: _moments(values, advantages.spread[name]) for name, values in table.items()}


def _moments(values: Tensor, group_std: float) -> dict[str, float | None]:
    finite = values[values.isfinite()]
    if len(finite) == 0:
        return {"mean": None, "std": None, "group_std": 0.0}
    std = finite.std().item() if len(finite) > 1 else 0.0
    return {"mean": finite.mean().item(), "std": std, "group_std": group_std}


def without_nan(value: object) -> object:
    """The same data with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in MiB: allocated GPU memory, or this process's resident memory without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    if sys.platform == "linux":
        # Not ru_maxrss, which is inherited from the parent process on Linux.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
