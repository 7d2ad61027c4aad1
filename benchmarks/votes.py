"""How many votes does a reward model need, and does choosing pairs help? A scripted voter on images of shapes.

    python benchmarks/votes.py                    # 20, 40, 80 and 160 votes, active and random, 10 seeds
    python benchmarks/votes.py --errors 0.15      # a voter who answers by chance in 15% of the votes

The voter prefers blue things on light ground. Each collection has 200 images, half of them on dark ground. The table
says how often the fitted model ranks pairs of 400 new images as the rule does, and what the leave-out agreement of the
votes themselves was: means over the seeds, and the std.
"""

import argparse
import dataclasses
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.shapes.prompts import balanced_prompts, parse
from trainer.shapes.world import Scene, make_scene, render
from trainer.votes.fit import Comparisons, agreement, fit
from trainer.votes.pixels import PixelFeatures
from trainer.votes.selection import next_pairs, pair

COUNTS = (20, 40, 80, 160)
POOL, TEST = 200, 400
MARGIN = 0.05
"""Difference in liking below which the voter says that it is a tie."""


def scenes(count: int, seed: int) -> list[Scene]:
    """Random scenes, half of them on dark ground."""
    rng, texts = random.Random(seed), balanced_prompts(30, held_out=False)
    found = [make_scene(parse(rng.choice(texts)), rng) for _ in range(count)]
    return [_darker(scene) if rng.random() < 0.5 else scene for scene in found]


def _darker(scene: Scene) -> Scene:
    return dataclasses.replace(scene, background=tuple(0.35 * value for value in scene.background))


def liking(scene: Scene) -> float:
    """What the voter goes by: the area of blue things, relative to a large one, and the brightness of the ground."""
    blue = sum(item.radius**2 for item in scene.objects if item.color == "blue")
    return blue / 15**2 + sum(scene.background) / 3


def run(mode: str, seed: int, errors: float) -> list[tuple[float, float]]:
    """Agreement with the rule on new images, and with votes left out, after each of `COUNTS` votes."""
    rng = random.Random(seed)
    pool, test = scenes(POOL, 2 * seed), scenes(TEST, 2 * seed + 1)
    features, new = (PixelFeatures()(render(some)).double().numpy() for some in (pool, test))
    likes, truth = np.array([liking(scene) for scene in pool]), np.array([liking(scene) for scene in test])
    votes: list[tuple[int, int, bool]] = []
    found = []
    while len(votes) < max(COUNTS):
        table = _table(votes)
        shown = {pair(first, second) for first, second, _ in votes}
        model = fit(features, table) if mode == "active" else None
        ((one, other),) = next_pairs(features, model, [""] * POOL, shown, mode=mode, seed=seed + len(votes))
        difference = likes[one] - likes[other]
        if rng.random() < errors:
            difference = rng.choice([-1, 1])
        ordered = (one, other) if difference > 0 else (other, one)
        votes.append((*ordered, abs(difference) <= MARGIN))
        if len(votes) in COUNTS:
            left_out = agreement(features, _table(votes))  # None after too many ties
            share = left_out.share if left_out else np.nan
            found.append((_accuracy(features, _table(votes), new, truth), share))
    return found


def _table(votes: list[tuple[int, int, bool]]) -> Comparisons:
    first, second, ties = zip(*votes, strict=True) if votes else ((), (), ())
    return Comparisons(np.array(first, dtype=int), np.array(second, dtype=int), np.array(ties, dtype=bool))


def _accuracy(features: np.ndarray, votes: Comparisons, new: np.ndarray, truth: np.ndarray) -> float:
    guess = fit(features, votes).utilities(new)
    one, other = np.triu_indices(len(truth), 1)
    clear = np.abs(truth[one] - truth[other]) > MARGIN
    return float(((guess[one] > guess[other]) == (truth[one] > truth[other]))[clear].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--errors", type=float, default=0.0, help="share of votes that are answered by chance")
    args = parser.parse_args()
    print("| votes | active: new images | votes left out | random: new images | votes left out |")
    print("|---|---|---|---|---|")
    runs = {mode: np.array([run(mode, s, args.errors) for s in range(args.seeds)]) for mode in ("active", "random")}
    for index, count in enumerate(COUNTS):
        columns = [r[:, index, k] for r in runs.values() for k in (0, 1)]
        cells = [f"{np.nanmean(column):.1%} ± {np.nanstd(column):.1%}" for column in columns]
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
