"""How much of an iteration is not the model: time whole iterations, then the model calls they make, alone.

    python benchmarks/overhead.py --set rollout.window=null --iterations 10

The alone timing makes the same number of forward passes (rollout) and forward-and-backward passes (update) at the same
batch sizes on random latents, and decodes as many images; what an iteration takes beyond that is overhead.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def timed(work: object, repeats: int) -> float:
    """Median seconds of a call after one warm-up."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    from trainer.config import parse_config, preset
    from trainer.loop import Trainer
    from trainer.utils.distributed import Processes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()

    config = parse_config(preset(args.preset), args.overrides)
    rollout = config.rollout
    if rollout.window or not rollout.shared_noise or rollout.guidance_scale != 1:
        parser.error("the alone timing knows runs with shared noise, without window and guidance")
    trainer = Trainer(config, None, Processes("cpu"))
    trainer.iterate()
    events = [trainer.iterate() for _ in range(args.iterations)]
    whole = statistics.median(e["seconds"]["total"] for e in events)
    phases = {name: statistics.median(e["seconds"][name] for e in events) for name in events[0]["seconds"]}

    model = trainer.model
    images = rollout.prompts_per_iteration * rollout.group_size
    predictions = round(statistics.median(e["forwards_per_image"] for e in events) * images)
    shared = rollout.prompts_per_iteration
    sampled = shared + (rollout.steps - 1) * images
    trained = predictions - sampled

    def forward(batch: int) -> None:
        rows = torch.arange(batch) % len(trainer.prompts.texts)
        latents = torch.randn(batch, *model.latent_shape)
        with torch.no_grad():
            model.predict_guided(latents, torch.full((batch,), 0.5), trainer.prompting.conditions.rows(rows))

    def backward(batch: int) -> None:
        rows = torch.arange(batch) % len(trainer.prompts.texts)
        latents = torch.randn(batch, *model.latent_shape)
        prediction = model.predict_guided(latents, torch.full((batch,), 0.5), trainer.prompting.conditions.rows(rows))
        prediction.square().mean().backward()

    size = config.objective.batch_size
    alone = {
        "rollout": timed(lambda: forward(shared), 5) + (rollout.steps - 1) * timed(lambda: forward(images), 5),
        "update": trained // size * timed(lambda: backward(size), 5)
        + (timed(lambda: backward(trained % size), 5) if trained % size else 0.0),
        "decode": timed(lambda: model.decode(torch.randn(images, *model.latent_shape)), 5),
    }
    total = sum(alone.values())
    print(f"images per iteration {images}, sampling predictions {sampled}, trained predictions {trained}")
    print(f"{'phase':10s} {'iteration':>10s} {'alone':>10s}")
    for name, seconds in phases.items():
        print(f"{name:10s} {seconds:10.3f} {alone.get(name, 0.0) if name != 'total' else total:10.3f}")
    print(f"overhead: {whole - total:.3f} s, {(whole - total) / whole:.1%} of an iteration")


if __name__ == "__main__":
    main()
