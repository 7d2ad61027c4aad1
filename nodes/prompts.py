"""Prompts one by one."""

from comfy_api.latest import io

from ..trainer.utils.errors import BadInput
from .types import CATEGORY

EMPTY = "prompts is empty: write one prompt per line"


class PromptLines(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_PromptLines",
            display_name="Prompt Lines (DanceGRPO)",
            category=CATEGORY,
            description="A prompt per line, as a list: the nodes behind it run once for each.",
            search_aliases=["split prompts", "text to list", "prompt list", "lines"],
            inputs=[
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="One prompt per line. Blank lines are left out.",
                )
            ],
            outputs=[io.String.Output(display_name="prompt", is_output_list=True, tooltip="One text per line.")],
        )

    @classmethod
    def validate_inputs(cls, prompts: str | None = None) -> bool | str:
        return True if prompts is None or prompts.strip() else EMPTY

    @classmethod
    def execute(cls, prompts: str) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise BadInput(EMPTY)
        return io.NodeOutput(lines)


NODES = [PromptLines]
