"""Notices a run that goes wrong: reward falling, gradient or objective exploding, or nothing to train on."""

import statistics
from dataclasses import asdict, dataclass, field

from ..config import WatchdogConfig
from ..objectives.advantage import Mixture

SMOOTHING = 0.2  # weight of the newest iteration in the smoothed reward


@dataclass
class Watchdog:
    """Watches the events of a run; its state is part of every checkpoint.

    Attributes:
        weights: of the rewards trained on.
        baseline, spread: per reward, the first mean and standard deviation over all images: the units in which rewards
            are compared with each other and over time.
        smoothed, best: the weighted reward, in these units, and its maximum.
        gradients: the last 50 gradient norms.
        signs: iterations in a row with a sign of collapse.
        idle: iterations in a row without an optimizer step.
        dropped, bad_updates: totals of the run.
    """

    config: WatchdogConfig
    weights: dict[str, float]
    baseline: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    smoothed: float | None = None
    best: float | None = None
    gradients: list[float] = field(default_factory=list)
    signs: int = 0
    idle: int = 0
    dropped: int = 0
    bad_updates: int = 0

    def state(self) -> dict:
        """Plain data for a checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in ("config", "weights")}

    def restore(self, state: dict) -> None:
        """Go back to what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def progress(self, rewards: dict[str, float]) -> float:
        """Weighted mean of the rewards' gains since the first iteration, in its standard deviations."""
        total = sum(abs(w) for w in self.weights.values()) or 1.0
        mixture = Mixture(self.weights, self.spread)
        return (mixture.of(rewards) - mixture.of(self.baseline)) / total

    def watch(self, event: dict, alarm: str | None = None) -> tuple[bool, str | None]:
        """Take in an iteration's event.

        Args:
            alarm: a sign of collapse that the objective sees, as a clause.

        Returns:
            whether this is the best smoothed reward so far, and the reason to stop, if any.
        """
        rewards = {name: value["mean"] for name, value in event["rewards"].items()}
        self._take_baseline(event["rewards"])
        self.dropped += event["dropped_samples"]
        self.bad_updates += event["bad_updates"]
        self.idle = self.idle + 1 if event["grad_norm"] is None and not event["bad_updates"] else 0
        improved = self._take_reward(rewards)
        signs = [sign for sign in (self._reward_sign(), alarm, self._gradient_sign(event)) if sign]
        self.signs = self.signs + 1 if signs else 0
        return improved, self._verdict(signs, event)

    def diversity_warning(self, first: dict, last: dict) -> str | None:
        """A sentence where the images of a prompt have become alike.

        Args:
            first, last: records of evaluations.
        """
        before, now = (record.get("looks", {}).get("diversity") for record in (first, last))
        if None in (before, now) or now >= self.config.diversity_share * before:
            return None
        return (
            f"the images of a held-out prompt have become alike: their diversity is {now:.3g}, and was {before:.3g} "
            f"at iteration {first['iteration']}. Raise objective.kl_weight where the objective has one, lower "
            "optimizer.learning_rate, or take the LoRA of an earlier iteration"
        )

    def _take_baseline(self, rewards: dict[str, dict]) -> None:
        # Iterations have different prompts, so the unit must cover their differences, not the group's std alone.
        units = {name: max(value["group_std"], value["std"] or 0.0) for name, value in rewards.items()}
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

    def _verdict(self, signs: list[str], event: dict) -> str | None:
        if self.dropped > self.config.max_dropped:
            return f"{self.dropped} samples had no finite reward (limit {self.config.max_dropped})"
        if self.bad_updates > self.config.max_bad_updates:
            return f"{self.bad_updates} updates had no finite loss or gradient (limit {self.config.max_bad_updates})"
        if self.idle >= self.config.max_idle:
            return f"nothing was trained for {self.idle} iterations in a row: {_why_idle(event)}"
        if signs and self.signs >= self.config.patience:
            return f"collapse: {'; '.join(signs)}, for {self.signs} iterations in a row"
        return None


def _why_idle(event: dict) -> str:
    """The usual causes of an iteration without an optimizer step, as its event shows them."""
    constant = [f"{name} {value['mean']:.4g}" for name, value in event["rewards"].items() if value["mean"] is not None]
    if not event["skipped_groups"] or not constant:
        return "no image had a finite reward; see the log of the reward"
    return (
        f"the images of every group had equal rewards ({', '.join(constant)}), so there is nothing to prefer. This is "
        "what a constant reward does, a threshold that no image meets or every image meets, or a very low rollout.eta"
    )
