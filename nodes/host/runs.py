"""A run as the nodes see it: described, begun or attached to, waited for, and what it has to show."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from comfy.model_management import InterruptProcessingException

from ...trainer.config import RunConfig, parse_config
from ...trainer.models import check_kernel, model_class
from ...trainer.prompts.sets import read_prompts
from ...trainer.prompts.text import check_prompts, prompt_lines, same_text
from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.runs.progress import duration, number, table
from ...trainer.utils.errors import BadInput, RunFailed, shorten
from ...trainer.utils.files import move_file
from ..types import Judges
from . import dry_run, session
from .encoding import applies_weights, encoded_prompts, first_row
from .folders import publish_lora, run_folder, runs_folder

GRACE = 6.0
"""Seconds a run has to stop by itself when the user cancels; its processes are ended then."""
POLL = 0.5
EXIT = 10.0
"""Seconds given to the processes of an ended run to give their memory back, before the graph goes on."""
LOG_LINES = 30


def check_texts(prompts: str, held_out: str) -> tuple[list[str], list[str]]:
    """Training prompts and held-out ones.

    Raises:
        BadInput: no prompts, one that is there twice, or one that is held out and trained on.
    """
    texts, tests = prompt_lines(prompts), prompt_lines(held_out)
    if not texts:
        raise BadInput("prompts is empty: write one prompt per line (lines that begin with # are comments)")
    check_prompts(texts, "prompts")
    check_prompts(tests, "held_out_prompts")
    known = set(map(same_text, texts))
    for text in tests:
        if same_text(text) in known:
            raise BadInput(f"held_out_prompts holds {shorten(text)}, which is also in prompts; hold out others")
    return texts, tests


def describe(
    model: dict,
    settings: dict | None,
    rewards: Judges,
    judges: Judges | None,
    prompts: str,
    held_out: str,
    negative: str,
) -> dict:
    """The plain data of a run description.

    Raises:
        BadInput: no prompts, or prompts that are held out and trained on.
    """
    texts, tests = check_texts(prompts, held_out)
    data = dict(settings or {})
    data["model"] = model
    data["prompts"] = {"texts": texts, "negative": negative.strip()}
    data["rewards"] = rewards.description()
    data["evaluation"] = {**data.get("evaluation", {}), "texts": tests}
    if judges is not None:
        data["evaluation"]["rewards"] = judges.description()
    return data


def upstream_digest(get_node: Callable[[str], dict], link: list) -> str:
    """Stands for what an input is connected to: the nodes above it and their widgets, not their numbers."""
    known: dict[str, list] = {}

    def describe_node(node_id: str) -> list:
        if node_id not in known:
            node = get_node(node_id)
            inputs = {name: describe_input(value) for name, value in sorted(node["inputs"].items())}
            text = json.dumps([node["class_type"], inputs], sort_keys=True, default=str)
            known[node_id] = hashlib.sha256(text.encode()).hexdigest()
        return known[node_id]

    def describe_input(value: object) -> object:
        is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        return [describe_node(value[0]), value[1]] if is_link else value

    text = json.dumps(describe_input(link))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------ the run


def existing(name: str) -> RunDirectory:
    """
    Raises:
        BadInput: there is no run of this name.
    """
    folder = run_folder(name)
    if not (folder / "run.yaml").is_file():
        raise BadInput(f"there is no run named {name!r} in {runs_folder()}")
    return RunDirectory(folder)


def is_finished(run: RunDirectory) -> bool:
    return (run.summary() or {}).get("state") == "finished"


def begin(
    name: str,
    data: dict,
    clip: object | None,
    clip_source: str,
    processes: int,
    gpus: list[int] | None,
    conditioning: list | None = None,
) -> RunDirectory:
    """The run of this name: attached to while it goes on or when it is finished, else started or resumed.

    Args:
        data: plain data of its description.
        clip: ComfyUI's text encoders; None leaves encoding to the trainer.
        clip_source: stands for where `clip` and `conditioning` come from.
        conditioning: CONDITIONING whose content beside the text goes with every prompt.

    Raises:
        BadInput: whatever cannot be accepted; nothing has been started then.
    """
    folder = run_folder(name)
    file = folder / f"conditions-{clip_source}.safetensors"
    if clip is not None:
        encoded = {"conditions": str(file), "weight_syntax": applies_weights(clip)}
        data = {**data, "prompts": {**data["prompts"], **encoded}}
    config = parse_config(data)
    run = RunDirectory(folder)
    if (folder / "run.yaml").is_file():
        _refuse_changes(name, run, config)
        if launch.is_running(run) or is_finished(run):
            return run
    _check(config, processes, gpus)
    if conditioning is not None and (config.model.graph is None or clip is None):
        raise BadInput("conditioning goes with a connected model and clip: disconnect it, or connect them")
    with ExitStack() as stack:
        encoded = None
        if clip is not None and not file.exists():
            encoded = stack.enter_context(encoded_prompts(clip, config, conditioning))
        if isinstance(data.get("model"), dry_run.Described):
            dry_run.refuse(data["model"].blueprint, config, encoded and first_row(encoded))
        _make_room(config, processes, gpus)
        run = RunDirectory.open(folder, config, ["ComfyUI", name])
        stack.callback(run.release)
        if launch.is_started(run):  # another ComfyUI was faster
            return run
        if encoded is not None:
            move_file(encoded, file)
        launch.start_run(run, processes, gpus)
    return run


def resume(run: RunDirectory) -> bool:
    """Start a run again that was stopped or died; whether there was anything to do.

    Raises:
        BadInput: there is no room for it, or something that it needs is gone.
    """
    if launch.is_running(run) or is_finished(run):
        return False
    status, config = run.status(), run.config()
    processes, gpus = status.get("processes") or 1, status.get("gpus") or None
    conditions = config.prompts.conditions
    if conditions is not None and not Path(conditions).is_file():
        raise BadInput(
            f"run {run.path.name!r} lacks {Path(conditions).name}, which holds its encoded prompts: queue its GRPO "
            "Train LoRA again, which writes them anew and goes on"
        )
    _check(config, processes, gpus)
    _make_room(config, processes, gpus)
    run.acquire()
    try:
        if launch.is_started(run):
            return False
        launch.start_run(run, processes, gpus)
    finally:
        run.release()
    return True


def _refuse_changes(name: str, run: RunDirectory, config: RunConfig) -> None:
    if changes := run.changes(config):
        raise BadInput(
            f"name {name!r} belongs to a run with other settings: {'; '.join(changes[:5])}. Choose another name for a "
            "new run, or set this back to go on with the old one"
        )


def _check(config: RunConfig, processes: int, gpus: list[int] | None) -> None:
    """What the trainer would refuse, said on the node at once."""
    from ...trainer.loop import check_groups, check_media
    from ...trainer.loop import check_prompts as check_reward_prompts
    from ...trainer.rewards import load_reward

    check_kernel(model_class(config.model), config.model.family, config.rollout)
    if config.model.graph is not None and config.prompts.conditions is None:
        raise BadInput("clip is not connected: a connected model's prompts are encoded by the graph's own clip")
    rewards = {reward.name: load_reward(reward) for reward in config.rewards}
    judges = {reward.name: load_reward(reward) for reward in config.evaluation.rewards} | rewards
    check_groups(rewards, processes)
    check_media(judges, config.model.frames)
    training, held_out = read_prompts(config)
    check_reward_prompts(judges, [*training.scored, *held_out.scored])
    if processes > config.rollout.prompts_per_iteration * config.rollout.group_size:
        raise BadInput(f"{processes} processes are more than the images of an iteration")
    session.require_gpus(gpus, processes)
    _refuse_busy_gpus(gpus)


def _refuse_busy_gpus(gpus: list[int] | None) -> None:
    """Two runs on one GPU would both be slow, or out of memory."""
    for folder in runs_folder().glob("*/status.json") if gpus else ():
        other = RunDirectory(folder.parent)
        shared = set(gpus) & set(other.status().get("gpus") or [])
        if shared and launch.is_running(other):
            raise BadInput(
                f"GPU {min(shared)} is in use by run {other.path.name!r}: wait for it, stop it, or name others"
            )


def _make_room(config: RunConfig, processes: int, gpus: list[int] | None) -> None:
    session.free_memory()
    session.require_memory(config.model, gpus, processes, config.runtime.device == "cpu")


# ------------------------------------------------------------------------------------------------------------ waiting


def wait(run: RunDirectory, screen: session.Screen) -> None:
    """Until the run has ended, showing how it goes.

    Raises:
        RunFailed: it failed or died; with the last lines of its log.
        InterruptProcessingException: the user cancelled.
    """
    seen = None
    while True:
        session.check_interrupt()
        running = launch.is_running(run)  # before its files are read: they are its last word then
        stamp = _stamp(run)
        if stamp != seen or not running:
            seen = stamp
            screen.show(run.status().get("iteration", 0), status_text(run, running), newest_sample(run))
        if not running:
            break
        time.sleep(POLL)
    launch.wait_for_exit(run, EXIT)
    refuse_failure(run)


def refuse_failure(run: RunDirectory) -> None:
    """
    Raises:
        RunFailed: the run, which has ended, did not do so in peace.
    """
    state = run.status().get("state")
    if state in ("finished", "stopped"):
        return
    reason = run.status().get("error") if state == "failed" else "its process ended without a word"
    raise RunFailed(f"run {run.path.name!r} failed: {reason}\n{log_tail(run)}")


def cancel(run: RunDirectory, name: str) -> None:
    """End every process of a run; what it learned is kept, also as a LoRA that ComfyUI lists."""
    launch.stop(run, grace=GRACE)
    if run.lora_file.exists():
        publish_lora(run.lora_file, name)


def wait_or_cancel(run: RunDirectory, name: str, screen: session.Screen) -> None:
    """`wait`, but a cancelled prompt ends the run."""
    try:
        wait(run, screen)
    except InterruptProcessingException:
        screen.say(f"run {name!r}: stopping")
        cancel(run, name)
        screen.say(status_text(run, running=False))
        raise


def _stamp(run: RunDirectory) -> tuple:
    files = (run.path / "status.json", run.path / "events.jsonl")
    return tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files)


# ----------------------------------------------------------------------------------------------------- what it shows


def status_text(run: RunDirectory, running: bool) -> str:
    """State, rewards and time left, in a few lines."""
    status, events = run.status(), run.events()
    state, done, total = status.get("state", "starting"), status.get("iteration", 0), status.get("iterations", 0)
    if not running and state in ("starting", "running", "stopping"):
        state = "ended without a word; it can be resumed"
    if not running and state == "stopped":
        state = "stopped; it can be resumed"
    lines = [f"run {run.path.name!r}: {state}"]
    if total:
        lines.append(f"iteration {done} of {total}")
    if events:
        first, last = events[0]["rewards"], events[-1]["rewards"]
        lines += [f"{name} {number(value['mean'])} (was {number(first[name]['mean'])})" for name, value in last.items()]
    if running and events and state == "running":
        recent = [event["seconds"]["total"] for event in events[-20:]]
        lines.append(f"{duration(sum(recent) / len(recent) * (total - done))} left")
    if state == "failed":
        lines.append(str(status.get("error")))
    if not running and (summary := run.summary()):
        lines.append(table(summary))
    return "\n".join(line for line in lines if line)


def log_tail(run: RunDirectory) -> str:
    """The last lines of what the run printed."""
    if not run.log_file.exists():
        return ""
    with run.log_file.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 20_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return "\n".join(lines[-LOG_LINES:])


def newest_sample(run: RunDirectory) -> Path | None:
    """The newest picture of samples."""
    pictures = list((run.path / "samples").glob("*.png"))
    return max(pictures, key=lambda path: path.stat().st_mtime_ns, default=None)


def losses(run: RunDirectory) -> list[float]:
    """Minus the weighted mean reward of each iteration: the policy's own loss is about 0 by construction."""
    weights = {reward.name: reward.weight for reward in run.config().rewards}
    values = []
    for event in run.events():
        means = {name: event["rewards"][name]["mean"] for name in weights}
        if None not in means.values():
            values.append(-sum(weights[name] * mean for name, mean in means.items()))
    return values
