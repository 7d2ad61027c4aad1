"""Compare objectives at equal cost on the embedded model: held-out scores against forward-equivalents and seconds.

    python benchmarks/objectives.py search   # every objective and learning rate, a third of the budget, seed 0
    python benchmarks/objectives.py final    # the best rate of each on three seeds, the whole budget
    python benchmarks/objectives.py report   # the tables, and the figure docs/images/objectives.png

A variant of `benchmarks/objectives.yaml` is the demo's description with some settings changed; prompts, rewards, LoRA,
held-out prompts and their evaluation (10 Euler steps) are the demo's. Cost is counted where the network runs: 1 per
latent of a forward pass, 3 where a backward pass follows; evaluation, decoding and rewards are not in it, and decoding
is given apart. A run lasts as many iterations as its budget pays for at the mean cost of a few that are made first. A
finished run is one file in `--output` and is not repeated; one line is printed for each.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGET = 0.78
"""The held-out strict score to reach."""


TRIAL = 6
"""Iterations that say what one costs: where each prompt has its own window, they differ."""


class Cost:
    """Forward-equivalents of a network: batch x 1, or x 3 where its output carries a gradient."""

    def __init__(self, network: object) -> None:
        self.total, self.counting = 0, False
        network.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, network: object, args: tuple, kwargs: dict, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        if self.counting:
            self.total += len(first) * (3 if first.requires_grad else 1)

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.counting = True
        yield
        self.counting = False


def description(base: str, settings: list[str], rate: float, seed: int, iterations: int) -> object:
    """The run description of a variant."""
    from trainer.config import parse_config, preset

    common = [
        f"optimizer.learning_rate={rate}",
        f"runtime.seed={seed}",
        f"runtime.iterations={iterations}",
        "evaluation.steps=10",
        "evaluation.solver=euler",
    ]
    return parse_config(preset(base), [*settings, *common])


def begin(config: object) -> tuple[object, Cost]:
    """A trainer, and what counts its network's work."""
    from trainer.loop import Trainer
    from trainer.utils.distributed import Processes

    trainer = Trainer(config, None, Processes("cpu"))
    return trainer, Cost(trainer.model.module)


def train(base: str, settings: list[str], rate: float, seed: int, budget: int, points: int, first: dict | None) -> dict:
    """One run of as many iterations as the budget pays for; see `follow`."""
    trainer, cost = begin(description(base, settings, rate, seed, TRIAL))
    with cost.counted():
        for _ in range(TRIAL):
            trainer.iterate()
    return follow(description(base, settings, rate, seed, budget * TRIAL // cost.total), points, first)


def follow(config: object, points: int, first: dict | None) -> dict:
    """One run: its evaluations with their costs.

    Args:
        points: evaluations after the first, evenly spaced.
        first: evaluation of the base model, where another run has made it already; None to make it.
    """
    iterations = config.runtime.iterations
    trainer, cost = begin(config)
    if first is None:
        trainer.evaluate()
    else:
        trainer.evaluations.append(first)
    marks = {round(iterations * (i + 1) / points) for i in range(points)}
    curve, decode, stopped = [{"cost": 0, **trainer.evaluations[0]}], 0.0, None
    for number in range(1, iterations + 1):
        with cost.counted():
            event = trainer.iterate()
        decode += event["seconds"].get("decode", 0.0)
        _, stopped = trainer.watchdog.watch(event, trainer.objective.alarm(event["objective"]))
        if number in marks or stopped:
            trainer.evaluate()
            curve.append({"cost": cost.total, **trainer.evaluations[-1]})
        if stopped:
            break
    per_image = cost.total / trainer.iteration / event_images(config)
    return {"curve": curve, "per_image": per_image, "decode_seconds": decode, "stopped": stopped}


def event_images(config: object) -> int:
    """Images of an iteration."""
    return config.rollout.prompts_per_iteration * config.rollout.group_size


def finished(output: Path, name: str, variant: dict, rate: float, seed: int, budget: int, points: int) -> dict:
    """Make a run, or read it from before; prints its line."""
    key = hashlib.sha256(json.dumps([variant["settings"], rate, seed, budget, points]).encode()).hexdigest()[:12]
    path = output / f"{key}.json"
    if not path.exists():
        started, first = time.perf_counter(), base_evaluation(output)
        result = train("demo", variant["settings"], rate, seed, budget, points, first)
        about = {"name": name, "rate": rate, "seed": seed, "budget": budget, "date": time.strftime("%Y-%m-%d")}
        about["wall_seconds"] = time.perf_counter() - started
        part = path.with_suffix(".part")
        part.write_text(json.dumps(about | result))
        part.replace(path)
    result = json.loads(path.read_text()) | {"name": name}
    print(line(result), flush=True)
    return result


def base_evaluation(output: Path) -> dict | None:
    """The base model's evaluation, from any finished run."""
    for path in sorted(output.glob("*.json")):
        return {key: value for key, value in json.loads(path.read_text())["curve"][0].items() if key != "cost"}
    return None


def line(result: dict) -> str:
    """What is printed of a run."""
    last = result["curve"][-1]
    strict = " ".join(f"{point['rewards']['shapes-strict']:.3f}" for point in result["curve"])
    note = f"  STOPPED: {result['stopped']}" if result["stopped"] else ""
    return (
        f"{result['name']:<22} lr {result['rate']:g}  seed {result['seed']}  {last['cost']:>6} FE "
        f"({last['iteration']} x {result['per_image']:.1f} per image)  {last['seconds']:.0f} s "
        f"(decoding {result['decode_seconds']:.0f})  strict {strict}  mixture {gain(result):+.2f} spreads{note}"
    )


def gain(result: dict) -> float:
    """Gain of the mixture in the base model's within-prompt spreads."""
    first, last = result["curve"][0], result["curve"][-1]
    return (last["rewards"]["mix"] - first["rewards"]["mix"]) / first["spread"]["mix"]


def strict(result: dict) -> float:
    """Held-out strict score at the end."""
    return result["curve"][-1]["rewards"]["shapes-strict"]


def search(args: argparse.Namespace, variants: dict) -> dict[str, list[dict]]:
    """Short runs of every variant at every rate; all variants at one rate before the next."""
    results: dict[str, list[dict]] = {name: [] for name in variants}
    for rate in args.rates:
        for name, variant in variants.items():
            results[name].append(finished(args.output, name, variant, rate, 0, args.search_budget, 1))
    return results


def final(args: argparse.Namespace, variants: dict) -> None:
    """The best rate of each variant on every seed."""
    for name, runs in search(args, variants).items():
        best = max(runs, key=strict)
        for seed in args.seeds:
            finished(args.output, name, variants[name], best["rate"], seed, args.budget, args.points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["search", "final", "report"])
    parser.add_argument("--only", nargs="+", help="variants, by name")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=int, default=73_000, help="forward-equivalents of a whole run")
    parser.add_argument("--search-budget", type=int, default=24_333, help="those of a run of the search")
    parser.add_argument("--points", type=int, default=4, help="evaluations along a whole run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/objectives")
    args = parser.parse_args()
    variants = yaml.safe_load((ROOT / "benchmarks/objectives.yaml").read_text())
    variants = {name: variants[name] for name in args.only or variants}
    args.output.mkdir(parents=True, exist_ok=True)
    if args.stage == "report":
        from objectives_report import report

        report(args.output, TARGET)
    else:
        import torch

        torch.set_num_threads(1)
        {"search": search, "final": final}[args.stage](args, variants)


if __name__ == "__main__":
    main()
