"""Prompt Lines: splits a text into a list of prompts, one per line."""

from comfy_api.latest import io

from ..trainer.prompts.forms import check_lines
from ..trainer.prompts.text import check_text, prompt_lines
from ..trainer.utils.errors import BadInput
from .host import inputs
from .types import CATEGORY


class PromptLines(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_PromptLines",
            display_name="Prompt Lines (DanceGRPO)",
            category=CATEGORY,
            description="A list of prompts, one per line: nodes that take one prompt run once for each of them.",
            search_aliases=["split prompts", "text to list", "prompt list", "lines"],
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One prompt per line. Blank lines and lines that begin with # are ignored.",
                )
            ],
            outputs=[
                io.String.Output(
                    display_name="prompt",
                    is_output_list=True,
                    tooltip="The prompts. GRPO Train LoRA takes the whole list.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return inputs.accepted(prompts, "prompts", _lines)

    @classmethod
    def execute(cls, prompts: str) -> io.NodeOutput:
        return io.NodeOutput(_lines(prompts))


def _lines(text: str) -> list[str]:
    check_text(text, "prompts")
    check_lines(text, "prompts")
    lines = prompt_lines(text)
    if not lines:
        raise BadInput(inputs.NO_PROMPTS)
    return lines


NODES = [PromptLines]
