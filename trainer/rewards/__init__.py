"""Rewards. A new one is one file, registered in `registry`."""

from .base import Reward, dtypes, memory_together, use_dtypes
from .registry import REWARDS, load_reward, reward_options, with_files_from
from .scoring import differentiable_score, score, score_or_nan
from .threshold import Threshold

__all__ = [
    "REWARDS",
    "Reward",
    "Threshold",
    "differentiable_score",
    "dtypes",
    "load_reward",
    "memory_together",
    "reward_options",
    "score",
    "score_or_nan",
    "use_dtypes",
    "with_files_from",
]
