"""A LoRA that is active over a part of the sampling only, by ComfyUI's own weight hooks."""

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
from .types import CATEGORY

FROM_SOCKET = "(from the lora socket)"


def keyframes(start: float, end: float) -> comfy.hooks.HookKeyframeGroup:
    """Strength 1 from `start` to `end` (shares of the sampling, as ComfyUI counts them), else 0."""
    group = comfy.hooks.HookKeyframeGroup()
    turns = [(0.0, 0.0), (start, 1.0)] if start > 0 else [(0.0, 1.0)]
    turns += [(end, 0.0)] if end < 1 else []
    for percent, strength in turns:
        group.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=percent, guarantee_steps=0))
    return group


def load_patches(model: ModelPatcher, lora: dict[str, Tensor]) -> dict:
    """The LoRA's weights by the model's own names.

    Raises:
        ValueError: nothing in the LoRA is for this model.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), keys)
    if not patches:
        raise ValueError(f"lora: none of its {len(lora)} tensors fits this model; it was made for another one")
    return patches


def with_scheduled_lora(
    model: ModelPatcher, lora: dict[str, Tensor], strength: float, start: float, end: float
) -> ModelPatcher:
    """A clone of `model` on which every sampling runs with the LoRA between `start` and `end`."""
    # Weights that are swapped while sampling need the patcher that holds them itself, as core's own hooks do.
    patched = model.get_non_dynamic_delegate() if _is_dynamic(model) else model.clone()
    hook = comfy.hooks.WeightHook()
    patched.add_hook_patches(hook=hook, patches=load_patches(patched, lora), strength_patch=strength)

    def outer_sample(executor: WrapperExecutor, *args: object, **kwargs: object) -> Tensor:
        scheduled = hook.clone()  # afresh for every sampling: a keyframe remembers where the last one ended
        scheduled.hook_keyframe = keyframes(start, end)
        add_hook(executor.class_obj.conds, scheduled)
        return executor(*args, **kwargs)

    patched.add_wrapper(WrappersMP.OUTER_SAMPLE, outer_sample)
    return patched


def add_hook(conds: dict[str, list[dict]], hook: comfy.hooks.Hook) -> None:
    """Put the hook on all conditions; those that shared a group of hooks share the new one, and so their batch."""
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
            description="A LoRA for a part of the sampling: early, it decides what is in the image; late, its texture. "
            "A LoRA that over-optimised texture is best used early (MixGRPO).",
            search_aliases=["lora schedule", "lora timestep", "lora range", "early lora", "hybrid inference"],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples; the LoRA must be made for it."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *folder_paths.get_filename_list("loras")],
                    tooltip="A file of the loras folder, or the LORA_MODEL wired in below.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly it acts where it is active: 1 as trained, 0 not at all.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where the LoRA begins; 0 is pure noise, 1 the finished image.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where it ends: it is active while sigma(start) >= sigma > sigma(end).",
                ),
                io.LoraModel.Input("lora", optional=True, tooltip="A LoRA from the graph, such as one just trained."),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA over that part of the sampling.")],
        )

    @classmethod
    def validate_inputs(cls, start_percent: float | None = None, end_percent: float | None = None) -> bool | str:
        start = 0.0 if start_percent is None else start_percent  # a value that arrives by wire is not known yet
        end = 1.0 if end_percent is None else end_percent
        if 0 <= start < end <= 1:
            return True
        return f"start_percent is {start} and end_percent {end}: they must lie in 0 to 1, the start below the end"

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
        if lora_name != FROM_SOCKET:
            lora = read_weights(Path(folder_paths.get_full_path_or_raise("loras", lora_name)))
        if lora is None:
            raise ValueError("lora: choose a file in lora_name, or wire a LORA_MODEL into lora")
        if strength == 0:
            return io.NodeOutput(model.clone())
        return io.NodeOutput(with_scheduled_lora(model, lora, strength, start_percent, end_percent))


NODES = [ApplyLoRAOverSigmas]
