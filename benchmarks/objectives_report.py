"""The tables and the figure of `benchmarks/objectives.py`, from the files of its runs."""

import json
from pathlib import Path

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


def best_of_search(runs: list[dict]) -> list[dict]:
    """Of the runs with the smallest budget, those of each objective's best rate on seed 0; and all with larger ones."""
    smallest = min(run["budget"] for run in runs)
    best: dict[str, dict] = {}
    for run in runs:
        if run["budget"] == smallest and run["seed"] == 0:
            best[run["name"]] = max(best.get(run["name"], run), run, key=strict)
    return [run for run in runs if run["budget"] > smallest or run["rate"] == best[run["name"]]["rate"]]


def draw(runs: list[dict], target: float) -> None:
    """Held-out strict score and mixture against cost: a line per run, a colour per objective, the search dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown, smallest = best_of_search(runs), min(run["budget"] for run in runs)
    colour = dict(zip(sorted({run["name"] for run in shown}), COLOURS, strict=False))
    labelled = set()
    for run in sorted(shown, key=lambda run: (run["name"], run["budget"], run["seed"])):
        costs = [point["cost"] / 1000 for point in run["curve"]]
        style = {"color": colour[run["name"]], "marker": "o", "markersize": 3, "linewidth": 1}
        style |= {"linestyle": "--" if run["budget"] == smallest else "-"}
        label = None if run["name"] in labelled else run["name"]
        labelled.add(run["name"])
        base = run["curve"][0]
        unit, start = base["spread"]["mix"], base["rewards"]["mix"]
        left.plot(costs, [point["rewards"]["shapes-strict"] for point in run["curve"]], label=label, **style)
        right.plot(costs, [(point["rewards"]["mix"] - start) / unit for point in run["curve"]], **style)
    left.axhline(target, color="black", linewidth=0.8, linestyle=":")
    left.set_ylabel("held-out strict score")
    right.set_ylabel("gain of the held-out mixture, spreads")
    for axes in (left, right):
        axes.set_xlabel("thousand forward-equivalents")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(FIGURE, dpi=130)
    print(f"figure: {FIGURE.relative_to(ROOT)}")
