"""Advantages: hand-computed numbers, an independent implementation in NumPy, and the known traps."""

import math

import numpy as np
import pytest
import torch

from trainer.objectives.advantage import best_of_n, group_advantages


def table(prompts: int, group: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(0, 3, (prompts, 1)), rng.uniform(0.5, 2, (prompts, 1)), (prompts, group))


def in_group(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(1, keepdims=True)) / values.std(1, ddof=1, keepdims=True)


def test_one_group_by_hand() -> None:
    result = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    std = math.sqrt((2.25 + 0.25 + 0.25 + 2.25) / 3)
    assert result.values[0].tolist() == pytest.approx([-1.5 / std, -0.5 / std, 0.5 / std, 1.5 / std], rel=1e-5)
    assert result.spread == {"reward": pytest.approx(std)}
    assert result.skipped.tolist() == [False]
    assert not result.dropped.any()
    assert result.values.dtype == torch.float32


def test_groups_do_not_see_each_other() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [100.0, 300.0, 200.0]])
    assert group_advantages(rewards).values.tolist() == [
        pytest.approx([-1, 0, 1], abs=1e-5),
        pytest.approx([-1, 1, 0], abs=1e-5),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_rewards_teach_exactly_nothing(dtype: torch.dtype) -> None:
    # (r - mean) / (std + 1e-8) blows the rounding error of the mean up to the clip of 5.
    for tenth in range(1, 10):
        for group in range(4, 25):
            result = group_advantages(torch.full((2, group), tenth / 10, dtype=dtype))
            assert not result.values.any(), (tenth, group)
            assert result.skipped.all(), (tenth, group)


def test_rounding_noise_of_large_rewards_is_no_spread() -> None:
    noise = torch.tensor([0.0, 1.0, 2.0, 1.0]) * 6e-5  # steps of float32 at 1000
    result = group_advantages((1000 + noise)[None])
    assert result.skipped.all()
    assert not result.values.any()


def test_small_but_real_spread_is_kept() -> None:
    result = group_advantages(torch.tensor([[0.2801, 0.2802, 0.2803, 0.2804]]))
    assert not result.skipped.any()
    assert result.values.std().item() == pytest.approx(1, abs=0.02)  # the floor of 1e-6 is also in the divisor


def test_a_skipped_group_leaves_the_others_alone() -> None:
    result = group_advantages(torch.tensor([[0.3] * 4, [1.0, 2.0, 3.0, 4.0]]))
    assert result.skipped.tolist() == [True, False]
    assert result.values[0].tolist() == [0] * 4
    assert result.values[1, 3] == pytest.approx(1.5 / math.sqrt(5 / 3), rel=1e-5)


def test_half_precision_rewards_are_computed_in_full() -> None:
    half = torch.tensor([[1000.0, 1001.0, 1002.0, 1003.0], [60000.0, 60032.0, 60064.0, 60096.0]]).half()
    expected = in_group(half.double().numpy())
    np.testing.assert_allclose(group_advantages(half).values.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_samples_are_dropped_and_do_not_count(bad: float) -> None:
    result = group_advantages(torch.tensor([[1.0, bad, 3.0, 5.0], [1.0, 2.0, 3.0, 4.0]]))
    assert result.values[0].tolist() == pytest.approx([-1, 0, 0, 1], abs=1e-5)
    assert result.dropped.tolist() == [[False, True, False, False], [False] * 4]
    assert result.skipped.tolist() == [False, False]
    assert result.spread["reward"] == pytest.approx((2 + math.sqrt(5 / 3)) / 2)


@pytest.mark.parametrize("combine", ["advantages", "sum", "gdpo"])
@pytest.mark.parametrize("normalize", ["group", "global-std", "global"])
def test_one_bad_reward_drops_the_sample_everywhere(combine: str, normalize: str) -> None:
    a, b = torch.tensor(table(2, 6)), torch.tensor(table(2, 6, seed=1))
    a[0, 2], b[1, 4] = math.nan, math.inf
    result = group_advantages({"a": a, "b": b}, combine=combine, normalize=normalize)
    assert result.dropped.nonzero().tolist() == [[0, 2], [1, 4]]
    assert result.values.isfinite().all()
    assert (result.values != 0).equal(~result.dropped)


def test_a_group_with_one_sample_left_is_skipped() -> None:
    result = group_advantages(torch.tensor([[math.nan, math.nan, 2.0], [math.nan] * 3]))
    assert result.skipped.tolist() == [True, True]
    assert not result.values.any()


def test_mixing_by_normalised_advantages() -> None:
    a, b = table(3, 12), 100 * table(3, 12, seed=1)
    result = group_advantages({"hps": torch.tensor(a), "clip": torch.tensor(b)}, weights={"hps": 0.7, "clip": 1.4})
    expected = in_group(0.7 * in_group(a) + 1.4 * in_group(b))
    np.testing.assert_allclose(result.values.numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.values.std(1).numpy(), 1, rtol=1e-4)
    assert result.spread["hps"] == pytest.approx(a.std(1, ddof=1).mean())
    assert result.spread["clip"] == pytest.approx(b.std(1, ddof=1).mean())


def test_mixing_by_raw_sum() -> None:
    a, b = table(3, 12), 100 * table(3, 12, seed=1)
    rewards = {"a": torch.tensor(a), "b": torch.tensor(b)}
    result = group_advantages(rewards, weights={"a": 0.7, "b": 1.4}, combine="sum")
    np.testing.assert_allclose(result.values.numpy(), in_group(0.7 * a + 1.4 * b), rtol=1e-4, atol=1e-5)


def test_mixing_as_gdpo() -> None:
    a, b = table(3, 12), 100 * table(3, 12, seed=1)
    rewards = {"a": torch.tensor(a), "b": torch.tensor(b)}
    result = group_advantages(rewards, weights={"b": 1.4, "a": 0.7}, combine="gdpo")
    mixed = 0.7 * in_group(a) + 1.4 * in_group(b)
    expected = (mixed - mixed.mean()) / mixed.std(ddof=1)
    np.testing.assert_allclose(result.values.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(result.values.std(1).numpy(), 1, rtol=1e-3)


def test_a_reward_without_spread_leaves_the_other_to_decide() -> None:
    a = table(2, 8)
    result = group_advantages({"a": torch.tensor(a), "flat": torch.full((2, 8), 0.3)})
    np.testing.assert_allclose(result.values.numpy(), in_group(a), rtol=1e-4, atol=1e-5)
    assert not result.skipped.any()


def test_negative_weight_turns_a_reward_round() -> None:
    a = table(2, 8)
    result = group_advantages({"a": torch.tensor(a), "flat": torch.zeros(2, 8)}, weights={"a": -1})
    np.testing.assert_allclose(result.values.numpy(), -in_group(a), rtol=1e-4, atol=1e-5)


def test_global_and_global_std() -> None:
    a = table(4, 8)
    of_all = group_advantages(torch.tensor(a), normalize="global").values.numpy()
    np.testing.assert_allclose(of_all, (a - a.mean()) / a.std(ddof=1), rtol=1e-4, atol=1e-5)
    of_group = group_advantages(torch.tensor(a), normalize="global-std").values.numpy()
    np.testing.assert_allclose(of_group, (a - a.mean(1, keepdims=True)) / a.std(ddof=1), rtol=1e-4, atol=1e-5)


def test_advantages_are_clipped() -> None:
    rewards = torch.zeros(1, 40)
    rewards[0, 7] = 1
    values = group_advantages(rewards).values
    assert (1 - 1 / 40) / rewards.std().item() > 6
    assert values.max() == 5
    assert group_advantages(-rewards).values.min() == -5
    assert group_advantages(rewards, clip=0.1).values.abs().max() == pytest.approx(0.1)


def test_binary_rewards() -> None:
    result = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4]))
    assert result.values[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert result.skipped.tolist() == [False, True, True]


def test_best_of_n_keeps_both_ends_of_each_row() -> None:
    values = torch.tensor([[3.0, -1.0, 0.0, 2.0, -2.0, 1.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])
    assert best_of_n(values, 4, torch.ones_like(values, dtype=torch.bool)).tolist() == [
        [True, True, False, True, True, False],
        [True, True, False, False, True, True],
    ]
    assert best_of_n(values, 6, torch.ones_like(values, dtype=torch.bool)).all()
    for seed in range(20):
        drawn = torch.tensor(table(5, 24, seed))
        mask, order = best_of_n(drawn, 8, torch.ones_like(drawn, dtype=torch.bool)), drawn.sort(1).values
        assert mask.sum(1).tolist() == [8] * 5
        kept = drawn[mask].reshape(5, 8).sort(1).values
        assert torch.equal(kept, torch.cat([order[:, :4], order[:, -4:]], 1))


def test_best_of_n_keeps_its_number_among_ties() -> None:
    assert best_of_n(torch.zeros(2, 6), 4, torch.ones(2, 6, dtype=torch.bool)).sum(1).tolist() == [4, 4]


def test_wrong_arguments_are_named() -> None:
    rewards = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        group_advantages({"a": rewards, "b": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="one shape"):
        group_advantages(torch.zeros(6))
    with pytest.raises(ValueError, match="one shape"):
        group_advantages({})
    with pytest.raises(ValueError, match=r"weights name no reward: hsp; rewards are hps"):
        group_advantages({"hps": rewards}, weights={"hsp": 1.0})
    with pytest.raises(ValueError, match="'mean' is unknown"):
        group_advantages(rewards, combine="mean")
    with pytest.raises(ValueError, match="'none' is unknown"):
        group_advantages(rewards, normalize="none")
