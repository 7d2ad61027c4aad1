"""Measures the seconds of a run's calls, on the loaded model and at their real sizes."""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from ..rewards import differentiable_score
from ..score import score_by_group
from ..utils.seeds import noise
from .calls import Call, Calls

if TYPE_CHECKING:
    from ..loop import Trainer

SCORED = 16
"""Number of images that a reward is timed on."""
SHORT, LONG = 0.5, 60.0
"""Seconds. After a warm-up, calls up to SHORT are timed three times; calls above LONG are not repeated at all. A first
call of 10 to 30 s took up to a half longer than later ones, because it reads weights from their files and asks the
system for memory (Z-Image on a CPU)."""


class Meter:
    """Times calls.

    Args:
        trainer: with everything loaded.
        quick: time every call once after a warm-up.
        clock: returns seconds.
    """

    def __init__(self, trainer: "Trainer", quick: bool = False, clock: Callable[[], float] = time.perf_counter) -> None:
        self.quick, self.clock = quick, clock
        self.trainer, self.model = trainer, trainer.model
        self.device = trainer.processes.device
        self._known: dict[Call, float] = {}

    def seconds(self, calls: Calls) -> dict[str, float]:
        """Seconds of all calls together, by kind.

        Of calls that differ only in their numbers of rows and prompts, the largest and the smallest are timed, and the
        others are interpolated linearly.
        """
        total: dict[str, float] = {}
        for call, count in calls.items():
            same = [other for other in calls if (other.kind, other.scale, other.reward) == _like(call)]
            total[call.kind] = total.get(call.kind, 0.0) + count * self._of(call, same)
        return total

    def _of(self, call: Call, same: list[Call]) -> float:
        low, high = min(same, key=lambda other: other.size), max(same, key=lambda other: other.size)
        if low.size == high.size:
            return self._measured(call)
        longest, shortest = self._measured(high), self._measured(low)
        share = (call.size - low.size) / (high.size - low.size)
        return shortest + share * (longest - shortest)

    def _measured(self, call: Call) -> float:
        if call not in self._known:
            self._known[call] = self._measure(call)
        return self._known[call]

    def _measure(self, call: Call) -> float:
        action, part = getattr(self, f"_{call.kind.replace('-', '_')}")(call)
        return self._timed(action) * part

    def _timed(self, action: Callable[[], object]) -> float:
        """Seconds of a call after a warm-up, or of the warm-up itself if it is long."""
        if self.trainer.config.runtime.compile:
            self._once(action)  # the compiler's time is no part of a call's
        first = self._once(action)
        if first > LONG:
            return first
        return statistics.median(self._once(action) for _ in range(1 if self.quick or first > SHORT else 3))

    def _once(self, action: Callable[[], object]) -> float:
        self._wait()
        started = self.clock()
        action()
        self._wait()
        return self.clock() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------- the function to time, and how many times the real call contains it

    def _latents(self, rows: int) -> torch.Tensor:
        return torch.stack([noise(self.model.latent_shape, 0, "estimate", i) for i in range(rows)]).to(self.device)

    def _prediction(self, call: Call) -> Callable[[], torch.Tensor]:
        prompting = self.trainer.prompting
        prompts = min(call.prompts, len(self.trainer.prompts.texts))
        index = torch.arange(call.rows) * prompts // call.rows
        latents, conditions = self._latents(call.rows), prompting.rows(index).to(self.device)
        trained = next(level for level in (0.7, 1.0, 0.005) if self.model.is_trained_at(level))
        level = torch.full((call.rows,), trained, device=self.device)
        return lambda: self.model.predict_guided(
            latents, level, conditions.conditions, call.scale, conditions.unconditional
        )

    def _forward(self, call: Call) -> tuple[Callable[[], object], float]:
        return torch.no_grad()(self._prediction(call)), 1.0

    def _train(self, call: Call) -> tuple[Callable[[], object], float]:
        predict, optimizer = self._prediction(call), self.trainer.policy.optimizer

        def action() -> None:
            predict().square().mean().backward()
            optimizer.zero_grad(set_to_none=True)

        return action, 1.0

    def _decode(self, call: Call) -> tuple[Callable[[], object], float]:
        rows = min(call.rows, self.model.decode_batch_size)
        latents = self._latents(rows)
        return torch.no_grad()(lambda: self.model.decode(latents)), call.rows / rows

    def _encode(self, call: Call) -> tuple[Callable[[], object], float]:
        rows = min(call.rows, self.model.decode_batch_size)
        with torch.no_grad():
            images = self.model.decode(self._latents(rows))
        return lambda: self.model.encode_image(images), call.rows / rows

    def _score(self, call: Call) -> tuple[Callable[[], object], float]:
        reward, rows = self.trainer.evaluator.rewards[call.reward], min(call.rows, SCORED)
        images, texts = self._images(rows), self._texts(rows)

        def action() -> None:
            score_by_group(reward, images, texts, [0] * rows)
            reward.idle()

        return action, call.rows / rows

    def _decode_train(self, call: Call) -> tuple[Callable[[], object], float]:
        latents = self._latents(call.rows).requires_grad_()
        decode = lambda: checkpoint(self.model.decode, latents, use_reentrant=False).square().mean()  # noqa: E731
        return lambda: torch.autograd.grad(decode(), latents), 0.5  # checkpointing decodes twice, and both were counted

    def _score_train(self, call: Call) -> tuple[Callable[[], object], float]:
        reward, texts = self.trainer.collector.rewards[call.reward], self._texts(call.rows)
        images = self._images(call.rows).requires_grad_()
        return lambda: torch.autograd.grad(differentiable_score(reward, images, texts).sum(), images), 1.0

    @torch.no_grad()
    def _images(self, rows: int) -> torch.Tensor:
        return self.model.decode(self._latents(rows))

    def _texts(self, rows: int) -> list[str]:
        return [self.trainer.prompts.scored[0]] * rows

    # ------------------------------------------------------------------------------------------- other durations

    def optimizer_step(self) -> float:
        """Seconds of one step of AdamW on copies of the LoRA's weights."""
        copies = [p.detach().clone().requires_grad_() for p in self.trainer.policy.parameters.values()]
        optimizer = torch.optim.AdamW(copies, lr=1e-6)

        def action() -> None:
            for parameter in copies:
                parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            optimizer.step()

        return self._timed(action)

    def saving(self) -> float:
        """Seconds to serialize a checkpoint and the LoRA file, without writing them."""
        from safetensors.torch import save

        policy = self.trainer.policy

        def action() -> None:
            save({name: value.detach().cpu().contiguous().clone() for name, value in policy.tensors().items()})
            save({name: value.cpu().contiguous() for name, value in policy.result().items()})

        return self._timed(action)


def _like(call: Call) -> tuple:
    return call.kind, call.scale, call.reward


def phases(kinds: dict[str, float]) -> dict[str, float]:
    """Seconds by the phases of an iteration."""
    names = {"forward": "forward passes", "train": "forward and backward passes", "score": "rewards"}
    names |= {"score-train": "rewards", "decode-train": "decode", "encode": "decode"}
    found: dict[str, float] = {}
    for kind, value in kinds.items():
        found[names.get(kind, kind)] = found.get(names.get(kind, kind), 0.0) + value
    return found
