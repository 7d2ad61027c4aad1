"""Apply LoRA over Sigmas: a LoRA that is active in a part of the sampling steps, with ComfyUI's weight hooks."""

from pathlib import Path

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..trainer.rewards.files import read_weights
from ..trainer.utils.errors import BadInput
from .host import inputs
from .types import CATEGORY

FROM_SOCKET = "(from the lora socket)"


def keyframes(start: float, end: float) -> comfy.hooks.HookKeyframeGroup:
    """Strength 1 from `start` to `end` (fractions of the sampling, as ComfyUI counts them), else 0."""
    group = comfy.hooks.HookKeyframeGroup()
    changes = [(0.0, 0.0), (start, 1.0)] if start > 0 else [(0.0, 1.0)]
    changes += [(end, 0.0)] if end < 1 else []
    for percent, strength in changes:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=percent, guarantee_steps=0))
    return group


def load_patches(model: ModelPatcher, lora: dict[str, Tensor]) -> dict:
    """The LoRA's weights under the model's own names.

    Raises:
        BadInput: nothing in the LoRA fits this model.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), keys)
    if not patches:
        raise BadInput(f"lora: none of its {len(lora)} tensors fits the model; choose a LoRA made for this model")
    return patches


def with_scheduled_lora(
    model: ModelPatcher, lora: dict[str, Tensor], strength: float, start: float, end: float
) -> ModelPatcher:
    """A clone of `model` on which every sampling runs with the LoRA between `start` and `end`."""
    # Hooks change weights during sampling, which needs a patcher without dynamic loading, as for core's hooks.
    patched = model.get_non_dynamic_delegate() if _is_dynamic(model) else model.clone()
    hook = comfy.hooks.WeightHook()
    patched.add_hook_patches(hook=hook, patches=load_patches(patched, lora), strength_patch=strength)

    def outer_sample(executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        scheduled = hook.clone()  # a new one for every sampling: a keyframe keeps its position
        scheduled.hook_keyframe = keyframes(start, end)
        add_hook(executor.class_obj.conds, scheduled)
        return executor(*args, **kwargs)

    patched.add_wrapper(WrappersMP.OUTER_SAMPLE, outer_sample)
    return patched


def add_hook(conds: dict[str, list[dict]], hook: comfy.hooks.Hook) -> None:
    """Add the hook to all conditionings. Those that shared a hook group still do, so they stay in one batch."""
    groups: dict[int, comfy.hooks.HookGroup] = {}
    for cond in (cond for conditions in conds.values() for cond in conditions):
        before = cond.get("hooks")
        if id(before) not in groups:
            groups[id(before)] = before.clone() if before is not None else comfy.hooks.HookGroup()
            groups[id(before)].add(hook)
        cond["hooks"] = groups[id(before)]


def _is_dynamic(model: ModelPatcher) -> bool:
    return hasattr(model, "get_non_dynamic_delegate") and model.is_dynamic()


class ApplyLoRAOverSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DanceGRPO_ApplyLoRAOverSigmas",
            display_name="Apply LoRA over Sigmas (DanceGRPO)",
            category=f"{CATEGORY}/sampling",
            description="Apply a LoRA in a part of the sampling steps only: early steps decide the content of an "
            "image, late ones its texture. A LoRA that over-optimized texture is best used early (MixGRPO).",
            search_aliases=["lora", "lora schedule", "lora timestep", "lora range", "early lora", "hybrid inference"],
            inputs=[
                io.Model.Input("model", lazy=True, tooltip="The model; the LoRA must be made for it."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *folder_paths.get_filename_list("loras")],
                    tooltip="A file of the loras folder, or the LORA_MODEL connected to lora.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Strength of the LoRA while it is active; 1 is as trained.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where the LoRA becomes active; 0 is pure noise, 1 the finished image.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where the LoRA ends: it is active while sigma(start) >= sigma > sigma(end).",
                ),
                io.LoraModel.Input("lora", optional=True, tooltip="A LoRA from the graph, such as one just trained."),
            ],
            outputs=[io.Model.Output(tooltip="The model, with the LoRA active in that part of the sampling.")],
        )

    @classmethod
    def check_lazy_status(
        cls, start_percent: float, end_percent: float, model: ModelPatcher | None = None, **_: object
    ) -> list[str]:
        """Check the range before the model is loaded."""
        if not start_percent < end_percent:
            raise BadInput(f"start_percent {start_percent} must be below end_percent {end_percent}")
        return ["model"] if model is None else []

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        lora_name: str,
        strength: float,
        start_percent: float,
        end_percent: float,
        lora: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        inputs.linked(model, "model", "MODEL")
        inputs.finite(strength, "strength")
        if lora_name != FROM_SOCKET:
            lora = _read(lora_name)
        elif lora is not None:
            inputs.lora_tensors(lora, "lora")
        if lora is None:
            raise BadInput("lora: choose a file in lora_name, or connect a LORA_MODEL to lora")
        if strength == 0:
            return io.NodeOutput(model.clone())
        return io.NodeOutput(with_scheduled_lora(model, lora, strength, start_percent, end_percent))


def _read(name: str) -> dict[str, Tensor]:
    """
    Raises:
        BadInput: the file is missing or damaged.
    """
    file = folder_paths.get_full_path("loras", name)
    if file is None:
        raise BadInput(f"lora_name {name[:100]!r} is not in ComfyUI's list of LoRAs: choose one from the list")
    return read_weights(Path(file))


NODES = [ApplyLoRAOverSigmas]
