"""The estimate of a run against what happened.

    python benchmarks/estimate.py trainer/presets/demo.yaml --iterations 12 [--set SECTION.FIELD=VALUE ...]

Estimates the description in a process of its own, trains that many iterations of it in another, and estimates it again,
because the speed of a machine that others use changes; compares seconds per iteration with the mean of both estimates
(the first iteration, which is slower, does not count) and the peak of memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def program(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "trainer", *map(str, arguments)], cwd=ROOT, check=True)


def compare(description: Path, settings: list[str], iterations: int) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / f"{number}.json" for number in range(2)]
        program("estimate", description.resolve(), *words, "--json", answers[0])
        run = Path(folder) / "run"
        shorter = ["--set", f"runtime.iterations={iterations}"]
        program("train", description.resolve(), *words, *shorter, "--output", run)
        program("estimate", description.resolve(), *words, "--json", answers[1])
        found = [json.loads(answer.read_text()) for answer in answers]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    estimates = [answer["seconds"]["iteration"] for answer in found]
    estimate = sum(estimates) / 2
    actual = [event["seconds"]["total"] for event in events[1:]]
    mean = sum(actual) / len(actual)
    needed, peak = found[0]["memory"]["needed"] / 2**20, max(event["memory_mb"] for event in events)
    each = " and ".join(f"{value:.2f}" for value in estimates)
    print(f"seconds per iteration: estimated {estimate:.2f} ({each}), was {mean:.2f}: {estimate / mean - 1:+.1%}")
    print(f"memory: estimated {needed:.0f} MB, was {peak:.0f} MB: {needed / peak - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("description", type=Path)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.FIELD=VALUE")
    args = parser.parse_args()
    compare(args.description, args.settings, args.iterations)


if __name__ == "__main__":
    main()
