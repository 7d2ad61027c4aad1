"""Model families. A new family is one file that registers itself in `FAMILIES`."""

from pathlib import Path

from ..config import ModelConfig, RolloutConfig
from ..diffusion import kernels
from ..shapes import WEIGHTS
from ..utils.errors import BadInput
from .base import Conditions, DiffusionModel
from .comfy.conditions import EntryConditions
from .comfy.model import ComfyModel
from .diffusers.flux import FluxModel
from .diffusers.hunyuan_video import HunyuanVideoModel, SkyReelsModel
from .diffusers.qwen_image import QwenImageEditModel, QwenImageModel
from .diffusers.sd3 import SD3Model
from .diffusers.size import BYTES, parameter_count
from .diffusers.stable_diffusion import SDXLModel, StableDiffusionModel
from .diffusers.wan import WanModel

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
    return FAMILIES[config.family]


def weight_bytes(config: ModelConfig) -> int:
    """Memory that the network and the VAE take as they are loaded; 0 for folders without safetensors files."""
    if config.graph is not None:
        files = {config.graph.file, config.graph.vae_file}
        return sum(Path(file).stat().st_size for file in files)
    folder = WEIGHTS if config.path == "embedded" else Path(config.path)
    network = sum(parameter_count(folder / name) for name in ("transformer", "unet"))
    return network * BYTES[config.dtype] + parameter_count(folder / "vae") * BYTES[config.vae_dtype]


def check_kernel(family: type[DiffusionModel] | DiffusionModel, name: str, rollout: RolloutConfig) -> None:
    """Raise BadInput where the kernel is one for another process than the family's, if that is known yet."""
    if rollout.kernel not in kernels.stochastic(family.process):
        fitting = ", ".join(kernels.stochastic(family.process))
        raise BadInput(f"rollout.kernel is {rollout.kernel!r}: models of family {name} take {fitting}")


__all__ = ["FAMILIES", "Conditions", "DiffusionModel", "EntryConditions", "check_kernel", "model_class", "weight_bytes"]
