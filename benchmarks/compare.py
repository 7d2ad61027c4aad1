"""Compare settings at equal training time on the embedded model.

    python benchmarks/compare.py benchmarks/variants.yaml --seconds 180 --output runs/compare

Every variant is the demo's description with some settings changed. Each trains for the same number of seconds
(evaluation not counted) in a process of its own with one thread; `--jobs` run side by side. Prints a Markdown table:
held-out strict score before and after, gain of the graded score in within-prompt spreads, pace.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def train_one(base: str, overrides: list[str], seconds: float) -> dict:
    """Train in this process until the time is up; returns what the table needs."""
    from trainer.config import parse_config, preset
    from trainer.loop import Trainer
    from trainer.utils.distributed import Processes

    config = parse_config(preset(base), [*overrides, "runtime.iterations=1000000"])
    trainer = Trainer(config, None, Processes("cpu"))
    trainer.evaluate()
    clips, stopped = [], ""
    while trainer.seconds < seconds:
        event = trainer.iterate()
        clips.append(event["objective"]["clip_fraction"])
        _, verdict = trainer.watchdog.watch(event)
        if verdict:
            stopped = verdict
            break
    trainer.evaluate()
    before, after = trainer.evaluations
    return {
        "iterations": trainer.iteration,
        "pace": trainer.seconds / trainer.iteration,
        "clipped": sum(clips) / len(clips),
        "before": before,
        "after": after,
        "stopped": stopped,
    }


def start(name: str, base: str, overrides: list[str], seconds: float, output: Path) -> dict:
    """Train one variant in a process of its own, or read its result from before."""
    key = hashlib.sha256(json.dumps([name, base, overrides, seconds]).encode()).hexdigest()[:12]
    path = output / f"{key}.json"
    if not path.exists():
        arguments = [sys.executable, __file__, "--one", json.dumps([base, overrides, seconds]), "--output", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (output / f"{path.stem}.log").open("w") as log:
            subprocess.run(arguments, check=True, env=environment, stdout=log, stderr=log)
    result = {"name": name, **json.loads(path.read_text())}
    print(row(result), flush=True)
    return result


def row(result: dict) -> str:
    """A line of the table."""
    before, after = result["before"], result["after"]
    strict = [e["rewards"]["shapes-strict"] for e in (before, after)]
    graded = (after["rewards"]["shapes"] - before["rewards"]["shapes"]) / before["spread"]["shapes"]
    relative = strict[1] / strict[0] - 1
    note = " (stopped: collapse)" if result["stopped"] else ""
    return (
        f"| {result['name']}{note} | {strict[0]:.3f} | {strict[1]:.3f} | {relative:+.0%} | {graded:+.2f} "
        f"| {result['iterations']} | {result['pace']:.2f} | {result['clipped']:.0%} |"
    )


HEAD = (
    "| variant | strict before | strict after | relative | graded gain in spreads | iterations | s / iteration "
    "| actions clipped |\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="?", type=Path, help="YAML: name -> list of settings")
    parser.add_argument("--base", default="demo", help="preset the variants change")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.output.write_text(json.dumps(train_one(*json.loads(args.one))))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    variants = yaml.safe_load(args.variants.read_text())
    print(HEAD, flush=True)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(start, name, args.base, overrides, args.seconds, args.output)
            for name, overrides in variants.items()
        ]
        results = [job.result() for job in jobs]
    print("\nin the order of the file:\n\n" + "\n".join([HEAD, *map(row, results)]))


if __name__ == "__main__":
    main()
