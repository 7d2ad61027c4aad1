"""The tables and the figure of `benchmarks/objectives.py`, from the files of its runs."""

import json
from pathlib import Path

import numpy as np
from objectives import ROOT, gain, strict

FIGURE = ROOT / "docs/images/objectives.png"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#e377c2", "#bcbd22")


def report(output: Path, target: float) -> None:
    """Print a table per budget and write the figure.

    Args:
        output: folder of the runs.
        target: the strict score that a line marks.
    """
    runs = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    for budget in sorted({run["budget"] for run in runs}):
        print(f"Up to {budget:,} forward-equivalents:\n\n{table([r for r in runs if r['budget'] == budget])}\n")
    draw(runs, target)


def table(runs: list[dict]) -> str:
    """Markdown, in the order of objective, learning rate and seed."""
    head = (
        "| objective | learning rate | seed | forward-equivalents | per image | iterations | seconds | decoding, s "
        "| strict before, on the way, after | mixture, spreads |\n" + "|---" * 10 + "|"
    )
    rows = []
    for run in sorted(runs, key=lambda run: (run["name"], run["rate"], run["seed"])):
        last = run["curve"][-1]
        curve = ", ".join(f"{point['rewards']['shapes-strict']:.3f}" for point in run["curve"])
        rows.append(
            f"| {run['name']} | {run['rate']:g} | {run['seed']} | {last['cost']:,} | {run['per_image']:.1f} "
            f"| {last['iteration']} | {last['seconds']:.0f} | {run['decode_seconds']:.0f} "
            f"| {curve} | {gain(run):+.2f} |"
        )
    return "\n".join([head, *rows])


def draw(runs: list[dict], target: float) -> None:
    """Held-out strict score (left) and mixture (right): after the smallest budget, and along the largest one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 8.2), layout="constrained")
    (strict_ends, mixture_ends), (strict_curves, mixture_curves) = figure.subplots(2, 2)
    shortest, longest = (pick(run["budget"] for run in runs) for pick in (min, max))
    draw_ends([run for run in runs if run["budget"] == shortest], strict_ends, mixture_ends)
    draw_curves([run for run in runs if run["budget"] == longest], strict_curves, mixture_curves)
    for axes in (strict_ends, mixture_ends):
        axes.set_title(f"after {shortest // 1000},000 forward-equivalents", fontsize=10)
    for axes in (strict_curves, mixture_curves):
        axes.set_xlabel("thousand forward-equivalents")
    strict_ends.axvline(target, color="black", linewidth=0.8, linestyle=":")
    strict_curves.axhline(target, color="black", linewidth=0.8, linestyle=":")
    strict_ends.set_xlabel("held-out strict score")
    mixture_ends.set_xlabel("gain of the held-out mixture, spreads")
    mixture_ends.set_yticklabels([])
    strict_curves.set_ylabel("held-out strict score")
    mixture_curves.set_ylabel("gain of the held-out mixture, spreads")
    for axes in (strict_ends, mixture_ends, strict_curves, mixture_curves):
        axes.grid(alpha=0.3)
    figure.savefig(FIGURE, dpi=130)
    print(f"figure: {FIGURE.relative_to(ROOT)}")


def draw_ends(runs: list[dict], left: object, right: object) -> None:
    """A point per run; a row per objective, the best on top, a colour per learning rate."""
    best: dict[str, float] = {}
    for run in runs:
        best[run["name"]] = max(best.get(run["name"], 0.0), strict(run))
    names = sorted(best, key=lambda name: best[name])
    for colour, rate in zip(COLOURS, sorted({run["rate"] for run in runs}), strict=False):
        points = [run for run in runs if run["rate"] == rate]
        rows = [names.index(run["name"]) for run in points]
        style = {"color": colour, "s": 22, "alpha": 0.8}
        left.scatter([strict(run) for run in points], rows, label=f"learning rate {rate:g}", **style)
        right.scatter([gain(run) for run in points], rows, **style)
    left.axvline(runs[0]["curve"][0]["rewards"]["shapes-strict"], color="grey", linewidth=0.8)
    for axes in (left, right):
        axes.set_yticks(range(len(names)), names)
    left.legend(fontsize=8, loc="lower right")


def draw_curves(runs: list[dict], left: object, right: object) -> None:
    """Thin lines for the seeds, a thick one for their mean; a colour per objective and learning rate."""
    groups: dict[tuple[str, float], list[dict]] = {}
    for run in sorted(runs, key=lambda run: (run["name"], run["rate"], run["seed"])):
        groups.setdefault((run["name"], run["rate"]), []).append(run)
    for colour, ((name, rate), seeds) in zip(COLOURS, groups.items(), strict=False):
        base = seeds[0]["curve"][0]
        values = {
            left: lambda point: point["rewards"]["shapes-strict"],
            right: lambda point, base=base: (point["rewards"]["mix"] - base["rewards"]["mix"]) / base["spread"]["mix"],
        }
        for axes, value in values.items():
            lines = [np.array([(point["cost"] / 1000, value(point)) for point in run["curve"]]) for run in seeds]
            for line in lines:
                axes.plot(*line.T, color=colour, linewidth=0.6, alpha=0.6)
            mean = np.mean([line[: min(map(len, lines))] for line in lines], axis=0)
            label = f"{name}, {rate:g} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            axes.plot(*mean.T, color=colour, linewidth=2, marker="o", markersize=3, label=label)
    right.legend(fontsize=7, loc="lower right")
