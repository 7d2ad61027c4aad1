"""The estimate of a run, as data and as text."""

from dataclasses import dataclass, field

from ..runs.progress import duration
from .memory import TURNS

MB, GB = 2**20, 2**30


@dataclass
class Forecast:
    """Estimated memory and time of a run.

    Attributes:
        device: name of the device.
        iterations: number of iterations of the run.
        seconds: seconds per iteration by kind of work; empty if nothing was measured.
        evaluation: seconds per evaluation.
        evaluations: number of evaluations of the run.
        start: seconds until the first iteration begins.
        parts: computed bytes by part.
        needed: peak memory in bytes; measured if possible, otherwise computed.
        free: available memory of the device in bytes.
        is_measured: whether `needed` is measured.
        changes: settings that save memory, with the bytes each saves; None if that is not known.
        unmeasured: names of remote rewards, whose time is not included.
    """

    device: str
    iterations: int
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: float = 0.0
    evaluations: int = 0
    start: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)
    needed: int = 0
    free: int = 0
    is_measured: bool = False
    changes: list[tuple[str, int | None]] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    @property
    def iteration(self) -> float:
        """Seconds of one iteration."""
        return sum(self.seconds.values())

    @property
    def whole(self) -> float:
        """Seconds of the whole run."""
        return self.start + self.iterations * self.iteration + self.evaluations * self.evaluation

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def record(self) -> dict:
        """Plain data; seconds and bytes."""
        return {
            "device": self.device,
            "memory": {
                "parts": self.parts,
                "needed": self.needed,
                "free": self.free,
                "fits": self.fits,
                "measured": self.is_measured,
                "changes": [{"change": label, "saves": saved} for label, saved in self.changes],
            },
            "seconds": {
                "start": self.start,
                "iteration": self.iteration,
                "phases": self.seconds,
                "evaluation": self.evaluation,
                "evaluations": self.evaluations,
                "whole": self.whole if self.seconds else None,
            },
            "iterations": self.iterations,
            "not_measured": self.unmeasured,
        }

    def line(self) -> str:
        """One sentence for the start of a run."""
        if not self.seconds:
            return f"estimate: {self._memory()}"
        note = f", without {', '.join(self.unmeasured)}" if self.unmeasured else ""
        return (
            f"estimate: {seconds(self.iteration)} per iteration{note}, {duration(self.whole)} for the whole run with "
            f"{self.evaluations} evaluations; {self._memory()}"
        )

    def corrected(self, left: float) -> str:
        """One sentence after the first iterations.

        Args:
            left: remaining seconds.
        """
        return f"estimate corrected: {seconds(self.iteration)} per iteration, {duration(left)} left"

    def _memory(self) -> str:
        verdict = "" if self.fits else ": it does not fit"
        return f"memory {size(self.needed)} of {size(self.free)} free on {self.device}{verdict}"

    def text(self) -> str:
        """The whole estimate as text."""
        kind = "measured" if self.is_measured else "computed"
        verdict = "it fits" if self.fits else "it does not fit"
        lines = [
            f"memory on {self.device}: {size(self.needed)} at the peak ({kind}), {size(self.free)} free: {verdict}"
        ]
        for name, value in self.parts.items():
            lines.append(f"  {name:38s} {size(value):>9s}{'  (one at a time)' if name in TURNS else ''}".rstrip())
        lines += ["", *self._time()]
        if self.changes:
            lines += ["", "to fit:" if not self.fits else "to take less memory:"]
            for label, saved in self.changes:
                lines.append(f"  {label}" if saved is None else f"  {label:44s} {size(saved)} less")
        return "\n".join(lines)

    def _time(self) -> list[str]:
        if not self.seconds:
            return ["time: not measured, because the memory does not suffice"]
        lines = [f"time: {seconds(self.iteration)} per iteration"]
        lines += [f"  {name:38s} {seconds(value):>9s}" for name, value in self.seconds.items()]
        lines.append(
            f"  {self.iterations} iterations, {self.evaluations} evaluations of {seconds(self.evaluation)}, start "
            f"{seconds(self.start)}: {duration(self.whole)} in all"
        )
        for name in self.unmeasured:
            lines.append(f"  reward {name!r} is computed by a server; its time is not included")
        return lines


def size(value: float) -> str:
    """Format bytes in MB or GB."""
    return f"{value / GB:.2f} GB" if value >= GB else f"{value / MB:.0f} MB"


def seconds(value: float) -> str:
    """Format seconds with three significant digits."""
    return f"{value:.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
