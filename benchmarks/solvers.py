"""Error of deterministic sampling with few steps on the embedded model, for each solver.

    python benchmarks/solvers.py

Held-out prompts of the demo, one image each. Prints a Markdown table against many steps: the relative error of the
final latents (root mean square of the difference over that of the latents), for the median image and as a mean, and the
mean absolute difference of the pixels in 1/255. The mean error is mostly that of a few images that become another
image, which no solver avoids with few steps.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    from trainer.config import parse_config, preset
    from trainer.diffusion.solvers import SOLVERS
    from trainer.models import SD3Model
    from trainer.prompts.sets import evaluation_prompts
    from trainer.rollout import Plan, Prompting, sample
    from trainer.utils.seeds import noise

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 10, 16])
    parser.add_argument("--reference", type=int, default=100, help="steps of the references")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--shift", type=float, default=None, help="default: the demo's")
    args = parser.parse_args()

    config = parse_config(preset("demo"))
    shift = config.rollout.shift if args.shift is None else args.shift
    cpu = torch.device("cpu")
    texts = evaluation_prompts(config.evaluation).texts
    conditions = SD3Model.encode(config.model, [*texts, ""], cpu)
    model = SD3Model.load(config.model, cpu)
    rows = torch.arange(len(texts))
    prompting = Prompting(conditions.rows(rows), conditions.rows(torch.tensor([len(texts)])))
    initial = torch.stack([noise(model.latent_shape, 0, text) for text in texts])

    def final(solver: str, steps: int) -> torch.Tensor:
        plan = Plan("ode", 0.0, model.sigmas(steps, shift), [False] * steps, False, args.guidance, solver)
        return sample(model, plan, prompting, rows, initial, lambda step: initial).final

    references = {name: final(name, args.reference) for name in SOLVERS}
    decoded = {name: model.decode(latents) for name, latents in references.items()}
    columns = ("median error", "mean error", "pixels")
    heads = [f"{column}, {args.reference} steps of {name}" for name in SOLVERS for column in columns]
    print(f"{len(texts)} images, shift {shift:g}, guidance {args.guidance:g}\n")
    print(f"| solver | steps | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 2)}")
    for name in SOLVERS:
        for steps in args.steps:
            latents = final(name, steps)
            images = model.decode(latents)
            cells = []
            for reference in SOLVERS:
                errors = relative_errors(latents, references[reference])
                pixels = (images - decoded[reference]).abs().mean() * 255
                cells += [f"{errors.median().item():.4f}", f"{errors.mean().item():.4f}", f"{pixels.item():.2f}"]
            print(f"| {name} | {steps} | {' | '.join(cells)} |", flush=True)


def relative_errors(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per image, `[B]`."""
    return (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


if __name__ == "__main__":
    main()
