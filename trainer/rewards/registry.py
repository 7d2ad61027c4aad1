"""All rewards by name: those of this pack, and those of other installed packages.

Another package adds a reward by an entry point in the group `dancegrpo.rewards`. Its name is the reward's name; its
object is a function that takes the module `trainer.rewards.base` and returns a subclass of its `Reward`. (The module is
an argument because ComfyUI imports this pack under another name.)
"""

import sys
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from pydantic import ValidationError

from ..config import RewardConfig, Section, describe
from ..utils.errors import BadInput
from . import base
from .base import ModelReward, Reward
from .brightness import Brightness
from .clip.aesthetic import Aesthetic
from .clip.clip_score import ClipScore
from .clip.hps import HPSv21
from .clip.pickscore import PickScore
from .colorfulness import Colorfulness
from .files import located
from .geneval_like import GenEvalLike
from .image_reward import ImageReward
from .jpeg_size import JpegSize
from .ocr import TextRendering
from .preference import Preference
from .qwen.hpsv3 import HPSv3
from .qwen.videoalign import VideoAlign, VideoAlignMQ, VideoAlignTA, VideoAlignVQ
from .remote.external import External
from .remote.mllm_pairwise import MllmPairwise
from .remote.mllm_rubric import MllmRubric
from .remote.mllm_yes import MllmYes
from .shapes import ShapesReward, ShapesStrictReward
from .sharpness import Sharpness
from .threshold import Threshold

GROUP = "dancegrpo.rewards"
"""Entry points of other packages' rewards."""

OWN: tuple[type[Reward], ...] = (
    ShapesReward,
    ShapesStrictReward,
    Brightness,
    Colorfulness,
    Sharpness,
    JpegSize,
    HPSv21,
    ClipScore,
    PickScore,
    ImageReward,
    Aesthetic,
    Preference,
    HPSv3,
    VideoAlign,
    VideoAlignVQ,
    VideoAlignMQ,
    VideoAlignTA,
    TextRendering,
    GenEvalLike,
    External,
    MllmRubric,
    MllmYes,
    MllmPairwise,
)


def installed_rewards(points: Iterable[EntryPoint]) -> dict[str, type[Reward]]:
    """Load the rewards of other packages; one that cannot be loaded is reported on stderr and skipped."""
    found: dict[str, type[Reward]] = {}
    for point in points:
        try:
            found[point.name] = _installed(point, [*(reward.name for reward in OWN), *found])
        except Exception as error:  # noqa: BLE001 - another package's code must not keep this pack from starting
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: the reward {point.name!r} of {point.value} is not available: {reason}", file=sys.stderr)
    return found


def _installed(point: EntryPoint, taken: list[str]) -> type[Reward]:
    if point.name in taken:
        raise ValueError("a reward of that name exists")
    reward = point.load()(base)
    if not (isinstance(reward, type) and issubclass(reward, Reward)):
        raise TypeError(f"it returned {reward!r}, which is not a subclass of Reward")
    if getattr(reward, "name", None) != point.name:
        raise ValueError(f"the class has the name {getattr(reward, 'name', None)!r}")
    if len(getattr(reward, "typical_range", ())) != 2:
        raise ValueError("the class has no typical_range")
    return reward


class Registry(dict[str, type[Reward]]):
    """Rewards by name; other packages are searched on the first look-up of a name that this pack does not have."""

    searched = False

    def with_others(self) -> "Registry":
        """All rewards, after searching other packages."""
        if not self.searched:
            self.searched = True
            self.update(installed_rewards(entry_points(group=GROUP)))
        return self

    def __missing__(self, name: str) -> type[Reward]:
        if self.searched:
            raise KeyError(name)
        return self.with_others()[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (not self.searched and name in self.with_others())


REWARDS = Registry({reward.name: reward for reward in OWN})


def reward_options(config: RewardConfig) -> Section:
    """Validate a reward's options, without looking at files.

    Raises:
        BadInput: unknown name or option, or an invalid value.
    """
    if config.name not in REWARDS:
        raise BadInput(f"reward {config.name!r} is unknown: choose one of {', '.join(REWARDS.with_others())}")
    kind = REWARDS[config.name].Options
    for option in config.options:
        if option not in kind.model_fields:
            known = f"it takes {', '.join(kind.model_fields)}" if kind.model_fields else "it takes none"
            raise BadInput(f"reward {config.name!r} has no option {option!r}; {known}")
    try:
        return kind.model_validate(config.options)
    except ValidationError as error:
        raise BadInput(f"reward {config.name!r}: {describe(error)}") from error


def with_files_from(config: RewardConfig, folders: Iterable[Path]) -> RewardConfig:
    """The same reward with absolute paths of its files, which must be inside one of the folders (`models/rewards`).

    Raises:
        BadInput: an option is invalid, or a file is in none of the folders.
    """
    options = located(reward_options(config), config.name, folders)
    return config.model_copy(update={"options": options})


def load_reward(config: RewardConfig, device: str = "auto", gradient: bool = False) -> Reward:
    """Create a reward from its configuration; `Reward.load` reads its weights.

    Args:
        device: where it scores, which decides what `dtype: auto` means: `auto`, a GPU if there is one; or the type of
            a torch device.
        gradient: whether the gradients of its scores are wanted, which decides it too.

    Raises:
        BadInput: unknown name, invalid option, or missing file or package.
    """
    options, kind = reward_options(config), REWARDS[config.name]
    if issubclass(kind, ModelReward) and getattr(options, "dtype", None) == "auto":
        options = options.model_copy(update={"dtype": kind.auto_dtype(device, gradient)})
    reward = kind(options)
    return reward if config.threshold is None else Threshold(reward, config.threshold)
