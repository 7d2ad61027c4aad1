"""Experiment trackers (TensorBoard, wandb). To add one, write a subclass of Tracker and add it to TRACKERS."""

import hashlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..config import RunConfig
from ..utils.errors import BadInput, cut, shorten
from .directory import RunDirectory

if TYPE_CHECKING:
    import numpy as np


class Tracker(ABC):
    """Logs a run to one tracking program.

    Args:
        run: the run directory, in which local files are written.
        config: the run description.
        iteration: number of iterations already done; later data of an interrupted run is replaced.

    Attributes:
        name: its name in `runtime.trackers`.
        package: the Python package that it needs.
    """

    name: ClassVar[str]
    package: ClassVar[str]

    @abstractmethod
    def __init__(self, run: RunDirectory, config: RunConfig, iteration: int) -> None:
        """Open the tracker and record the description."""

    @abstractmethod
    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Record numbers by name, such as `rewards/brightness/mean`."""

    @abstractmethod
    def images(self, tag: str, images: "np.ndarray", captions: list[str], iteration: int) -> None:
        """Record images.

        Args:
            images: `[N, H, W, 3]` uint8.
            captions: N texts.
        """

    @abstractmethod
    def close(self) -> None:
        """Write what is still buffered."""


class TensorBoard(Tracker):
    """TensorBoard logs in `tensorboard/` of the run directory."""

    name, package = "tensorboard", "tensorboard"

    def __init__(self, run: RunDirectory, config: RunConfig, iteration: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        # TensorBoard hides data that an earlier process has written for purge_step and later steps.
        self._tracker = _opened(TensorBoardTracker("tensorboard", run.path, purge_step=iteration + 1))
        self._tracker.log({"description": f"```\n{config.to_yaml()}```"}, step=iteration)

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        self._tracker.log(values, step=iteration)

    def images(self, tag: str, images: "np.ndarray", captions: list[str], iteration: int) -> None:
        self._tracker.log_images({tag: images}, step=iteration, dataformats="NHWC")
        self._tracker.log({f"{tag}/prompts": "\n".join(f"1. {caption}" for caption in captions)}, step=iteration)

    def close(self) -> None:
        self._tracker.finish()


class WeightsAndBiases(Tracker):
    """A wandb run of the project `dancegrpo`, in `wandb/` of the run directory; offline by default."""

    name, package = "wandb", "wandb"

    def __init__(self, run: RunDirectory, config: RunConfig, iteration: int) -> None:
        from accelerate.tracking import WandBTracker

        self._tracker = _opened(
            WandBTracker(
                "dancegrpo",
                name=run.path.resolve().name,
                id=hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16],
                dir=str(run.path),
                mode=config.runtime.wandb_mode,
                resume="allow",
            )
        )
        self._tracker.store_init_configuration(config.model_dump(mode="json"))

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        self._tracker.log(values, step=iteration)

    def images(self, tag: str, images: "np.ndarray", captions: list[str], iteration: int) -> None:
        import wandb

        pairs = zip(images, captions, strict=True)
        self._tracker.log({tag: [wandb.Image(image, caption=caption) for image, caption in pairs]}, step=iteration)

    def close(self) -> None:
        self._tracker.finish()


TRACKERS: dict[str, type[Tracker]] = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases)}


def _opened(tracker: Any) -> Any:
    if hasattr(tracker, "start"):  # older versions of accelerate open it in the constructor
        tracker.start()
    return tracker


def check_trackers(config: RunConfig) -> None:
    """
    Raises:
        BadInput: `runtime.trackers` names one that does not exist or is not installed.
    """
    for name in config.runtime.trackers:
        if name not in TRACKERS:
            raise BadInput(f"runtime.trackers: {shorten(name)} is unknown; choose from {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"runtime.trackers: {name} needs the package {package}: run `pip install {package}`")


class Trackers:
    """All trackers of a run. A tracker that fails is disabled with a warning, and the run continues."""

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self.run, self.config = run, config
        self._open: list[Tracker] = []

    def begin(self, iteration: int) -> None:
        """Open the trackers of a run after this number of iterations."""
        for name in dict.fromkeys(self.config.runtime.trackers):
            self._try(name, lambda name=name: self._open.append(TRACKERS[name](self.run, self.config, iteration)))

    def event(self, event: dict) -> None:
        """Record all numbers of an iteration's event."""
        values = {key: value for key, value in event.items() if key != "iteration"}
        self._each(lambda tracker: tracker.scalars(flat(values), event["iteration"]))

    def evaluation(self, record: dict) -> None:
        """Record the scores of the held-out prompts."""
        values = {key: value for key, value in record.items() if key not in ("iteration", "seconds")}
        self._each(lambda tracker: tracker.scalars(flat({"evaluation": values}), record["iteration"]))

    def images(self, tag: str, images: Tensor, captions: list[str], iteration: int) -> None:
        """Record images, and the middle frames of videos.

        Args:
            images: `[N, 3, H, W]` or `[N, F, 3, H, W]` in [0, 1].
        """
        if not self._open:
            return
        stills = images[:, images.shape[1] // 2] if images.ndim == 5 else images
        pixels = (stills.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        self._each(lambda tracker: tracker.images(f"samples/{tag}", pixels, captions, iteration))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = []

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._open):
            if not self._try(tracker.name, lambda tracker=tracker: do(tracker)):
                self._open.remove(tracker)

    def _try(self, name: str, do: Callable[[], None]) -> bool:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - a tracker must not stop the run
            reason = cut(str(error), 200) or type(error).__name__
            print(f"warning: tracker {name} failed ({reason}); the run continues without it", file=sys.stderr)
            return False
        return True


def flat(values: dict, prefix: str = "") -> dict[str, float]:
    """Flatten nested mappings of numbers, to names such as `rewards/brightness/mean`."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers
