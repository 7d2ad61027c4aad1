"""Bootstrap intervals over prompts: against known means, and against what they must not do."""

import pytest
import torch

from trainer.evaluation.intervals import bootstrap, change, win_rate


@pytest.mark.parametrize("prompts", [10, 40])
def test_intervals_cover_the_true_mean_at_about_the_nominal_rate(prompts: int) -> None:
    # Scores of a prompt share its difficulty, so images are no independent draws: the interval must know that.
    generator, tries, covered = torch.Generator().manual_seed(7), 600, 0
    for _ in range(tries):
        difficulty = torch.randn(prompts, 1, generator=generator)
        found = bootstrap(2.0 + difficulty + 0.3 * torch.randn(prompts, 4, generator=generator))
        covered += found.low <= 2.0 <= found.high
    assert 0.91 <= covered / tries <= 0.975, "the standard error of this rate is 0.009"


def test_intervals_of_a_skewed_score_cover_its_mean() -> None:
    generator, tries, covered = torch.Generator().manual_seed(8), 400, 0
    for _ in range(tries):
        easy = torch.rand(60, 1, generator=generator)  # the chance that an image of this prompt is right
        found = bootstrap((torch.rand(60, 4, generator=generator) < easy).double())
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / tries <= 0.98


def test_the_mean_is_over_images_and_leaves_out_what_has_no_score() -> None:
    values = torch.tensor([[1.0, 2.0, torch.nan], [torch.nan, torch.nan, torch.nan], [6.0, 7.0, 8.0]])
    found = bootstrap(values)
    assert found.mean == pytest.approx(24 / 5)
    assert found.low < found.mean < found.high
    assert bootstrap(values[1:2]).record() == {"mean": None, "low": None, "high": None}
    assert bootstrap(values[2:]).record() == {"mean": 7.0, "low": None, "high": None}, "one prompt tells nothing"


def test_equal_prompts_leave_no_doubt_and_calls_agree() -> None:
    found = bootstrap(torch.full((5, 3), 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    values = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    assert bootstrap(values) == bootstrap(values.clone())


def test_a_paired_change_is_surer_than_the_difference_of_two_means() -> None:
    generator = torch.Generator().manual_seed(2)
    base = 5 * torch.randn(30, 1, generator=generator) + torch.randn(30, 4, generator=generator)
    found = change(base + 1, base)
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-5)
    assert bootstrap(base).high - bootstrap(base).low > 2


def test_win_rate_counts_equal_images_half_and_missing_ones_not() -> None:
    base = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, torch.nan]])
    better = torch.tensor([[1.0, 1.0], [1.0, 4.0], [torch.inf, 9.0]])
    found = win_rate(better, base)
    assert found.mean == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert win_rate(base[:2] + 1, base[:2]).record() == {"mean": 1.0, "low": 1.0, "high": 1.0}
