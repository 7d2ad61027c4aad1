"""Estimates the memory and time of a run in a separate process, as the run itself would be."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import folder_paths
from comfy.model_management import InterruptProcessingException

from ...trainer.config import parse_config
from ...trainer.runs import launch
from ...trainer.utils.errors import BadInput, RunFailed
from ..types import ModelSpec
from . import dry_run, runs
from .encoding import GraphConditioning, applies_weights, encoded_prompts, first_row
from .progress import POLL, check_interrupt, say

BAD_INPUT = 2


def estimate(
    data: dict,
    clip: object | None,
    conditioning: GraphConditioning | None,
    processes: int,
    gpus: list[int] | None,
    spec: ModelSpec | None,
    node_id: str | None,
) -> dict:
    """The record of `python -m trainer estimate` for a description, with its `text`.

    Args:
        data: plain data of the description.
        clip, conditioning, spec: as in `runs.begin`.

    Raises:
        BadInput: something cannot be accepted.
        RunFailed: the process ended without an answer.
        InterruptProcessingException: the user cancelled.
    """
    with ExitStack() as stack:
        config = parse_config(data)
        temporary = folder_paths.get_temp_directory()
        Path(temporary).mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=temporary, prefix="estimate-")))
        if clip is not None:
            encoded = stack.enter_context(encoded_prompts(clip, config, conditioning))
            more = {"conditions": str(encoded), "weight_syntax": applies_weights(clip)}
            config = parse_config({**data, "prompts": {**data["prompts"], **more}})
        runs.check(config, processes, gpus)
        if spec is not None:
            dry_run.refuse(spec, config, None if clip is None else first_row(encoded))
        runs.make_room(config, processes, gpus)
        description, answer, log = folder / "run.yaml", folder / "answer.json", folder / "log.txt"
        description.write_text(config.to_yaml(), encoding="utf-8")
        arguments = ["estimate", str(description), "--processes", str(processes), "--json", str(answer)]
        _wait(launch.start(arguments, log, gpus), node_id, log)
        return {**json.loads(answer.read_text(encoding="utf-8")), "text": log.read_text("utf-8", "replace").strip()}


def _wait(pid: int, node_id: str | None, log: Path) -> None:
    started = time.monotonic()
    try:
        while (code := launch.exit_code(pid)) is None:
            check_interrupt()
            say(f"measuring, {time.monotonic() - started:.0f} s", node_id)
            time.sleep(POLL)
    except InterruptProcessingException:
        launch.kill_tree(pid)
        launch.exit_code(pid)
        raise
    if code:
        words = log.read_text("utf-8", "replace").strip().splitlines() or ["its process ended unexpectedly"]
        last = words[-1].removeprefix("error: ").removeprefix("failed: ")
        raise BadInput(last) if code == BAD_INPUT else RunFailed(f"the estimate failed: {last}")
