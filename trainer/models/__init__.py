"""Model families. A new family is one file, and one entry in `FAMILIES`."""

from ..config import ModelConfig, RolloutConfig
from ..diffusion import kernels
from ..utils.errors import BadInput
from .base import Conditions, DiffusionModel
from .comfy.conditions import EntryConditions
from .comfy.experts import TwoExperts
from .comfy.model import ComfyModel
from .diffusers.flux import FluxModel
from .diffusers.hunyuan_video import HunyuanVideoModel, SkyReelsModel
from .diffusers.qwen_image import QwenImageEditModel, QwenImageModel
from .diffusers.sd3 import SD3Model
from .diffusers.stable_diffusion import SDXLModel, StableDiffusionModel
from .diffusers.wan import WanModel
from .memory import RunMemory, latent_numbers, run_memory, weight_bytes

FAMILIES: dict[str, type[DiffusionModel]] = {
    family.family: family
    for family in (
        SD3Model,
        FluxModel,
        StableDiffusionModel,
        SDXLModel,
        QwenImageModel,
        QwenImageEditModel,
        HunyuanVideoModel,
        SkyReelsModel,
        WanModel,
        ComfyModel,
    )
}


def model_class(config: ModelConfig) -> type[DiffusionModel]:
    """The class of the configured family, after a check of its folder; nothing large is loaded.

    Raises:
        BadInput: unknown family, or a folder that does not hold such a model.
    """
    if config.family not in FAMILIES:
        raise BadInput(f"model.family is {config.family!r}: choose one of {', '.join(FAMILIES)}")
    FAMILIES[config.family].check(config)
    has_experts = config.graph is not None and config.graph.low_noise is not None
    return TwoExperts if has_experts else FAMILIES[config.family]


def model_bytes(config: ModelConfig, processes: int = 1) -> int:
    """Device memory of a process for the model: its weights, and decoding at its peak; nothing is loaded.

    Args:
        processes: of the run.
    """
    return weight_bytes(config, processes) + FAMILIES[config.family].decode_bytes(config)


def check_kernel(family: type[DiffusionModel] | DiffusionModel, name: str, rollout: RolloutConfig) -> None:
    """Raise BadInput where the kernel is one for another process than the family's, if that is known yet."""
    if rollout.kernel not in kernels.stochastic(family.process):
        fitting = ", ".join(kernels.stochastic(family.process))
        raise BadInput(f"rollout.kernel is {rollout.kernel!r}: models of family {name} take {fitting}")


__all__ = [
    "FAMILIES",
    "Conditions",
    "DiffusionModel",
    "EntryConditions",
    "RunMemory",
    "check_kernel",
    "latent_numbers",
    "model_bytes",
    "model_class",
    "run_memory",
    "weight_bytes",
]
