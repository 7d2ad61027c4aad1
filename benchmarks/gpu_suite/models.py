"""Models with random weights, made on the device: files of a diffusers folder, or in place of what core would load."""

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.core_models import Network, core_model, core_vae, entry, fill
from trainer.models import EntryConditions
from trainer.models.comfy import model as comfy_model
from trainer.prompts.store import write_conditions

from .setting import Setting, Skipped, replaced

PROMPTS = ["a red circle", "two triangles"]
KEYS = [(text, "") for text in [*PROMPTS, ""]]


# --------------------------------------------------------------------------------------------------------- in core


@contextmanager
def in_core(make: Callable[[], Any], vae: Callable[[], Any], data: dict) -> Iterator[None]:
    """In this block, core's loaders give these in place of what they would read from files.

    Args:
        make: gives core's `ModelPatcher`.
        vae: gives core's `VAE` or None.
        data: the run description, whose LoRAs of the graph core merges.
    """

    def load_network(graph: Any, comfy: Any) -> Any:
        patcher = make()
        for lora in graph.loras:
            weights = comfy.utils.load_torch_file(lora.file, safe_load=True)
            patcher = comfy.sd.load_lora_for_models(patcher, None, weights, lora.strength, 0)[0]
        if graph.loras:
            patcher.patch_model()
            patcher = comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)
        return patcher

    with replaced(comfy_model, load_network=load_network, load_vae=lambda graph, comfy: vae()):
        yield


def new_patcher(setting: Setting, network: Network, weights: torch.dtype, compute: torch.dtype) -> Any:
    """Core's patcher of a network with random weights in RAM, the same every time."""
    base = core_model(network.core, network.config, weights, None if weights == compute else compute, "cpu")
    fill(base.diffusion_model.state_dict().items(), setting.device)
    return patcher_of(base)


def tiny_patcher(case: Any) -> Any:
    """The same of a case of tests/tiny_graphs.py, with its own weights in float32."""
    from tiny_graphs import random_weights

    base = core_model(case.core, case.config, torch.float32, None, "cpu", case.marks)
    base.diffusion_model.float()
    random_weights(base.diffusion_model)
    return patcher_of(base)


def patcher_of(base: Any) -> Any:
    import comfy.model_management as management
    import comfy.model_patcher

    return comfy.model_patcher.ModelPatcher(
        base, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def new_vae(setting: Setting, kind: str) -> Any:
    """Core's VAE in its released size with random weights."""
    import comfy.sd

    weights = vae_weights(kind, setting.device)
    vae = comfy.sd.VAE(sd=dict(weights))
    missing = set(vae.first_stage_model.state_dict()) - set(weights)
    if missing:  # core leaves them uninitialised
        raise ValueError(f"the VAE {kind} lacks {sorted(missing)}")
    return vae


@functools.cache
def vae_weights(kind: str, device: torch.device) -> dict[str, torch.Tensor]:
    weights = {name: torch.empty(value.shape) for name, value in core_vae(kind).state_dict().items()}
    fill(weights.items(), device)
    return weights


def graph_section(setting: Setting, size: tuple[int, int, int], **settings: Any) -> dict:
    """The section `model` of a graph whose files are empty."""
    file = setting.folder / "empty.safetensors"
    file.touch()
    height, width, frames = size
    graph = {"folder": str(setting.need_comfyui().expanduser().resolve()), "file": str(file), "vae_file": str(file)}
    graph["reserve_gb"] = settings.pop("reserve_gb", 0.0)
    return {"family": "comfy", "graph": graph, "height": height, "width": width, "frames": frames, **settings}


def graph_conditions(setting: Setting, network: Network) -> str:
    """A file of random conditions."""
    return conditions_file(setting, EntryConditions.of([random_entry(network, seed) for seed in range(len(KEYS))]))


def random_entry(network: Network, seed: int) -> dict:
    made = entry(network)
    generator = torch.Generator().manual_seed(seed)
    for name in ("cross_attn", "pooled_output"):
        if name in made:
            made[name].normal_(generator=generator)
    return made


def conditions_file(setting: Setting, conditions: Any) -> str:
    path = setting.folder / "conditions.safetensors"
    write_conditions(path, KEYS, [conditions])
    return str(path)


# ------------------------------------------------------------------------------------------------ in diffusers folders


def write_folder(
    setting: Setting, family: Any, network: tuple[str, dict], vae: tuple[str, dict], dtype: torch.dtype
) -> Path:
    """A diffusers folder with random weights and without text encoders; one that is there is taken as it is."""
    import diffusers

    folder = setting.folder.parent / f"{family.family}-folder"
    if (folder / "model_index.json").exists():
        return folder
    for part, (name, settings) in ((family.component, network), ("vae", vae)):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype if part != "vae" else torch.float32)
        try:
            with torch.device(setting.device):
                module = getattr(diffusers, name)(**settings)
        finally:
            torch.set_default_dtype(default)
        fill(module.state_dict().items(), setting.device)
        module.save_pretrained(folder / part)
        del module
    levels = {"shift": 3.0}
    diffusers.FlowMatchEulerDiscreteScheduler(**levels).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family.pipelines[0]}))
    setting.free()
    return folder


def folder_conditions(setting: Setting, family: Any, config: Any) -> str:
    """A file of random conditions for a diffusers folder."""
    made = family.empty_conditions(config, len(KEYS), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for value in made.tensors.values():
        if value.is_floating_point():
            value.normal_(generator=generator)
        else:
            value.fill_(1)
    return conditions_file(setting, made)


def need_bitsandbytes(setting: Setting) -> None:
    """
    Raises:
        Skipped: the package or a GPU is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    if not setting.on_gpu:
        raise Skipped("diffusers quantizes on a GPU, and there is none")


@contextmanager
def decoded_without_vae() -> Iterator[None]:
    """In this block, a graph's models show three channels of their latents as pixels."""

    def decode_batch(model: Any, latents: torch.Tensor) -> torch.Tensor:
        config = model.config
        frames = latents if latents.ndim == 5 else latents[:, :, None]
        pixels = torch.nn.functional.interpolate(frames[:, :3], (config.frames, config.height, config.width))
        videos = pixels.sigmoid().transpose(1, 2).contiguous()
        return videos[:, 0] if config.frames == 1 else videos

    with replaced(comfy_model.ComfyModel, decode_batch=decode_batch):
        yield
