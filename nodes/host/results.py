"""Outputs of GRPO Train LoRA and GRPO Run, and the same results as JSON in ComfyUI's history."""

import hashlib
import math
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ...trainer.config.model import BOTH
from ...trainer.objectives.advantage import Mixture
from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.sample_grids import captioned
from ...trainer.utils.errors import BadInput
from ...trainer.utils.media import read_image
from ..types import RunType
from .folders import publish_loras, published_loras, run_folder
from .images import image_output
from .live_preview import newest_sample
from .progress import RunView, say

DATA = "dancegrpo"
"""Key of a node's JSON results in `/history` and `/api/jobs`; the value is a list with one object."""


def outputs(status_first: bool) -> list[io.Output]:
    """The outputs of GRPO Train LoRA; with `status_first` those of GRPO Run (status first, run last)."""
    found = [
        io.LoraModel.Output(display_name="lora_model", tooltip="The newest LoRA, for core's Load LoRA Model."),
        io.LossMap.Output(
            display_name="loss_map",
            tooltip="Minus the mean reward of each iteration, for core's Plot Loss Graph (GRPO's own loss is always "
            "about 0).",
        ),
        io.String.Output(
            display_name="lora_name", tooltip="The LoRA's name in ComfyUI's LoRA loaders, once the run has ended."
        ),
        RunType.Output(display_name="run", tooltip="For GRPO Run."),
        io.Image.Output(display_name="curve", tooltip="Plot of the rewards over the iterations."),
        io.Image.Output(display_name="samples", tooltip="Images before and after training, or the newest samples."),
    ]
    if not status_first:
        return found
    run = found.pop(3)
    return [io.String.Output(display_name="status", tooltip="State, rewards and remaining time."), *found, run]


def result(run: RunDirectory, cls: type[io.ComfyNode], status_first: bool, note: str = "") -> io.NodeOutput:
    """The current outputs of a run. Nodes that are connected to an output without a value yet are not executed.

    Args:
        note: shown below the state.
    """
    name, running = run.path.name, launch.is_running(run)
    text, events = RunView(run).text(running), run.events()
    samples, values = _samples(run), losses(run, events)
    try:
        lora, names = _lora(run, running)
        if len(names) > 1:
            text = f"{text}\nthe LoRAs for high and low noise, each for its own loader: {', '.join(names)}"
    except BadInput as error:  # the other outputs are still valid
        lora, names, text = None, [], f"{text}\n{error}"
    lora_name = names[0] if len(names) == 1 else None
    found = [
        _or_blocked(lora),
        _or_blocked({"loss": values} if len(set(values)) > 1 else None),  # core's plot divides by max - min
        _or_blocked(lora_name),
        name,
        _or_blocked(_curve(run, events)),
        _or_blocked(samples),
    ]
    if status_first:
        found = [text, *found[:3], *found[4:], name]
    text = "\n\n".join(filter(None, (text, note)))
    shown = {"text": (text,), DATA: (_data(run, events, names, running),)}
    if samples is not None:
        shown |= ui.PreviewImage(samples, cls=cls).as_dict()
    say(text, cls.hidden.unique_id)
    return io.NodeOutput(*found, ui=shown)


def unwatched(run: RunDirectory, cls: type[io.ComfyNode]) -> io.NodeOutput:
    """The state of a run that nobody waits for any more; no node behind it is executed."""
    found = result(run, cls, status_first=True)
    text = f"{found.ui['text'][0]}\nno longer watched; the run goes on"
    say(text, cls.hidden.unique_id)
    return io.NodeOutput(*(ExecutionBlocker(None) for _ in found.args), ui={**found.ui, "text": (text,)})


def _or_blocked(value: object | None) -> object:
    return ExecutionBlocker(None) if value is None else value


def _data(run: RunDirectory, events: list[dict], names: list[str], running: bool) -> dict:
    """The state of a run as plain JSON data; files are relative to ComfyUI's output folder."""
    status, files = run.status(), [f"loras/{Path(name).as_posix()}" for name in names]
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
            "lora_name": names[0] if len(names) == 1 else None,
            "lora_file": files[0] if len(files) == 1 else None,
            "loras": [{"name": name, "file": file} for name, file in zip(names, files, strict=True)],
            "summary": None if running else run.summary(),
        }
    )


def jsonable(value: object) -> object:
    """The same data with None in place of NaN and infinity, which JSON does not have."""
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


def _lora(run: RunDirectory, running: bool) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """The newest LoRA, or None, and its name in ComfyUI's list once the run has ended.

    A run that trains two networks has two names, and no LoRA that one loader could take.

    Raises:
        BadInput: its file is damaged.
    """
    from ...trainer.rewards.files import read_weights

    if not run.lora_file.exists():
        return None, []
    names = [] if running else publish_loras(run.lora_file, run.path.name)
    graph = run.config().model.graph
    has_two = graph is not None and graph.low_noise is not None and graph.low_noise.trained == BOTH
    return None if has_two else read_weights(run.lora_file), names


def _curve(run: RunDirectory, events: list[dict]) -> torch.Tensor | None:
    from ...trainer.runs.reward_curve import draw_reward_curve

    chart = draw_reward_curve(events, (run.summary() or {}).get("evaluations", []))
    return None if chart is None else _image(chart)


def _samples(run: RunDirectory) -> torch.Tensor | None:
    both = run.path / "report" / "before_after.png"
    if both.exists() and run.is_finished():
        return _image(both)
    newest = newest_sample(run)
    try:
        return None if newest is None else image_output(captioned(newest))
    except BadInput:
        return None


def _image(source: Path | bytes) -> torch.Tensor | None:
    """An image file as ComfyUI's IMAGE, `[1, H, W, 3]`; None if it is damaged."""
    try:
        return image_output(read_image(source))
    except BadInput:
        return None


def fingerprint(name: str | None) -> float | str:
    """A fingerprint that changes whenever the run of this name or its published LoRA changes.

    NaN means "always changed". ComfyUI compares by identity first, so each call creates a new NaN object.

    Args:
        name: None if it comes through a link and is not known yet.
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
