"""A run's samples put into a collection, to be voted on: the next round trains on what the run makes now."""

from pathlib import Path

from ..utils.errors import BadInput
from ..utils.media import open_image
from ..votes.importing import Imported
from ..votes.store import Collection
from .directory import RunDirectory
from .pictures import read_samples

KINDS = ("rollout", "evaluation")
"""Of pictures of samples."""


def import_run(
    collection: Collection, run: RunDirectory, kind: str = "rollout", iteration: int | None = None
) -> Imported:
    """Add the samples of a training run at one iteration, with their prompts, at the size in which they were made.

    Args:
        kind: rollout, whose pictures hold several images per prompt; or evaluation, which has held-out prompts.
        iteration: None takes the newest picture of this kind.

    Raises:
        BadInput: there is no such picture, it cannot be read, or the run makes videos.
        OSError: the disk is full or not writable.
    """
    from PIL import Image

    model = run.config().model
    if model.frames > 1:
        raise BadInput(f"run {run.path.name!r} makes videos, and a collection holds images")
    picture, at = _sample_picture(run, kind, iteration)
    grid = open_image(picture, picture.name)
    source = f"run {run.path.name}, {kind} at iteration {at}"
    cells = [
        (grid.crop(sample.box).resize((model.width, model.height), Image.Resampling.NEAREST), sample.prompt, source)
        for sample in read_samples(picture)
        if sample.box[2] <= grid.width and sample.box[3] <= grid.height
    ]
    if not cells:
        raise BadInput(
            f"{picture.name} of run {run.path.name!r} does not say where its images are, or of which prompts"
        )
    added = collection.add(cells)
    return Imported(new=added.new, known=len(cells) - added.new)


def _sample_picture(run: RunDirectory, kind: str, iteration: int | None) -> tuple[Path, int]:
    if kind not in KINDS:
        raise BadInput(f"kind is {str(kind)[:40]!r}: choose one of {', '.join(KINDS)}")
    found = {}
    for path in (run.path / "samples").glob(f"{kind}_*.png"):
        number = path.stem.removeprefix(f"{kind}_")
        if number.isascii() and number.isdecimal() and not path.is_symlink():
            found[int(number)] = path
    if not found:
        raise BadInput(
            f"run {run.path.name!r} has no picture of kind {kind} yet (runtime.samples_every says how often)"
        )
    if iteration is None:
        iteration = max(found)
    if iteration not in found:
        known = ", ".join(map(str, sorted(found)))
        raise BadInput(f"run {run.path.name!r} has no picture of kind {kind} at iteration {iteration}: it has {known}")
    return found[iteration], iteration
