"""What the reward curve of a run shows."""

import io

import pytest
from PIL import Image

from trainer.runs import reward_curve
from trainer.runs.reward_curve import POINTS, draw_reward_curve, reward_points, thinned


def event(iteration: int, mean: float | None = 0.5) -> dict:
    return {"iteration": iteration, "rewards": {"r": {"mean": mean, "std": 0.2, "group_std": 0.1}}}


def test_long_curves_are_averaged_and_short_ones_left_alone() -> None:
    points = [(float(i), 2.0 * i, 1.0) for i in range(20_000)]
    thin = thinned(points)
    assert len(thin) == POINTS
    assert thin[0] == (19.5, 39.0, 1.0), "the mean of the first 40"
    assert thin[-1] == (19_979.5, 39_959.0, 1.0)
    assert thinned(points[:POINTS]) == points[:POINTS]
    assert [len(thinned(points[:n], 7)) for n in (0, 1, 7, 8, 13)] == [0, 1, 7, 7, 7]
    uneven = thinned([(float(i),) for i in range(10)], 4)
    assert uneven == [(0.5,), (3.0,), (5.5,), (8.0,)], "every point is in exactly one"


def test_what_is_drawn_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(reward_curve, "_draw_panel", lambda axis, *values: drawn.append(values))
    events = [event(i + 1, mean=i / 1000) for i in range(5000)] + [event(5001, mean=None)]
    draw_reward_curve(events, [{"iteration": 0, "rewards": {"r": 0.25, "other": None}}])
    (name, training, held_out), (other, nothing, none) = drawn
    assert (name, len(training), held_out) == ("r", POINTS, [(0, 0.25)])
    assert training[0] == pytest.approx((5.5, 0.0045, 0.1))
    assert (other, nothing, none) == ("other", [], [])


def test_points_leave_out_iterations_without_a_mean() -> None:
    events = [event(1), event(2, None), {**event(3), "rewards": {}}, event(4, 0.75)]
    assert reward_points(events, "r") == [(1, 0.5, 0.1), (4, 0.75, 0.1)]


def test_a_curve_is_an_image_and_nothing_is_none() -> None:
    assert draw_reward_curve([], []) is None
    image = Image.open(io.BytesIO(draw_reward_curve([event(1), event(2)], [])))
    assert image.size == (550, 374)
