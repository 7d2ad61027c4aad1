"""The tables and the figure of `benchmarks/objectives.py`, from the files of its runs."""

import json
from pathlib import Path

from objectives import ROOT, gain, strict

FIGURE = ROOT / "docs/images/objectives.png"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def report(output: Path, target: float) -> None:
    """Print both tables and write the figure.

    Args:
        output: folder of the runs.
        target: the strict score that a line marks.
    """
    runs = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    longest = max(run["budget"] for run in runs)
    short = [run for run in runs if run["budget"] < longest]
    whole = [run for run in runs if run["budget"] == longest]
    print("Search, one seed:\n")
    print(table(short))
    print("\nWhole budget:\n")
    print(table(whole))
    draw(whole or short, target)


def table(runs: list[dict]) -> str:
    """Markdown, in the order of objective, learning rate and seed."""
    head = (
        "| objective | learning rate | seed | forward-equivalents | per image | iterations | seconds | decoding "
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
    """Held-out strict score and mixture against cost, a line per run, a colour per objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({run["name"] for run in runs})
    colour = dict(zip(names, COLOURS, strict=False))
    for run in sorted(runs, key=lambda run: (run["name"], run["seed"])):
        costs = [point["cost"] / 1000 for point in run["curve"]]
        first = next(r for r in runs if r["name"] == run["name"]) is run
        style = {"color": colour[run["name"]], "marker": "o", "markersize": 3, "linewidth": 1}
        label = run["name"] if first else None
        left.plot(costs, [point["rewards"]["shapes-strict"] for point in run["curve"]], label=label, **style)
        base = run["curve"][0]
        unit, start = base["spread"]["mix"], base["rewards"]["mix"]
        right.plot(costs, [(point["rewards"]["mix"] - start) / unit for point in run["curve"]], label=label, **style)
    left.axhline(target, color="black", linewidth=0.8, linestyle=":")
    left.set_ylabel("held-out strict score")
    right.set_ylabel("held-out mixture, within-prompt spreads")
    for axes in (left, right):
        axes.set_xlabel("thousand forward-equivalents")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(FIGURE, dpi=130)
    print(f"\nfigure {FIGURE.relative_to(ROOT)}; best strict score {max(map(strict, runs)):.3f}")
