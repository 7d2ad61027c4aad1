"""Writes the files of a run: events, sample images, checkpoints, the LoRA, status and summary."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config import RunConfig
from ..policy import Policy
from ..utils.errors import RunFailed
from ..utils.files import write_atomically, write_json
from ..utils.media import save_image, save_video
from .directory import Checkpoint, RunDirectory
from .events import add_evaluation
from .reward_curve import write_reward_curve
from .sample_grids import Sample, before_after, boxes, magnification, plain_grid, write_samples
from .trackers import Trackers

STATUS_INTERVAL = 1.0
"""Seconds between two writes of the progress to the status."""
LISTENER_INTERVAL = 0.2
"""Seconds between two reports of the progress to the listener."""


class Recorder:
    """Writes the results of the training loop to disk. Only the main process writes.

    Args:
        run: the run directory; None writes nothing.
        config: the run description.
        policy: the policy whose LoRA is saved; may be set later if only status and progress are recorded before.
        writes: whether this process writes.
        listener: called in the writing process with the progress, `{"progress": {"phase", "done", "total"}}`.
    """

    def __init__(
        self,
        run: RunDirectory | None,
        config: RunConfig,
        policy: Policy | None,
        writes: bool,
        listener: Callable[[dict], None] = lambda event: None,
    ) -> None:
        self.run, self.config, self.policy, self.listener = run, config, policy, listener
        self.speaks, self.writes = writes, writes and run is not None
        self.state, self._written, self._reported = "starting", -STATUS_INTERVAL, -LISTENER_INTERVAL
        self.trackers = Trackers(run, config) if self.writes else None

    # --------------------------------------------------------------------------------------- status and events

    def status(self, state: str, iteration: int, error: str | None = None) -> None:
        """Replace the status.

        Args:
            state: one of `directory.STATES`.
            iteration: number of iterations that are done and saved.
        """
        self.state = state
        if self.writes:
            total = self.config.runtime.iterations
            self.run.write_status(state, iteration=iteration, iterations=total, error=error, progress=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        """Report the progress of a phase, such as `rollout`, 2 of 10. Frequent calls are throttled.

        Raises:
            RunFailed: the run directory was deleted or replaced.
        """
        now, progress = time.monotonic(), {"phase": phase, "done": done, "total": total}
        if self.speaks and now - self._reported >= LISTENER_INTERVAL:
            self._reported = now
            self.listener({"progress": progress})
        if self.writes and now - self._written >= STATUS_INTERVAL:
            self._written = now
            self.run.write_status(self.state, progress=progress)

    def estimate(self, figures: dict) -> None:
        """Put into the status how long the run will take: seconds per iteration and to the end."""
        if self.writes:
            self.run.write_status(self.state, estimate=figures)

    def event(self, event: dict) -> None:
        """Append the event of an iteration to the log."""
        if self.writes:
            self.run.append_event(event)
            self.trackers.event(event)

    # -------------------------------------------------------------------------------------------------- images

    def rollout_grid(self, images: Tensor, iteration: int, samples: list[Sample]) -> None:
        """The first groups of this process, a row per group of up to 12 images, every `samples_every` iterations.

        Args:
            images: `[N, 3, H, W]`, or videos `[N, F, 3, H, W]`, of which the first group is shown; in [0, 1].
            samples: prompt, seed and scores of each.
        """
        every = self.config.runtime.samples_every
        if self.writes and every and iteration % every == 0:
            group = min(self.config.rollout.group_size, 12)
            count = group if images.ndim == 5 else 4 * group
            path = self.run.path / "samples" / f"rollout_{iteration:06d}.png"
            self._show(path, images[:count].cpu(), group, 96, samples[:count])
            captions = [sample.prompt for sample in samples[:group]]
            self.trackers.images("rollout", images[:group].cpu(), captions, iteration)

    def evaluation(self, record: dict, images: Tensor, samples: list[Sample]) -> None:
        """Record scores and images of the held-out prompts.

        Args:
            record: as in the summary, with `iteration` and `rewards`.
            images: `[N, 3, H, W]` or `[N, F, 3, H, W]` in [0, 1], one per shown prompt.
            samples: prompt, seed and scores of each.
        """
        if self.writes:
            self.run.require_ownership()
            add_evaluation(self.run.path / "evaluations.jsonl", record)
            self._show(self._evaluation_path(record["iteration"]), images, 6, 160, samples)
            self.trackers.evaluation(record)
            self.trackers.images("evaluation", images, [sample.prompt for sample in samples], record["iteration"])

    def _show(self, path: Path, images: Tensor, columns: int, largest: int, samples: list[Sample]) -> None:
        """Write a grid of images and its JSON file; for videos a grid video, and its middle frame as the image."""
        self.run.require_ownership()
        height, width = (side * magnification(images, largest) for side in images.shape[-2:])
        cells = boxes(len(samples), columns, width, height)
        write_samples(path, [replace(sample, box=box) for sample, box in zip(samples, cells, strict=True)])
        if images.ndim == 5:
            frames = [plain_grid(frame, columns, largest) for frame in images.unbind(1)]
            save_video(path.with_suffix(".mp4"), frames, self.config.model.fps)
            save_image(path, frames[len(frames) // 2])
        else:
            save_image(path, plain_grid(images, columns, largest))

    def _evaluation_path(self, iteration: int) -> Path:
        return self.run.path / "samples" / f"evaluation_{iteration:06d}.png"

    # --------------------------------------------------------------------------------------------- weights

    def best(self, iteration: int, weights: dict[str, Tensor]) -> None:
        """Save weights as the best so far."""
        if self.writes and _are_finite(weights):
            self.run.require_ownership()
            self.policy.save_lora(self.run.path / "best.safetensors", weights, self._metadata(iteration))

    def newest(self, iteration: int, state: dict) -> None:
        """Write a checkpoint, then the LoRA.

        Raises:
            RunFailed: a weight is not finite; nothing is written. All processes raise it.
        """
        tensors, result = self.policy.tensors(), self.policy.result()
        if not _are_finite(tensors) or not _are_finite(result):
            raise RunFailed(
                f"a weight of the LoRA is not finite after iteration {iteration}: lower optimizer.learning_rate, "
                "optimizer.weight_decay or lora.alpha. The previous checkpoint and LoRA are kept"
            )
        if not self.writes:
            return
        self.run.save_checkpoint(iteration, Checkpoint(tensors, state), self.config.runtime.keep_checkpoints)
        self.policy.save_lora(self.run.lora_file, result, self._metadata(iteration))

    def fall_back_to_best(self) -> str:
        """Replace the run's LoRA by the best one, if there is one; returns a clause about it for messages."""
        best = self.run.path / "best.safetensors" if self.run else None
        if best is None or not best.exists():
            return "lora.safetensors holds the newest LoRA"
        if self.writes:
            self.run.require_ownership()
            write_atomically(self.run.lora_file, best.read_bytes())
        return "lora.safetensors holds the best LoRA"

    def _metadata(self, iteration: int) -> dict[str, str]:
        # A single key, because safetensors does not fix the order of keys, and equal LoRAs should give equal files.
        config = self.config
        graph = config.model.graph
        base = config.model.path if graph is None else " and ".join(Path(file).name for file in graph.trained_files)
        record = {
            "base_model": f"{config.model.family} {base}",
            "rewards": {reward.name: reward.weight for reward in config.rewards},
            "iteration": iteration,
            "description": config.model_dump(mode="json"),
        }
        return {"dancegrpo": json.dumps(record)}

    # ---------------------------------------------------------------------------------------- start and end

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest valid checkpoint, which every process reads."""
        if self.run is None:
            return None
        checkpoint, complaints = self.run.load_checkpoint()
        if self.writes:
            for complaint in complaints:
                print(f"warning: {complaint}", file=sys.stderr)
            if checkpoint is None and complaints:
                self._set_aside()
        return checkpoint

    def _set_aside(self) -> None:
        """Rename the existing LoRA before the run restarts from iteration 0, so that it is not lost."""
        self.run.require_ownership()
        if self.run.lora_file.exists():
            os.replace(self.run.lora_file, self.run.path / "lora-before-restart.safetensors")
            print("warning: the run starts over; its old LoRA is now lora-before-restart.safetensors", file=sys.stderr)

    def begin(self, iteration: int) -> None:
        """Drop events after the checkpoint; the resumed run writes them again."""
        if not self.writes:
            return
        if damaged := self.run.keep_events(iteration):
            print(f"warning: events.jsonl had {damaged} damaged lines, which were removed", file=sys.stderr)
        self.trackers.begin(iteration)

    def finish(self, state: str, iteration: int, seconds: float, evaluations: list[dict], error: str | None) -> dict:
        """Write the report, the summary and the final status; returns the summary."""
        summary = {
            "state": state,
            "error": error,
            "iterations": iteration,
            "seconds": round(seconds, 3),
            "eval": {
                "before": evaluations[0] if evaluations else None,
                "after": evaluations[-1] if len(evaluations) > 1 else None,
            },
            "evaluations": evaluations,
            "lora": str(self.run.lora_file.resolve()) if self.run else None,
            "lora_modules": len(self.policy.modules),
        }
        if self.writes:
            self.run.require_ownership()
            folder = self.run.path / "report"
            write_reward_curve(folder / "reward_curve.png", self.run.events(), evaluations)
            grids = [self._evaluation_path(e["iteration"]) for e in (evaluations or [{"iteration": 0}])]
            first, last = grids[0], grids[-1]
            if first != last and first.exists() and last.exists():
                before_after(first, last, folder / "before_after.png")
            write_json(folder / "summary.json", summary)
            self.status(state, iteration, error)
            self.trackers.close()
        return summary


def _are_finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in tensors.values())
