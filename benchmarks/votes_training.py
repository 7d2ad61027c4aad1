"""Does training on votes give what the voter likes? A scripted voter; a reward model fitted to its votes, or dpo.

    python benchmarks/votes_training.py                    # 40 votes, three ways, three seeds
    python benchmarks/votes_training.py --votes 20 40 80 160 --modes active random --ways judge
    python benchmarks/votes_training.py --report           # the table of what has been done

The voter looks at pixels alone and prefers blue things on light ground (`liking`). Per seed, the embedded model makes
200 images of prompts that name no colour, the voter votes on pairs of them, and a LoRA is trained from these votes:

- `judge`: the objective nft with the reward `preference`, fitted to the votes on `pixels`; it does not read prompts.
- `judge and prompt`: the same, and a second reward of equal weight that reads them.
- `dpo`: the objective dpo on the pairs themselves, without rollout and without reward.

What is measured is the share of images of held-out prompts that the voter prefers to the base model's for the same
prompt and noise; a tie counts half. Beside it stands the share of images that show what the prompt asks for, by the
shapes world's checker. Seconds are those of one CPU core in training; making the images and voting come on top.

Every case is one line of `runs/votes_training/results.jsonl`, and one that is there is not done again.
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.config import RewardConfig, RunConfig, parse_config, preset
from trainer.loop import Trainer
from trainer.rewards import load_reward, score
from trainer.rollout import Plan, Prompting, sample
from trainer.shapes.prompts import balanced_prompts, parse
from trainer.shapes.world import PALETTE
from trainer.utils.distributed import Processes
from trainer.utils.media import read_image, to_pil_image
from trainer.utils.seeds import noise
from trainer.votes import store
from trainer.votes.analysis import VoteAnalyzer
from trainer.votes.pixels import PixelFeatures
from trainer.votes.records import Vote
from trainer.votes.store import Collection

PROMPTS, PER_PROMPT = 20, 10
HELD_OUT, IMAGES = 24, 2
MARGIN = 0.02
"""Difference in liking below which the voter says that it is a tie."""
BLUE, LARGE = 0.35, 0.15
"""Distance in RGB that passes for blue, and the share of the image from which on more blue is no better."""
_ROLLOUT = [
    "objective={name: nft, noise_levels: 2}",
    "rollout.steps=6",
    "rollout.solver=2m",
    "rollout.prompts_per_iteration=6",
    "rollout.group_size=6",
    "runtime.iterations=20",
]
WAYS = {
    "judge": [*_ROLLOUT, "optimizer.learning_rate=1.5e-3"],
    "judge and prompt": [*_ROLLOUT, "optimizer.learning_rate=2e-3"],
    "dpo": [
        "objective={name: dpo, beta: 20, noise_levels: 2}",
        "rollout.steps=10",
        "rollout.prompts_per_iteration=24",
        "optimizer.learning_rate=1e-3",
        "runtime.iterations=30",
    ],
}


def liking(images: Tensor) -> Tensor:
    """What the voter goes by, `[N]`: how much is blue, and how light the ground is; of images `[N, 3, H, W]`."""
    away = (images - torch.tensor(PALETTE["blue"]).view(3, 1, 1)).square().sum(1).sqrt()
    share = (away < BLUE).float().mean((1, 2))
    edge = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], -1)
    return (share / LARGE).clamp(max=1) + edge.median(-1).values.mean(1)


def colourless(held_out: bool, count: int) -> list[str]:
    """Evenly spaced prompts that name no colour."""
    texts = [text for text in balanced_prompts(10, held_out) if not any(p.color for p in parse(text).phrases)]
    return [texts[i * len(texts) // count] for i in range(count)]


def describe(way: str, seed: int, collection: Collection | None, overrides: list[str] = ()) -> RunConfig:
    """The run description of one way to train; without a collection, of a run that only samples."""
    data = preset("demo")
    data["rewards"], data["evaluation"], data["prompts"] = [], {}, {"texts": colourless(False, PROMPTS)}
    data["runtime"] = {"device": "cpu", "samples_every": 0, "seed": seed}
    data["lora"]["ema_decay"] = 0
    data["optimizer"] = {"schedule": "linear", "betas": [0.9, 0.99]}
    data["rollout"] = {"shift": 3.0}
    data["rewards"] = [{"name": "brightness"}]
    settings = [*WAYS[way], *overrides]
    if collection is not None and way != "dpo":
        data["rewards"] = [{"name": "preference", "options": {"collection": str(collection.folder)}}]
        data["rewards"] += [{"name": "shapes"}] if way == "judge and prompt" else []
    elif collection is not None:
        data["rewards"], data["prompts"] = [], {}
        settings.append(f"objective.collection={json.dumps(str(collection.folder))}")
    return parse_config(data, settings)


# ------------------------------------------------------------------------------------------------------- images, votes


class Counter:
    """Forward-equivalents of the network: 1 for a forward pass of one latent, 3 with a backward pass."""

    def __init__(self, trainer: Trainer) -> None:
        self.count, predict = 0, trainer.model.predict_guided

        def counted(latents: Tensor, *rest: object) -> Tensor:
            self.count += len(latents) * (3 if torch.is_grad_enabled() else 1)
            return predict(latents, *rest)

        trainer.model.predict_guided = counted


@torch.no_grad()
def draw(trainer: Trainer, texts: list[str], per_prompt: int, name: str, seed: int) -> Tensor:
    """Images of prompts by the trainer's weights of the moment, `[N, 3, H, W]`, rounded as files are."""
    model = trainer.model
    conditions = type(model).encode(trainer.config.model, [*texts, ""], model.device)
    prompt_of = torch.arange(len(texts)).repeat_interleave(per_prompt)
    start = torch.stack([noise(model.latent_shape, seed, name, i) for i in range(len(prompt_of))])
    plan = Plan("ode", 0.0, model.sigmas(10, 3.0), [False] * 10, shared_noise=False)
    final = sample(model, plan, Prompting(conditions), prompt_of, start, lambda step: start).final
    return (model.decode(final) * 255).round() / 255


@functools.lru_cache
def pool(seed: int) -> Tensor:
    """The base model's images of the training prompts."""
    trainer = Trainer(describe("judge", seed, None), None, Processes("cpu"))
    return draw(trainer, colourless(False, PROMPTS), PER_PROMPT, "pool", seed)


def collected(root: Path, seed: int) -> Collection:
    """A collection of the base model's images."""
    collection = store.create(root, f"pool {seed}")
    texts = [text for text in colourless(False, PROMPTS) for _ in range(PER_PROMPT)]
    pairs = zip(pool(seed), texts, strict=True)
    collection.add((to_pil_image(image), text, "base") for image, text in pairs)
    return collection


def vote(collection: Collection, count: int, mode: str) -> Iterator[tuple[int, dict]]:
    """Cast votes by the rule; gives the state of the collection after each."""
    features = PixelFeatures()
    images = {item.image: read_image(collection.images / item.image) for item in collection.items()[0]}
    likes = dict(zip(images, liking(torch.stack(list(images.values()))).tolist(), strict=True))
    analyzer = VoteAnalyzer(lambda backbone: lambda path: features(images[path.name][None])[0].double().numpy())
    for number in range(1, count + 1):
        ((left, right),) = analyzer.next(collection, "pixels", mode=mode)
        difference = likes[left.image] - likes[right.image]
        better, worse = (left.image, right.image) if difference > 0 else (right.image, left.image)
        collection.record([Vote(better, worse, "tie" if abs(difference) <= MARGIN else "winner", f"{number}")])
    yield from [(count, analyzer.state(collection, "pixels"))]


# ------------------------------------------------------------------------------------------------------- one case


def case(root: Path, votes: int, mode: str, way: str, seed: int, overrides: list[str]) -> dict:
    """Votes, training and the share of preferred images, as plain data."""
    torch.manual_seed(0)
    collection = collected(root, seed)
    ((_, state),) = vote(collection, votes, mode)
    with contextlib.redirect_stderr(sys.stdout):
        config = describe(way, seed, collection, overrides)
        trainer = Trainer(config, None, Processes("cpu"))
        held_out = colourless(True, HELD_OUT)
        base = draw(trainer, held_out, IMAGES, "held out", seed)
        before, prompts = liking(base), [text for text in held_out for _ in range(IMAGES)]
        counter, began = Counter(trainer), time.process_time()
        for _ in range(config.runtime.iterations):
            event = trainer.iterate()
        cost, seconds = counter.count, time.process_time() - began
        images = draw(trainer, held_out, IMAGES, "held out", seed)
        after = liking(images)
    return {
        "votes": votes,
        "mode": mode,
        "way": way,
        "seed": seed,
        "overrides": overrides,
        "winners": state["votes"]["winners"],
        "agreement": state["agreement"] and state["agreement"]["share"],
        "win": win(after, before),
        "right": [right(base, prompts), right(images, prompts)],
        "liking": [before.mean().item(), after.mean().item()],
        "equivalents": cost,
        "seconds": seconds,
        "objective": event["objective"],
    }


def right(images: Tensor, prompts: list[str]) -> float:
    """Share of images that show what their prompt asks for."""
    return score(load_reward(RewardConfig(name="shapes-strict")), images, prompts).mean().item()


def win(after: Tensor, before: Tensor) -> float:
    """Share of images that the voter prefers to those they are compared with; equal ones count half."""
    return ((after > before).double() + (after == before).double() / 2).mean().item()


def report(results: list[dict]) -> str:
    """A row per number of votes, choice of pairs and way: means over seeds, and the seeds' own figures."""
    lines = [
        "| votes | pairs | way | agreement | preferred to the base's | right before, after | equivalents | CPU s |"
    ]
    lines.append("|---" * 8 + "|")
    keys = sorted({(r["votes"], r["mode"], r["way"]) for r in results}, key=lambda k: (k[2], k[0], k[1]))
    for votes, mode, way in keys:
        some = [r for r in results if (r["votes"], r["mode"], r["way"]) == (votes, mode, way)]
        shares = ", ".join(f"{r['win']:.0%}" for r in sorted(some, key=lambda r: r["seed"]))
        agreement = np.nanmean([np.nan if r["agreement"] is None else r["agreement"] for r in some])
        mean = lambda name: np.mean([r[name] for r in some])  # noqa: B023, E731
        lines.append(
            f"| {votes} | {mode} | {way} | {agreement:.0%} | {mean('win'):.0%} ({shares}) "
            f"| {np.mean([r['right'][0] for r in some]):.0%}, {np.mean([r['right'][1] for r in some]):.0%} "
            f"| {mean('equivalents'):,.0f} | {mean('seconds'):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--votes", type=int, nargs="+", default=[40])
    parser.add_argument("--modes", nargs="+", choices=["active", "random"], default=["active"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--results", type=Path, default=Path("runs/votes_training/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="only print the tables of what has been done")
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    results = [json.loads(line) for line in lines]
    cases = [
        (votes, mode, way, seed)
        for seed in args.seeds
        for votes in args.votes
        for mode in args.modes
        for way in args.ways
    ]
    for votes, mode, way, seed in [] if args.report else cases:
        known = [(r["votes"], r["mode"], r["way"], r["seed"], r["overrides"]) for r in results]
        if (votes, mode, way, seed, args.overrides) in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append(case(Path(folder), votes, mode, way, seed, args.overrides))
        with args.results.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)
    print(report(results))


if __name__ == "__main__":
    main()
