"""GRPO Objective: selects an objective and its options; the widgets are generated from the registry."""

from typing import Any

from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ..trainer.config import parse_sections
from ..trainer.objectives import DEFAULT, OBJECTIVES, Objective
from ..trainer.utils.errors import BadInput
from . import types
from .host.reward_files import option_widget
from .host.vote_collections import with_collection
from .types import CATEGORY, ObjectiveType


def widgets(kind: type[Objective]) -> list[io.Input]:
    """A widget per option: the objective's own ones first, then those that several have."""
    fields = {name: field for name, field in kind.Options.model_fields.items() if name != "name"}
    own = [name for name in fields if name in kind.Options.__annotations__]
    return [_widget(name, fields[name]) for name in [*own, *(name for name in fields if name not in own)]]


def _widget(name: str, field: FieldInfo) -> io.Input:
    """Optional texts and numbers are text boxes; an empty box stands for None.

    All are optional, so that an API client can leave them out, and options added later do not break saved graphs.
    """
    if field.annotation is str or field.default is None:
        text = f"{field.description} Empty for none."
        return io.String.Input(name, default=field.default or "", tooltip=text, optional=True)
    found = option_widget(name, field)
    found.optional = True
    return found


class GRPOObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = [io.DynamicCombo.Option(name, widgets(OBJECTIVES[name])) for name in [DEFAULT, *_others()]]
        return io.Schema(
            node_id="DanceGRPO_Objective",
            display_name="GRPO Objective",
            category=CATEGORY,
            description="The training objective (loss). dpo with the name of a collection trains on your votes, "
            "without sampling and without a reward.",
            search_aliases=[
                "objective",
                "loss",
                "dpo",
                "nft",
                "awm",
                "refl",
                "draft",
                "preference",
                "vote",
                "human feedback",
                "rlhf",
                "lora",
                "fine-tune",
                "finetune",
                "dancegrpo",
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.DynamicCombo.Input(
                    "objective", options=choices, tooltip="The objective; docs/objectives.md compares them."
                )
            ],
            outputs=[ObjectiveType.Output(display_name="objective", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, objective: dict | None = None) -> io.NodeOutput:
        if objective is None:  # ComfyUI drops a choice that is not among the options
            raise BadInput(f"objective is unknown: choose one of {', '.join(OBJECTIVES)}")
        return io.NodeOutput(types.Objective(section(objective)))


def _others() -> list[str]:
    return [name for name in OBJECTIVES if name != DEFAULT]


def section(values: dict[str, Any]) -> dict[str, Any]:
    """The section `objective` of the run description, from the values of the widgets.

    Raises:
        BadInput: a value is invalid, or the collection does not exist.
    """
    given = {key: value for key, value in values.items() if key != "objective" and value not in ("", None)}
    found = parse_sections({"objective": {"name": values["objective"], **given}})["objective"]
    return with_collection(found.model_dump(mode="json"))


NODES = [GRPOObjective]
