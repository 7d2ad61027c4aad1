"""Reports the estimated duration of a run when it starts, and corrects it after the first iterations."""

import statistics
import sys
from typing import TYPE_CHECKING

from ..check import CheckedRun
from ..utils.errors import BadInput, RunFailed, StopRequested
from . import memory
from .command import measure
from .forecast import Forecast

if TYPE_CHECKING:
    from ..loop import Trainer

FEWEST = 10
"""Fewest remaining iterations for which an estimate is made."""
FIRST = 4
"""Iterations after which the estimate is corrected; the first one, which is slower, is left out."""


class Pace:
    """Estimates a run that has started.

    Args:
        trainer: with everything loaded.
        checked: the checked description of the run.
    """

    def __init__(self, trainer: "Trainer", checked: CheckedRun) -> None:
        self.trainer, self.checked = trainer, checked
        self.forecast: Forecast | None = None
        self.seen: list[float] = []

    def begin(self) -> None:
        """Estimate and report, if enough iterations remain.

        Sharded models are left out: their processes must make the same calls, but each would time its own.
        """
        trainer = self.trainer
        left = trainer.config.runtime.iterations - trainer.iteration
        if left < FEWEST or trainer.config.model.sharded:
            return
        trainer.recorder.progress("estimate", 0, 1)
        device, count = trainer.processes.device, trainer.processes.count
        forecast = Forecast(memory.name_of(device), left, free=memory.free_bytes(device))
        try:
            measure(forecast, trainer, self.checked, count, quick=True)
        except (BadInput, RunFailed, StopRequested):
            raise
        except Exception as error:  # noqa: BLE001 - an estimate is not worth a run
            print(f"warning: the run could not be estimated ({type(error).__name__}: {error})", file=sys.stderr)
            return
        self.forecast = forecast
        self._tell(forecast.line(), forecast.iteration, forecast.whole, corrected=False)

    def take(self, event: dict) -> None:
        """Correct the estimate from the durations of the first iterations."""
        if self.forecast is None or len(self.seen) >= FIRST:
            return
        self.seen.append(event["seconds"]["total"])
        if len(self.seen) < FIRST:
            return
        forecast, actual = self.forecast, statistics.mean(self.seen[1:])
        left = self.trainer.config.runtime.iterations - self.trainer.iteration
        # Evaluations make the same kinds of calls as iterations, so they are off by the same factor.
        evaluation = forecast.evaluation * actual / forecast.iteration
        whole = left * actual + max(forecast.evaluations - 1, 0) * evaluation
        changed = Forecast(forecast.device, left, {"iteration": actual}, evaluation, forecast.evaluations)
        self._tell(changed.corrected(whole), actual, whole, corrected=True)

    def _tell(self, line: str, iteration: float, whole: float, corrected: bool) -> None:
        trainer = self.trainer
        if trainer.processes.is_main:
            trainer.listener({"note": line})
        trainer.recorder.estimate({"iteration": iteration, "left": whole, "corrected": corrected})
