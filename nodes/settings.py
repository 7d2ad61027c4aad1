"""Settings of a run as widgets, made from the run description's own fields."""

from collections.abc import Iterator

from annotated_types import Ge, Gt, Le, Lt
from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ..trainer.config import RunConfig, parse_sections, preset, preset_names
from ..trainer.objectives import DEFAULT, OBJECTIVES
from ..trainer.prompts.text import prompt_lines
from ..trainer.utils.errors import BadInput, shorten
from ..trainer.utils.fields import choices, rules
from . import types
from .host.vote_collections import with_collection
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
ADVANCED = (
    "rollout.shared_noise",
    "rollout.batch_size",
    "objective.batch_size",
    "objective.train_steps",
    "objective.step_fraction",
    "objective.clip_range",
    "advantage.clip",
    "advantage.combine",
    "advantage.normalize",
    "objective.updates",
    "objective.ratio",
    "objective.kl_weight",
    "lora.ema_decay",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
    "evaluation.images_per_prompt",
    "evaluation.every",
    "runtime.samples_every",
    "runtime.checkpoint_every",
    "runtime.device",
)
"""New ones go at the end: saved workflows keep values by position."""
SECTIONS = ("rollout", "advantage", "objective", "lora", "optimizer", "evaluation", "runtime")
_ELSEWHERE = ("texts", "file", "shapes", "rewards")
"""Fields of `evaluation` that the training node's own sockets and boxes fill."""
_STEP = {"optimizer.learning_rate": 1e-6, "objective.clip_range": 1e-6, "optimizer.weight_decay": 1e-5}
_LARGEST = 2**31 - 1
OVERRIDES_TOOLTIP = (
    "Further settings, one section.field=value per line, such as rollout.window={size: 2, position: moving}. They win "
    "over everything above. docs/configuration.md lists all of them."
)


def input_name(setting: str) -> str:
    """Name of a setting's widget: `rollout.eta` is `rollout_eta`."""
    return setting.replace(".", "_")


def widget(setting: str, advanced: bool) -> io.Input:
    """The widget of one setting, with its default, range and description."""
    section, name = setting.split(".")
    kind = OBJECTIVES[DEFAULT].Options if section == "objective" else RunConfig.model_fields[section].annotation
    field = kind.model_fields[name]
    common = {
        "id": input_name(setting),
        "display_name": name,
        "default": field.default,
        "tooltip": f"{field.description} ({setting})",
        "advanced": advanced or None,
        "optional": advanced,
    }
    if (options := choices(field)) is not None:
        return io.Combo.Input(options=options, **common)
    if field.annotation is bool:
        return io.Boolean.Input(**common)
    if field.annotation is int:
        low, high = _range(field, 1)
        return io.Int.Input(min=low, max=high, **common)
    step = _STEP.get(setting, 0.01)
    low, high = _range(field, step)
    return io.Float.Input(min=low, max=high, step=step, round=False, **common)


def _range(field: FieldInfo, step: float) -> tuple[float, float]:
    low, high = 0, _LARGEST if field.annotation is int else 1e6
    for rule in rules(field):
        low = rule.ge if isinstance(rule, Ge) else rule.gt + step if isinstance(rule, Gt) else low
        high = rule.le if isinstance(rule, Le) else rule.lt - step if isinstance(rule, Lt) else high
    return low, high


def settings(data: dict, overrides: str) -> dict:
    """Sections of a run description: complete, and valid in themselves.

    Args:
        data: sections as plain data.
        overrides: text of the box, one setting per line.

    Raises:
        BadInput: an unknown setting, a value that is not accepted, one that belongs to another node, or a collection
            that does not exist.
    """
    sections = parse_sections({name: data.get(name, {}) for name in SECTIONS}, list(_lines(overrides)))
    for field in _ELSEWHERE:
        if getattr(sections["evaluation"], field):
            raise BadInput(f"setting evaluation.{field} is given on the node GRPO Train LoRA, not here")
    found = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return found | {"objective": with_collection(found["objective"])}


def _lines(overrides: str) -> Iterator[str]:
    for line in prompt_lines(overrides):
        section = line.split("=")[0].split(".")[0].strip()
        if section not in SECTIONS:
            raise BadInput(
                f"setting {shorten(line.strip())} cannot be given here: model, prompts and rewards have their own "
                f"nodes, and the other sections are {', '.join(SECTIONS)}"
            )
        yield line.strip()


class Settings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Settings",
            display_name="GRPO Settings",
            category=CATEGORY,
            description="How a LoRA is trained: sampling, learning rate, iterations. All the rest is under advanced.",
            search_aliases=["grpo settings", "training settings", "hyperparameters", "learning rate", "dancegrpo"],
            inputs=[
                *(widget(setting, advanced=False) for setting in MAIN),
                *(widget(setting, advanced=True) for setting in ADVANCED),
                io.String.Input(
                    "overrides",
                    multiline=True,
                    default="",
                    optional=True,
                    advanced=True,
                    dynamic_prompts=False,
                    tooltip=OVERRIDES_TOOLTIP,
                ),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, overrides: str = "", **values: object) -> io.NodeOutput:
        data: dict[str, dict] = {}
        for setting in (*MAIN, *ADVANCED):
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
                "Settings that are known to work together, by name, in place of GRPO Settings. Model, prompts and "
                "rewards always come from their own nodes."
            ),
            search_aliases=["grpo preset", "training preset", "paper settings", "demo settings", "dancegrpo"],
            inputs=[
                io.Combo.Input("preset", options=preset_names(), tooltip="A file of trainer/presets in this pack."),
                io.String.Input(
                    "overrides",
                    multiline=True,
                    default="",
                    optional=True,
                    dynamic_prompts=False,
                    tooltip=OVERRIDES_TOOLTIP,
                ),
            ],
            outputs=[SettingsType.Output(display_name="settings", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, preset: str, overrides: str = "") -> io.NodeOutput:
        return io.NodeOutput(types.Settings(settings(preset_sections(preset), overrides)))


def preset_sections(name: str) -> dict:
    """A preset without its model, prompts and rewards."""
    data = {section: values for section, values in preset(name).items() if section in SECTIONS}
    evaluation = data.get("evaluation", {})
    data["evaluation"] = {field: value for field, value in evaluation.items() if field not in _ELSEWHERE}
    return data


NODES = [Settings, Preset]
