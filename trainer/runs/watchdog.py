"""Watchdog: detects a falling reward, exploding gradients or objectives, and iterations without training."""

import statistics
from dataclasses import asdict, dataclass, field

from ..config import WatchdogConfig
from ..objectives.advantage import Mixture

SMOOTHING = 0.2  # weight of the newest iteration in the smoothed reward


@dataclass
class Watchdog:
    """Decides from the events of a run whether to stop it. Its state is part of every checkpoint.

    Attributes:
        weights: weight of each trained reward.
        baseline, spread: mean and std of each reward in the first iteration with a std above 0, used to normalise it.
        smoothed, best: the smoothed weighted reward in these units, and its maximum.
        gradients: the last 50 gradient norms.
        signs: number of consecutive iterations with a sign of collapse.
        idle: number of consecutive iterations without an optimizer step.
        trained: number of iterations with an optimizer step.
        obstacle: why the last iteration without an optimizer step had none.
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
    trained: int = 0
    obstacle: str = ""
    dropped: int = 0
    bad_updates: int = 0

    def state(self) -> dict:
        """JSON data for checkpoints."""
        return {k: v for k, v in asdict(self).items() if k not in ("config", "weights")}

    def restore(self, state: dict) -> None:
        """Restore what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)

    def progress(self, rewards: dict[str, float]) -> float:
        """Weighted mean of the rewards' gains over the baseline, in units of their std in the baseline."""
        total = sum(abs(w) for w in self.weights.values()) or 1.0
        mixture = Mixture(self.weights, self.spread)
        return (mixture.of(rewards) - mixture.of(self.baseline)) / total

    def watch(self, event: dict, alarm: str | None = None) -> tuple[bool, str | None]:
        """Process the event of an iteration.

        Args:
            alarm: a sign of collapse reported by the objective, as a clause.

        Returns:
            whether the smoothed reward is the best so far, and the reason to stop the run, if any.
        """
        rewards = {name: value["mean"] for name, value in event["rewards"].items()}
        self._take_baseline(event["rewards"])
        self.dropped += event["dropped_samples"]
        self.bad_updates += event["bad_updates"]
        self._count_training(event)
        improved = self._take_reward(rewards)
        signs = [sign for sign in (self._reward_sign(), alarm, self._gradient_sign(event)) if sign]
        self.signs = self.signs + 1 if signs else 0
        return improved, self._verdict(signs)

    def final_verdict(self) -> str | None:
        """Why a run that has done all its iterations has nevertheless failed: the LoRA is as it was."""
        return None if self.trained else f"no iteration has trained anything: {self.obstacle}"

    def _count_training(self, event: dict) -> None:
        if event["grad_norm"] is not None:
            self.trained, self.idle = self.trained + 1, 0
        elif event["bad_updates"]:
            self.idle, self.obstacle = 0, "no update had a finite loss and gradient"
        else:
            self.idle, self.obstacle = self.idle + 1, _why_idle(event)

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
        # Prompts differ between iterations, so the unit is not just the within-group std.
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

    def _verdict(self, signs: list[str]) -> str | None:
        if self.dropped > self.config.max_dropped:
            return f"{self.dropped} samples had no finite reward (limit {self.config.max_dropped})"
        if self.bad_updates > self.config.max_bad_updates:
            return f"{self.bad_updates} updates had no finite loss or gradient (limit {self.config.max_bad_updates})"
        if self.idle >= self.config.max_idle:
            return f"nothing was trained for {self.idle} iterations in a row: {self.obstacle}"
        if signs and self.signs >= self.config.patience:
            return f"collapse: {'; '.join(signs)}, for {self.signs} iterations in a row"
        return None


def _why_idle(event: dict) -> str:
    """Why an iteration had no optimizer step, according to its event."""
    constant = [f"{name} {value['mean']:.4g}" for name, value in event["rewards"].items() if value["mean"] is not None]
    if not event["skipped_groups"] or not constant:
        return "no image had a finite reward; check the log for warnings of the reward"
    return (
        f"the images of every group had equal rewards ({', '.join(constant)}). Possible causes: a constant reward, a "
        "threshold that every image or no image meets, or a rollout.eta that is too low"
    )
