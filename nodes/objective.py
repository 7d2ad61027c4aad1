"""The objective of a run as a node, made from the registry: one choice, and the options of what is chosen."""

from typing import Any

from comfy_api.latest import io
from pydantic.fields import FieldInfo

from ..trainer.config import parse_sections
from ..trainer.objectives import DEFAULT, OBJECTIVES, Objective, ObjectiveOptions
from ..trainer.utils.errors import BadInput
from . import types
from .host.reward_files import option_widget
from .host.vote_collections import with_collection
from .types import CATEGORY, ObjectiveType


def widgets(kind: type[Objective]) -> list[io.Input]:
    """A widget per option: the objective's own ones first, then those that all have."""
    fields = {name: field for name, field in kind.Options.model_fields.items() if name != "name"}
    own = [name for name in fields if name not in ObjectiveOptions.model_fields]
    return [_widget(name, fields[name]) for name in [*own, *(name for name in fields if name not in own)]]


def _widget(name: str, field: FieldInfo) -> io.Input:
    """Texts and numbers that may be missing are text boxes, in which nothing stands for none."""
    if field.annotation is str or field.default is None:
        return io.String.Input(name, default=field.default or "", tooltip=f"{field.description} Empty for none.")
    return option_widget(name, field)


class GRPOObjective(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = [io.DynamicCombo.Option(name, widgets(OBJECTIVES[name])) for name in [DEFAULT, *_others()]]
        return io.Schema(
            node_id="DanceGRPO_Objective",
            display_name="GRPO Objective",
            category=CATEGORY,
            description="How scores, or votes, become an update. dpo with the name of a collection trains on its "
            "pairs, without sampling and without a reward.",
            search_aliases=[
                "objective",
                "loss",
                "dpo",
                "nft",
                "awm",
                "refl",
                "draft",
                "preference",
                "rlhf",
                "dancegrpo",
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                io.DynamicCombo.Input(
                    "objective", options=choices, tooltip="What each is, costs and needs: docs/objectives.md."
                )
            ],
            outputs=[ObjectiveType.Output(display_name="objective", tooltip="For GRPO Train LoRA.")],
        )

    @classmethod
    def execute(cls, objective: dict | None = None) -> io.NodeOutput:
        if objective is None:  # ComfyUI leaves a choice out that it does not know
            raise BadInput(f"objective is unknown: choose one of {', '.join(OBJECTIVES)}")
        return io.NodeOutput(types.Objective(section(objective)))


def _others() -> list[str]:
    return [name for name in OBJECTIVES if name != DEFAULT]


def section(values: dict[str, Any]) -> dict[str, Any]:
    """The section `objective` that the widgets stand for.

    Raises:
        BadInput: a value is not accepted, or there is no such collection.
    """
    given = {key: value for key, value in values.items() if key != "objective" and value != ""}
    found = parse_sections({"objective": {"name": values["objective"], **given}})["objective"]
    return with_collection(found.model_dump(mode="json"))


NODES = [GRPOObjective]
