"""What a node shows of a run while it trains: the curve of every reward above the newest samples."""

import io
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.events import read_evaluations
from ...trainer.runs.sample_grids import captioned
from ...trainer.utils.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH = 1024
"""Largest width of the preview in pixels."""
REDRAWN = 15.0
"""Seconds between two drawings of a run's preview; one takes about 0.3 s of a processor."""
REMEMBERED = 8


@dataclass
class _Drawn:
    """The preview of a run, what its files looked like when it was drawn, and when that was."""

    stamp: tuple
    time: float
    preview: "Image | None"


class LivePreviews:
    """Draws the previews of runs, each at most every REDRAWN seconds however many clients ask."""

    def __init__(self) -> None:
        self._drawn: dict[Path, _Drawn] = {}
        self._lock = threading.Lock()

    def of(self, run: RunDirectory) -> "Image | None":
        """The preview of a run, the same object until it is drawn anew; None where there is nothing to draw yet."""
        with self._lock:
            known, stamp = self._drawn.pop(run.path, None), _stamp(run)
            now = time.monotonic()
            if known is None or (known.stamp != stamp and (known.preview is None or now - known.time >= REDRAWN)):
                known = _Drawn(stamp, now, _preview(run))
            self._drawn[run.path] = known  # the most recently asked for is last
            while len(self._drawn) > REMEMBERED:
                del self._drawn[next(iter(self._drawn))]
            return known.preview


previews = LivePreviews()
"""Of this server."""


def as_jpeg(run: RunDirectory) -> bytes:
    """The preview of a run as a JPEG file.

    Raises:
        BadInput: there is nothing to draw yet.
    """
    preview = previews.of(run)
    if preview is None:
        raise BadInput(f"run {run.path.name!r} has no curve and no samples yet")
    buffer = io.BytesIO()
    preview.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def newest_sample(run: RunDirectory) -> Path | None:
    """The newest sample grid."""
    found = list((run.path / "samples").glob("*.png"))
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _stamp(run: RunDirectory) -> tuple:
    files = (run.path / "events.jsonl", run.path / "evaluations.jsonl", newest_sample(run))
    return tuple(None if file is None or not file.exists() else (file, file.stat().st_mtime_ns) for file in files)


def _preview(run: RunDirectory) -> "Image | None":
    from PIL import Image

    found = [part for part in (_curve(run), _samples(run)) if part is not None]
    if not found:
        return None
    for part in found:
        part.thumbnail((WIDTH, part.height))  # smaller ones stay as they are
    sheet = Image.new("RGB", (max(part.width for part in found), sum(part.height for part in found)), "white")
    top = 0
    for part in found:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _curve(run: RunDirectory) -> "Image | None":
    from PIL import Image

    from ...trainer.runs.reward_curve import draw_reward_curve

    drawn = draw_reward_curve(run.events(), read_evaluations(run.path / "evaluations.jsonl"))
    return None if drawn is None else Image.open(io.BytesIO(drawn)).convert("RGB")


def _samples(run: RunDirectory) -> "Image | None":
    newest = newest_sample(run)
    try:
        return None if newest is None else captioned(newest).convert("RGB")
    except BadInput:  # it is being replaced, or damaged
        return None
