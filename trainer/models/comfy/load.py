"""Loads and checks the parts of a model of a ComfyUI graph.

ComfyUI's modules are passed as arguments: `comfy` has all of them, `kinds` is `comfy.model_sampling`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import GraphModel, GraphSampling, ModelConfig
from ...diffusion.process import FLOW, VP, VP_V, Process
from ...utils.errors import BadInput


def load_network(graph: GraphModel, comfy: SimpleNamespace) -> Any:
    """Load the model with core's loader, merge the graph's LoRAs, and set the graph's model sampling."""
    options = {} if graph.weights is None else {"dtype": getattr(torch, graph.weights)}
    try:
        if graph.loader == "diffusion_model":
            patcher = comfy.sd.load_diffusion_model(graph.file, model_options=options)
        else:
            patcher = comfy.sd.load_checkpoint_guess_config(
                graph.file, output_vae=False, output_clip=False, model_options=options
            )[0]
    except RuntimeError as error:
        raise BadInput(f"model.graph.file: ComfyUI cannot load {graph.file}: {error}") from error
    for lora in graph.loras:
        patcher = _with_lora(patcher, lora.file, lora.strength, comfy)
    if graph.loras:
        patcher.patch_model()  # merge: weight names change when the trained LoRA is added
        patcher = comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)
    if graph.sampling is not None:
        patcher.model.model_sampling = build_sampling(graph.sampling, patcher.model.model_config, comfy.model_sampling)
    return patcher


def _with_lora(patcher: Any, file: str, strength: float, comfy: SimpleNamespace) -> Any:
    weights = comfy.utils.load_torch_file(file, safe_load=True)
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, weights, strength, 0)
    return patched


def load_vae(graph: GraphModel, comfy: SimpleNamespace) -> Any:
    """Load the VAE with core's loader.

    Raises:
        BadInput: the file has no VAE, or lacks weights of its decoder.
    """
    try:
        with _missing_weights() as missing:
            if graph.vae_loader == "checkpoint":
                vae = comfy.sd.load_checkpoint_guess_config(graph.vae_file, output_clip=False, output_model=False)[2]
            else:
                weights, metadata = comfy.utils.load_torch_file(graph.vae_file, return_metadata=True)
                vae = comfy.sd.VAE(sd=weights, metadata=metadata)
        vae.throw_exception_if_invalid()
    except RuntimeError as error:
        raise BadInput(f"model.graph.vae_file: ComfyUI cannot load a VAE from {graph.vae_file}: {error}") from error
    lacking = [name for name in missing if name.endswith(_WEIGHTS) and not name.startswith(_ENCODER)]
    if lacking:
        names = ", ".join(lacking[:3]) + (" and others" if len(lacking) > 3 else "")
        raise BadInput(
            f"model.graph.vae_file: {graph.vae_file} lacks {len(lacking)} weights of the VAE's decoder ({names}): "
            "download it again"
        )
    return vae


_WEIGHTS, _ENCODER = (".weight", ".bias", ".gamma"), ("encoder.", "taesd_encoder.", "quant_conv.")
"""Endings of weights that core leaves uninitialised if a file lacks them; prefixes of weights that decoding does not
need and some files lack."""


@contextmanager
def _missing_weights() -> Iterator[list[str]]:
    """Collects the names of weights that are missing when modules are loaded in this block; core only warns of them."""
    load, missing = nn.Module.load_state_dict, []

    def recording(module: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = load(module, *arguments, **options)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = recording
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load


_KINDS = {"flow": "ModelSamplingDiscreteFlow", "flux": "ModelSamplingFlux", "noise": "ModelSamplingDiscrete"}
_PREDICTS = {"flow": "CONST", "noise": "EPS", "v": "V_PREDICTION"}


def build_sampling(description: GraphSampling, model_config: Any, kinds: ModuleType) -> Any:
    """Create a `model_sampling` as core's ModelSampling nodes do."""
    kind, predicts = getattr(kinds, _KINDS[description.kind]), getattr(kinds, _PREDICTS[description.predicts])
    options = {"zsnr": description.zsnr} if description.kind == "noise" else {}
    sampling = type("GraphSampling", (kind, predicts), {})(model_config, **options)
    given = {"shift": description.shift, "multiplier": description.multiplier}
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        sampling.set_parameters(**given)
    return sampling


def describe_sampling(sampling: Any, kinds: ModuleType) -> dict[str, Any]:
    """A description from which `build_sampling` creates an equal object.

    Raises:
        BadInput: it is of an unsupported kind, or has custom noise levels.
    """
    known = [name for name in _KINDS if any(c.__name__ == _KINDS[name] for c in type(sampling).__mro__[1:])]
    meant = [name for name in _PREDICTS if getattr(kinds, _PREDICTS[name]) in type(sampling).__mro__]
    if not known or not meant:
        names = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:3])
        raise BadInput(f"a node sets a model sampling that training does not support ({names}): remove the node")
    found = {"kind": known[0], "predicts": meant[-1]}  # v is also a kind of noise prediction
    for name in ("shift", "multiplier"):
        if hasattr(sampling, name):
            found[name] = float(getattr(sampling, name))
    return found | ({"zsnr": bool(sampling.zsnr)} if known[0] == "noise" else {})


# ------------------------------------------------------------------------------------------------------- what fits


def process_of(sampling: Any, kinds: ModuleType) -> Process:
    """The process of a `model_sampling`: FLOW for a flow model; for latents x0 + s noise, VP_V if the network predicts
    v, else VP.

    Raises:
        BadInput: it is none of these.
    """
    names = [kind.__name__ for kind in type(sampling).__mro__ if kind.__module__ == kinds.__name__]
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise BadInput(f"the model's noise is scaled by {sampling.noise_scale:g}, which training cannot follow yet")
    if isinstance(sampling, kinds.CONST) and "IMG_TO_IMG_FLOW" not in names and "ModelSamplingAV" not in names:
        return FLOW
    if not isinstance(sampling, kinds.EPS) or "IMG_TO_IMG" in names:
        raise BadInput(f"the model's sampling ({', '.join(names)}) is neither that of flow nor of noise prediction")
    if isinstance(sampling, kinds.V_PREDICTION):
        return VP_V
    if getattr(sampling, "zsnr", False):
        raise BadInput(
            "the model predicts noise with zero terminal SNR, where a prediction of noise determines no image: in "
            "core's ModelSamplingDiscrete set zsnr off, or sampling to v_prediction if the model predicts v"
        )
    return VP


_OTHER_TASKS = {
    "ACEStep": "makes music",
    "DepthAnything3": "measures depth",
    "RT_DETR_v4": "finds objects",
    "SAM3": "finds objects",
    "SeedVR2": "enlarges images and videos",
    "Trellis2": "makes 3D models",
    "TripoSplat": "makes 3D models",
}
"""Core's classes whose latents look like those of an image or a video, and what they do instead."""


def check_task(base: Any) -> None:
    """
    Args:
        base: ComfyUI's `BaseModel`.

    Raises:
        BadInput: the model makes neither images nor silent videos from a text.
    """
    name = next((kind.__name__ for kind in type(base).__mro__ if kind.__name__ in _OTHER_TASKS), None)
    if name is not None:
        raise BadInput(
            f"the model ({name}) {_OTHER_TASKS[name]}, and training takes models of images and silent videos: connect "
            "another one"
        )


def may_have_sound(base: Any) -> bool:
    """Whether a model also takes latents of sound, and has to be told that there are none (LTX-2)."""
    return type(base).__name__ == "LTXAV"


def latent_shape(latent_format: Any, config: ModelConfig) -> tuple[int, ...]:
    """Shape of the latents of one image or video, from the model's latent format.

    Raises:
        BadInput: the model does not support the height, width or number of frames.
    """
    step, frame_step = latent_format.spacial_downscale_ratio, latent_format.temporal_downscale_ratio
    for name, size in (("height", config.height), ("width", config.width)):
        if size % step:
            raise BadInput(f"model.{name} is {size}: it must be a multiple of {step} for this model")
    size = (config.height // step, config.width // step)
    if latent_format.latent_dimensions == 2:
        if config.frames != 1:
            raise BadInput(f"model.frames is {config.frames}: it must be 1, because this model generates images")
        return (latent_format.latent_channels, *size)
    if latent_format.latent_dimensions != 3:
        raise BadInput("this model generates neither images nor videos and cannot be trained")
    if (config.frames - 1) % frame_step:
        raise BadInput(f"model.frames is {config.frames}: it must be a multiple of {frame_step}, plus 1")
    return (latent_format.latent_channels, (config.frames - 1) // frame_step + 1, *size)


ZEROS_ARE_INPUT = ("HunyuanVideo15", "HunyuanVideo15_SR_Distilled", "Kandinsky5")
"""Core's classes whose extra input channels are zeros where there is no first frame, in training as well."""


def check_extra_channels(base: Any, conds: list[dict], given: set[str]) -> None:
    """
    Args:
        base: ComfyUI's `BaseModel`.
        conds: a prompt's conditions as it has processed them.
        given: names of these conditions.

    Raises:
        BadInput: the network has extra input channels (for inpainting, editing, first frames) for which the
            conditioning has no data, so that core would fill them with blank images.
    """
    extra = [cond["model_conds"]["c_concat"].cond.shape[1] for cond in conds if "c_concat" in cond["model_conds"]]
    needed = {"concat_latent_image"} | ({"concat_mask"} if "mask" in base.concat_keys else set())
    if not extra or needed <= given or type(base).__name__ in ZEROS_ARE_INPUT:
        return
    channels = base.latent_format.latent_channels
    raise BadInput(
        f"the network has {channels + extra[0]} input channels, but latents have {channels}: it is for inpainting, "
        f"editing or a first frame, and conditioning has no {' and '.join(sorted(needed - given))}. Connect the output "
        "of core's node for it (such as InpaintModelConditioning) to conditioning, or use another model"
    )


def check_vae(vae: Any, latent_format: Any) -> None:
    """
    Raises:
        BadInput: the VAE does not belong to the model.
    """
    if vae.latent_channels != latent_format.latent_channels:
        raise BadInput(
            f"the VAE has {vae.latent_channels} latent channels, but the model has {latent_format.latent_channels}: "
            "connect the VAE that belongs to the model"
        )
    if vae.latent_dim != latent_format.latent_dimensions:
        kinds = {2: "images", 3: "videos"}
        raise BadInput(
            f"the VAE is for {kinds.get(vae.latent_dim, 'audio')}, but the model is for "
            f"{kinds.get(latent_format.latent_dimensions, 'audio')}: connect the VAE that belongs to the model"
        )
    if vae.spacial_compression_decode() != latent_format.spacial_downscale_ratio:
        raise BadInput(
            f"the VAE has {vae.spacial_compression_decode()} pixels per latent along an edge, but the model has "
            f"{latent_format.spacial_downscale_ratio}: connect the VAE that belongs to the model"
        )
    if type(getattr(vae.first_stage_model, "decoder", None)).__name__ == "VideoDecoder":
        raise BadInput(
            "the VAE of Stable Video Diffusion cannot be used, because it mixes the images of a batch: connect the VAE "
            "that belongs to the model"
        )


def decodes_with_noise(vae: Any) -> bool:
    """Whether decoding draws random noise, as in LTX-Video's VAE since version 0.9.1."""
    return type(vae.first_stage_model).__module__.startswith("comfy.ldm.lightricks.vae")


OLDEST = (0, 20, 0)
"""The oldest ComfyUI version that is supported for connected models, as in pyproject.toml."""


def require_version(folder: Path) -> None:
    """
    Raises:
        BadInput: ComfyUI is too old, or is not in this folder.
    """
    if not (folder / "comfy" / "sd.py").is_file():
        raise BadInput(f"model.graph.folder is {str(folder)!r}, which is not a ComfyUI folder")
    file = folder / "comfyui_version.py"
    found = re.search(r"__version__ = \"(\d+)\.(\d+)\.(\d+)", file.read_text() if file.is_file() else "")
    if found is None or tuple(map(int, found.groups())) < OLDEST:
        version = "of an unknown version" if found is None else ".".join(found.groups())
        oldest = ".".join(map(str, OLDEST))
        raise BadInput(f"ComfyUI in {folder} is {version}, but a connected model needs {oldest} or later: update it")


def check_offload(offloaded: int, config: ModelConfig) -> None:
    """
    Args:
        offloaded: bytes of weights that stay in RAM.

    Raises:
        BadInput: the backward pass would need all of them on the GPU at once.
    """
    if offloaded > 0 and not config.gradient_checkpointing:
        raise BadInput(
            f"{offloaded / 2**30:.1f} GB of the weights do not fit on the GPU and stay in RAM, which requires gradient "
            "checkpointing: turn model.gradient_checkpointing on"
        )


def attention_layers(network: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers of the attention, including the fused layers of FLUX-like single blocks.

    Raises:
        BadInput: there are none.
    """
    linear = [name for name, child in network.named_modules() if isinstance(child, nn.Linear) or _is_mixed(child)]
    found = tuple(name for name in linear if _is_attention(name.split(".")))
    if not found:
        raise BadInput("no linear attention layers were found in the model, so no LoRA can be added to it")
    return found


def open_mixed_layers(network: nn.Module, packed: type) -> None:
    """Make the quantized layers of mixed-precision files (such as scaled fp8) subclasses of nn.Linear, for peft.

    They also dequantize their weights in each call, on every device, as ComfyUI does on devices that cannot multiply in
    their format: quantizing activations has no gradient, and for some formats depends on the rest of the batch.

    Args:
        packed: ComfyUI's class of quantized tensors.
    """

    def multiply(layer: nn.Module, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        unpacked = weight.dequantize().to(value.dtype) if isinstance(weight, packed) else weight
        return nn.functional.linear(value, unpacked, bias)

    for layer in network.modules():
        if _is_mixed(layer):
            layer.__class__ = type("MixedLinear", (type(layer), nn.Linear), {"_forward": multiply})
            layer._full_precision_mm = True


def _is_mixed(layer: nn.Module) -> bool:
    """Whether this is ComfyUI's linear layer for quantized weights, which is not an `nn.Linear`."""
    is_linear = type(layer).__name__ == "Linear" and hasattr(layer, "comfy_cast_weights")
    return is_linear and not isinstance(layer, nn.Linear)


def _is_attention(path: list[str]) -> bool:
    if any("mod" in part.lower() for part in path[-2:]):  # modulation, not attention
        return False
    if any("audio" in part or "connector" in part for part in path):  # not reached by a silent video; of the text
        return False
    fused = path[-1] in ("linear1", "linear2") and any(part.startswith("single") for part in path)
    return fused or any("attn" in part or "attention" in part for part in path)
