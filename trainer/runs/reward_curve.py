"""The reward curve of a run."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 500
"""Largest number of points of a curve; longer curves are averaged to this resolution."""


def write_reward_curve(path: Path, events: list[dict], evaluations: list[dict]) -> None:
    """Write what `draw_reward_curve` gives, if anything."""
    if chart := draw_reward_curve(events, evaluations):
        write_atomically(path, chart)


def draw_reward_curve(events: list[dict], evaluations: list[dict]) -> bytes | None:
    """Plot one panel per reward: the mean of each iteration with the within-group std, and the evaluations.

    Returns:
        the content of a PNG file; None without any data.
    """
    from matplotlib.figure import Figure

    names = list(
        dict.fromkeys([n for e in events for n in e["rewards"]] + [n for e in evaluations for n in e["rewards"]])
    )
    if not names:
        return None
    figure = Figure(figsize=(5 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        training = thinned(reward_points(events, name))
        held_out = [(e["iteration"], e["rewards"][name]) for e in evaluations if e["rewards"].get(name) is not None]
        _draw_panel(axis, name, training, held_out)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw_panel(axis: "Axes", name: str, training: list[tuple[float, ...]], held_out: list[tuple[int, float]]) -> None:
    if training:
        x, mean, std = zip(*training, strict=True)
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, alpha=0.15, color="tab:blue", linewidth=0)
        axis.plot(x, mean, color="tab:blue", linewidth=1.2, label="training images")
    if held_out:
        axis.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held-out, deterministic")
    axis.set(title=name, xlabel="iteration")
    axis.grid(alpha=0.3)
    if training or held_out:
        axis.legend(fontsize=8)


def reward_points(events: list[dict], name: str) -> list[tuple[float, float, float]]:
    """Iteration, mean and within-group std of a reward, for all events in which it has a mean."""
    found = ((event["iteration"], event["rewards"].get(name, {})) for event in events)
    return [
        (iteration, value["mean"], value.get("group_std") or 0.0)
        for iteration, value in found
        if value.get("mean") is not None
    ]


def thinned(points: list[tuple[float, ...]], limit: int = POINTS) -> list[tuple[float, ...]]:
    """Reduce points to `limit` by averaging neighbours; fewer points are returned unchanged."""
    if len(points) <= limit:
        return points
    edges = [len(points) * i // limit for i in range(limit + 1)]
    parts = [points[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    return [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]
