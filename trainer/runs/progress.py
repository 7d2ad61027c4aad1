"""Console output of a run: a progress bar on a terminal, plain lines otherwise, and a table at the end."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .directory import RunDirectory

PROGRESS_INTERVAL = 30.0
"""Seconds between two progress lines within an iteration, without a terminal."""


class Progress:
    """Listens to a run's events and prints them.

    Args:
        iterations: total iterations of the run, including those before it was resumed.
        line: returns the objective's text about an event.
    """

    def __init__(self, iterations: int, line: Callable[[dict], str] = lambda event: "") -> None:
        self.iterations, self.line = iterations, line
        self.seconds, self.seen, self.bar = 0.0, 0, None
        self.said, self.rewards = time.monotonic(), ""
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=iterations, unit="it", dynamic_ncols=True)

    def __call__(self, event: dict) -> None:
        """Take in an event, `{"evaluation": record}`, `{"note": str}` or `{"progress": {"phase", "done", "total"}}`."""
        if "note" in event:
            self._say(event["note"])
        elif "progress" in event:
            self._take_progress(**event["progress"])
        elif "evaluation" in event:
            values = ", ".join(f"{name} {number(value)}" for name, value in event["evaluation"]["rewards"].items())
            self._say(f"held-out at iteration {event['evaluation']['iteration']}: {values}")
        else:
            self._take_iteration(event)

    def _take_iteration(self, event: dict) -> None:
        self.rewards = " ".join(f"{name} {number(value['mean'])}" for name, value in event["rewards"].items())
        if self.bar is not None:
            self._advance_bar(event["iteration"])
            return
        self.seconds, self.seen = self.seconds + event["seconds"]["total"], self.seen + 1
        left = self.seconds / self.seen * (self.iterations - event["iteration"])
        words = [
            f"iteration {event['iteration']}/{self.iterations}",
            self.rewards,
            f"{event['seconds']['total']:.2f} s",
            self.line(event),
            f"{duration(left)} left",
        ]
        self._say("  ".join(word for word in words if word))

    def _advance_bar(self, iteration: int) -> None:
        if self.bar.n == 0 and iteration > 1:
            self.bar.initial = self.bar.n = iteration - 1  # iterations before a resumed run
        self.bar.set_postfix_str(self.rewards)
        self.bar.update(iteration - self.bar.n)

    def _take_progress(self, phase: str, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.rewards} {phase} {done}/{total}".strip())
        elif time.monotonic() - self.said >= PROGRESS_INTERVAL:
            self._say(f"{phase} {done} of {total}")

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def table(summary: dict) -> str:
    """Table of the held-out scores before and after training, in total and per category."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if not before or not after:
        return ""
    lines = [f"{'held-out score':28s} {'before':>8s} {'after':>8s} {'change':>8s}"]
    for name, value in before["rewards"].items():
        last = after["rewards"].get(name)
        lines.append(_row(name, value, last))
        spread = before.get("spread", {}).get(name)
        if spread and None not in (value, last):
            lines.append(f"{'  in stds within a prompt':28s} {'':8s} {'':8s} {(last - value) / spread:+8.2f}")
        later = after.get("categories", {}).get(name, {})
        for category, share in before.get("categories", {}).get(name, {}).items():
            lines.append(_row(f"  {category}", share, later.get(category)))
    return "\n".join(lines)


def _row(name: str, before: float | None, after: float | None) -> str:
    change = f"{after - before:+8.4f}" if None not in (before, after) else f"{'-':>8s}"
    return f"{name:28s} {number(before):>8s} {number(after):>8s} {change}"


def number(value: float | None) -> str:
    """A number with four decimals; a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def closing(summary: dict, run: RunDirectory, sentences: Callable[[list[dict]], list[str]] = lambda events: []) -> str:
    """Text that is printed at the end of a run.

    Args:
        sentences: returns the objective's lines, from all events.
    """
    events = run.events()
    pace = sum(e["seconds"]["total"] for e in events) / len(events) if events else 0.0
    lines = [
        table(summary),
        "",
        f"{summary['state']}: {summary['iterations']} iterations in {duration(summary['seconds'])}, {pace:.2f} s each",
    ]
    if events and events[-1].get("forwards_per_image") is not None:
        lines.append(f"forward passes of the network per image {events[-1]['forwards_per_image']:.2f}")
    with suppress(KeyError, TypeError, ValueError):  # figures that were damaged on disk
        lines += sentences(events)
    lines += [f"{label:9s} {path}" for label, path in _files(run.path) if path.exists()]
    return "\n".join(lines).strip()


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [
        ("LoRA", folder / "lora.safetensors"),
        ("curve", folder / "report" / "reward_curve.png"),
        ("images", folder / "report" / "before_after.png"),
        ("summary", folder / "report" / "summary.json"),
    ]
