"""Tiny networks of ComfyUI's own classes with random weights, behind the trainer's interface: for checks inside it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from core_networks import (
    LUMINA_BASE,
    SD3_BASE,
    SD_BASE,
    SDXL_BASE,
    TINY_FLUX,
    TINY_HUNYUAN,
    TINY_QWEN,
    TINY_UNET_SIZE,
    TINY_WAN,
    Z_IMAGE_BASE,
    core_model,
)
from stages import updater_for
from tiny_networks import MORE, VIDEO, draw
from torch import Tensor

CPU = torch.device("cpu")
SAMPLING = comfy.model_sampling
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A family.

    Attributes:
        core: ComfyUI's class.
        config: of a tiny network.
        text: width of the token embeddings, and of the pooled vector where there is one.
        size: height, width and frames.
        extra: makes what else the conditioning carries.
        detected: what to change in `config` so that core's loader recognises a file of it, for it takes the width of
            heads and of texts as given; None where it only knows the released sizes.
        detected_text: `text` then.
        marks: names of empty tensors by which core recognises this kind of a released file.
        rounding: by how much core's euler may differ, of its largest value.
        shapes: whether the network can be run without weights to its end, and complains of a wrong width.
        scale: of the LoRA's weights, so that it does something.
    """

    core: str
    config: dict
    text: tuple[int, int | None]
    size: tuple[int, int, int] = (32, 48, 1)
    extra: Callable[[], dict] = dict
    name: str = field(default="")
    detected: dict | None = None
    detected_text: tuple[int, int | None] = (16, None)
    marks: tuple[str, ...] = ()
    rounding: float = 1e-5
    shapes: bool = True
    scale: float = 0.2

    def __str__(self) -> str:
        return self.name or self.core


SD15 = SD_BASE | TINY_UNET_SIZE | {"num_heads": 2}
SDXL = SDXL_BASE | TINY_UNET_SIZE | {"num_head_channels": 16, "adm_in_channels": 1280 + 6 * 256}
SD3 = SD3_BASE | {
    "depth": 1,
    "adm_in_channels": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
    "num_patches": 256,
    "pos_embed_max_size": 16,
}
FLUX2 = TINY_FLUX | {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "axes_dim": [4, 4, 4, 4],
    "vec_in_dim": None,
    "qkv_bias": False,
    "ops_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}
LUMINA_SIZE = {
    "dim": 32,
    "cap_feat_dim": 16,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "axes_dims": [4, 6, 6],
    "axes_lens": [64, 64, 64],
    "multiple_of": 16,
}
LUMINA = LUMINA_BASE | LUMINA_SIZE
ZIMAGE = Z_IMAGE_BASE | LUMINA_SIZE | {"dim": 256, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 24, 24]}
LTXV = {
    "image_model": "ltxv",
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "cross_attention_dim": 32,
    "caption_channels": 16,
}


def first_frame() -> dict:
    """What core's image-to-video nodes put into conditioning."""
    mask = torch.ones(1, 1, 2, 4, 6)
    mask[:, :, :1] = 0
    return {"concat_latent_image": draw(1, 16, 2, 4, 6, seed=7), "concat_mask": mask}


def wan_first_frame() -> dict:
    return first_frame() | {"clip_vision_output": {"penultimate_hidden_states": draw(1, 257, 1280, seed=8)}}


HEAD = {"hidden_size": 128, "num_heads": 1}
FLUX_HEAD = HEAD | {"axes_dim": [16, 56, 56]}
ONE_LEVEL = {
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "context_dim": 768,
    "num_heads": 8,
}
WAN_HEAD = {"dim": 128, "num_heads": 1, "freq_dim": 256, "text_dim": 4096}
LTXV_HEADS = {
    "num_attention_heads": 32,
    "attention_head_dim": 2,
    "cross_attention_dim": 64,
    "caption_channels": 4096,
}
CASES = [
    Case("SD15", SD15, (16, None), (64, 64, 1), detected=ONE_LEVEL, detected_text=(768, None)),
    Case("SDXL", SDXL, (16, 1280), (64, 64, 1)),
    Case("SDXL", SDXL, (16, 1280), (64, 64, 1), name="SDXLv", marks=("v_pred",)),
    # Core's first latents are 4519 times as large as its last, and rounded accordingly.
    Case("SDXL", SDXL, (16, 1280), (64, 64, 1), name="SDXLzsnr", marks=("v_pred", "ztsnr"), rounding=3e-4),
    Case("SD3", SD3, (16, 16), detected={}, detected_text=(16, 16)),
    Case("Flux", TINY_FLUX, (16, 16), extra=lambda: {"guidance": 6.0}, detected=FLUX_HEAD, detected_text=(16, 16)),
    Case("Flux2", FLUX2, (16, None), detected=HEAD | {"axes_dim": [32] * 4}),
    Case("QwenImage", TINY_QWEN, (16, None)),
    Case("Lumina2", LUMINA, (16, None)),
    Case("ZImage", ZIMAGE, (16, None)),
    Case("WAN21_T2V", TINY_WAN, (16, None), VIDEO, detected=WAN_HEAD, detected_text=(4096, None)),
    Case(
        "WAN21_I2V",
        TINY_WAN | {"model_type": "i2v", "in_dim": 36},
        (16, None),
        VIDEO,
        wan_first_frame,
        detected=WAN_HEAD,
        detected_text=(4096, None),
    ),
    Case(
        "HunyuanVideo",
        TINY_HUNYUAN,
        (16, 16),
        VIDEO,
        lambda: {"guidance": 4.0},
        detected=FLUX_HEAD | {"vec_in_dim": 768},
        detected_text=(16, 768),
    ),
    Case(
        "HunyuanVideoSkyreelsI2V",
        TINY_HUNYUAN | {"in_channels": 32},
        (16, 16),
        VIDEO,
        first_frame,
        detected=FLUX_HEAD | {"vec_in_dim": 768},
        detected_text=(16, 768),
    ),
    Case(
        "LTXV",
        LTXV,
        (16, None),
        (64, 96, 9),
        lambda: {"attention_mask": torch.ones(1, 6, dtype=torch.long)},
        detected=LTXV_HEADS,
        detected_text=(4096, None),
    ),
    Case(
        "QwenImage",
        TINY_QWEN,
        (16, None),
        extra=lambda: {"reference_latents": [draw(1, 16, 1, 4, 6, seed=9)]},
        name="QwenImageEdit",
    ),
    *(Case(**given) for given in MORE),
]


def random_weights(network: torch.nn.Module) -> None:
    weights = {}
    for i, (name, value) in enumerate(network.state_dict().items()):
        scale = value.ndim == 1 and "norm" in name and name.endswith(("weight", "scale"))
        spread = 0.1 if value.ndim < 2 else 0.7 / max(1.0, value[0].numel()) ** 0.5
        weights[name] = (float(scale) + spread * draw(*value.shape, seed=i)).to(value.dtype)
    network.load_state_dict(weights)


def new_patcher(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    """Core's patcher of a tiny model with random weights, the same every time."""
    base = core_model(case.core, case.config, dtype, None, "cpu", case.marks)
    base.diffusion_model.to(dtype)
    random_weights(base.diffusion_model)
    patcher = comfy.model_patcher.ModelPatcher(base, CPU, CPU)
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def entry(case: Case, seed: int, tokens: int = 6) -> dict:
    pooled = {} if case.text[1] is None else {"pooled_output": draw(1, case.text[1], seed=seed + 50)}
    return {"cross_attn": draw(1, tokens, case.text[0], seed=seed), **pooled, **case.extra()}


def conditioning(entry: dict) -> list:
    """The same as core's nodes hand it over."""
    carried = {name: value for name, value in entry.items() if name != "cross_attn"}
    if "clip_vision_output" in carried:
        carried["clip_vision_output"] = SimpleNamespace(**carried["clip_vision_output"])
    return [[entry["cross_attn"], copy.deepcopy(carried)]]


@torch.no_grad()
def euler(patcher: Any, noise: Tensor, sigmas: Tensor, positive: dict, negative: dict, cfg: float) -> Tensor:
    """Core's own sampling; latents in the model's own scale."""
    comfy.model_management.in_training = False
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(conditioning(positive), conditioning(negative))
    guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object("euler")
    done = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
    return patcher.model.process_latent_in(done)


@dataclass
class Trained:
    """A tiny model behind the trainer's interface, with a LoRA."""

    case: Case
    model: Any
    lora: Any
    plan: Any
    prompting: Any
    noise: Tensor
    updater: Any

    def wake(self, scale: float = 0.2) -> None:
        """Give the LoRA weights that do something."""
        for i, parameter in enumerate(self.lora.parameters(self.model.module).values()):
            parameter.data = (scale * draw(*parameter.shape, seed=i)).to(parameter)


def graph_model(
    pack: Callable, case: Case, patcher: Any, sections: dict | None = None, vae: Any = None, **settings: object
) -> Trained:
    """
    Args:
        sections: of the run description; without, the objective is GRPO with a wide clip range.
        settings: of the section `model`.
    """
    config_module, models = pack("trainer.config"), pack("trainer.models")
    rollout, schedule = pack("trainer.rollout"), pack("trainer.models.comfy.model")
    height, width, frames = case.size
    graph = {"folder": "x", "file": "x", "vae_file": "x"}
    config = config_module.ModelConfig(
        family="comfy", graph=graph, height=height, width=width, frames=frames, **settings
    )
    model = schedule.ComfyModel(patcher, vae, config)
    sections = {"objective": {"batch_size": 4, "clip_range": 0.99}} | (sections or {})
    lora = {"rank": 2, "alpha": 6} | sections.pop("lora", {})
    updater = updater_for(model, sections.pop("objective"), pack, lora=lora, **sections)
    kernel = pack("trainer.diffusion.kernels").stochastic(model.process)[0]
    sigmas = model.sigmas(STEPS, None)
    plan = rollout.Plan(kernel, 0.3, sigmas, [True] * (STEPS - 1) + [False], False, 2.0)
    conditions = models.EntryConditions.of([entry(case, 1), entry(case, 2)])
    prompting = rollout.Prompting(conditions, models.EntryConditions.of([entry(case, 3)]))
    noise = torch.stack([draw(*model.latent_shape, seed=4), draw(*model.latent_shape, seed=5)])
    return Trained(case, model, pack("trainer.adapters.lora"), plan, prompting, noise, updater)
