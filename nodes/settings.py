"""Nodes for the settings of a run, with widgets that are generated from the fields of the run description."""

from collections.abc import Iterator
from contextlib import contextmanager

from comfy.model_sampling import CONST
from comfy_api.latest import io

from ..trainer.config import AUTO, RunConfig, parse_sections, preset, preset_names
from ..trainer.config import settings as given_settings
from ..trainer.diffusion import kernels
from ..trainer.diffusion.process import FLOW, VP
from ..trainer.models import FAMILIES
from ..trainer.prompts.text import prompt_lines
from ..trainer.utils.errors import BadInput, shorten
from . import types
from .host import inputs
from .host.vote_collections import with_collection
from .host.widgets import LARGEST, field_widget
from .types import CATEGORY, SettingsType

MAIN = (
    "runtime.iterations",
    "rollout.prompts_per_iteration",
    "rollout.group_size",
    "rollout.steps",
    "rollout.kernel",
    "rollout.eta",
    "rollout.guidance_scale",
    "rollout.shift",
    "optimizer.learning_rate",
    "lora.rank",
    "lora.alpha",
    "runtime.seed",
)
"""What matters most; the rest goes into the overrides. Saved workflows keep values by position: append new ones."""
SECTIONS = ("rollout", "advantage", "objective", "lora", "optimizer", "evaluation", "runtime")
_ELSEWHERE = ("texts", "file", "shapes", "rewards")
"""Fields of `evaluation` that the training node's own sockets and boxes fill."""
ON_THE_NODE = "set it on GRPO Train LoRA"
_STEP = {"optimizer.learning_rate": 1e-6}
OVERRIDES_TOOLTIP = (
    "Further settings, one section.field=value per line, such as rollout.window={size: 2, position: moving}. They take "
    "precedence over the widgets. docs/configuration.md lists all settings."
)


def input_name(setting: str) -> str:
    """Name of a setting's widget: `rollout.eta` is `rollout_eta`."""
    return setting.replace(".", "_")


def widget(setting: str) -> io.Input:
    """The widget of one setting, with its default, range and description."""
    section, name = setting.split(".")
    field = RunConfig.model_fields[section].annotation.model_fields[name]
    step, limits = _STEP.get(setting, 0.01), (0, LARGEST if field.annotation is int else 1e6)
    shown = {"display_name": name, "tooltip": f"{field.description} ({setting})"}
    return field_widget(input_name(setting), field, limits, step, margin=step, **shown)


def settings(data: dict, overrides: str) -> dict:
    """Validated sections of a run description, with all defaults.

    Args:
        data: sections as plain data.
        overrides: text of the widget `overrides`, one setting per line.

    Raises:
        BadInput: a setting is unknown, invalid or set by another node, or a collection does not exist.
    """
    sections = parse_sections({name: data.get(name, {}) for name in SECTIONS}, list(_lines(overrides)))
    for field in _ELSEWHERE:
        if getattr(sections["evaluation"], field):
            raise BadInput(f"setting evaluation.{field} cannot be set here: {ON_THE_NODE}")
    if sections["lora"].start_from is not None:  # the node's widget lists ComfyUI's LoRAs; a path could be any file
        raise BadInput(f"setting lora.start_from cannot be set here: {ON_THE_NODE}")
    if sections["runtime"].wandb_mode == "online":  # someone else may have written the workflow
        raise BadInput(
            "setting runtime.wandb_mode=online cannot be set here, because it sends prompts and samples to a server: "
            "leave it out and send the run's folder wandb with `wandb sync`, or train from the command line"
        )
    found = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return found | {"objective": with_collection(found["objective"])}


def _lines(overrides: str) -> Iterator[str]:
    for line in prompt_lines(overrides):
        section = line.split("=")[0].split(".")[0].strip()
        if section not in SECTIONS:
            raise BadInput(
                f"setting {shorten(line.strip())} cannot be set here: model, prompts and rewards are set by other "
                f"nodes. The sections that can be set here are {', '.join(SECTIONS)}"
            )
        yield line.strip()


SEARCH_WORDS = ("lora", "rlhf", "dpo", "fine-tune", "finetune", "dancegrpo")
"""Of both nodes, beside their own."""


def overrides_input() -> io.Input:
    """The box for settings that have no widget."""
    return io.String.Input(
        "overrides", multiline=True, default="", optional=True, dynamic_prompts=False, tooltip=OVERRIDES_TOOLTIP
    )


class Settings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Settings",
            display_name="GRPO Settings",
            category=CATEGORY,
            description="How a LoRA is trained: sampling, learning rate, iterations. All other settings go into "
            "overrides.",
            search_aliases=[
                "grpo settings",
                "training settings",
                "hyperparameters",
                "learning rate",
                *SEARCH_WORDS,
            ],
            inputs=[
                *(widget(setting) for setting in MAIN),
                overrides_input(),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, overrides: str = "", **values: object) -> io.NodeOutput:
        data: dict[str, dict] = {}
        for setting in MAIN:
            section, name = setting.split(".")
            if input_name(setting) in values:
                data.setdefault(section, {})[name] = values[input_name(setting)]
        return io.NodeOutput(types.Settings(settings(data, overrides)))


class Preset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Preset",
            display_name="GRPO Preset",
            category=CATEGORY,
            description=(
                "A preset of settings, to use instead of GRPO Settings. The preset's model, prompts and rewards are "
                "ignored; other nodes set them."
            ),
            search_aliases=[
                "grpo preset",
                "training preset",
                "paper settings",
                "demo settings",
                *SEARCH_WORDS,
            ],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[AUTO, *preset_names()],
                    tooltip="auto chooses for the connected model and this machine's GPU, and says why on the training "
                    "node; the others are files of trainer/presets in this pack.",
                ),
                overrides_input(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Sampling steps in training, in place of the preset's; 0 leaves them to the preset.",
                ),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, preset: str, overrides: str = "", steps: int = 0) -> io.NodeOutput:
        if inputs.whole_number(steps, "steps", 0, 1000):
            overrides = f"rollout.steps={steps}\n{overrides}"
        if preset == AUTO:  # what it chooses depends on the model, which the training node knows
            given = given_settings(list(_lines(overrides)))
            return io.NodeOutput(types.Settings(settings({}, overrides), preset, given))
        return io.NodeOutput(types.Settings(settings(preset_sections(preset), overrides), preset))


@contextmanager
def preset_is_named(given: types.Settings | None, model: types.Model) -> Iterator[None]:
    """Turn an error about settings that do not fit the model into one that names the preset and others that fit.

    Raises:
        BadInput: what was raised inside, with the preset's name where it is the cause.
    """
    try:
        yield
    except BadInput as error:
        name = given.preset if isinstance(given, types.Settings) else None
        if name is None or not str(error).startswith(_OF_THE_MODEL):
            raise
        others = " or ".join(_general_presets(model))
        raise BadInput(
            f"preset {name!r} does not fit this model: choose {others} in GRPO Preset, or use GRPO Settings ({error})"
        ) from error


_OF_THE_MODEL = ("lora.targets", "rollout.kernel")
"""Beginnings of errors about settings that fit only some models."""


def _general_presets(model: types.Model) -> list[str]:
    """Presets for one GPU that name no layers and have a kernel of the model's process."""
    process = None
    if model.spec is not None:
        process = FLOW if isinstance(model.spec.sampling, CONST) else VP
    elif model.section.get("family") in FAMILIES:
        process = FAMILIES[model.section["family"]].process
    known = kernels.stochastic(process)
    fitting = []
    for name in preset_names():
        data = preset(name)
        targets, kernel = data.get("lora", {}).get("targets"), data.get("rollout", {}).get("kernel", "dance")
        if name.startswith("one-gpu") and targets is None and kernel in known:
            fitting.append(name)
    return fitting or ["another one"]


def preset_sections(name: str) -> dict:
    """A preset without its model, prompts and rewards."""
    data = {section: values for section, values in preset(name).items() if section in SECTIONS}
    evaluation = data.get("evaluation", {})
    data["evaluation"] = {field: value for field, value in evaluation.items() if field not in _ELSEWHERE}
    return data


NODES = [Settings, Preset]
