"""GRPO Train LoRA: starts, resumes or attaches to a run, which trains in a separate process."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..trainer.config import parse_config
from ..trainer.models.distilled import distilled_notes
from ..trainer.prompts.text import prompt_lines
from ..trainer.utils.errors import BadInput
from . import types
from .host import automatic, devices, inputs, progress, results, runs
from .host.encoding import GraphConditioning
from .host.folders import check_name
from .settings import preset_is_named
from .types import CATEGORY, ModelType, ObjectiveType, RewardType, SettingsType, connected

BASE_MODEL = "(the base model)"
MOST_PROCESSES = 64
DESCRIPTIONS = ("reward", "settings", "evaluation_rewards", "objective")
"""Inputs that are cheap to compute. They are checked first, because most mistakes are in them."""
LOADED = ("grpo_model", "clip", "conditioning", "held_out_conditioning")
"""Inputs whose computation loads a model."""
CONDITIONINGS = ("conditioning", "held_out_conditioning")


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_TrainLoRA",
            display_name="GRPO Train LoRA",
            category=CATEGORY,
            description=(
                "Train a LoRA from rewards, in a separate process. If the same graph is queued again, the run of that "
                "name is resumed, or its result is returned; it is never trained twice. Cancel stops the run and keeps "
                "the newest LoRA."
            ),
            search_aliases=[
                "grpo", "rlhf", "dpo", "reinforcement learning", "rl", "human feedback", "preference", "vote",
                "reward training", "reward model", "train lora", "lora", "fine-tune", "finetune", "dancegrpo",
            ],
            is_output_node=True,
            is_input_list=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[*sockets(), *_widgets(), *_optional_inputs()],
            outputs=results.outputs(status_first=False),
        )  # fmt: skip

    # ComfyUI shows an error once for every input named here, so only `name` is. `check_lazy_status` checks the other
    # inputs, also before anything is loaded.
    @classmethod
    def validate_inputs(cls, name: list[str | None] = (None,)) -> bool | str:
        return inputs.accepted(name[0], "name", check_name)

    @classmethod
    def fingerprint_inputs(cls, name: list[str | None] = (None,), **_: object) -> float | str:
        return results.fingerprint(name[0])

    @classmethod
    def check_lazy_status(cls, **given: list) -> list[str]:
        """Names of the inputs to compute next: first those that are cheap, then those that load models."""
        with progress.errors_on_node(cls.hidden.unique_id):
            _check_widgets(given)
            if waiting := waiting_for(given, DESCRIPTIONS):
                return waiting
            runs.check_without_model(description(given, {}), *processes_of(given))
            return waiting_for(given, LOADED)

    @classmethod
    def execute(cls, **given: list) -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            name, model = inputs.single(given["name"], "name"), inputs.single(given["grpo_model"], "grpo_model")
            connected(model, types.Model, "grpo_model")
            clip, conditioning = optional(given, "clip"), conditioning_of(given)
            source = ""
            if clip is not None:
                source = cls._source_of("clip")
                inputs.linked(clip, "clip", "CLIP")
            sources = tuple(cls._source_of(name) if name in given else "" for name in CONDITIONINGS)
            source += "".join(f"-{each}" for each in sources if each)
            (processes, gpus), node_id = processes_of(given), cls.hidden.unique_id
            data, chosen = chosen_description(given, model, processes, conditioning, sources)
            if note := noted(data, chosen):
                progress.say(note, node_id)
            with preset_is_named(optional(given, "settings"), model):
                run = runs.begin(name, data, clip, source, processes, gpus, conditioning, model.spec)
            if inputs.single(given["wait"], "wait"):
                bar = progress.NodeProgress(cls.hidden.unique_id, run.config().runtime.iterations)
                progress.wait_or_cancel(run, name, bar)
            return results.result(run, cls, status_first=False, note=note)

    @classmethod
    def _source_of(cls, name: str) -> str:
        graph = cls.hidden.dynprompt
        return runs.upstream_digest(graph.get_node, graph.get_node(cls.hidden.unique_id)["inputs"][name])


# -------------------------------------------------------------------------------------------------------------- schema


def sockets() -> list[io.Input]:
    return [
        ModelType.Input("grpo_model", lazy=True, tooltip="The model to train: from GRPO Base Model or Demo Model."),
        RewardType.Input(
            "reward",
            optional=True,
            lazy=True,
            tooltip="The reward to maximise; use Combine Rewards for several. Not needed for dpo with a collection.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            lazy=True,
            tooltip="Encodes the prompts, so that the training process loads no text encoder. Required for a connected "
            "model. Without it, the text encoders of the diffusers folder are used.",
        ),
        SettingsType.Input(
            "settings", optional=True, lazy=True, tooltip="From GRPO Settings or GRPO Preset; else the defaults."
        ),
        RewardType.Input(
            "evaluation_rewards",
            optional=True,
            lazy=True,
            tooltip="Rewards that are only measured on the held-out prompts, not trained.",
        ),
    ]


def _widgets() -> list[io.Input]:
    return [
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="Name of the run and its LoRA. Other settings need a new name; more iterations extend the existing "
            "run. Runs are in output/dancegrpo/runs, LoRAs in output/loras/dancegrpo.",
        ),
        text_input(
            "prompts",
            "Training prompts, one per line; or a list of prompts. Each iteration uses some of them. Leave it empty "
            "if the objective trains on a collection of votes, which has prompts of its own.",
        ),
        text_input(
            "held_out_prompts",
            "Prompts that are not trained on, one per line. Their images are scored before and after training.",
            default="",
            optional=True,
        ),
        text_input("negative", "Negative prompt, used if guidance_scale is not 1.", default="", optional=True),
        io.Boolean.Input(
            "wait",
            default=True,
            label_on="wait for the result",
            label_off="in the background",
            tooltip="Wait for the run and show its progress, or return at once and continue with the graph; then use "
            "GRPO Run to watch, stop or resume the run.",
        ),
        *process_inputs(),
    ]


def process_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "processes", default=1, min=1, max=MOST_PROCESSES, tooltip="Processes that share the training: one per GPU."
        ),
        io.String.Input(
            "gpus",
            default="",
            optional=True,
            advanced=True,
            tooltip="GPU numbers, such as 0,1, one per process. If empty, the GPUs that ComfyUI sees are used.",
        ),
    ]


def _optional_inputs() -> list[io.Input]:
    return [
        conditioning_input(),
        io.Combo.Input(
            "start_from",
            options=[BASE_MODEL, *folder_paths.get_filename_list("loras")],
            default=BASE_MODEL,
            optional=True,
            advanced=True,
            tooltip="An existing LoRA to continue training from. It must be for this model, and its rank must not be "
            "higher than lora.rank.",
        ),
        objective_input(),
        held_out_conditioning_input(),
    ]


def objective_input() -> io.Input:
    tooltip = "From GRPO Objective; without it, the objective of the settings is used."
    return ObjectiveType.Input("objective", optional=True, lazy=True, tooltip=tooltip)


def conditioning_input() -> io.Input:
    return io.Conditioning.Input(
        "conditioning",
        optional=True,
        lazy=True,
        tooltip="What all prompts share besides the text, for a connected model: guidance, reference latents, a first "
        "frame, masks. Its text is ignored. Or a list with one for each prompt, which then is used with its text.",
    )


def held_out_conditioning_input() -> io.Input:
    return io.Conditioning.Input(
        "held_out_conditioning",
        optional=True,
        lazy=True,
        tooltip="One for each held-out prompt, if conditioning has one for each prompt.",
    )


def text_input(name: str, tooltip: str, **options: object) -> io.Input:
    return io.String.Input(name, multiline=True, dynamic_prompts=False, tooltip=tooltip, **options)


# -------------------------------------------------------------------------------------------------------------- inputs


def waiting_for(given: dict[str, list], names: tuple[str, ...]) -> list[str]:
    """Which of these sockets are connected to something that has not been computed yet."""
    return [name for name in names if name in given and list(given[name]) == [None]]


def optional(given: dict[str, list], name: str, default: object = None) -> object:
    """The one value of an optional input."""
    return inputs.single(given[name], name) if name in given else default


def prompts_of(given: dict[str, list], name: str) -> str:
    """Text with a prompt per line; each text of a connected list, such as from Prompt Lines, has lines of its own."""
    return "\n".join(inputs.text(text, name) for text in given.get(name, []))


def processes_of(given: dict[str, list]) -> tuple[int, list[int] | None]:
    """Number of processes and their GPUs."""
    processes = inputs.whole_number(inputs.single(given["processes"], "processes"), "processes", 1, MOST_PROCESSES)
    return processes, devices.parse_gpus(inputs.text(optional(given, "gpus", ""), "gpus"), processes)


def _check_widgets(given: dict[str, list]) -> None:
    check_name(inputs.single(given["name"], "name"))
    check_prompts_of(given)
    processes_of(given)
    inputs.single(given["wait"], "wait")
    start_from(given)


def check_prompts_of(given: dict[str, list]) -> None:
    """Raise BadInput where prompts are missing, repeated, or both held out and trained on."""
    decided = "settings" not in given and "objective" not in given  # else the objective may bring its own
    texts = prompts_of(given, "prompts"), prompts_of(given, "held_out_prompts")
    runs.check_texts(*texts, needed=decided, may_repeat="conditioning" in given)


def conditioning_of(given: dict[str, list]) -> GraphConditioning | None:
    """What is connected to `conditioning` and `held_out_conditioning`.

    Raises:
        BadInput: there are several, but not one for each prompt.
    """
    found = {name: [inputs.conditioning(each, name) for each in given.get(name, [])] for name in CONDITIONINGS}
    shared, held_out = found.values()
    if not shared and not held_out:
        return None
    if len(shared) == 1 and not held_out:
        return GraphConditioning(shared[0])
    for (name, own), field in zip(found.items(), ("prompts", "held_out_prompts"), strict=True):
        count = len(prompt_lines(prompts_of(given, field)))
        if len(own) != count:
            raise BadInput(
                f"{name} has {len(own)} entries and {field} has {count} lines: connect one for each line, or a single "
                "conditioning for all prompts"
            )
    return GraphConditioning(None, tuple(shared), tuple(held_out))


def start_from(given: dict[str, list]) -> Path | None:
    name = optional(given, "start_from", BASE_MODEL)
    if name == BASE_MODEL:
        return None
    file = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if file is None:
        raise BadInput(f"start_from {str(name)[:100]!r} is not in ComfyUI's list of LoRAs: choose one from the list")
    return Path(file).absolute()


def description(given: dict[str, list], model: dict) -> dict:
    """The plain data of the run description."""
    reward, settings = optional(given, "reward"), optional(given, "settings")
    evaluation_rewards = optional(given, "evaluation_rewards")
    if reward is not None:
        connected(reward, types.Rewards, "reward")
    if settings is not None:
        connected(settings, types.Settings, "settings")
        settings = settings.sections
    objective = optional(given, "objective")
    if objective is not None:
        connected(objective, types.Objective, "objective")
        settings = {**(settings or {}), "objective": dict(objective)}
    if evaluation_rewards is not None:
        connected(evaluation_rewards, types.Rewards, "evaluation_rewards")
    negative = inputs.text(optional(given, "negative", ""), "negative")
    return runs.describe(
        model,
        settings,
        reward,
        evaluation_rewards,
        prompts_of(given, "prompts"),
        prompts_of(given, "held_out_prompts"),
        negative,
        start_from(given),
        may_repeat="conditioning" in given,
    )


def noted(data: dict, chosen: str) -> str:
    """What the node says of a description beside the run's state: what preset auto chose, and warnings."""
    return "\n\n".join(filter(None, (chosen, *(f"warning: {each}" for each in distilled_notes(parse_config(data))))))


def chosen_description(
    given: dict[str, list],
    model: types.Model,
    processes: int,
    conditioning: GraphConditioning | None,
    sources: tuple[str, str],
) -> tuple[dict, str]:
    """The plain data of the run description, with what preset auto chooses, and its reasons as text.

    Args:
        sources: digests of what CONDITIONINGS are connected to.
    """
    data = description(given, model.section)
    if conditioning is not None:
        data = runs.described_apart(data, sources) if conditioning.is_own else runs.described_alike(data)
    return automatic.resolved(data, optional(given, "settings"), optional(given, "objective"), model, processes)


NODES = [TrainLoRA]
