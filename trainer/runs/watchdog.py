"""Notices a run that goes wrong: reward falling, ratio or gradient exploding."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ..config import WatchdogConfig
from ..objectives.advantage import Mixture

SMOOTHING = 0.2  # weight of the newest iteration in the smoothed reward


@dataclass
class Watchdog:
    """Watches the events of a run; its state is part of every checkpoint.

    `alarm` finds a sign of collapse in the objective's own record of an iteration.
    `baseline` and `spread` are the first mean and standard deviation over all images per reward: the units in which
    rewards are compared with each other and over time.
    """

    config: WatchdogConfig
    weights: dict[str, float]
    alarm: Callable[[dict], str | None]
    baseline: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    smoothed: float | None = None
    best: float | None = None
    gradients: list[float] = field(default_factory=list)
    signs: int = 0
    dropped: int = 0
    bad_updates: int = 0

    def state(self) -> dict:
        names = [field.name for field in fields(self) if field.name not in ("config", "weights", "alarm")]
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def progress(self, rewards: dict[str, float]) -> float:
        """Weighted mean of the rewards' gains since the first iteration, in its standard deviations."""
        total = sum(abs(w) for w in self.weights.values()) or 1.0
        mixture = Mixture(self.weights, self.spread)
        return (mixture.of(rewards) - mixture.of(self.baseline)) / total

    def watch(self, event: dict) -> tuple[bool, str | None]:
        """Take in an iteration's event.

        Returns:
            whether this is the best smoothed reward so far, and the reason to stop, if any.
        """
        rewards = {name: value["mean"] for name, value in event["rewards"].items()}
        self._take_baseline(event["rewards"])
        self.dropped += event["dropped_samples"]
        self.bad_updates += event["bad_updates"]
        improved = self._take_reward(rewards)
        found = (self._reward_sign(), self.alarm(event["objective"]), self._gradient_sign(event))
        signs = [sign for sign in found if sign]
        self.signs = self.signs + 1 if signs else 0
        return improved, self._verdict(signs)

    def _take_baseline(self, rewards: dict[str, dict]) -> None:
        # Iterations have different prompts, so the unit must cover their differences, not the group's spread alone.
        units = {name: max(value["spread"], value["std"] or 0.0) for name, value in rewards.items()}
        if not self.baseline and all(units.values()):
            self.baseline = {name: value["mean"] for name, value in rewards.items()}
            self.spread = units

    def _take_reward(self, rewards: dict[str, float | None]) -> bool:
        if any(value is None for value in rewards.values()) or not self.baseline:
            return False
        value = self.progress(rewards)
        self.smoothed = value if self.smoothed is None else self.smoothed + SMOOTHING * (value - self.smoothed)
        if self.best is not None and self.smoothed <= self.best:
            return False
        self.best = self.smoothed
        return True

    def _reward_sign(self) -> str | None:
        if self.smoothed is None or self.best - self.smoothed <= self.config.reward_drop:
            return None
        return f"the smoothed reward is {self.best - self.smoothed:.2f} standard deviations below its best"

    def _gradient_sign(self, event: dict) -> str | None:
        norm = event["grad_norm"]
        if norm is None:
            return None
        median = statistics.median(self.gradients) if len(self.gradients) >= 5 else None
        self.gradients = [*self.gradients[-49:], norm]
        if median is None or norm <= self.config.gradient_factor * median:
            return None
        return f"the gradient norm is {norm:.3g}, its running median {median:.3g}"

    def _verdict(self, signs: list[str]) -> str | None:
        if self.dropped > self.config.max_dropped:
            return f"{self.dropped} samples had no finite reward (limit {self.config.max_dropped})"
        if self.bad_updates > self.config.max_bad_updates:
            return f"{self.bad_updates} updates had no finite loss or gradient (limit {self.config.max_bad_updates})"
        if signs and self.signs >= self.config.patience:
            return f"collapse: {'; '.join(signs)}, for {self.signs} iterations in a row"
        return None
