"""The estimate of a run against what happened.

    python benchmarks/estimate.py trainer/presets/demo.yaml --iterations 5 [--set SECTION.FIELD=VALUE ...]

Time: the calls are measured and counted as `python -m trainer estimate` does, then iterations are made, in one process.
On a CPU both are seconds of this process alone (`time.process_time`), so that other work on the machine does not count.
Memory: the peak that `estimate` says, and that of a run of as many iterations, each in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.check import check_run
from trainer.config import read_config
from trainer.estimate.calls import iteration_calls
from trainer.estimate.measure import Meter, phases
from trainer.loop import Trainer
from trainer.utils.console import quiet_libraries
from trainer.utils.distributed import Processes

ROOT = Path(__file__).resolve().parents[1]


def seconds(description: Path, settings: list[str], iterations: int) -> tuple[float, float]:
    """Of an iteration: estimated, and the mean of those after the first."""
    quiet_libraries()
    config = read_config(description, settings)
    processes = Processes(config.runtime.device)
    clock = time.process_time if processes.device.type == "cpu" else time.perf_counter
    trainer = Trainer(config, None, processes)
    estimated = sum(estimated_seconds(trainer, clock).values())
    spent = []
    for _ in range(iterations):
        started = clock()
        trainer.iterate()
        spent.append(clock() - started)
    return estimated, sum(spent[1:]) / len(spent[1:])


def estimated_seconds(trainer: Trainer, clock: Callable[[], float]) -> dict[str, float]:
    """Of an iteration by phase, as `estimate` measures and counts its calls.

    Args:
        clock: returns seconds.
    """
    config, model = trainer.config, trainer.model
    meter, checked = Meter(trainer, clock=clock), check_run(config, 1)
    calls = iteration_calls(config, checked, model.process, model.sigmas, trainer.processes, model.is_trained_at)
    return phases(meter.seconds(calls)) | {"optimizer": config.objective.updates * meter.optimizer_step()}


def memory(description: Path, settings: list[str], iterations: int) -> tuple[float, float]:
    """The peak in MB: estimated, and of a run."""
    words = [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        answer, run = Path(folder) / "answer.json", Path(folder) / "run"
        program("estimate", description.resolve(), *words, "--json", answer)
        shorter = ["--set", f"runtime.iterations={iterations}"]
        program("train", description.resolve(), *words, *shorter, "--output", run)
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        return json.loads(answer.read_text())["memory"]["needed"] / 2**20, max(e["memory_mb"] for e in events)


def program(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "trainer", *map(str, arguments)], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("description", type=Path)
    parser.add_argument("--iterations", type=int, default=5, help="at least 2: the first one is not counted")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--only", choices=("seconds", "memory"), help="one of the two")
    args = parser.parse_args()
    measures = {"seconds": seconds, "memory": memory}
    for name in [args.only] if args.only else list(measures):
        estimated, was = measures[name](args.description, args.settings, args.iterations)
        print(f"{name}: estimated {estimated:.4g}, was {was:.4g}: {estimated / was - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
