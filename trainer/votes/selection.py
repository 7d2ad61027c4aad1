"""Active selection of the next pair: the one whose vote is expected to give most information about the weights.

The measure is the mutual information between the vote and the weights, also known as BALD (Houlsby et al. 2011,
arXiv 1112.5745), under the Laplace approximation: the entropy of the predicted vote minus its expected entropy given
the weights. It is high if the prediction is near 0.5 because the weights are uncertain, and low if it is near 0.5
because the images are equally good.
"""

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from ..utils.seeds import derive
from .fit import Fit

CANDIDATES = 2000
"""Largest number of candidate pairs; if there are more pairs, a random sample is used."""
NODES = 15
"""Nodes of the Gauss-Hermite quadrature over a pair's predicted difference in utility."""

Pair = tuple[int, int]
"""Row indices of two images, the smaller one first."""


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

    Pairs of images of the same prompt come first, as long as there are any that have not been shown, because training
    also compares images of the same prompt.

    Args:
        features: `[M, D]` float64, a row per image.
        fitted: fit to the votes so far; not needed for `random`.
        prompts: M prompts.
        shown: pairs that must not be returned.
        mode: `random` draws from the same candidates at random.
        seed: seed of the random sample of candidates.
    """
    candidates = _candidates(prompts, shown, seed)
    if mode == "random" or len(candidates) == 0:
        return [pair(*one) for one in candidates[:count].tolist()]
    scaled = fitted.scaled(features)
    differences = scaled[candidates[:, 0]] - scaled[candidates[:, 1]]
    mean = differences @ fitted.weights
    seen, curvature = fitted.differences, fitted.curvature
    chosen: list[int] = []
    while len(chosen) < min(count, len(candidates)):
        variance = _variance(differences, seen, curvature, fitted.precision)
        gain = information(mean, variance)
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        chosen.append(best)
        # Choose the next pair as if this one had been voted on; the variance does not depend on the vote.
        probability = 1 / (1 + np.exp(-mean[best]))
        seen = np.vstack([seen, differences[best]])
        curvature = np.append(curvature, probability * (1 - probability))
    return [pair(*one) for one in candidates[chosen].tolist()]


def information(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mutual information in nats between a vote and the weights, for Gaussian differences in utility."""
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


def _candidates(prompts: Sequence[str], shown: Collection[Pair], seed: int) -> np.ndarray:
    """Up to `CANDIDATES` pairs `[C, 2]` in random order: of the same prompt if there are any, else of all images."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    known = np.array([first * len(prompts) + second for first, second in shown], dtype=int)
    for choice in (list(groups.values()), [list(range(len(prompts)))]):
        found = _pairs(choice, len(known), np.random.default_rng(derive(seed, "votes")))
        found = found[~np.isin(found[:, 0] * len(prompts) + found[:, 1], known)]
        if len(found):
            break
    return found[:CANDIDATES]


def _pairs(groups: list[list[int]], shown: int, random: np.random.Generator) -> np.ndarray:
    """Distinct pairs `[C, 2]` within groups in random order: all pairs, or a sample that is large enough."""
    members = [np.array(group) for group in groups if len(group) > 1]
    sizes = np.array([len(group) * (len(group) - 1) // 2 for group in members])
    if sizes.sum() <= 10 * CANDIDATES + shown:
        corners = [np.stack(np.triu_indices(len(group), 1), axis=1) for group in members]
        every = [group[corner] for group, corner in zip(members, corners, strict=True)]
        return random.permutation(np.concatenate(every)) if every else np.zeros((0, 2), dtype=int)
    drawn = random.choice(len(members), size=3 * CANDIDATES + 2 * shown, p=sizes / sizes.sum())
    counts = np.array([len(group) for group in members])
    starts, count = (np.cumsum(counts) - counts)[drawn], counts[drawn]
    first = random.integers(count)
    second = (first + 1 + random.integers(count - 1)) % count
    found = np.concatenate(members)[starts[:, None] + np.stack([first, second], axis=1)]
    return np.array(list(dict.fromkeys(map(tuple, np.sort(found, axis=1).tolist()))))
