"""State of a collection of votes: counts, agreement, and the next pair. Results are cached until the votes change."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..utils.errors import BadInput
from ..utils.seeds import derive, generator
from .fit import Comparisons, Fit, agreement, enough, fit
from .records import CollectedImage
from .selection import next_pairs, pair
from .store import Collection, VoteLog

PATIENCE = 2.0
"""Seconds that a request waits for the features of new images; then it uses those that are ready."""
MOST_KEPT = 16
"""Number of cached results."""

Describe = Callable[[Path], np.ndarray]
"""Features `[D]` of an image file."""


def comparisons(vote_log: VoteLog, names: list[str] | None = None) -> tuple[list[str], Comparisons]:
    """Names of images, and the votes as indices into these names, without skipped pairs.

    Args:
        names: use only votes on these images, and return the names in this order; None uses all images with votes.
    """
    votes = [vote for vote in vote_log.votes if vote.kind != "skip"]
    if names is None:
        names = list(dict.fromkeys(name for vote in votes for name in (vote.better, vote.worse)))
    row = {name: index for index, name in enumerate(names)}
    votes = [vote for vote in votes if vote.better in row and vote.worse in row]
    first, second = ([row[getattr(vote, side)] for vote in votes] for side in ("better", "worse"))
    ties = np.array([vote.kind == "tie" for vote in votes], dtype=bool)
    return names, Comparisons(np.array(first, dtype=int), np.array(second, dtype=int), ties)


@dataclass(frozen=True)
class Snapshot:
    """The state of a collection at one moment.

    Attributes:
        items: the images, in order.
        vote_log: the votes.
        complaints: a warning for each line that cannot be read.
        described: indices of the `items` whose features are ready.
        features: `[len(described), D]`.
        votes: votes on images with features, as indices into `features`.
    """

    items: list[CollectedImage]
    vote_log: VoteLog
    complaints: list[str]
    described: list[int]
    features: np.ndarray
    votes: Comparisons


class VoteAnalyzer:
    """Computes the state and the next pairs of collections; thread-safe.

    Args:
        describe: returns, for a backbone, a function that computes the features of an image file.
    """

    def __init__(self, describe: Callable[[str], Describe]) -> None:
        self._describe = describe
        self._workers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="votes")
        self._features: dict[tuple[str, Path], np.ndarray | Exception] = {}
        self._pending: dict[tuple[str, Path], Any] = {}
        self._kept: dict[tuple, Any] = {}
        self._lock = threading.Lock()

    def state(self, collection: Collection, backbone: str) -> dict[str, Any]:
        """Counts, cross-validated agreement and its interpretation, as JSON data."""
        now = self._snapshot(collection, backbone)
        counts = now.vote_log.counts()
        found = self._keep(collection, backbone, "agreement", now, lambda: agreement(now.features, now.votes))
        low, high = found.interval if found else (None, None)
        return {
            "name": collection.name,
            "images": len(now.items),
            "described": len(now.described),
            "prompts": len({item.prompt for item in now.items}),
            "votes": counts,
            "agreement": found and {"share": found.share, "low": low, "high": high, "tested": found.tested},
            "enough": enough(found, counts["winners"]),
            "warnings": now.complaints,
        }

    def next(
        self,
        collection: Collection,
        backbone: str,
        count: int = 1,
        mode: Literal["active", "random"] = "active",
        repeat: bool = False,
        exclude: list[tuple[str, str]] = (),
    ) -> list[tuple[CollectedImage, CollectedImage]]:
        """The next pairs to vote on, each in random order; an empty list if there are none left.

        Args:
            repeat: also return pairs that were already voted on or skipped.
            exclude: pairs not to return, because they are being shown already.
        """
        now = self._snapshot(collection, backbone)
        rows = range(len(now.items)) if mode == "random" else now.described
        position = {now.items[row].image: index for index, row in enumerate(rows)}
        shown = [] if repeat else [(vote.better, vote.worse) for vote in now.vote_log.votes]
        known = {pair(position[a], position[b]) for a, b in (*shown, *exclude) if a in position and b in position}
        seed = derive(len(now.vote_log.ids), collection.name, *sorted(known))
        if len(rows) < 2:
            return []
        model = None if mode == "random" else self._fitted(collection, backbone, now)
        prompts = [now.items[row].prompt for row in rows]
        sides = generator(seed, "sides")
        found = next_pairs(now.features, model, prompts, known, count, mode, seed)
        return [tuple(now.items[rows[index]] for index in sides.sample(one, 2)) for one in found]

    # ------------------------------------------------------------------------------------------------- what is kept

    def _fitted(self, collection: Collection, backbone: str, now: Snapshot) -> Fit:
        return self._keep(collection, backbone, "fit", now, lambda: fit(now.features, now.votes))

    def _keep(self, collection: Collection, backbone: str, what: str, now: Snapshot, make: Callable[[], Any]) -> Any:
        """A cached result for these votes and features."""
        key = (what, collection.folder, backbone)
        stamp = (tuple(now.vote_log.votes), tuple(now.described))
        with self._lock:
            kept = self._kept.get(key)
        if kept is None or kept[0] != stamp:
            kept = (stamp, make())
            with self._lock:
                self._kept.pop(key, None)
                self._kept[key] = kept
                while len(self._kept) > MOST_KEPT:
                    self._kept.pop(next(iter(self._kept)))
        return kept[1]

    # ------------------------------------------------------------------------------------------------------ features

    def _snapshot(self, collection: Collection, backbone: str) -> Snapshot:
        items, complaints = collection.items()
        vote_log = collection.vote_log()
        found = self._describe_all(collection, backbone, [item.image for item in items])
        described = [row for row, features in enumerate(found) if isinstance(features, np.ndarray)]
        features = np.stack([found[row] for row in described]) if described else np.zeros((0, 1))
        broken = [
            f"{item.image} is ignored: {f}" for item, f in zip(items, found, strict=True) if isinstance(f, BadInput)
        ]
        votes = comparisons(vote_log, [items[row].image for row in described])[1]
        return Snapshot(items, vote_log, [*complaints, *vote_log.complaints, *broken], described, features, votes)

    def _describe_all(self, collection: Collection, backbone: str, names: list[str]) -> list[Any]:
        """For each image its features, the error, or None if they are not ready yet."""
        keys = [(backbone, collection.images / name) for name in names]
        describe = self._describe(backbone)
        with self._lock:
            for key in keys:
                if key not in self._features and key not in self._pending:
                    self._pending[key] = self._workers.submit(self._describe_one, describe, key)
            pending = [self._pending[key] for key in keys if key in self._pending]
        wait(pending, timeout=PATIENCE)
        with self._lock:
            return [self._features.get(key) for key in keys]

    def _describe_one(self, describe: Describe, key: tuple[str, Path]) -> None:
        try:
            found: np.ndarray | Exception = describe(key[1])
        except BadInput as error:
            found = error
        except Exception as error:  # noqa: BLE001 - an error with one image must not affect the others
            found = BadInput(f"its features cannot be computed: {error}")
        with self._lock:
            self._features[key] = found
            self._pending.pop(key, None)
