"""The paper's claims on the embedded model: one setting of DanceGRPO (arXiv 2505.07818) changed at a time.

    python benchmarks/paper.py run      # every variant of benchmarks/paper.yaml on three seeds
    python benchmarks/paper.py report   # the tables of docs/paper.md, and the figure docs/images/paper.png

All runs of a question have the same number of iterations and of images, as in the paper; their cost is given beside
them, in forward-equivalents (see benchmarks/objectives.py). Held-out evaluation is the demo's: 82 prompts, 328 images,
10 Euler steps. A finished run is one file in `--output` and is not repeated, so a stopped benchmark goes on where it
was; one line is printed for each run as it ends.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import yaml
from objectives import ROOT, follow

FIGURE = ROOT / "docs/images/paper.png"
POINTS = 1
"""Evaluations after the first one."""


def description(settings: list[str], seed: int, iterations: int) -> object:
    """The run description of a variant."""
    from trainer.config import parse_config, preset

    fixed = ["evaluation.steps=10", f"runtime.iterations={iterations}", f"runtime.seed={seed}"]
    return parse_config(preset("demo"), [*settings, *fixed])


def path_of(output: Path, settings: list[str], seed: int, iterations: int) -> Path:
    """The file of a run; its name is a hash of what was run, so equal variants of two questions are run once."""
    key = hashlib.sha256(json.dumps([settings, seed, iterations]).encode()).hexdigest()[:12]
    return output / f"{key}.json"


def base_evaluation(output: Path, config: object) -> dict | None:
    """The base model's evaluation, from a finished run with the same rewards."""
    rewards = scored(config)
    for path in sorted(output.glob("*.json")):
        run = json.loads(path.read_text())
        if run["scored"] == rewards:
            return {key: value for key, value in run["curve"][0].items() if key != "cost"}
    return None


def scored(config: object) -> list:
    """What an evaluation's figures depend on, as JSON: its rewards, and how the trained ones are combined."""
    rewards = [reward.model_dump(mode="json") for reward in (*config.rewards, *config.evaluation.rewards)]
    return [*rewards, config.advantage.combine]


def run(output: Path, name: str, settings: list[str], seed: int, iterations: int) -> dict:
    """Make a run, or read it from before."""
    path = path_of(output, settings, seed, iterations)
    if not path.exists():
        config = description(settings, seed, iterations)
        started = time.process_time()
        result = follow(config, POINTS, base_evaluation(output, config))
        result |= {"scored": scored(config), "cpu_seconds": time.process_time() - started}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(result | {"date": time.strftime("%Y-%m-%d")}))
        part.replace(path)
    result = json.loads(path.read_text())
    print(line(name, seed, result), flush=True)
    return result


def line(name: str, seed: int, result: dict) -> str:
    """What is printed of a run."""
    last = result["curve"][-1]
    strict = " ".join(f"{point['rewards']['shapes-strict']:.3f}" for point in result["curve"])
    note = f"  STOPPED: {result['stopped']}" if result["stopped"] else ""
    return f"{name:<44} seed {seed}  {last['cost']:>6} FE  strict {strict}  {gains(result)}{note}"


def gains(result: dict) -> str:
    """Change of every held-out figure from the first evaluation to the last."""
    first, last = result["curve"][0], result["curve"][-1]
    names = [name for name in first["rewards"] if name != "shapes-strict"]
    changes = {name: (last["rewards"][name] - first["rewards"][name]) / first["spread"][name] for name in names}
    return "  ".join(f"{name} {change:+.2f}" for name, change in changes.items())


def plan(question: dict, common: list[str], iterations: int) -> list[tuple[str, list[str], int]]:
    """Name, settings and number of iterations of the variants of a question."""
    return [
        (name, [*common, *question.get("settings", []), *settings], question.get("iterations", iterations))
        for name, settings in question["variants"].items()
    ]


def run_all(args: argparse.Namespace, spec: dict) -> None:
    """Every variant on every seed; all of a question on one seed before the next seed."""
    for question in chosen(args, spec):
        print(f"\n{question['title']}", flush=True)
        for seed in args.seeds:
            for name, settings, iterations in plan(question, spec["common"], spec["iterations"]):
                run(args.output, name, settings, seed, iterations)


def chosen(args: argparse.Namespace, spec: dict) -> list[dict]:
    """The questions that were asked for, by their numbers from 1; all by default."""
    numbers = args.only or range(1, len(spec["questions"]) + 1)
    return [spec["questions"][number - 1] for number in numbers]


def report(args: argparse.Namespace, spec: dict) -> None:
    """Print a table per question, and draw the figure."""
    drawn = []
    for question in chosen(args, spec):
        rows, results = [], {}
        for name, settings, iterations in plan(question, spec["common"], spec["iterations"]):
            paths = [path_of(args.output, settings, seed, iterations) for seed in args.seeds]
            runs = [json.loads(path.read_text()) for path in paths if path.exists()]
            if runs:
                rows.append(row(name, runs))
                results[name] = runs
        if rows:
            print(f"### {question['title']}\n\n{table(rows)}\n")
            drawn.append((question, results))
    draw(drawn)


def row(name: str, runs: list[dict]) -> dict[str, str]:
    """A line of a table: means over seeds, and each seed's gain and strict score."""
    firsts, lasts = [run["curve"][0] for run in runs], [run["curve"][-1] for run in runs]
    cells = {"variant": name, "thousand FE": f"{mean([last['cost'] for last in lasts]) / 1000:.0f}"}
    gained, strict = [gain(run) for run in runs], [last["rewards"]["shapes-strict"] for last in lasts]
    cells["trained, mean (seeds)"] = f"**{mean(gained):+.2f}** ({', '.join(f'{value:+.2f}' for value in gained)})"
    cells["strict, mean (seeds)"] = f"{mean(strict):.3f} ({', '.join(f'{value:.3f}' for value in strict)})"
    for reward in firsts[0]["rewards"]:
        if reward not in ("shapes-strict", "mix"):
            change = [(b["rewards"][reward] - a["rewards"][reward]) / a["spread"][reward] for a, b in pairs(runs)]
            cells[reward] = f"{mean(change):+.2f}"
    for look in ("brightness", "diversity"):
        before, after = (mean([point["looks"][look] for point in points]) for points in (firsts, lasts))
        cells[f"mean {look}"] = f"{before:.3f} to {after:.3f}"
    return cells


def pairs(runs: list[dict]) -> list[tuple[dict, dict]]:
    """First and last evaluation of every run."""
    return [(run["curve"][0], run["curve"][-1]) for run in runs]


def gain(run: dict) -> float:
    """Gain of what was trained, from the first evaluation to the last, in within-prompt spreads of the base model."""
    first, last = run["curve"][0], run["curve"][-1]
    name = "mix" if "mix" in first["rewards"] else run["scored"][0]["name"]
    return (last["rewards"][name] - first["rewards"][name]) / first["spread"][name]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown; a figure that not every variant has stays empty in the others."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [" | ".join(heads), "|".join("---" for _ in heads)]
    lines += [" | ".join(row.get(head, "") for head in heads) for row in rows]
    return "\n".join(f"| {text} |" if index != 1 else f"|{text}|" for index, text in enumerate(lines))


def draw(drawn: list[tuple[dict, dict[str, list[dict]]]]) -> None:
    """A plot per question: gain of what was trained, a dot per seed and a bar at their mean."""
    from matplotlib.figure import Figure

    columns = 2
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.6 * columns, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for plot in axes[len(drawn) :]:
        plot.set_visible(False)
    for plot, (question, results) in zip(axes, drawn, strict=False):
        for place, runs in enumerate(results.values()):
            values = [gain(run) for run in runs]
            plot.scatter(values, [place] * len(values), color="#1f77b4", s=18, alpha=0.7)
            plot.scatter([mean(values)], [place], color="black", marker="|", s=260)
        plot.axvline(0, color="black", linewidth=0.6)
        plot.set_yticks(range(len(results)), list(results), fontsize=8)
        plot.set_ylim(len(results) - 0.5, -0.5)
        plot.set_title(question["title"], fontsize=9)
        plot.set_xlabel("gain of the trained rewards, within-prompt spreads", fontsize=8)
        plot.grid(alpha=0.3, axis="x")
    figure.savefig(FIGURE, dpi=110)
    print(f"figure: {FIGURE.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "report"])
    parser.add_argument("--only", type=int, nargs="+", help="questions, by their numbers in the file, from 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "runs/paper")
    args = parser.parse_args()
    spec = yaml.safe_load((ROOT / "benchmarks/paper.yaml").read_text())
    args.output.mkdir(parents=True, exist_ok=True)
    if args.stage == "report":
        report(args, spec)
    else:
        import torch

        torch.set_num_threads(1)
        run_all(args, spec)


if __name__ == "__main__":
    main()
