"""Imports the samples of a run into a collection of votes, for a further round of voting and training."""

from pathlib import Path

from ..utils.errors import BadInput
from ..utils.media import open_image
from ..votes.importing import Imported
from ..votes.store import Collection
from .directory import RunDirectory
from .sample_grids import read_samples

KINDS = ("rollout", "evaluation")
"""Kinds of sample grids."""


def import_run(
    collection: Collection, run: RunDirectory, kind: str = "rollout", iteration: int | None = None
) -> Imported:
    """Add the samples of a run at one iteration, with their prompts, in their original size.

    Args:
        kind: rollout, with several images per prompt; or evaluation, with held-out prompts.
        iteration: iteration of the sample grid; None for the newest one of this kind.

    Raises:
        BadInput: the sample grid does not exist or cannot be read, or the run generates videos.
        OSError: the disk is full or not writable.
    """
    from PIL import Image

    model = run.config().model
    if model.frames > 1:
        raise BadInput(f"run {run.path.name!r} generates videos, but a collection can only have images")
    file, at = _sample_grid(run, kind, iteration)
    grid = open_image(file, file.name)
    source = f"run {run.path.name}, {kind} at iteration {at}"
    cells = [
        (grid.crop(sample.box).resize((model.width, model.height), Image.Resampling.NEAREST), sample.prompt, source)
        for sample in read_samples(file)
        if sample.box[2] <= grid.width and sample.box[3] <= grid.height
    ]
    if not cells:
        raise BadInput(
            f"the JSON file of {file.name} of run {run.path.name!r} is missing or damaged: choose another iteration"
        )
    added = collection.add(cells)
    return Imported(new=added.new, known=len(cells) - added.new)


def _sample_grid(run: RunDirectory, kind: str, iteration: int | None) -> tuple[Path, int]:
    if kind not in KINDS:
        raise BadInput(f"kind is {str(kind)[:40]!r}: choose one of {', '.join(KINDS)}")
    found = {}
    for path in (run.path / "samples").glob(f"{kind}_*.png"):
        number = path.stem.removeprefix(f"{kind}_")
        if number.isascii() and number.isdecimal() and not path.is_symlink():
            found[int(number)] = path
    if not found:
        raise BadInput(
            f"run {run.path.name!r} has no {kind} samples yet (runtime.samples_every sets how often they are saved)"
        )
    if iteration is None:
        iteration = max(found)
    if iteration not in found:
        known = ", ".join(map(str, sorted(found)))
        raise BadInput(f"run {run.path.name!r} has no {kind} samples at iteration {iteration}: choose one of {known}")
    return found[iteration], iteration
