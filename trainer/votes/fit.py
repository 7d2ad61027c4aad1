"""What the votes say: a Bradley-Terry model on image features, and how well it predicts votes it has not seen.

The utility of an image is linear in its features, u = w f, and the first image of a pair is preferred with probability
1 / (1 + exp(-(u1 - u2))) (Bradley and Terry 1952). w has a Gaussian prior; a tie counts as half a vote each way. The
posterior is approximated by a Gaussian at its mode (Laplace), and the precision of the prior is the one of a fixed list
that has the highest evidence (MacKay 1992), so that nothing has to be set by hand for few votes or for many.
"""

from dataclasses import dataclass

import numpy as np

PRECISIONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the prior of w, for features whose mean squared distance from their mean is 1."""
FOLDS = 10
FEWEST = 10
"""Votes with a winner below which agreement is not measured."""
SOME, ENOUGH = 0.5, 0.65
"""Agreement that the lower end of the interval must exceed to be better than guessing, and to be enough."""
MANY = 100
"""Votes after which features that predict nothing are more likely the reason than too few votes."""
Z = 1.959963984540054
"""Standard deviations of a 95% interval."""


@dataclass(frozen=True)
class Comparisons:
    """Votes as rows of a feature matrix; skipped pairs are not among them.

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
        center: `[D]`, subtracted from features.
        scale: what features are divided by after that.
        weights: `[D]`, the mode.
        precision: of the prior.
        differences: `[N, D]`, scaled features of the first less those of the second image of each vote.
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
        """Features `[M, D]` as the model sees them."""
        return (features - self.center) / self.scale

    def utilities(self, features: np.ndarray) -> np.ndarray:
        """`[M]`; 0 is the utility of the mean features."""
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
    """How many votes are predicted by fits that have not seen them.

    Attributes:
        hits: votes predicted; a prediction of exactly 0.5 counts half.
        tested: votes with a winner.
        ties: votes without one, which are fitted but not tested.
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
    """Agreement with votes left out, by cross-validation; None if there are fewer than `FEWEST` with a winner.

    All votes on the same pair are left out together. Images occur in several pairs, so this measures how well new
    pairs of the collection's images are predicted.

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
    """`[N]`, the fold of each vote: equal for equal pairs, and in turn for new ones."""
    pairs: dict[tuple[int, int], int] = {}
    keys = zip(np.minimum(votes.first, votes.second), np.maximum(votes.first, votes.second), strict=True)
    return np.array([pairs.setdefault(key, len(pairs)) % FOLDS for key in keys])


def enough(found: Agreement | None, votes: int) -> str:
    """Whether there are enough votes to train on, in words.

    Args:
        votes: with a winner.
    """
    if found is None:
        return f"too few votes to tell: {votes} with a winner, and at least {FEWEST} are needed"
    low, high = found.interval
    measured = f"agrees with {found.share:.0%} of the votes left out ({low:.0%} to {high:.0%})"
    if low > ENOUGH:
        return f"enough to train on: {measured}"
    if low > SOME:
        return f"better than guessing, and more votes will help: {measured}"
    if votes < MANY:
        return f"not yet better than guessing: {measured}; go on voting"
    return (
        f"not better than guessing after {votes} votes: {measured}; these features may not show what you look at, so "
        "choose another backbone"
    )
