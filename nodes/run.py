"""GRPO Run: look at, watch, stop or resume a training run."""

from comfy.model_management import InterruptProcessingException
from comfy_api.latest import io

from ..trainer.runs import launch
from ..trainer.utils.errors import BadInput, shorten
from .host import inputs, progress, results, runs
from .host.folders import check_name
from .types import CATEGORY, RunType

ACTIONS = ("look", "watch", "stop", "resume")


class Run(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Run",
            display_name="GRPO Run",
            category=CATEGORY,
            description="Show a training run, wait for its end, stop it or resume it, and get its LoRA.",
            search_aliases=[
                "grpo run", "training status", "resume training", "stop training", "lora", "rlhf", "fine-tune",
                "finetune", "dancegrpo",
            ],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                RunType.Input("run", optional=True, tooltip="From GRPO Train LoRA; or enter a name below."),
                io.String.Input("name", default="", optional=True, tooltip="Name of a run, if none is connected."),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    tooltip="look: show its current state. watch: wait for its end (Cancel does not stop the run). "
                    "stop: stop it and keep the newest LoRA. resume: continue a stopped or crashed run.",
                ),
            ],
            outputs=results.outputs(status_first=True),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        return inputs.accepted(name, "name", lambda text: text and check_name(text))

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return float("nan")  # NaN differs from the last value; a new object, as ComfyUI compares by identity first

    @classmethod
    def execute(cls, action: str, run: str | None = None, name: str = "") -> io.NodeOutput:
        with progress.errors_on_node(cls.hidden.unique_id):
            if run is None and not name:
                raise BadInput("no run is given: connect a run, or enter its name")
            if run is not None and name and name != run:
                raise BadInput(
                    f"run {shorten(run)} is connected and the name is {name!r}: clear the name, or disconnect"
                )
            directory = runs.existing(run or name)
            if action == "stop":
                launch.stop(directory, grace=progress.GRACE)
            elif action == "resume":
                runs.resume(directory)
            elif action == "watch":
                bar = progress.NodeProgress(cls.hidden.unique_id, directory.config().runtime.iterations)
                try:
                    progress.wait(directory, bar)
                except InterruptProcessingException:  # only the watching has ended, which is no failure
                    return results.unwatched(directory, cls)
            return results.result(directory, cls, status_first=True)


NODES = [Run]
