"""Runs for the nodes: building a run description, and starting, resuming or attaching to its run."""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ...trainer.check import check_rewards, check_run, load_rewards
from ...trainer.config import RunConfig, parse_config, parse_sections
from ...trainer.objectives import objective_class
from ...trainer.prompts.forms import check_lines
from ...trainer.prompts.sets import read_prompts
from ...trainer.prompts.text import check_prompts, prompt_lines, same_text
from ...trainer.rewards import memory_together
from ...trainer.runs import launch
from ...trainer.runs.directory import RunDirectory
from ...trainer.utils.errors import BadInput, shorten
from ...trainer.utils.files import move_file
from ..types import ModelSpec, Rewards
from . import devices, dry_run
from .encoding import GraphConditioning, applies_weights, encoded_prompts, first_row
from .folders import run_folder, runs_folder
from .inputs import NO_PROMPTS


def check_texts(
    prompts: str, held_out: str, needed: bool = True, may_repeat: bool = False
) -> tuple[list[str], list[str]]:
    """Training prompts and held-out ones.

    Args:
        needed: whether there must be training prompts.
        may_repeat: whether texts may occur again, because each prompt may have conditions of its own.

    Raises:
        BadInput: there are no prompts, a text is not one prompt per line, a prompt is repeated, or one is both held
            out and trained on.
    """
    check_lines(prompts, "prompts")
    check_lines(held_out, "held_out_prompts")
    texts, tests = prompt_lines(prompts), prompt_lines(held_out)
    if not texts and needed:
        raise BadInput(NO_PROMPTS)
    check_prompts(texts, "prompts", _numbers(texts) if may_repeat else None)
    check_prompts(tests, "held_out_prompts", _numbers(tests) if may_repeat else None)
    known = set() if may_repeat else set(map(same_text, texts))
    for text in tests:
        if same_text(text) in known:
            raise BadInput(f"held_out_prompts: {shorten(text)} is also in prompts; remove it from one of them")
    return texts, tests


def _numbers(texts: list[str], prefix: str = "") -> list[str]:
    return [f"{prefix}{number}" for number in range(len(texts))]


def described_apart(data: dict, sources: tuple[str, str]) -> dict:
    """A description in which every prompt has conditions of its own, so that texts may occur again.

    Args:
        sources: digests of what makes the conditions of the training prompts and of the held-out ones.
    """
    result = dict(data)
    for section, source in zip(("prompts", "evaluation"), sources, strict=True):
        texts = data[section]["texts"]
        result[section] = {**data[section], "digests": _numbers(texts, f"{source}-")}
    return result


def described_alike(data: dict) -> dict:
    """A description in which prompts share their conditions beside the text.

    Raises:
        BadInput: a text occurs twice.
    """
    prompts, tests = ("\n".join(data[section]["texts"]) for section in ("prompts", "evaluation"))
    check_texts(prompts, tests, needed=False)
    return {**data, **{section: {**data[section], "digests": []} for section in ("prompts", "evaluation")}}


def describe(
    model: dict,
    settings: dict | None,
    rewards: Rewards | None,
    evaluation_rewards: Rewards | None,
    prompts: str,
    held_out: str,
    negative: str,
    start_from: Path | None = None,
    may_repeat: bool = False,
) -> dict:
    """The plain data of a run description.

    Args:
        model: its `model` section.
        rewards: None where the objective needs none.
        start_from: LoRA file that training starts from.
        may_repeat: as for `check_texts`; `described_apart` or `described_alike` then decides.

    Raises:
        BadInput: there are no prompts, or one is both held out and trained on; there is no reward; or the objective
            trains on a collection, and prompts or rewards are given nevertheless.
    """
    data = dict(settings or {})
    offline = not _samples(data.get("objective"))
    texts, tests = check_texts(prompts, held_out, needed=not offline, may_repeat=may_repeat)
    if offline and texts:
        raise BadInput("prompts is not empty, but the objective trains on the prompts of its collection: clear prompts")
    if offline and rewards is not None:
        raise BadInput(
            "reward is connected, but the objective trains on the pairs of its collection: disconnect it, or connect "
            "it to evaluation_rewards"
        )
    if not offline and rewards is None:
        raise BadInput("reward is not connected: only objective dpo with a collection trains without one")
    data["model"] = model
    data["prompts"] = {"texts": texts, "negative": negative.strip()}
    data["rewards"] = [] if rewards is None else rewards.description()
    data["evaluation"] = {**data.get("evaluation", {}), "texts": tests}
    if evaluation_rewards is not None:
        data["evaluation"]["rewards"] = evaluation_rewards.description()
    if start_from is not None:
        data["lora"] = {**data.get("lora", {}), "start_from": str(start_from)}
    return described_apart(data, ("prompt", "held-out")) if may_repeat else data


def _samples(objective: dict | None) -> bool:
    """Whether the section `objective` stands for one that samples images for prompts and rewards."""
    return objective is None or objective_class(parse_sections({"objective": objective})["objective"]).needs_rollout


def upstream_digest(get_node: Callable[[str], dict], link: list) -> str:
    """A digest of what an input is connected to: all upstream nodes and their widgets, independent of node ids."""
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
    """The run of this name.

    Raises:
        BadInput: there is none.
    """
    folder = run_folder(name)
    if not (folder / "run.yaml").is_file():
        raise BadInput(f"there is no run named {name!r} in {runs_folder()}")
    return RunDirectory(folder)


def begin(
    name: str,
    data: dict,
    clip: object | None,
    clip_source: str,
    processes: int,
    gpus: list[int] | None,
    conditioning: GraphConditioning | None = None,
    spec: ModelSpec | None = None,
) -> RunDirectory:
    """The run of this name, started, resumed or extended as needed; unchanged if it is running or finished.

    Args:
        data: plain data of its description.
        clip: ComfyUI's text encoders; None if the trainer encodes the prompts.
        clip_source: digest of what `clip` and `conditioning` are connected to.
        conditioning: CONDITIONING of the graph beside its prompts.
        spec: of a connected model.

    Raises:
        BadInput: an input is invalid; nothing has been started.
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
        if launch.is_running(run):
            _refuse_extension(name, run, config)
            return run
        if run.is_finished() and not _is_extended(run, config):
            return run
    check(config, processes, gpus)
    if conditioning is not None and (config.model.graph is None or clip is None):
        raise BadInput("conditioning needs a connected model and clip: connect model and clip, or disconnect it")
    with ExitStack() as stack:
        encoded = None
        if clip is not None and not file.exists():
            encoded = stack.enter_context(encoded_prompts(clip, config, conditioning))
        if spec is not None:
            dry_run.refuse(spec, config, encoded and first_row(encoded))
        make_room(config, processes, gpus)
        run = RunDirectory(folder).open(config, ["ComfyUI", name])
        stack.callback(run.release)
        if launch.is_running(run):  # started by another ComfyUI in the meantime
            return run
        if encoded is not None:
            move_file(encoded, file)
        launch.start_run(run, processes, gpus)
    return run


def resume(run: RunDirectory) -> bool:
    """Resume a run that was stopped or has crashed; returns whether there was anything left to do.

    Raises:
        BadInput: there is too little memory, or a file that the run needs is missing.
    """
    if launch.is_running(run) or run.is_finished():
        return False
    status, config = run.status(), run.config()
    processes, gpus = status.get("processes") or 1, status.get("gpus") or None
    conditions = config.prompts.conditions
    if conditions is not None and not Path(conditions).is_file():
        raise BadInput(
            f"run {run.path.name!r} has lost its file of encoded prompts, {Path(conditions).name}: queue its GRPO "
            "Train LoRA node again, which encodes the prompts again and resumes the run"
        )
    check(config, processes, gpus)
    make_room(config, processes, gpus)
    run.acquire()
    try:
        if launch.is_running(run):
            return False
        launch.start_run(run, processes, gpus)
    finally:
        run.release()
    return True


def _is_extended(run: RunDirectory, config: RunConfig) -> bool:
    """Whether a description has more iterations than the run."""
    return config.runtime.iterations > run.config().runtime.iterations


def _refuse_extension(name: str, run: RunDirectory, config: RunConfig) -> None:
    if _is_extended(run, config):
        raise BadInput(
            f"run {name!r} is still running, to iteration {run.config().runtime.iterations}: to extend it to "
            f"{config.runtime.iterations}, stop it or wait until it has ended, and queue this again"
        )


def _refuse_changes(name: str, run: RunDirectory, config: RunConfig) -> None:
    if changes := run.changes(config):
        raise BadInput(
            f"name {name!r} belongs to a run with other settings: {'; '.join(changes[:5])}. Choose another name for a "
            "new run, or undo these changes to resume the existing run"
        )


def check_without_model(data: dict, processes: int, gpus: list[int] | None) -> None:
    """Refuse what cannot be trained with any model, before a model is loaded.

    Args:
        data: plain data of a run description; its `model` section is ignored.

    Raises:
        BadInput: a setting, prompt, reward or GPU cannot be used.
    """
    config = parse_config({**data, "model": {}})
    check_rewards(config, processes, *read_prompts(config))
    devices.require_gpus(gpus, processes)
    _refuse_busy_gpus(gpus)


def check(config: RunConfig, processes: int, gpus: list[int] | None) -> None:
    """Refuse on the node, before anything starts, what the trainer would refuse."""
    check_run(config, processes, conditions_exist=False)
    if config.model.graph is not None and config.prompts.conditions is None:
        raise BadInput("clip is not connected: a connected model's prompts are encoded by the graph's own clip")
    devices.require_gpus(gpus, processes)
    _refuse_busy_gpus(gpus)


def _refuse_busy_gpus(gpus: list[int] | None) -> None:
    """Refuse a GPU that another run uses: both would be slow, or run out of memory."""
    for folder in runs_folder().glob("*/status.json") if gpus else ():
        other = RunDirectory(folder.parent)
        shared = set(gpus) & set(other.status().get("gpus") or [])
        if shared and launch.is_running(other):
            raise BadInput(
                f"GPU {min(shared)} is in use by run {other.path.name!r}: stop that run or wait for it, or choose "
                "other gpus"
            )


def make_room(config: RunConfig, processes: int, gpus: list[int] | None) -> None:
    devices.free_memory()
    rewards = memory_together(load_rewards(config)[1].values())
    devices.require_memory(config.model, gpus, processes, config.runtime.device == "cpu", rewards)
