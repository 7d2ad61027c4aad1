"""GRPO Train LoRA: the training itself is a process of its own."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..trainer.utils.errors import BadInput
from . import types
from .host import inputs, memory, progress, results, runs
from .host.folders import check_name
from .types import CATEGORY, ModelType, ObjectiveType, RewardType, SettingsType, connected

BASE_MODEL = "(the base model)"
MOST_PROCESSES = 64
DESCRIPTIONS = ("reward", "settings", "evaluation_rewards", "objective")
"""Sockets whose values are made at no cost, and with which most mistakes are found."""
LOADED = ("grpo_model", "clip", "conditioning")
"""Sockets behind which models are loaded."""


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_TrainLoRA",
            display_name="GRPO Train LoRA",
            category=CATEGORY,
            description=(
                "Train a LoRA from rewards, in a process of its own. Queueing the same again continues the run of that "
                "name, or gives its result; it never trains the same twice. Cancel stops it and keeps what was "
                "learned."
            ),
            search_aliases=[
                "grpo", "rlhf", "dpo", "reinforcement learning", "rl", "human feedback", "preference", "vote",
                "reward training", "reward model", "train lora", "lora", "fine-tune", "finetune", "dancegrpo",
            ],
            is_output_node=True,
            is_input_list=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[*_sockets(), *_widgets(), *_late_inputs()],
            outputs=results.outputs(status_first=False),
        )  # fmt: skip

    # ComfyUI repeats a refusal at every input named here, so only one is. The other inputs are checked by
    # `check_lazy_status`, still before anything is loaded.
    @classmethod
    def validate_inputs(cls, name: list[str | None] = (None,)) -> bool | str:
        try:
            if name[0] is not None:  # else it arrives through a link
                check_name(name[0])
        except BadInput as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: list[str | None] = (None,), **_: object) -> float | str:
        return results.fingerprint(name[0])

    @classmethod
    def check_lazy_status(cls, **given: list) -> list[str]:
        """Names of the inputs to compute next: first descriptions, then what loads models."""
        with progress.errors_on_node(cls.hidden.unique_id):
            _check_widgets(given)
            if waiting := _waiting(given, DESCRIPTIONS):
                return waiting
            runs.check_without_model(_description(given, {}), *_processes(given))
            return _waiting(given, LOADED)

    @classmethod
    def execute(cls, **given: list) -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            name, model = inputs.single(given["name"], "name"), inputs.single(given["grpo_model"], "grpo_model")
            connected(model, types.Model, "grpo_model")
            clip, conditioning = _optional(given, "clip"), _optional(given, "conditioning")
            source = ""
            if clip is not None:
                source = cls._source_of("clip")
                inputs.linked(clip, "clip", "CLIP")
            if conditioning is not None:
                source += f"-{cls._source_of('conditioning')}"
                inputs.conditioning(conditioning, "conditioning")
            data, (processes, gpus) = _description(given, model.section), _processes(given)
            run = runs.begin(name, data, clip, source, processes, gpus, conditioning, model.blueprint)
            if inputs.single(given["wait"], "wait"):
                bar = progress.NodeProgress(cls.hidden.unique_id, run.config().runtime.iterations)
                progress.wait_or_cancel(run, name, bar)
            return results.result(run, cls, status_first=False)

    @classmethod
    def _source_of(cls, name: str) -> str:
        graph = cls.hidden.dynprompt
        return runs.upstream_digest(graph.get_node, graph.get_node(cls.hidden.unique_id)["inputs"][name])


# -------------------------------------------------------------------------------------------------------------- schema


def _sockets() -> list[io.Input]:
    return [
        ModelType.Input("grpo_model", lazy=True, tooltip="The model that learns: GRPO Base Model or Demo Model."),
        RewardType.Input(
            "reward",
            optional=True,
            lazy=True,
            tooltip="What is rewarded; Combine Rewards mixes several. Only objective dpo with a collection needs none.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            lazy=True,
            tooltip="Encodes the prompts, so that the trainer loads no text encoder. Without it, the trainer uses "
            "those of the model's folder.",
        ),
        SettingsType.Input(
            "settings", optional=True, lazy=True, tooltip="GRPO Settings or GRPO Preset; without it, every default."
        ),
        RewardType.Input(
            "evaluation_rewards",
            optional=True,
            lazy=True,
            tooltip="Rewards that are measured on the held-out prompts and not trained on.",
        ),
    ]


def _widgets() -> list[io.Input]:
    return [
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="Name of the run and its LoRA. It belongs to these settings: other settings need another name, but "
            "more iterations extend the run. Runs are in output/dancegrpo/runs, LoRAs in output/loras/dancegrpo.",
        ),
        _text(
            "prompts",
            "Training prompts, one per line; or a list of prompts. Each iteration uses some of them. Empty where the "
            "objective trains on a collection, whose prompts it takes.",
        ),
        _text(
            "held_out_prompts",
            "Prompts that are not trained on, one per line: images of them are scored before and after.",
            default="",
            optional=True,
        ),
        _text("negative", "Negative prompt, used where guidance_scale is not 1.", default="", optional=True),
        io.Boolean.Input(
            "wait",
            default=True,
            label_on="wait for the result",
            label_off="in the background",
            tooltip="Wait and show progress, or return at once and leave the run to GRPO Run. Other prompts can be "
            "queued while a run is in the background.",
        ),
        io.Int.Input(
            "processes", default=1, min=1, max=MOST_PROCESSES, tooltip="Processes that share the training: one per GPU."
        ),
        io.String.Input(
            "gpus",
            default="",
            optional=True,
            advanced=True,
            tooltip="GPU numbers, such as 0,1: as many as processes. Empty uses those that ComfyUI sees.",
        ),
    ]


def _late_inputs() -> list[io.Input]:
    """Inputs after the widgets; saved workflows keep widget values by position, so new widgets go to the end."""
    return [
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            lazy=True,
            tooltip="What every prompt carries beside its text, with a connected model: guidance, reference latents, a "
            "first frame, masks. The text in it is not used.",
        ),
        io.Combo.Input(
            "start_from",
            options=[BASE_MODEL, *folder_paths.get_filename_list("loras")],
            default=BASE_MODEL,
            optional=True,
            advanced=True,
            tooltip="A LoRA to start from, instead of the base model alone: training continues to change it. It must "
            "be made for this model, and of no higher rank than lora.rank.",
        ),
        ObjectiveType.Input(
            "objective", optional=True, lazy=True, tooltip="GRPO Objective; without it, that of the settings."
        ),
    ]


def _text(name: str, tooltip: str, **options: object) -> io.Input:
    return io.String.Input(name, multiline=True, dynamic_prompts=False, tooltip=tooltip, **options)


# -------------------------------------------------------------------------------------------------------------- inputs


def _waiting(given: dict[str, list], names: tuple[str, ...]) -> list[str]:
    """Which of these sockets are connected to something that has not been computed yet."""
    return [name for name in names if name in given and list(given[name]) == [None]]


def _optional(given: dict[str, list], name: str, default: object = None) -> object:
    """The one value of an optional input."""
    return inputs.single(given[name], name) if name in given else default


def _prompts(given: dict[str, list], name: str) -> str:
    """Text with a prompt per line; each text of a connected list, such as from Prompt Lines, has lines of its own."""
    return "\n".join(inputs.text(text, name) for text in given.get(name, []))


def _processes(given: dict[str, list]) -> tuple[int, list[int] | None]:
    """Number of processes and their GPUs."""
    processes = inputs.whole_number(inputs.single(given["processes"], "processes"), "processes", 1, MOST_PROCESSES)
    return processes, memory.parse_gpus(inputs.text(_optional(given, "gpus", ""), "gpus"), processes)


def _check_widgets(given: dict[str, list]) -> None:
    check_name(inputs.single(given["name"], "name"))
    decided = "settings" not in given and "objective" not in given  # else the objective may bring its own
    runs.check_texts(_prompts(given, "prompts"), _prompts(given, "held_out_prompts"), needed=decided)
    _processes(given)
    inputs.single(given["wait"], "wait")
    _start_from(given)


def _start_from(given: dict[str, list]) -> Path | None:
    name = _optional(given, "start_from", BASE_MODEL)
    if name == BASE_MODEL:
        return None
    file = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if file is None:
        raise BadInput(f"start_from is {str(name)[:100]!r}, which is not in ComfyUI's list of LoRAs: choose one of it")
    return Path(file).absolute()


def _description(given: dict[str, list], model: dict) -> dict:
    """The plain data of the run description."""
    reward, settings = _optional(given, "reward"), _optional(given, "settings")
    evaluation_rewards = _optional(given, "evaluation_rewards")
    if reward is not None:
        connected(reward, types.Rewards, "reward")
    if settings is not None:
        connected(settings, types.Settings, "settings")
    objective = _optional(given, "objective")
    if objective is not None:
        connected(objective, types.Objective, "objective")
        settings = {**(settings or {}), "objective": dict(objective)}
    if evaluation_rewards is not None:
        connected(evaluation_rewards, types.Rewards, "evaluation_rewards")
    negative = inputs.text(_optional(given, "negative", ""), "negative")
    return runs.describe(
        model,
        settings,
        reward,
        evaluation_rewards,
        _prompts(given, "prompts"),
        _prompts(given, "held_out_prompts"),
        negative,
        _start_from(given),
    )


NODES = [TrainLoRA]
