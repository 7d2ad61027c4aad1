"""Describes a MODEL and a VAE of core's loaders, so that the training process can load them again."""

import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...config import GraphModel, ModelConfig
from ...shapes import WEIGHTS
from ...utils.errors import BadInput
from .load import attention_layers, check_task, check_vae, describe_sampling, latent_shape, process_of, require_version

LORA_LOADERS = ("LoraLoader", "LoraLoaderModelOnly")
REPEATABLE = "connect core's Load Diffusion Model or Load Checkpoint (and Load VAE), or choose a diffusers folder"
_MODEL_LOADERS = {"load_diffusion_model": "diffusion_model", "load_checkpoint_guess_config": "checkpoint"}
_VAE_LOADERS = {"load_vae_patcher": "vae", "load_checkpoint_vae_patcher": "checkpoint"}
_FOLDERS = {"diffusion_model": "diffusion_models", "checkpoint": "checkpoints", "vae": "vae"}


def describe(
    model: object,
    vae: object | None,
    scheduler: str | None,
    sigmas: torch.Tensor | None,
    vae_node: dict | None,
    nodes_above: Iterator[dict],
) -> dict:
    """The section `model.graph` for a connected model.

    Args:
        model: a MODEL.
        vae: a VAE.
        scheduler: name of a ComfyUI scheduler.
        sigmas: SIGMAS, used instead of the scheduler.
        vae_node: the node that `vae` comes from, for ComfyUI versions whose VAE does not record its loader.
        nodes_above: all upstream nodes of `model`.

    Raises:
        BadInput: the training process cannot reproduce the model, or it cannot be trained.
    """
    folder = Path(folder_paths.__file__).resolve().parent
    require_version(folder)
    if vae is None:
        raise BadInput("vae is not connected: connect the VAE of the connected model")
    loader, file, options = _network(model)
    vae_loader, vae_file = _vae(vae, vae_node)
    _refuse_other_patches(model)
    check_task(model.model)
    sampling = model.get_model_object("model_sampling")
    process_of(sampling, comfy.model_sampling)
    attention_layers(model.model.diffusion_model)
    check_vae(vae, model.model.latent_format)
    return {
        "folder": str(folder),
        "loader": loader,
        "file": file,
        "weights": _weights(model, options),
        "vae_loader": vae_loader,
        "vae_file": vae_file,
        "loras": _loras(model, nodes_above),
        "sampling": describe_sampling(sampling, comfy.model_sampling)
        if "model_sampling" in model.object_patches
        else None,
        "scheduler": scheduler if sigmas is None else None,
        "sigmas": None if sigmas is None else sigmas.double().tolist(),
    }


def describe_low_noise(low: object, high: object, nodes_above: Iterator[dict], boundary: float, trained: str) -> dict:
    """The section `model.graph.low_noise` for the connected network for low noise of a model with two.

    Args:
        low: a MODEL.
        high: the MODEL of the network for high noise, which `describe` has accepted.
        nodes_above: all upstream nodes of `low`.
        boundary, trained: as in that section.

    Raises:
        BadInput: the training process cannot reproduce it, or it is not of the same kind as the other network.
    """
    loader, file, options = _network(low)
    _refuse_other_patches(low)
    if file == _network(high)[1]:
        raise BadInput(
            f"low_noise_model is loaded from the same file as model ({Path(file).name}): choose the other one"
        )
    check_same_kind(low, high)
    return {
        "loader": loader,
        "file": file,
        "weights": _weights(low, options),
        "loras": _loras(low, nodes_above),
        "boundary": boundary,
        "trained": trained,
    }


def check_same_kind(low: object, high: object) -> None:
    """Check that two MODELs are the networks of one model.

    Raises:
        BadInput: they differ in class, in the shapes of their weights, or in their sampling.
    """
    if type(low.model) is not type(high.model) or _shape_of(low) != _shape_of(high):
        raise BadInput(
            f"low_noise_model ({type(low.model).__name__}) is not a network of the same kind and size as model "
            f"({type(high.model).__name__}): connect the two files of one model"
        )
    kinds = [describe_sampling(each.get_model_object("model_sampling"), comfy.model_sampling) for each in (high, low)]
    if kinds[0] != kinds[1]:
        raise BadInput(
            "model and low_noise_model have different samplings: put the same ModelSampling node, with the same shift, "
            "behind both loaders"
        )


def _shape_of(model: object) -> dict:
    """The shapes of a network's weights by name."""
    return {name: tuple(value.shape) for name, value in model.model.diffusion_model.state_dict().items()}


def check_size(model: object, config: ModelConfig) -> None:
    """Raise BadInput for a height, width or number of frames that the model does not support."""
    latent_shape(model.model.latent_format, config)


# -------------------------------------------------------------------------------------------------------- the loaders


def _network(model: object) -> tuple[str, str, dict]:
    """Loader, file and options of a MODEL."""
    function, arguments, *_ = getattr(model, "cached_patcher_init", None) or (None, ())
    loader = _known(function, _MODEL_LOADERS)
    if loader is None:
        raise BadInput(f"the connected model comes from a loader that training does not support: {REPEATABLE}")
    options = arguments[1] if loader == "diffusion_model" else arguments[6]
    if unknown := set(options) - {"dtype"}:
        raise BadInput(
            f"the model is loaded with {', '.join(sorted(unknown))}, which training does not support: set weight_dtype "
            "of the loader to default, fp8_e4m3fn or fp8_e5m2"
        )
    return loader, _inside(arguments[0], loader), options


def _vae(vae: object, node: dict | None) -> tuple[str, str]:
    """Loader and file of a VAE."""
    function, arguments, *_ = getattr(vae.patcher, "cached_patcher_init", None) or (None, ())
    loader = _known(function, _VAE_LOADERS)
    if loader is not None:
        return loader, _inside(arguments[0], loader)
    names = {"VAELoader": ("vae", "vae_name"), "CheckpointLoaderSimple": ("checkpoint", "ckpt_name")}
    loader, field = names.get((node or {}).get("class_type"), (None, None))
    name = node["inputs"].get(field) if loader else None
    file = folder_paths.get_full_path(_FOLDERS[loader], name) if isinstance(name, str) else None
    if file is None:
        raise BadInput(f"the connected VAE comes from a loader that training does not support: {REPEATABLE}")
    return loader, _inside(file, loader)


def _known(function: Callable | None, loaders: dict[str, str]) -> str | None:
    """The name of a loader of core; None for any other function, which the trainer must not call."""
    name = getattr(function, "__name__", None)
    return loaders[name] if name in loaders and function is getattr(comfy.sd, name, None) else None


def _inside(file: str, loader: str) -> str:
    """The file's full path.

    Raises:
        BadInput: it is outside of ComfyUI's folders for this type.
    """
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(_FOLDERS[loader])] + [WEIGHTS]
    path = Path(file).absolute()
    if ".." in path.parts or not any(folder.absolute() in path.parents for folder in folders):
        raise BadInput(f"{file} is outside of ComfyUI's folders for {_FOLDERS[loader]}: move it there")
    return str(path)


def _weights(model: object, options: dict) -> str | None:
    """The dtype of the loaded weights; None if they are quantized."""
    chosen = options.get("dtype")
    if chosen is None and getattr(model.model.model_config, "quant_config", None) is not None:
        return None
    name = str(chosen or model.model.get_dtype()).removeprefix("torch.")
    known = typing.get_args(typing.get_args(GraphModel.model_fields["weights"].annotation)[0])
    return name if name in known else None


# ------------------------------------------------------------------------------------------------------------ patches


def _refuse_other_patches(model: object) -> None:
    """Refuse all other patches, because they would silently be missing in training."""
    found = [name for name in model.object_patches if name != "model_sampling"]
    found += [name for name, value in model.model_options.items() if value]
    for name in ("weight_wrapper_patches", "hook_patches", "injections", "attachments", "additional_models"):
        if set(getattr(model, name, None) or ()) - {"lora_metadata"}:
            found.append(name)
    for name in ("wrappers", "callbacks"):
        if any(any(kind.values()) for kind in getattr(model, name, {}).values()):
            found.append(name)
    if found:
        raise BadInput(
            f"a node before GRPO Base Model patches the model in a way that training does not support "
            f"({', '.join(found)}): remove it, or use it only after training"
        )


def _loras(model: object, nodes_above: Iterator[dict]) -> list[dict]:
    """The LoRAs in the model's weights, in the order in which they were applied.

    Raises:
        BadInput: the weights have patches that are not from core's LoRA loaders.
    """
    if not model.patches:
        return []
    loras = [_lora(node["inputs"]) for node in nodes_above if node["class_type"] in LORA_LOADERS][::-1]
    loras = [lora for lora in loras if lora["strength"]]
    expected = Counter(key for lora in loras for key in _lora_keys(model, lora))
    actual = Counter((key, float(patch[0])) for key, patches in model.patches.items() for patch in patches)
    if actual != expected:
        raise BadInput(
            "a node before GRPO Base Model patches the model's weights: only core's Load LoRA is supported, with name "
            "and strength set in its widgets"
        )
    return loras


def _lora(inputs: dict) -> dict:
    name, strength = inputs.get("lora_name"), inputs.get("strength_model")
    file = folder_paths.get_full_path("loras", name) if isinstance(name, str) else None
    if file is None or not isinstance(strength, int | float):
        raise BadInput("the name or strength of a Load LoRA is connected to another node: set it in the widget")
    return {"file": str(Path(file).absolute()), "strength": float(strength)}


def _lora_keys(model: object, lora: dict) -> list[tuple[str, float]]:
    """The keys of the weights that a LoRA changes, with its strength."""
    weights = comfy.utils.load_torch_file(lora["file"], safe_load=True)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(weights), names)
    return [(key if isinstance(key, str) else key[0], lora["strength"]) for key in loaded]


# -------------------------------------------------------------------------------------------------------------- graph


def nodes_above(get_node: Callable[[str], dict], link: object) -> Iterator[dict]:
    """All upstream nodes of a MODEL up to its loader, along their `model` inputs."""
    while isinstance(link, list) and len(link) == 2 and isinstance(link[0], str):
        node = get_node(link[0])
        yield node
        link = node["inputs"].get("model")
