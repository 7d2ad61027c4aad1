"""The outputs of a run's nodes, and the same as data in ComfyUI's history."""

import hashlib
import math
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ...trainer.objectives.advantage import Mixture
from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.pictures import captioned
from ...trainer.utils.errors import BadInput
from ...trainer.utils.media import read_image, to_tensor
from ..types import RunType
from . import runs
from .folders import publish_lora, published_loras, run_folder
from .progress import RunView, newest_sample, say

DATA = "dancegrpo"
"""Key of a node's structured results in `/history` and `/api/jobs`: a list of one object."""


def outputs(status_first: bool) -> list[io.Output]:
    """The outputs of GRPO Train LoRA, or those of GRPO Run, which begin with the status and end with the run."""
    found = [
        io.LoraModel.Output(display_name="lora_model", tooltip="The newest LoRA, for core's Load LoRA Model."),
        io.LossMap.Output(
            display_name="loss_map",
            tooltip="Minus the mean reward per iteration, for core's Plot Loss Graph. (GRPO's own loss is about 0 by "
            "construction.)",
        ),
        io.String.Output(
            display_name="lora_name", tooltip="Its name in the lists of ComfyUI's LoRA loaders, once the run has ended."
        ),
        RunType.Output(display_name="run", tooltip="For GRPO Run."),
        io.Image.Output(display_name="curve", tooltip="Rewards over the iterations."),
        io.Image.Output(display_name="samples", tooltip="Before and after, or the newest samples."),
    ]
    if not status_first:
        return found
    run = found.pop(3)
    return [io.String.Output(display_name="status", tooltip="State, rewards and time left."), *found, run]


def result(run: RunDirectory, cls: type[io.ComfyNode], status_first: bool) -> io.NodeOutput:
    """What a run has so far; nodes behind an output that is not there yet are not executed."""
    name, running = run.path.name, launch.is_running(run)
    text, events = RunView(run).text(running), run.events()
    samples, values = _samples(run), losses(run, events)
    try:
        lora, lora_name = _lora(run, running)
    except BadInput as error:  # the rest of the run is there nevertheless
        lora, lora_name, text = None, None, f"{text}\n{error}"
    found = [
        _or_blocked(lora),
        _or_blocked({"loss": values} if len(set(values)) > 1 else None),  # core's plot divides by their range
        _or_blocked(lora_name),
        name,
        _or_blocked(_curve(run, events)),
        _or_blocked(samples),
    ]
    if status_first:
        found = [text, *found[:3], *found[4:], name]
    shown = {"text": (text,), DATA: (_data(run, events, lora_name, running),)}
    if samples is not None:
        shown |= ui.PreviewImage(samples, cls=cls).as_dict()
    say(text, cls.hidden.unique_id)
    return io.NodeOutput(*found, ui=shown)


def _or_blocked(value: object | None) -> object:
    return ExecutionBlocker(None) if value is None else value


def _data(run: RunDirectory, events: list[dict], lora_name: str | None, running: bool) -> dict:
    """The state of a run as plain JSON data; files are relative to ComfyUI's output folder."""
    status = run.status()
    return jsonable(
        {
            "run": run.path.name,
            "folder": f"dancegrpo/runs/{run.path.name}",
            "running": running,
            "state": status.get("state", "starting"),
            "iteration": status.get("iteration", 0),
            "iterations": status.get("iterations", 0),
            "error": status.get("error"),
            "rewards": events[-1]["rewards"] if events else None,
            "lora_name": lora_name,
            "lora_file": None if lora_name is None else f"loras/{Path(lora_name).as_posix()}",
            "summary": None if running else run.summary(),
        }
    )


def jsonable(value: object) -> object:
    """The same data with None in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def losses(run: RunDirectory, events: list[dict]) -> list[float]:
    """Minus the reward of each iteration, in stds of the first: the policy's own loss is about 0 by construction.

    Without rewards, the loss of the objective.
    """
    weights = {reward.name: reward.weight for reward in run.config().rewards}
    if not weights:
        return [event["loss"] for event in events if event["loss"] is not None]
    units = {name: value["group_std"] for name, value in events[0]["rewards"].items()} if events else {}
    mixture = Mixture(weights, units)
    means = [{name: event["rewards"].get(name, {}).get("mean") for name in weights} for event in events]
    return [-mixture.of(mean) for mean in means if None not in mean.values()]


def _lora(run: RunDirectory, running: bool) -> tuple[dict[str, torch.Tensor] | None, str | None]:
    """The newest LoRA, and its name in ComfyUI's lists once the run has ended; None for what is not there yet.

    Raises:
        BadInput: its file is damaged.
    """
    from ...trainer.rewards.files import read_weights

    if not run.lora_file.exists():
        return None, None
    return read_weights(run.lora_file), None if running else publish_lora(run.lora_file, run.path.name)


def _curve(run: RunDirectory, events: list[dict]) -> torch.Tensor | None:
    from ...trainer.runs.report import draw_reward_curve

    picture = draw_reward_curve(events, (run.summary() or {}).get("evaluations", []))
    return None if picture is None else _image(picture)


def _samples(run: RunDirectory) -> torch.Tensor | None:
    both = run.path / "report" / "before_after.png"
    if both.exists() and runs.is_finished(run):
        return _image(both)
    newest = newest_sample(run)
    try:
        return None if newest is None else to_tensor(captioned(newest)).movedim(0, -1)[None]
    except BadInput:
        return None


def _image(source: Path | bytes) -> torch.Tensor | None:
    """An image file as ComfyUI's IMAGE, `[1, H, W, 3]`; None where it is damaged."""
    try:
        return read_image(source).movedim(0, -1)[None]
    except BadInput:
        return None


def fingerprint(name: str | None) -> float | str:
    """Changes whenever the run of this name or its published LoRA does.

    NaN stands for a value that never equals another. ComfyUI compares by identity first, so each call makes a new one.

    Args:
        name: None where it arrives through a link and is not known yet.
    """
    try:
        run = RunDirectory(run_folder(name))
    except BadInput:
        return float("nan")
    if launch.is_running(run):
        return float("nan")
    digest = hashlib.sha256()
    files = [run.path / part for part in ("status.json", "run.yaml", "report/summary.json", "lora.safetensors")]
    for file in [*files, *published_loras(run.path.name)]:
        stat = file.stat() if file.exists() else None
        digest.update(repr((file.name, stat and (stat.st_mtime_ns, stat.st_size))).encode())
    return digest.hexdigest()
