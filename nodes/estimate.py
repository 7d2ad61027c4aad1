"""GRPO Estimate: what a training run will take, before it starts."""

from comfy_api.latest import io

from ..trainer.utils.errors import BadInput
from . import training, types
from .host import estimating, inputs, progress, results, runs
from .settings import preset_is_named
from .types import CATEGORY, connected


class Estimate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Estimate",
            display_name="GRPO Estimate",
            category=CATEGORY,
            description="Memory by part, seconds per iteration and time to the end of a training run on this machine, "
            "and what to change if it does not fit. It measures a few calls of the model and trains nothing.",
            search_aliases=[
                "grpo estimate", "vram", "memory", "out of memory", "oom", "training time", "cost", "eta", "lora",
                "rlhf", "fine-tune", "finetune", "dancegrpo",
            ],
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *training.sockets(),
                training.text_input(
                    "prompts", "Training prompts, one per line, as for GRPO Train LoRA.", default="", optional=True
                ),
                training.text_input(
                    "held_out_prompts",
                    "Held-out prompts, one per line: evaluating them takes time as well.",
                    default="",
                    optional=True,
                ),
                training.text_input("negative", "Negative prompt.", default="", optional=True),
                *training.process_inputs(),
                training.conditioning_input(),
                training.objective_input(),
                training.held_out_conditioning_input(),
            ],
            outputs=[
                io.String.Output(display_name="estimate", tooltip="The estimate as text."),
                io.Boolean.Output(display_name="fits", tooltip="Whether the memory suffices."),
                io.Float.Output(display_name="seconds", tooltip="Seconds per iteration; 0 if the run does not fit."),
            ],
        )  # fmt: skip

    @classmethod
    def check_lazy_status(cls, **given: list) -> list[str]:
        """Names of the inputs to compute next: first those that are cheap, then those that load models."""
        with progress.errors_on_node(cls.hidden.unique_id):
            training.check_prompts_of(given)
            processes = training.processes_of(given)
            if waiting := training.waiting_for(given, training.DESCRIPTIONS):
                return waiting
            runs.check_without_model(training.description(given, {}), *processes)
            return training.waiting_for(given, training.LOADED)

    @classmethod
    def execute(cls, **given: list) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        with progress.errors_on_node(node_id):
            model = inputs.single(given["grpo_model"], "grpo_model")
            connected(model, types.Model, "grpo_model")
            clip, conditioning = training.optional(given, "clip"), training.conditioning_of(given)
            if clip is not None:
                inputs.linked(clip, "clip", "CLIP")
            elif conditioning is not None:
                raise BadInput("conditioning goes with a connected clip: connect it, or disconnect conditioning")
            processes, gpus = training.processes_of(given)
            data, chosen = training.chosen_description(given, model, processes, conditioning, ("prompt", "held-out"))
            with preset_is_named(training.optional(given, "settings"), model):
                found = estimating.estimate(data, clip, conditioning, processes, gpus, model.spec, node_id)
        text = "\n\n".join(filter(None, (training.noted(data, chosen), found.pop("text"))))
        progress.say(text, node_id)
        shown = {"text": (text,), results.DATA: (results.jsonable(found),)}
        return io.NodeOutput(text, found["memory"]["fits"], found["seconds"]["iteration"], ui=shown)


NODES = [Estimate]
