"""Noise levels, windows of stochastic steps, and which of them are trained."""

import random

import pytest

from trainer.diffusion.schedules import Window, sigma_schedule, stochastic_steps, trained_steps
from trainer.utils.errors import BadInput


def test_shifted_levels_by_hand() -> None:
    assert sigma_schedule(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert sigma_schedule(4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert sigma_schedule(2, 0.5) == pytest.approx([1.0, 1 / 3, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_levels_fall_from_exactly_one_to_exactly_zero(steps: int) -> None:
    sigmas = sigma_schedule(steps, 3.0)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert sigmas == sorted(set(sigmas), reverse=True)


def begins(window: Window, steps: int, iterations: range, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [stochastic_steps(steps, window, iteration, rng).index(True) for iteration in iterations]


def test_without_a_window_all_but_the_last_step_are_stochastic() -> None:
    assert stochastic_steps(4, None, 0, random.Random(0)) == [True, True, True, False]


def test_fixed_window_stays() -> None:
    flags = stochastic_steps(6, Window(2, "fixed", 1), 0, random.Random(0))
    assert flags == [False, True, True, False, False, False]
    assert set(begins(Window(2, "fixed", 1), 6, range(40))) == {1}


def test_random_window_visits_every_place_from_its_start_on() -> None:
    assert set(begins(Window(2, "random", 0), 6, range(200))) == {0, 1, 2, 3}
    assert set(begins(Window(2, "random", 2), 6, range(200))) == {2, 3}


def test_moving_window_goes_through_every_place_and_back_to_its_start() -> None:
    window = Window(2, "moving", start=1, every=3)
    assert begins(window, 6, range(12)) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1]


def test_steps_that_train_nothing_are_outside_of_every_window() -> None:
    rng = random.Random(0)
    assert stochastic_steps(6, None, 0, rng, range(2, 5)) == [False, False, True, True, True, False]
    for position in ("random", "moving"):
        window = Window(2, position, every=1)
        begun = {stochastic_steps(6, window, i, rng, range(2, 5)).index(True) for i in range(50)}
        assert begun == {2, 3}, position
    for window in (Window(2, "fixed", 0), Window(4, "random"), Window(2, "random", 4)):
        with pytest.raises(
            BadInput, match=r"does not fit: the steps that can be stochastic and are trained are 2 to 4"
        ):
            stochastic_steps(6, window, 0, rng, range(2, 5))


@pytest.mark.parametrize("position", ["fixed", "random", "moving"])
def test_no_window_is_ever_empty_or_reaches_the_last_step(position: str) -> None:
    for steps in range(2, 9):
        for size in range(1, steps):
            for start in range(steps - size):
                window = Window(size, position, start, every=2)
                for iteration in range(40):
                    flags = stochastic_steps(steps, window, iteration, random.Random(iteration))
                    first = flags.index(True)
                    assert len(flags) == steps
                    assert first >= start
                    assert flags[first : first + size] == [True] * size
                    assert sum(flags) == size
                    assert not flags[-1]


@pytest.mark.parametrize(("steps", "count"), [(16, 9), (20, 11), (12, 6)])
def test_random_share_counts_as_the_papers_code(steps: int, count: int) -> None:
    flags = stochastic_steps(steps, None, 0, random.Random(0))
    chosen = [trained_steps(flags, "random", 0.6, random.Random(seed)) for seed in range(60)]
    assert {len(steps_) for steps_ in chosen} == {count}
    assert all(steps_ == sorted(set(steps_)) for steps_ in chosen)
    assert {step for steps_ in chosen for step in steps_} == set(range(steps - 1))
    assert len({tuple(steps_) for steps_ in chosen}) > 50
    assert chosen[5] == trained_steps(flags, "random", 0.6, random.Random(5))


def test_first_share_and_all() -> None:
    flags = stochastic_steps(11, None, 0, random.Random(0))
    assert trained_steps(flags, "first", 0.3, random.Random(0)) == [0, 1, 2]
    assert trained_steps(flags, "all", 0.3, random.Random(0)) == list(range(10))


@pytest.mark.parametrize("mode", ["random", "first", "all"])
def test_only_steps_of_the_window_are_trained_and_at_least_one(mode: str) -> None:
    flags = [False, False, True, True, True, False, False]
    for seed in range(20):
        chosen = trained_steps(flags, mode, 0.1, random.Random(seed))
        assert chosen
        assert set(chosen) <= {2, 3, 4}
    assert trained_steps(flags, "first", 0.7, random.Random(0)) == [2, 3]
