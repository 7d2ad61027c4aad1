"""The list of cases: every family tiny, released sizes in every form, and the reference's order of work."""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import core_models
from benchmarks.core_models import NETWORKS, Network
from trainer.config import ModelConfig, parse_config
from trainer.diffusion.process import FLOW
from trainer.models import FAMILIES, run_memory
from trainer.models.comfy.load import process_of
from trainer.models.compiled import missing_compiler

from . import models, one_by_one
from .running import exercise
from .setting import GIB, Setting, Skipped

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[Setting], dict]
CORE_TINY = (
    "SD15", "SDXL", "SDXLzsnr", "SD3", "Flux", "Flux2", "QwenImage", "QwenImageEdit", "Lumina2", "ZImage",
    "WAN21_T2V", "WAN21_I2V", "HunyuanVideo", "HunyuanVideoSkyreelsI2V", "LTXV", "SD20", "SDXLRefiner", "FluxSchnell",
    "LongCatImage", "Chroma", "HiDream", "ErnieImage", "Krea2", "Kandinsky5Image", "Kandinsky5", "Omnigen2", "Boogu",
    "MageFlow", "JoyImage", "Ideogram4", "Lens", "CosmosT2V", "AuraFlow", "PixArtAlpha", "PixArtSigma", "HunyuanDiT",
    "HunyuanVideo15", "HunyuanImage21", "WAN22_T2V", "QwenImageEditPlus",
)  # fmt: skip
"""Names of the tiny networks in tests/tiny_graphs.py."""
FOLDER_TINY = (
    "sd", "sd-v", "sd-zero-snr", "sdxl", "flux", "wan", "wan-image", "wan-i2v", "hunyuanvideo", "hunyuanvideo-image",
    "skyreels", "qwen-image", "qwen-image-edit",
)  # fmt: skip
"""Names of the tiny models in tests/tiny_families.py."""


@dataclass(frozen=True)
class Sized:
    """A released model.

    Attributes:
        network: of core.
        tiny: name in `CORE_TINY` of what stands for it in a dry run.
        family: of the diffusers door; None where there is none.
        folder: classes and settings of that folder's network and VAE.
        guidance: rollout.guidance_scale.
    """

    network: Network
    tiny: str
    family: str | None = None
    folder: tuple[tuple[str, dict], tuple[str, dict]] | None = None
    guidance: float = 1.0


SIZED = {
    "flux.1": Sized(
        NETWORKS["FLUX.1-dev"],
        "Flux",
        "flux",
        (("FluxTransformer2DModel", {"guidance_embeds": True}), ("AutoencoderKL", core_models.FOLDER_KL_16)),
    ),
    "z-image": Sized(NETWORKS["Z-Image"], "ZImage"),
    "wan-1.3b": Sized(
        NETWORKS["Wan 2.1 1.3B"],
        "WAN21_T2V",
        "wan",
        (("WanTransformer3DModel", core_models.FOLDER_WAN_SMALL), ("AutoencoderKLWan", {})),
        5.0,
    ),
}


@dataclass(frozen=True)
class Form:
    """How a released model is trained.

    Attributes:
        door: graph or folder.
        weights: dtype of the frozen network in a graph.
        model: settings of the section `model`.
        card: GiB of a smaller card that is played by keeping the rest free; 0 for the whole GPU.
        compiled: with `runtime.compile`.
        checks: look at resuming and the LoRA's file as well.
    """

    door: str = "graph"
    weights: torch.dtype = torch.bfloat16
    model: dict = field(default_factory=dict)
    card: int = 0
    compiled: bool = False
    checks: bool = False


CHECKPOINTED = {"gradient_checkpointing": True}
FORMS = {
    "bf16": Form(model=CHECKPOINTED, checks=True),
    "fp8": Form(weights=torch.float8_e4m3fn, model=CHECKPOINTED),
    "without checkpointing": Form(),
    "offload to a 12 GB card": Form(weights=torch.float8_e4m3fn, model=CHECKPOINTED, card=12),
    "folder, bf16": Form("folder", model=CHECKPOINTED | {"dtype": "bfloat16"}, checks=True),
    "folder, int8": Form("folder", model=CHECKPOINTED | {"dtype": "bfloat16", "quantization": "int8"}),
    "folder, nf4": Form("folder", model=CHECKPOINTED | {"dtype": "bfloat16", "quantization": "nf4"}),
    "folder, compile": Form("folder", model=CHECKPOINTED | {"dtype": "bfloat16"}, compiled=True),
}


def cases() -> dict[str, Run]:
    """Every case by its name, in the order in which they run."""
    found: dict[str, Run] = {}
    for name in FOLDER_TINY:
        found[f"tiny/folder/{name}"] = functools.partial(tiny_folder, name)
    for name in CORE_TINY:
        found[f"tiny/graph/{name}"] = functools.partial(tiny_graph, name)
    for name, sized in SIZED.items():
        for form in FORMS:
            if sized.family or FORMS[form].door == "graph":
                found[f"{name}/{form}"] = functools.partial(sized_run, name, form)
        found[f"{name}/one by one"] = functools.partial(sized_comparison, name)
    return found


def description(**sections: dict) -> dict:
    """A run of one prompt's images in bfloat16 or whatever the model is; two steps are stochastic."""
    data = {
        "prompts": {"texts": models.PROMPTS},
        "rollout": {"steps": 6, "group_size": 4, "prompts_per_iteration": 2, "batch_size": 4, "window": {"size": 2}},
        # In a group of two, equal weights would cancel wherever the rewards disagree.
        "rewards": [{"name": "brightness"}, {"name": "colorfulness", "weight": 0.5}],
        "objective": {"batch_size": 1},
        "lora": {"rank": 16, "alpha": 32},
        "optimizer": {"learning_rate": 1e-4},
        "runtime": {"iterations": 10},
    }
    for name, changes in sections.items():
        data[name] = data[name] | changes
    return data


# ---------------------------------------------------------------------------------------------------------------- tiny


def from_tests(module: str) -> Any:
    """A module of the tests, which has the tiny models."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    return __import__(module)


TINY = {
    "rollout": {"steps": 3, "group_size": 2, "prompts_per_iteration": 1, "batch_size": 96},
    "objective": {"batch_size": 4},
    "lora": {"rank": 2, "alpha": 4},
    "optimizer": {"learning_rate": 1e-3},
}


def tiny_folder(name: str, setting: Setting) -> dict:
    """A tiny model of the same classes, with its own text encoders."""
    families = from_tests("tiny_families")
    case, folder = families.CASES[name], setting.folder / "model"
    case.build(folder)
    rows = []
    for number, text in enumerate(models.PROMPTS):
        row = {"prompt": text}
        if case.takes_images:
            row["image"] = families.write_image(folder / f"image_{number}.png", number).name
        rows.append(row)
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = description(**TINY)
    data["model"] = {"family": case.family, "path": str(folder), **case.model}
    data["prompts"] = {"file": str(folder / "prompts.jsonl")}
    data["rollout"] |= case.rollout
    return exercise(setting, data)


def tiny_graph(name: str, setting: Setting) -> dict:
    """A tiny network of core's class; pixels come from its latents without a VAE."""
    setting.need_comfyui()
    graphs = from_tests("tiny_graphs")
    case = next(case for case in graphs.CASES if str(case) == name)
    entries = [graphs.entry(case, seed) for seed in range(len(models.KEYS))]
    data = description(**TINY)
    data["model"] = models.graph_section(setting, case.size)
    data["prompts"] = {"texts": models.PROMPTS}
    data["prompts"]["conditions"] = models.conditions_file(setting, models.EntryConditions.of(entries))
    data["rollout"] |= {"guidance_scale": 2.0, "shift": None}

    sampling = models.tiny_patcher(case).model.model_sampling
    if process_of(sampling, sys.modules["comfy.model_sampling"]) is not FLOW:
        data["rollout"] |= {"kernel": "ddim", "eta": 1.0}

    def prepare(data: dict) -> AbstractContextManager:
        return models.in_core(lambda: models.tiny_patcher(case), lambda: None, data)

    with models.decoded_without_vae():
        return exercise(setting, data, prepare)


# ------------------------------------------------------------------------------------------------------ released sizes


def network_of(sized: Sized, setting: Setting) -> Network:
    """The network, or the tiny one that stands for it; its VAE is of the released size."""
    if not setting.dry:
        return sized.network
    setting.need_comfyui()
    graphs = from_tests("tiny_graphs")
    case = next(case for case in graphs.CASES if str(case) == sized.tiny)
    tokens = (6, *case.text)
    return replace(sized.network, config=case.config, text=tokens, frames=min(5, sized.network.frames))


def size_of(sized: Sized, setting: Setting) -> tuple[int, int, int]:
    side = 32 if setting.dry else 512
    return side, side, network_of(sized, setting).frames


def rollout_of(sized: Sized, setting: Setting) -> dict:
    short = {"steps": 3, "group_size": 2, "prompts_per_iteration": 1} if setting.dry else {}
    return short | {"guidance_scale": sized.guidance}


def without_vae(form: Form, setting: Setting) -> bool:
    """Whether latents are shown as they are: VAEs are of released size, which a CPU decodes with once per model."""
    return setting.dry and not form.checks


def graph_run(sized: Sized, form: Form, setting: Setting) -> tuple[dict, Callable]:
    """A run's description and what to prepare for it."""
    setting.need_comfyui()
    network = network_of(sized, setting)
    reserve = {}
    if form.card and setting.on_gpu:
        whole = torch.cuda.get_device_properties(setting.device).total_memory / GIB
        reserve["reserve_gb"] = max(0.0, whole - form.card)
    data = description(rollout=rollout_of(sized, setting))
    data["model"] = models.graph_section(setting, size_of(sized, setting), **form.model, **reserve)
    data["prompts"] = data["prompts"] | {"conditions": models.graph_conditions(setting, network)}
    compute = torch.float32 if form.weights == torch.float32 else torch.bfloat16

    def prepare(data: dict) -> AbstractContextManager:
        return models.in_core(
            lambda: models.new_patcher(setting, network, form.weights, compute),
            lambda: None if without_vae(form, setting) else models.new_vae(setting, network.vae),
            data,
        )

    return data, prepare


def folder_run(sized: Sized, form: Form, setting: Setting) -> dict:
    family = FAMILIES[sized.family]
    if form.model.get("quantization"):
        models.need_bitsandbytes(setting)
    if setting.dry:
        folder = setting.folder / "model"
        from_tests("tiny_families").CASES[sized.family].build(folder)
    else:
        folder = models.write_folder(setting, family, *sized.folder, torch.bfloat16)
    height, width, frames = size_of(sized, setting)
    data = description(rollout=rollout_of(sized, setting))
    data["model"] = {"family": sized.family, "path": str(folder), "height": height, "width": width, "frames": frames}
    data["model"] |= form.model
    conditions = models.folder_conditions(setting, family, ModelConfig(**data["model"]))
    data["prompts"] = data["prompts"] | {"conditions": conditions}
    return data


def sized_run(name: str, form_name: str, setting: Setting) -> dict:
    """A released model in one form: measured, and beside it what was computed."""
    sized, form = SIZED[name], FORMS[form_name]
    if form.compiled and (absent := missing_compiler(setting.on_gpu)):
        raise Skipped(f"nothing to compile with: no {absent}")
    if form.compiled and not setting.on_gpu:  # nothing else is compiled for a CPU
        form = replace(form, weights=torch.float32, model=form.model | {"dtype": "float32"})
    if form.door == "graph":
        data, prepare = graph_run(sized, form, setting)
    else:
        data, prepare = folder_run(sized, form, setting), None
    if form.compiled:
        data["runtime"] = data["runtime"] | {"compile": True}
        if setting.dry:  # one shape, and so half of the graphs
            data["rollout"] = data["rollout"] | {"batch_size": 1}
    with models.decoded_without_vae() if without_vae(form, setting) else nullcontext():
        found = exercise(setting, data, prepare, form.checks)
    return found | {"computed_gib": dict(computed(sized, form, data, setting))}


def sized_comparison(name: str, setting: Setting) -> dict:
    """The reference's order of work against the trainer's, on the bf16 model of a graph."""
    sized = SIZED[name]
    form = Form(model=CHECKPOINTED)
    data, prepare = graph_run(sized, form, setting)
    data["rollout"] = data["rollout"] | {"window": None, "prompts_per_iteration": 1}
    with models.decoded_without_vae() if without_vae(form, setting) else nullcontext():
        return one_by_one.compare(setting, data, prepare)


def computed(sized: Sized, form: Form, data: dict, setting: Setting) -> Iterator[tuple[str, float]]:
    """GiB at the peak of rollout, update and decoding, as the tables of the documentation count them."""
    config = parse_config(data)
    if form.door == "folder":
        memory = run_memory(FAMILIES[sized.family], config)
        base = memory.weights + memory.adapter
        parts = {"rollout": memory.rollout, "update": memory.update, "decode": memory.decode}
        yield from ((phase, (base + size) / GIB) for phase, size in parts.items())
        return
    from benchmarks.memory import counted

    network, (side, _, _) = network_of(sized, setting), size_of(sized, setting)
    memory = counted(
        network,
        side,
        form.weights,
        config.lora.rank,
        config.objective.batch_size,
        config.rollout.batch_size,
        config.model.gradient_checkpointing,
    )
    base = memory.weights + memory.states
    yield "rollout", (base + memory.rollout) / GIB
    yield "update", (base + memory.update) / GIB
