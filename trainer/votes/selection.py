"""Which pair to show next: the one whose vote is expected to say most about the weights of the fit.

The measure is the mutual information between the vote and the weights, also known as BALD (Houlsby et al. 2011,
arXiv 1112.5745), under the Laplace approximation: the entropy of the predicted vote less its expected entropy once the
weights are known. It is high where the prediction is near one half because the weights are uncertain, and low where it
is near one half because the images are equally good.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from ..utils.seeds import generator
from .fit import Fit

CANDIDATES = 2000
"""Pairs that are compared; a random sample of all pairs if there are more."""
NODES = 15
"""Of the Gauss-Hermite quadrature over a pair's predicted difference in utility."""

Pair = tuple[int, int]
"""Rows of the features, the smaller one first."""


def pair(first: int, second: int) -> Pair:
    return (min(first, second), max(first, second))


def next_pairs(
    features: np.ndarray,
    fitted: Fit | None,
    prompts: Sequence[str],
    shown: Collection[Pair],
    count: int = 1,
    mode: Literal["active", "random"] = "active",
    seed: int = 0,
) -> list[Pair]:
    """The next pairs to vote on, the most informative first; fewer than `count` if there are no more.

    Pairs of images of one prompt come first, as long as there are any that have not been shown: only they say which of
    two answers to a prompt is better.

    Args:
        features: `[M, D]` float64, a row per image.
        fitted: to the votes so far; `random` needs none.
        prompts: M texts.
        shown: pairs that must not come again.
        mode: `random` draws from the same candidates, for comparison.
        seed: of the draw of candidates.
    """
    candidates = _candidates(prompts, set(shown), seed)
    if mode == "random" or not candidates:
        return candidates[:count]
    scaled = fitted.scaled(features)
    rows = np.array(candidates)
    differences = scaled[rows[:, 0]] - scaled[rows[:, 1]]
    mean = differences @ fitted.weights
    seen, curvature = fitted.differences, fitted.curvature
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        variance = _variance(differences, seen, curvature, fitted.precision)
        gain = information(mean, variance)
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        chosen.append(best)
        # The next one is chosen as if this one had been voted on; the variance does not depend on how.
        probability = 1 / (1 + np.exp(-mean[best]))
        seen = np.vstack([seen, differences[best]])
        curvature = np.append(curvature, probability * (1 - probability))
    return [candidates[index] for index in chosen]


def information(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mutual information, in nats, between a vote and the weights, for a difference in utility of that distribution."""
    from scipy.special import entr, expit

    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    probability = expit(mean[:, None] + np.sqrt(variance)[:, None] * nodes)
    weights = weights / weights.sum()

    def entropy(p: np.ndarray) -> np.ndarray:
        return entr(p) + entr(1 - p)

    return entropy(probability @ weights) - entropy(probability) @ weights


def _variance(differences: np.ndarray, seen: np.ndarray, curvature: np.ndarray, precision: float) -> np.ndarray:
    """d' H^-1 d for each row d `[C, D]`, with H = precision I + X' diag(curvature) X, by Woodbury's identity."""
    prior = (differences**2).sum(1)
    if len(seen) == 0:
        return prior / precision
    roots = np.sqrt(curvature)[:, None] * seen
    kernel = precision * np.eye(len(seen)) + roots @ roots.T
    cross = roots @ differences.T
    explained = (cross * np.linalg.solve(kernel, cross)).sum(0)
    return np.maximum(prior - explained, 0.0) / precision


def _candidates(prompts: Sequence[str], shown: set[Pair], seed: int) -> list[Pair]:
    """Up to `CANDIDATES` pairs in random order: of one prompt if there are any, else of all images."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    return _sample(list(groups.values()), shown, seed) or _sample([list(range(len(prompts)))], shown, seed)


def _sample(groups: list[list[int]], shown: set[Pair], seed: int) -> list[Pair]:
    """Up to `CANDIDATES` pairs within groups, in random order, all of them if there are no more than that."""
    random = generator(seed, "votes")
    sizes = [len(group) * (len(group) - 1) // 2 for group in groups]
    total = sum(sizes)
    if total <= 2 * CANDIDATES + len(shown):
        found = [pair(a, b) for group in groups for i, a in enumerate(group) for b in group[:i]]
        found = [one for one in found if one not in shown]
        random.shuffle(found)
        return found[:CANDIDATES]
    drawn: dict[Pair, None] = {}
    while len(drawn) < CANDIDATES:
        (group,) = random.choices(groups, weights=sizes)
        one = pair(*random.sample(group, 2))
        if one not in shown:
            drawn[one] = None
    return list(drawn)
