"""What a run keeps on disk: events, pictures, checkpoints, the LoRA, status and summary."""

import json
import os
import sys
from pathlib import Path

from torch import Tensor

from ..config import RunConfig
from ..policy import Policy
from ..utils.files import write_atomically, write_json
from ..utils.media import save_video
from . import report
from .directory import Checkpoint, RunDirectory


class Keeper:
    """
    Args:
        run: where to write; None keeps nothing.
        config: the run's description.
        policy: whose LoRA is saved.
        writes: whether this process is the one that writes.
    """

    def __init__(self, run: RunDirectory | None, config: RunConfig, policy: Policy, writes: bool) -> None:
        self.run, self.config, self.policy = run, config, policy
        self.writes = writes and run is not None

    def status(self, state: str, iteration: int, error: str | None = None) -> None:
        if self.writes:
            total = self.config.runtime.iterations
            self.run.write_status(state, iteration=iteration, iterations=total, error=error)

    def event(self, event: dict) -> None:
        if self.writes:
            self.run.append_event(event)

    # -------------------------------------------------------------------------------------------- pictures

    def rollout_picture(self, images: Tensor, iteration: int) -> None:
        """The first groups of this process, a row for every 12 images or group, every `samples_every` iterations.

        Args:
            images: `[N, 3, H, W]`, or videos `[N, F, 3, H, W]`, of which the first group is shown.
        """
        every = self.config.runtime.samples_every
        if self.writes and every and iteration % every == 0:
            group = min(self.config.rollout.group_size, 12)
            shown = images[: group if images.ndim == 5 else 4 * group].cpu()
            self._show(self.run.path / "samples" / f"rollout_{iteration:06d}.png", shown, group, largest=96)

    def evaluation_picture(self, images: Tensor, iteration: int) -> None:
        if self.writes:
            self._show(self._evaluation_path(iteration), images, columns=6, largest=160)

    def _show(self, path: Path, images: Tensor, columns: int, largest: int) -> None:
        """A grid of images; of videos a grid that moves, and as the picture its middle frame."""
        if images.ndim == 5:
            frames = [report.grid(frame, columns, largest) for frame in images.unbind(1)]
            save_video(path.with_suffix(".mp4"), frames, self.config.model.fps)
            report.save_picture(path, frames[len(frames) // 2])
        else:
            report.save_picture(path, report.grid(images, columns, largest))

    def _evaluation_path(self, iteration: int) -> Path:
        return self.run.path / "samples" / f"evaluation_{iteration:06d}.png"

    # --------------------------------------------------------------------------------------------- weights

    def best(self, iteration: int, weights: dict[str, Tensor]) -> None:
        """Keep weights as the best so far."""
        if self.writes:
            self.policy.save_lora(self.run.path / "best.safetensors", weights, self._metadata(iteration))

    def newest(self, iteration: int, state: dict) -> None:
        """Checkpoint, then LoRA."""
        if not self.writes:
            return
        keep = self.config.runtime.keep_checkpoints
        self.run.save_checkpoint(iteration, Checkpoint(self.policy.tensors(), state), keep)
        self.policy.save_lora(self.run.path / "lora.safetensors", self.policy.result(), self._metadata(iteration))

    def fall_back_to_best(self) -> str:
        """Make the best LoRA the run's result; says what lora.safetensors holds now."""
        best = self.run.path / "best.safetensors" if self.run else None
        if best is None or not best.exists():
            return "lora.safetensors holds the newest LoRA"
        if self.writes:
            write_atomically(self.run.path / "lora.safetensors", best.read_bytes())
        return "lora.safetensors holds the best LoRA"

    def _metadata(self, iteration: int) -> dict[str, str]:
        # One key alone: the file format keeps several in no fixed order, and equal LoRAs should be equal files.
        config = self.config
        base = config.model.path if config.model.graph is None else Path(config.model.graph.file).name
        record = {
            "base_model": f"{config.model.family} {base}",
            "rewards": {reward.name: reward.weight for reward in config.rewards},
            "iteration": iteration,
            "description": config.model_dump(mode="json"),
        }
        return {"dancegrpo": json.dumps(record)}

    # ---------------------------------------------------------------------------------------- start and end

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest sound checkpoint; every process reads it."""
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
        """Before a run starts over, keep the LoRA that can be learned again only in time."""
        learned = self.run.path / "lora.safetensors"
        if learned.exists():
            os.replace(learned, self.run.path / "lora-before-restart.safetensors")
            print("warning: the run starts over; its LoRA is kept in lora-before-restart.safetensors", file=sys.stderr)

    def begin(self, iteration: int) -> None:
        """Forget what a resumed run will do again."""
        if self.writes:
            self.run.keep_events(iteration)

    def finish(self, state: str, iteration: int, seconds: float, evaluations: list[dict], error: str | None) -> dict:
        """Write report and status; returns the summary."""
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
            "lora": str((self.run.path / "lora.safetensors").resolve()) if self.run else None,
            "lora_modules": len(self.policy.modules),
        }
        if self.writes:
            folder = self.run.path / "report"
            report.reward_curve(folder / "reward_curve.png", self.run.events(), evaluations)
            pictures = [self._evaluation_path(e["iteration"]) for e in (evaluations or [{"iteration": 0}])]
            first, last = pictures[0], pictures[-1]
            if first != last and first.exists() and last.exists():
                report.before_after(first, last, folder / "before_after.png")
            write_json(folder / "summary.json", summary)
            self.status(state, iteration, error)
        return summary
