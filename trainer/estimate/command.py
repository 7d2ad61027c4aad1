"""Estimates a run: memory from shapes, time from measured calls."""

import math
import time
from typing import TYPE_CHECKING

import torch

from ..check import CheckedRun, check_run
from ..config import RunConfig
from ..rewards.threshold import Threshold
from ..runs.capacity import iteration_bytes
from ..utils.console import quiet_libraries
from ..utils.distributed import Processes
from ..utils.precision import tf32
from . import memory
from .calls import evaluation_calls, evaluations, iteration_calls
from .forecast import Forecast
from .measure import Meter, phases

if TYPE_CHECKING:
    from ..loop import Trainer

ASKED_LATER = ".remote."
"""Part of the module names of remote rewards, which are not called here because a request may cost money."""


def run_estimate(config: RunConfig, processes: int = 1) -> Forecast:
    """Estimate the memory and time of a run on this machine, from a few calls of each kind on the loaded models.

    Args:
        processes: number of processes of the run, each with a device like this one.

    Raises:
        BadInput: the description is invalid.
    """
    quiet_libraries()
    checked, here = check_run(config, processes), Processes(config.runtime.device)
    forecast = _computed(config, checked, processes, here.device)
    if not forecast.fits:
        return forecast
    from ..loop import Trainer

    started = time.perf_counter()
    try:
        trainer = Trainer(config, None, here)
        forecast.start = time.perf_counter() - started
        with tf32(config.runtime.tf32):
            measure(forecast, trainer, checked, processes)
    except torch.OutOfMemoryError:
        forecast.needed, forecast.is_measured, forecast.seconds = forecast.free + 1, True, {}
    return forecast


def _computed(config: RunConfig, checked: CheckedRun, processes: int, device: torch.device) -> Forecast:
    on_cpu = device.type == "cpu"
    parts = memory.parts(config, checked, processes, on_cpu)
    if config.model.graph is None:
        found: list = memory.changes(config, checked, processes, on_cpu)
    else:
        found = [(change, None) for change in memory.GRAPH_CHANGES]
    needed = memory.peak(parts, on_cpu) if config.model.graph is None else 0  # ComfyUI leaves in RAM what does not fit
    name, free = memory.name_of(device), memory.free_bytes(device)
    return Forecast(name, config.runtime.iterations, parts=parts, needed=needed, free=free, changes=found)


def measure(forecast: Forecast, trainer: "Trainer", checked: CheckedRun, processes: int, quick: bool = False) -> None:
    """Fill in the measured seconds and the peak memory.

    Args:
        processes: number of processes of the run.
        quick: time every call once.
    """
    config, device = trainer.config, trainer.processes.device
    model, meter = trainer.model, Meter(trainer, quick)
    forecast.unmeasured = [name for name, reward in checked.all_rewards.items() if _is_remote(reward)]
    calls = iteration_calls(config, checked, model.process, model.sigmas, trainer.processes, model.is_trained_at)
    evaluated = evaluation_calls(config, checked, trainer.processes)
    for counted in (calls, evaluated):
        for call in [call for call in counted if call.reward in forecast.unmeasured]:
            del counted[call]
    shares = processes / trainer.processes.count  # the calls were counted for this process only
    forecast.seconds = {name: value / shares for name, value in phases(meter.seconds(calls)).items()}
    forecast.seconds["optimizer"] = config.objective.updates * meter.optimizer_step()
    forecast.seconds["saving"] = meter.saving() / config.runtime.checkpoint_every
    forecast.evaluations = evaluations(config, checked)
    forecast.evaluation = sum(meter.seconds(evaluated).values()) / shares
    forecast.parts[memory.HELD] = iteration_bytes(config, processes, math.prod(model.latent_shape))
    forecast.needed, forecast.is_measured = memory.measured_peak(device) + forecast.parts[memory.HELD], True


def _is_remote(reward: object) -> bool:
    inner = reward.reward if isinstance(reward, Threshold) else reward
    return ASKED_LATER in type(inner).__module__
