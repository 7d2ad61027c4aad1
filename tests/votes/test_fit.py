"""The fit against independent derivations, its agreement with votes left out, and the choice of the next pair."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import entr, expit
from scipy.stats import binom, norm

from trainer.votes.fit import Agreement, Comparisons, agreement, enough, fit, wilson
from trainer.votes.selection import CANDIDATES, information, next_pairs, pair


def votes(*pairs: tuple[int, int], ties: int = 0) -> Comparisons:
    """The last `ties` of the pairs are ties."""
    rows = np.array(pairs, dtype=int).reshape(-1, 2)
    return Comparisons(rows[:, 0], rows[:, 1], np.arange(len(rows)) >= len(rows) - ties)


def random_votes(
    features: np.ndarray, direction: np.ndarray, count: int, seed: int, errors: float = 0.0
) -> Comparisons:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(features), count)
    second = (first + rng.integers(1, len(features), count)) % len(features)
    swap = ((features[first] - features[second]) @ direction < 0) ^ (rng.random(count) < errors)
    return Comparisons(np.where(swap, second, first), np.where(swap, first, second), np.zeros(count, dtype=bool))


@pytest.fixture
def features() -> np.ndarray:
    return 5 + 3 * np.random.default_rng(0).normal(size=(40, 12))


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("count", [5, 30])  # fewer votes than dimensions, and more
def test_the_fit_is_the_optimum(features: np.ndarray, count: int) -> None:
    given = random_votes(features, np.ones(12), count, seed=1)
    given.tie[:2] = True
    found = fit(features, given, precision=0.3)
    scaled = torch.from_numpy((features - features.mean(0)) / np.sqrt(12 * features.var(0).mean()))
    weights = torch.from_numpy(found.weights).requires_grad_()
    margin = (scaled[given.first] - scaled[given.second]) @ weights
    surprise = torch.nn.functional.softplus(-margin)
    tied = (torch.nn.functional.softplus(margin) + surprise) / 2
    loss = torch.where(torch.from_numpy(given.tie), tied, surprise).sum() + 0.15 * weights.square().sum()
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-5
    np.testing.assert_allclose(found.utilities(features), scaled @ weights.detach(), atol=1e-12)
    assert abs(found.utilities(features).mean()) < 1e-12


def test_the_evidence_is_the_integral_over_the_weights() -> None:
    # In one dimension, with enough votes that the posterior is nearly Gaussian.
    features = np.array([[-1.0], [1.0]])
    given = votes(*[(1, 0)] * 60, *[(0, 1)] * 40)
    for precision in (0.5, 2.0):

        def likelihood(w: float, precision: float = precision) -> float:
            return np.exp(60 * np.log(expit(2 * w)) + 40 * np.log(expit(-2 * w)) + 70) * norm.pdf(w, 0, precision**-0.5)

        exact = np.log(quad(likelihood, -3, 3, epsabs=1e-14)[0]) - 70
        assert fit(features, given, precision).evidence == pytest.approx(exact, abs=0.02)


def test_the_prior_is_chosen_by_what_the_votes_show(features: np.ndarray) -> None:
    clear = fit(features, random_votes(features, np.ones(12), 200, seed=2))
    noise = fit(features, random_votes(features, np.ones(12), 200, seed=2, errors=0.5))
    assert clear.precision < noise.precision
    assert np.abs(clear.utilities(features)).mean() > 3 * np.abs(noise.utilities(features)).mean()
    for found in (clear, noise):
        others = [fit(features, random_votes(features, np.ones(12), 200, 2, 0.0 if found is clear else 0.5), precision)
                  for precision in (0.001, 0.1, 3.0)]  # fmt: skip
        assert found.evidence >= max(other.evidence for other in others)


def test_turned_votes_turn_the_utilities_and_ties_say_equal(features: np.ndarray) -> None:
    given = random_votes(features, np.ones(12), 30, seed=3)
    turned = Comparisons(given.second, given.first, given.tie)
    np.testing.assert_allclose(
        fit(features, given).utilities(features), -fit(features, turned).utilities(features), atol=1e-5
    )
    ties = Comparisons(given.first, given.second, np.ones(30, dtype=bool))
    assert np.abs(fit(features, ties).weights).max() == 0
    one, both = votes((0, 1)), votes((0, 1), (0, 1), ties=1)
    gap = [np.diff(fit(features, given, 0.1).utilities(features)[:2])[0] for given in (one, both)]
    assert gap[0] < gap[1] < 0


def test_no_votes_and_equal_images_are_no_trouble(features: np.ndarray) -> None:
    assert fit(features, votes()).utilities(features).tolist() == [0.0] * 40
    same = np.ones((5, 3))
    assert fit(same, votes((0, 1))).utilities(same).tolist() == [0.0] * 5


# ----------------------------------------------------------------------------------------------------------- agreement


def test_the_interval_is_wilsons() -> None:
    # Wilson 1927: the bounds are the shares at which the count found lies exactly Z standard deviations off.
    for hits, count in ((8, 10), (70, 80), (0, 12), (40.5, 60)):
        for bound in wilson(hits, count):
            if 0 < bound < 1:
                assert (hits / count - bound) ** 2 == pytest.approx(3.841458820694124 * bound * (1 - bound) / count)
    assert wilson(0, 12)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(12, 12)[1] == pytest.approx(1, abs=1e-12)
    for share in (0.55, 0.8, 0.95):  # it covers the true share in about 95 of 100 cases
        hits = np.arange(81)
        covers = np.array([low <= share <= high for low, high in (wilson(int(h), 80) for h in hits)])
        assert 0.93 < binom.pmf(hits, 80, share)[covers].sum() < 0.98


def test_agreement_is_high_for_a_taste_and_half_for_chance(features: np.ndarray) -> None:
    assert agreement(features, random_votes(features, np.ones(12), 9, seed=4)) is None
    taste = agreement(features, random_votes(features, np.ones(12), 120, seed=4))
    assert (taste.tested, taste.ties) == (120, 0)
    assert taste.share > 0.85
    chance = [
        agreement(features, random_votes(features, np.ones(12), 120, seed, errors=0.5)).share for seed in range(5)
    ]
    assert 0.4 < np.mean(chance) < 0.6


def test_votes_on_one_pair_are_left_out_together(features: np.ndarray) -> None:
    # Ten pairs of chance votes, each given eight times: whoever has seen a pair knows its answer.
    pairs = [(2 * i, 2 * i + 1) for i in range(20)]
    rng = np.random.default_rng(0)
    pairs = [p if rng.random() < 0.5 else p[::-1] for p in pairs]
    found = agreement(features, votes(*[pairs[i % 20] for i in range(160)]))
    assert found.hits % 8 == 0
    assert 0.2 < found.share < 0.8
    assert agreement(features, votes(*pairs, *pairs, ties=20)).tested == 20


def test_whether_it_is_enough_is_said_in_words() -> None:
    assert enough(None, 4) == "too few votes to tell: 4 with a winner, and at least 10 are needed"
    assert enough(Agreement(36, 40, 2), 40).startswith(
        "enough to train on: predicts 90% of held-out votes (95% interval 77% "
    )
    assert enough(Agreement(28, 40, 2), 40).startswith("better than guessing, and more votes will help: predicts 70%")
    assert enough(Agreement(22, 40, 2), 40).startswith("not yet better than guessing")
    assert "try another backbone" in enough(Agreement(60, 110, 0), 110)


# ----------------------------------------------------------------------------------------------------------- selection


def test_information_is_the_mutual_information() -> None:
    def entropy(p: float) -> float:
        return entr(p) + entr(1 - p)

    for mean, variance in ((0.0, 0.5), (1.3, 2.0), (-3.0, 4.0), (0.2, 0.0)):
        std = variance**0.5 or 1e-9

        def density(x: float, mean: float = mean, std: float = std) -> float:
            return norm.pdf(x, mean, std)

        edges = (mean - 8 * std, mean + 8 * std)
        p = quad(lambda x: expit(x) * density(x), *edges)[0]
        inner = quad(lambda x: entropy(expit(x)) * density(x), *edges)[0]
        found = information(np.array([mean]), np.array([variance]))[0]
        assert found == pytest.approx(entropy(p) - inner, abs=2e-3)


def test_the_next_pair_is_the_most_informative_by_the_full_posterior(features: np.ndarray) -> None:
    given = random_votes(features, np.arange(12) - 4.0, 25, seed=5)
    found = fit(features, given)
    scaled = (features - features.mean(0)) / np.sqrt(12 * features.var(0).mean())
    seen = scaled[given.first] - scaled[given.second]
    p = expit(seen @ found.weights)
    covariance = np.linalg.inv(found.precision * np.eye(12) + (seen.T * (p * (1 - p))) @ seen)
    one, other = np.triu_indices(40, 1)
    difference = scaled[one] - scaled[other]
    variance = np.einsum("nd,de,ne->n", difference, covariance, difference)
    best = information(difference @ found.weights, variance).argmax()
    assert next_pairs(features, found, ["x"] * 40, []) == [(one[best], other[best])]
    # Once it has been shown, and of several, each is chosen knowing the ones before it.
    assert next_pairs(features, found, ["x"] * 40, [(one[best], other[best])]) != [(one[best], other[best])]
    three = next_pairs(features, found, ["x"] * 40, [], count=3)
    assert three[0] == (one[best], other[best])
    row = difference[best]
    q = expit(row @ found.weights)
    posterior = np.linalg.inv(np.linalg.inv(covariance) + q * (1 - q) * np.outer(row, row))
    again = information(difference @ found.weights, np.einsum("nd,de,ne->n", difference, posterior, difference))
    again[best] = -1
    assert three[1] == (one[again.argmax()], other[again.argmax()])


@pytest.mark.parametrize("mode", ["active", "random"])
def test_no_pair_comes_twice_and_all_come(mode: str) -> None:
    features = np.random.default_rng(1).normal(size=(7, 3))
    shown = set()
    for turn in range(21):
        (one,) = next_pairs(features, fit(features, votes(*shown)), [""] * 7, shown, mode=mode, seed=turn)
        assert one == pair(*one)
        assert one not in shown
        shown.add(one)
    assert next_pairs(features, fit(features, votes(*shown)), [""] * 7, shown, mode=mode) == []
    assert len(next_pairs(features, fit(features, votes()), [""] * 7, [], count=50, mode=mode)) == 21


@pytest.mark.parametrize("mode", ["active", "random"])
def test_pairs_of_one_prompt_come_first(mode: str) -> None:
    features = np.random.default_rng(1).normal(size=(6, 3))
    prompts = ["a", "b", "a", "c", "b", "a"]
    same = {(0, 2), (0, 5), (2, 5), (1, 4)}
    found = next_pairs(features, fit(features, votes()), prompts, [], count=50, mode=mode)
    assert set(found) == same
    rest = next_pairs(features, fit(features, votes()), prompts, same, count=50, mode=mode)
    assert len(rest) == 15 - 4
    assert not set(rest) & same


def test_a_thousand_images_are_sampled_with_a_seed() -> None:
    features = np.random.default_rng(1).normal(size=(1000, 20))
    model = fit(features, random_votes(features, np.ones(20), 50, seed=0))
    draw = [next_pairs(features, model, ["x"] * 1000, [], count=9999, mode="random", seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    assert len(set(draw[0])) == CANDIDATES
    assert max(np.bincount(np.array(draw[0]).ravel(), minlength=1000)) < 20
    (one,) = next_pairs(features, model, ["x"] * 1000, [], seed=1)
    assert one in draw[0]
