"""Fits a Bradley-Terry model on image features to votes, and measures how well it predicts held-out votes.

The utility of an image is linear in its features, u = w f, and the first image of a pair is preferred with probability
1 / (1 + exp(-(u1 - u2))) (Bradley and Terry 1952). w has a Gaussian prior; a tie counts as half a vote each way. The
posterior is approximated by a Gaussian at its mode (Laplace). The precision of the prior is chosen from a fixed list by
the highest evidence (MacKay 1992), so that it needs no tuning for the number of votes.
"""

from dataclasses import dataclass

import numpy as np

PRECISIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Candidate precisions of the prior of w, for features scaled to a mean squared distance of 1 from their mean."""
FOLDS = 10
FEWEST = 10
"""Smallest number of votes with a winner for which agreement is measured."""
SOME, ENOUGH = 0.5, 0.65
"""Lower ends of the interval above which the model is better than guessing, and good enough to train on."""
MANY = 100
"""Number of votes above which poor agreement is blamed on the features, not on too few votes."""
Z = 1.959963984540054
"""Half-width of a 95% interval in standard deviations."""


@dataclass(frozen=True)
class Comparisons:
    """Votes as row indices of a feature matrix, without skipped pairs.

    Attributes:
        first: `[N]` int; the preferred image, unless the vote is a tie.
        second: `[N]` int.
        tie: `[N]` bool.
    """

    first: np.ndarray
    second: np.ndarray
    tie: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: np.ndarray) -> "Comparisons":
        return Comparisons(self.first[index], self.second[index], self.tie[index])


@dataclass(frozen=True)
class Fit:
    """The Gaussian approximation of the posterior of w.

    Attributes:
        center: `[D]`, which is subtracted from features.
        scale: by which centred features are divided.
        weights: `[D]`, the mode.
        precision: of the prior.
        differences: `[N, D]`, scaled features of each vote's first image minus those of its second image.
        curvature: `[N]`, p (1 - p) of each vote at the mode.
        evidence: log probability of the votes under the model, up to a constant.
    """

    center: np.ndarray
    scale: float
    weights: np.ndarray
    precision: float
    differences: np.ndarray
    curvature: np.ndarray
    evidence: float

    def scaled(self, features: np.ndarray) -> np.ndarray:
        """Centred and scaled features, `[M, D]`."""
        return (features - self.center) / self.scale

    def utilities(self, features: np.ndarray) -> np.ndarray:
        """Utilities of images, `[M]`; the utility of the mean features is 0."""
        return self.scaled(features) @ self.weights


def fit(features: np.ndarray, votes: Comparisons, precision: float | None = None) -> Fit:
    """Fit the model to any number of votes, which may be 0.

    Args:
        features: `[M, D]` float64, of at least one image.
        precision: of the prior; None chooses from `PRECISIONS` by the evidence.
    """
    center = features.mean(0)
    scale = float(np.sqrt(((features - center) ** 2).sum(1).mean())) or 1.0
    differences = (features[votes.first] - features[votes.second]) / scale
    if len(votes) == 0:
        empty = np.zeros(0)
        return Fit(center, scale, np.zeros(features.shape[1]), precision or 1.0, differences, empty, 0.0)
    # The mode lies in the span of the differences, so the search has as many dimensions as there are votes, at most.
    left, values, basis = np.linalg.svd(differences, full_matrices=False)
    targets = np.where(votes.tie, 0.5, 1.0)
    found, mode = [], np.zeros(len(values))
    for candidate in reversed(PRECISIONS) if precision is None else (precision,):
        mode, curvature, evidence = _laplace(left * values, targets, candidate, start=mode)
        found.append(Fit(center, scale, mode @ basis, candidate, differences, curvature, evidence))
    return max(found, key=lambda one: one.evidence)


def _laplace(
    inputs: np.ndarray, targets: np.ndarray, precision: float, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mode `[R]`, curvature of each vote `[N]` and log evidence of a logistic regression without offset.

    Args:
        inputs: `[N, R]`.
        targets: `[N]`, 1 for a vote and 0.5 for a tie.
        start: `[R]`, where the search begins.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = inputs @ weights
        surprise = targets * np.logaddexp(0, -margin) + (1 - targets) * np.logaddexp(0, margin)
        value = surprise.sum() + precision / 2 * weights @ weights
        return value, inputs.T @ (expit(margin) - targets) + precision * weights

    options = {"gtol": 1e-7, "ftol": 0.0, "maxiter": 10_000, "maxfun": 20_000}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    probability = expit(inputs @ found.x)
    curvature = probability * (1 - probability)
    hessian = np.eye(inputs.shape[1]) + (inputs.T * curvature) @ inputs / precision
    return found.x, curvature, float(-found.fun - np.linalg.slogdet(hessian)[1] / 2)


# ----------------------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Agreement:
    """Number of votes that are predicted correctly in cross-validation.

    Attributes:
        hits: correctly predicted votes; a prediction of exactly 0.5 counts half.
        tested: number of votes with a winner.
        ties: number of ties, which are used for fitting but not tested.
    """

    hits: float
    tested: int
    ties: int

    @property
    def share(self) -> float:
        return self.hits / self.tested

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the share (Wilson 1927)."""
        return wilson(self.hits, self.tested)


def wilson(hits: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share: the shares from which `hits` of `count` is less than Z standard deviations away."""
    share = hits / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def agreement(features: np.ndarray, votes: Comparisons, precision: float | None = None) -> Agreement | None:
    """Cross-validated agreement; None if there are fewer than `FEWEST` votes with a winner.

    All votes on a pair are in the same fold. An image can occur in several pairs, so this measures how well new pairs
    of known images are predicted.

    Args:
        precision: of the prior; None chooses it once, from all votes.
    """
    winners = np.flatnonzero(~votes.tie)
    if len(winners) < FEWEST:
        return None
    precision = fit(features, votes).precision if precision is None else precision
    fold = _folds(votes)
    hits = 0.0
    for index in range(FOLDS):
        tested = winners[fold[winners] == index]
        if len(tested) == 0:
            continue
        model = fit(features, votes[np.flatnonzero(fold != index)], precision)
        margin = (features[votes.first[tested]] - features[votes.second[tested]]) @ model.weights
        hits += float((margin > 0).sum() + (margin == 0).sum() / 2)
    return Agreement(hits, len(winners), int(votes.tie.sum()))


def _folds(votes: Comparisons) -> np.ndarray:
    """The fold of each vote, `[N]`; all votes on a pair are in the same fold."""
    pairs: dict[tuple[int, int], int] = {}
    keys = zip(np.minimum(votes.first, votes.second), np.maximum(votes.first, votes.second), strict=True)
    return np.array([pairs.setdefault(key, len(pairs)) % FOLDS for key in keys])


def enough(found: Agreement | None, votes: int) -> str:
    """A sentence on whether there are enough votes to train on.

    Args:
        votes: with a winner.
    """
    if found is None:
        return f"too few votes to tell: {votes} with a winner, and at least {FEWEST} are needed"
    low, high = found.interval
    measured = f"predicts {found.share:.0%} of held-out votes (95% interval {low:.0%} to {high:.0%})"
    if low > ENOUGH:
        return f"enough to train on: {measured}"
    if low > SOME:
        return f"better than guessing, and more votes will help: {measured}"
    if votes < MANY:
        return f"not yet better than guessing: {measured}; vote on more pairs"
    return (
        f"not better than guessing after {votes} votes: {measured}; these features may not capture your preference, "
        "so try another backbone"
    )
