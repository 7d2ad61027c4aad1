"""The training itself, and a look at any run: the run itself is a process of its own."""

import hashlib
import io as memory_file

import torch
from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ..trainer.runs import launch
from ..trainer.runs.directory import RunDirectory
from ..trainer.utils.errors import BadInput
from . import types
from .host import runs, session
from .host.folders import check_name, publish_lora, run_folder
from .types import CATEGORY, Judges, ModelType, RewardType, RunType, SettingsType, connected

ALWAYS = float("nan")
"""A fingerprint that equals nothing, not even itself: the node runs every time."""
ACTIONS = ("look", "watch", "stop", "resume")


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_TrainLoRA",
            display_name="GRPO Train LoRA",
            category=CATEGORY,
            description=(
                "Train a LoRA from rewards, in a process of its own. Queueing the same again goes on with the run of "
                "that name, or gives its result; it never trains the same twice. Cancel stops it and keeps what was "
                "learned."
            ),
            search_aliases=["grpo", "train lora", "reinforcement learning", "rl", "reward training", "dancegrpo"],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                ModelType.Input("grpo_model", tooltip="The model that learns: GRPO Base Model or Demo Model."),
                RewardType.Input("reward", tooltip="What is rewarded; several are mixed by Combine Rewards."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Encodes the prompts, so that the trainer loads no text encoder. Without it, the trainer "
                    "takes those of the model's folder.",
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="GRPO Settings or GRPO Preset; without it, every default."
                ),
                RewardType.Input(
                    "judges", optional=True, tooltip="Rewards that only watch: measured on the held-out prompts."
                ),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="Name of the run and its LoRA. With these settings it is one run for good: other settings "
                    "need another name. Runs lie in output/dancegrpo/runs, LoRAs in output/loras/dancegrpo.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    dynamic_prompts=False,
                    tooltip="Training prompts, one per line. Each iteration takes some of them.",
                ),
                io.String.Input(
                    "held_out_prompts",
                    multiline=True,
                    default="",
                    optional=True,
                    dynamic_prompts=False,
                    tooltip="Prompts that are not trained on, one per line: they are judged before and after.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    optional=True,
                    dynamic_prompts=False,
                    tooltip="Negative prompt, used where guidance_scale is not 1.",
                ),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    label_on="wait for the result",
                    label_off="in the background",
                    tooltip="Wait and show progress, or return at once and let GRPO Run look after it. Other prompts "
                    "can be queued while a run is in the background.",
                ),
                io.Int.Input(
                    "processes",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Processes that share the training: one per GPU.",
                ),
                io.String.Input(
                    "gpus",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="GPU numbers, such as 0,1: as many as processes. Empty takes those that ComfyUI sees.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="What every prompt carries beside its text, with a connected model: guidance, reference "
                    "latents, a first frame, masks. The text in it is not used.",
                ),
            ],
            outputs=_result_outputs(run_last=False),
        )

    @classmethod
    def validate_inputs(
        cls,
        name: str | None = None,
        prompts: str | None = None,
        held_out_prompts: str | None = None,
        gpus: str | None = None,
    ) -> bool | str:
        # A value that arrives by wire is None here; what is looked at then is the rest.
        try:
            if name is not None:
                check_name(name)
            if prompts is not None:
                runs.check_texts(prompts, held_out_prompts or "")
            if gpus is not None:
                session.gpu_numbers(gpus)
        except BadInput as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **_: object) -> float | str:
        return _state_on_disk(name)

    @classmethod
    def execute(
        cls,
        grpo_model: dict,
        reward: Judges,
        name: str,
        prompts: str,
        wait: bool,
        processes: int,
        clip: object | None = None,
        settings: dict | None = None,
        judges: Judges | None = None,
        held_out_prompts: str = "",
        negative: str = "",
        gpus: str = "",
        conditioning: list | None = None,
    ) -> io.NodeOutput:
        connected(grpo_model, types.Model, "grpo_model")
        connected(reward, Judges, "reward")
        if settings is not None:
            connected(settings, types.Settings, "settings")
        if judges is not None:
            connected(judges, Judges, "judges")
        data = runs.describe(grpo_model, settings, reward, judges, prompts, held_out_prompts, negative)
        source = "" if clip is None else cls._source_of("clip")
        if conditioning is not None:
            source += f"-{cls._source_of('conditioning')}"
        run = runs.begin(name, data, clip, source, processes, session.parse_gpus(gpus, processes), conditioning)
        if wait:
            screen = session.Screen(cls.hidden.unique_id, run.config().runtime.iterations)
            runs.wait_or_cancel(run, name, screen)
        return _result(run, cls, run_last=False)

    @classmethod
    def _source_of(cls, name: str) -> str:
        graph = cls.hidden.dynprompt
        return runs.upstream_digest(graph.get_node, graph.get_node(cls.hidden.unique_id)["inputs"][name])


class Run(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_Run",
            display_name="GRPO Run",
            category=CATEGORY,
            description="Look at a training run, watch it to its end, stop it, or let it go on; and take its LoRA.",
            search_aliases=["grpo run", "training status", "resume training", "stop training", "dancegrpo"],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                RunType.Input("run", optional=True, tooltip="From GRPO Train LoRA; or give its name below."),
                io.String.Input("name", default="", optional=True, tooltip="Name of a run, where none is connected."),
                io.Combo.Input(
                    "action",
                    options=list(ACTIONS),
                    tooltip="look: its state now. watch: wait for its end (cancel ends the watching, not the run). "
                    "stop: end it, keeping what was learned. resume: let a stopped or broken run go on.",
                ),
            ],
            outputs=_result_outputs(run_last=True),
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool | str:
        try:
            if name:
                check_name(name)
        except BadInput as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> float:
        return ALWAYS

    @classmethod
    def execute(cls, action: str, run: str | None = None, name: str = "") -> io.NodeOutput:
        if run is None and not name:
            raise BadInput("no run: connect one, or give its name")
        if run is not None and name and name != run:
            raise BadInput(f"run {run!r} is connected and the name is {name!r}: clear the name, or disconnect")
        directory = runs.existing(run or name)
        if action == "stop":
            launch.stop(directory, grace=runs.GRACE)
        elif action == "resume":
            runs.resume(directory)
        elif action == "watch":
            runs.wait(directory, session.Screen(cls.hidden.unique_id, directory.config().runtime.iterations))
        return _result(directory, cls, run_last=True)


# ------------------------------------------------------------------------------------------------------------- results


def _result_outputs(run_last: bool) -> list[io.Output]:
    outputs = [
        io.LoraModel.Output(display_name="lora_model", tooltip="The newest LoRA, for core's Load LoRA Model."),
        io.LossMap.Output(
            display_name="loss_map",
            tooltip="Minus the mean reward per iteration, for core's Plot Loss Graph. (GRPO's own loss is about 0 by "
            "construction.)",
        ),
        io.String.Output(
            display_name="lora_name", tooltip="Its name in the lists of ComfyUI's LoRA loaders, once the run has ended."
        ),
        RunType.Output(display_name="run", tooltip="For GRPO Run."),
        io.Image.Output(display_name="curve", tooltip="Rewards over the iterations."),
        io.Image.Output(display_name="samples", tooltip="Before and after, or the newest samples."),
    ]
    if not run_last:
        return outputs
    run = outputs.pop(3)
    return [io.String.Output(display_name="status", tooltip="State, rewards and time left."), *outputs, run]


def _result(run: RunDirectory, cls: type[io.ComfyNode], run_last: bool) -> io.NodeOutput:
    """What a run has to give now; nodes after an output that is not there yet are left out."""
    name, running = run.path.name, launch.is_running(run)
    text = runs.status_text(run, running)
    samples = _samples(run)
    absent = ExecutionBlocker(None)
    lora = _lora(run)
    values = runs.losses(run)
    outputs = [
        absent if lora is None else lora,
        {"loss": values} if len(set(values)) > 1 else absent,  # core's plot divides by their range
        absent if lora is None or running else publish_lora(run.lora_file, name),
        name,
        _or_absent(_curve(run)),
        _or_absent(samples),
    ]
    if run_last:
        outputs = [text, *outputs[:3], *outputs[4:], name]
    shown = {"text": (text,)}
    if samples is not None:
        shown |= ui.PreviewImage(samples, cls=cls).as_dict()
    session.say(text, cls.hidden.unique_id)
    return io.NodeOutput(*outputs, ui=shown)


def _or_absent(value: torch.Tensor | None) -> object:
    return ExecutionBlocker(None) if value is None else value


def _lora(run: RunDirectory) -> dict[str, torch.Tensor] | None:
    from safetensors.torch import load_file

    return load_file(run.lora_file) if run.lora_file.exists() else None


def _curve(run: RunDirectory) -> torch.Tensor | None:
    from ..trainer.runs.report import draw_reward_curve

    picture = draw_reward_curve(run.events(), (run.summary() or {}).get("evaluations", []))
    return None if picture is None else _image(memory_file.BytesIO(picture))


def _samples(run: RunDirectory) -> torch.Tensor | None:
    both = run.path / "report" / "before_after.png"
    picture = both if both.exists() and runs.is_finished(run) else runs.newest_sample(run)
    return None if picture is None else _image(picture)


def _image(source: object) -> torch.Tensor:
    """A picture as ComfyUI has images: `[1, H, W, 3]`."""
    import numpy as np
    from PIL import Image

    with Image.open(source) as picture:
        array = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array)[None]


def _state_on_disk(name: str | None) -> float | str:
    """Changes whenever the run of this name does."""
    try:
        run = RunDirectory(run_folder(name or ""))
    except BadInput:
        return ALWAYS
    if launch.is_running(run):
        return ALWAYS
    status = run.path / "status.json"
    return hashlib.sha256(status.read_bytes() if status.exists() else b"").hexdigest()


NODES = [TrainLoRA, Run]
