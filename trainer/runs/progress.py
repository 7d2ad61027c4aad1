"""What a run prints: a progress bar on a terminal, plain lines otherwise, and a table at the end."""

import sys
from pathlib import Path

from ..objectives import Objective, make_objective
from .directory import RunDirectory


class Progress:
    """Listens to a run's events.

    Args:
        iterations: of the whole run; a resumed run begins with some of them done.
        objective: of the run, which says what matters in its own figures.
    """

    def __init__(self, iterations: int, objective: Objective) -> None:
        self.objective = objective
        self.iterations, self.seconds, self.seen, self.bar = iterations, 0.0, 0, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=iterations, unit="it", dynamic_ncols=True)

    def __call__(self, event: dict) -> None:
        if "evaluation" in event:
            values = ", ".join(f"{name} {number(value)}" for name, value in event["evaluation"]["rewards"].items())
            self._say(f"held-out at iteration {event['evaluation']['iteration']}: {values}")
            return
        text = " ".join(f"{name} {number(value['mean'])}" for name, value in event["rewards"].items())
        if self.bar is not None:
            self._advance_bar(event["iteration"], text)
            return
        self.seconds, self.seen = self.seconds + event["seconds"]["total"], self.seen + 1
        left = self.seconds / self.seen * (self.iterations - event["iteration"])
        print(
            f"iteration {event['iteration']}/{self.iterations}  {text}  {event['seconds']['total']:.2f} s"
            f"  {self.objective.line(event['objective'])}  {duration(left)} left",
            flush=True,
        )

    def _advance_bar(self, iteration: int, text: str) -> None:
        if self.bar.n == 0 and iteration > 1:
            self.bar.initial = self.bar.n = iteration - 1  # what a resumed run had already
        self.bar.set_postfix_str(text)
        self.bar.update(iteration - self.bar.n)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def table(summary: dict) -> str:
    """Held-out scores before and after, whole and per category."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    if not before or not after:
        return ""
    lines = [f"{'held-out score':28s} {'before':>8s} {'after':>8s} {'change':>8s}"]
    for name, value in before["rewards"].items():
        lines.append(_row(name, value, after["rewards"][name]))
        spread = before["spread"][name]
        if spread and None not in (value, after["rewards"][name]):
            gain = (after["rewards"][name] - value) / spread
            lines.append(f"{'  in within-prompt spreads':28s} {'':8s} {'':8s} {gain:+8.2f}")
        for category, share in before["categories"][name].items():
            lines.append(_row(f"  {category}", share, after["categories"][name][category]))
    return "\n".join(lines)


def _row(name: str, before: float | None, after: float | None) -> str:
    change = f"{after - before:+8.4f}" if None not in (before, after) else f"{'-':>8s}"
    return f"{name:28s} {number(before):>8s} {number(after):>8s} {change}"


def number(value: float | None) -> str:
    """Four decimals, or a dash where there is no value."""
    return "-" if value is None else f"{value:.4f}"


def closing(summary: dict, run: RunDirectory) -> str:
    """The last words of a run."""
    events = run.events()
    pace = sum(e["seconds"]["total"] for e in events) / len(events) if events else 0.0
    lines = [
        table(summary),
        "",
        f"{summary['state']}: {summary['iterations']} iterations in {duration(summary['seconds'])}, {pace:.2f} s each",
    ]
    if events:
        lines.append(f"forward passes of the network per image {events[-1]['forwards_per_image']:.2f}")
        lines += make_objective(run.config()).closing([event["objective"] for event in events])
    lines += [f"{label:9s} {path}" for label, path in _files(run.path) if path.exists()]
    return "\n".join(lines).strip()


def _files(folder: Path) -> list[tuple[str, Path]]:
    return [
        ("LoRA", folder / "lora.safetensors"),
        ("curve", folder / "report" / "reward_curve.png"),
        ("pictures", folder / "report" / "before_after.png"),
        ("summary", folder / "report" / "summary.json"),
    ]
