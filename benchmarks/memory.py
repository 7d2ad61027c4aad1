"""GPU memory that training a connected model takes, computed on the meta device from core's own networks.

    python benchmarks/memory.py --comfyui ~/ComfyUI            # the table in docs/comfy-backend.md
    python benchmarks/memory.py --comfyui ~/ComfyUI --check    # the same counting against memory really allocated

Nothing is loaded and nothing runs on a GPU. Each network is built in its released size without weights; the trainer's
own adapter puts the LoRA on it and checkpoints its blocks; one prediction goes forward and backward, the VAE decodes as
many images as `model.decode_batch_size` says by default, and every tensor is counted from when it is made until nothing
refers to it any more. Attention counts as a fused kernel, which keeps what comes in and goes out. An update, decoding
and rewards take turns; ComfyUI moves what is idle out of the GPU. Not counted: the GPU's own context (about 0.5 GB),
fragmentation, workspaces of matrix libraries, and the copies of weights that ComfyUI makes to move them from RAM.
`benchmarks/memory_presets.py` does the same for the presets of diffusers folders.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.models.memory import STATES
from trainer.utils.allocation import AllocatedBytes, attention_memory, peak_bytes

META = torch.device("meta")
GB = 2**30
CONTEXT = 1.5 * GB
"""Left free for what is not counted."""


@dataclass(frozen=True)
class Network:
    """A released model.

    Attributes:
        core: ComfyUI's class.
        config: of the network, as ComfyUI reads it from the released file.
        text: tokens and width of the token embeddings, and width of the pooled vector.
        guided: whether it needs a negative prompt, so that two predictions are kept at once.
        frames: of a video.
        vae: its VAE, one of `DECODERS`.
        masked: whether the text's mask is asked for.
        multiple: height and width are taken as the next multiple of this.
    """

    core: str
    config: dict
    text: tuple[int, int, int | None]
    guided: bool = False
    frames: int = 1
    vae: str = "kl"
    masked: bool = False
    multiple: int = 16


UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "model_channels": 320,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD15 = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "adm_in_channels": None,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
    "context_in_dim": 4096,
    "vec_in_dim": 768,
}
HUNYUAN = {name: value for name, value in FLUX.items() if name != "txt_ids_dims"} | {
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
    "theta": 256,
    "depth": 20,
    "depth_single_blocks": 40,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "qk_norm": True,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
WAN = {"image_model": "wan2.1", "model_type": "t2v", "freq_dim": 256, "text_dim": 4096}
LTXV = {
    "image_model": "ltxv",
    "num_layers": 28,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "caption_channels": 4096,
}
NETWORKS = {
    "SD 1.5": Network("SD15", SD15, (77, 768, None), guided=True),
    "SDXL": Network("SDXL", SDXL, (77, 2048, 1280), guided=True),
    "Z-Image": Network("ZImage", Z_IMAGE, (100, 2560, None), vae="kl-16"),
    "FLUX.1-dev": Network("Flux", FLUX, (512, 4096, 768), vae="kl-16"),
    "Qwen-Image": Network(
        "QwenImage", {"image_model": "qwen_image", "num_layers": 60}, (100, 3584, None), guided=True, vae="wan"
    ),
    "Wan 2.1 1.3B": Network(
        "WAN21_T2V",
        WAN | {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
        (512, 4096, None),
        guided=True,
        frames=33,
        vae="wan",
    ),
    "Wan 2.1 14B": Network(
        "WAN21_T2V",
        WAN | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
        (512, 4096, None),
        guided=True,
        frames=33,
        vae="wan",
    ),
    "HunyuanVideo": Network("HunyuanVideo", HUNYUAN, (256, 4096, 768), frames=33, vae="hunyuan"),
    "LTX-Video 2B": Network(
        "LTXV", LTXV, (128, 4096, None), guided=True, frames=33, vae="ltx", masked=True, multiple=32
    ),
}
TINY = Network(
    "Flux", FLUX | {"hidden_size": 256, "num_heads": 2, "depth": 3, "depth_single_blocks": 6}, (64, 4096, 768)
)


# ------------------------------------------------------------------------------------------------------------ counting


def fused_attention(_: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *arguments: Any, **keywords: Any) -> Tensor:
    """In place of ComfyUI's attention: the memory of a fused kernel, and none of its values."""
    batch, tokens = (q.shape[0], q.shape[2]) if keywords.get("skip_reshape") else q.shape[:2]
    width = q.shape[-1] if keywords.get("skip_reshape") else q.shape[-1] // heads
    shape = (batch, heads, tokens, width) if keywords.get("skip_output_reshape") else (batch, tokens, heads * width)
    return attention_memory(q, k, v, shape)


# ------------------------------------------------------------------------------------------------------------ networks


def build(network: Network, size: int, weights: torch.dtype, rank: int, device: torch.device) -> Any:
    """The trainer's model of a network, with its LoRA."""
    import comfy.model_patcher
    import comfy.supported_models

    from trainer.adapters import lora
    from trainer.config import LoraConfig, ModelConfig
    from trainer.models.comfy.model import ComfyModel

    class Placed(ComfyModel):
        def _make_resident(self) -> None:
            """Everything is where it was built."""

    description = getattr(comfy.supported_models, network.core)(dict(network.config))
    description.unet_config = dict(network.config)
    compute = torch.float32 if weights == torch.float32 else torch.bfloat16
    description.set_inference_dtype(weights, None if weights == compute else compute)
    base = description.get_model({}, "", device=device)
    base.model_sampling.to(device)
    config = ModelConfig(
        family="comfy",
        graph={"folder": "x", "file": "x", "vae_file": "x"},
        height=size,
        width=size,
        frames=network.frames,
        gradient_checkpointing=True,
    )
    model = Placed(comfy.model_patcher.ModelPatcher(base, device, device), None, config)
    with device:
        lora.inject(model.module, LoraConfig(rank=rank, alpha=rank), model.default_targets, seed=0)
    return model


def update(model: Any, network: Network, batch: int) -> None:
    """Predictions of one batch and their backward pass, as an update makes them."""
    device = model.device
    tokens, width, pooled = network.text
    entry = {"cross_attn": torch.zeros(1, tokens, width)}
    if pooled is not None:
        entry["pooled_output"] = torch.zeros(1, pooled)
    if network.masked:
        entry["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    samplers, level = model.comfy.samplers, torch.full((batch,), 0.5, device=device)
    latents = torch.zeros(batch, *model.latent_shape)
    (condition,) = model._conditions_of(latents, entry, "positive")
    latents = latents.to(device)
    outputs = []
    for _ in range(1 + network.guided):
        parts = {
            name: part.process_cond(batch_size=batch, area=None) for name, part in condition["model_conds"].items()
        }
        given = samplers.cond_cat([parts])
        options = {"cond_or_uncond": [0], "uuids": [condition["uuid"]], "sigmas": level}
        options["optimized_attention_override"] = fused_attention
        given["transformer_options"] = options
        call = {"input": latents, "timestep": level, "c": given}
        outputs.append(model._options["model_function_wrapper"](model.base.apply_model, call).float())
    sum(outputs).square().sum().backward()


def counted(network: Network, size: int, weights: torch.dtype, rank: int, batch: int) -> tuple[int, int, int, int]:
    """Parameters, bytes of weights, LoRA parameters, and bytes of activations at their largest."""
    from trainer.adapters import lora

    model = build(network, size, weights, rank, META)
    adapter = list(lora.parameters(model.module).values())
    base = [value for value in model.module.parameters() if not value.requires_grad]
    gradients = sum(value.numel() * 4 for value in adapter)
    with AllocatedBytes() as counter:
        update(model, network, batch)
    return (
        sum(value.numel() for value in base),
        sum(value.numel() * value.element_size() for value in base),
        sum(value.numel() for value in adapter),
        counter.peak - gradients,
    )


# ------------------------------------------------------------------------------------------------------------ decoding

KL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def decoder(kind: str) -> torch.nn.Module:
    """Core's autoencoder in its released size, without weights, in bfloat16."""
    import comfy.model_management
    from comfy.ldm.lightricks.vae import causal_video_autoencoder
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.wan.vae import WanVAE

    comfy.model_management.ENABLE_PYTORCH_ATTENTION = True  # as on a GPU
    causal_video_autoencoder.get_max_chunk_size = lambda device: causal_video_autoencoder.MAX_CHUNK_SIZE
    makers = {
        "kl": lambda: AutoencoderKL(ddconfig=KL, embed_dim=4),
        "kl-16": lambda: AutoencoderKL(ddconfig=KL | {"z_channels": 16}, embed_dim=16),
        "wan": lambda: WanVAE(dim=96, z_dim=16),
        "hunyuan": lambda: AutoencoderKL(
            ddconfig=KL | {"z_channels": 16, "conv3d": True, "time_compress": 4}, embed_dim=16
        ),
        "ltx": lambda: causal_video_autoencoder.VideoVAE(version=0),
    }
    with META:
        return makers[kind]().to(torch.bfloat16).eval()


@torch.no_grad()
def decoding(network: Network, size: int) -> int:
    """Bytes of decoding as many images as the trainer decodes at once by default."""
    model = build(network, size, torch.bfloat16, 1, META)
    latents = torch.zeros(model.decode_batch_size, *model.latent_shape, dtype=torch.bfloat16, device=META)
    vae = decoder(network.vae)
    return peak_bytes(lambda: vae.decode(latents))


# -------------------------------------------------------------------------------------------------------------- tables


def in_ram(bytes_needed: float, weights: float, gpu: float) -> str:
    """What has to stay in RAM on a GPU."""
    over = bytes_needed + CONTEXT - gpu * GB
    if over <= 0:
        return "all on the GPU"
    return f"{over / GB:.1f} in RAM" if over < 0.95 * weights else "no"


def table(names: list[str], sizes: list[int], rank: int, batch: int) -> Iterator[str]:
    yield (
        "| model | size | parameters | weights bf16 / fp8 | LoRA | activations | decoding | total bf16 / fp8 | "
        "24 GB | 16 GB | 12 GB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name in names:
        network = NETWORKS[name]
        for size in [-(-size // network.multiple) * network.multiple for size in sizes]:
            parameters, wide, adapter, active = counted(network, size, torch.bfloat16, rank, batch)
            _, narrow, _, packed = counted(network, size, torch.float8_e4m3fn, rank, batch)
            states = adapter * STATES
            both = [wide + states + active, narrow + states + packed]
            frames = f" x {network.frames}" if network.frames > 1 else ""
            fits = " | ".join(in_ram(both[1], narrow, gpu) for gpu in (24, 16, 12))
            yield (
                f"| {name} | {size} x {size}{frames} | {parameters / 1e9:.2f}B | {wide / GB:.1f} / {narrow / GB:.1f} | "
                f"{adapter / 1e6:.0f}M, {states / GB:.2f} | {active / GB:.1f} / {packed / GB:.1f} | "
                f"{decoding(network, size) / GB:.1f} | "
                f"{both[0] / GB:.1f} / {both[1] / GB:.1f} | {fits} |"
            )


def check() -> tuple[float, float]:
    """Largest memory in MB of a tiny network on a CPU: as its allocator tells, and as counted without values."""
    from torch.profiler import ProfilerActivity, profile

    cpu = torch.device("cpu")
    model = build(TINY, 256, torch.float32, 16, cpu)
    update(model, TINY, 2)
    model.module.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        update(model, TINY, 2)
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    model = build(TINY, 256, torch.float32, 16, META)
    with AllocatedBytes() as counter:
        update(model, TINY, 2)
    return peak / 2**20, counter.peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="ComfyUI's folder")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="MODEL")
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 720], help="height and width in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="objective.batch_size")
    parser.add_argument("--check", action="store_true", help="compare the counting with memory that is allocated")
    args = parser.parse_args()
    from trainer.models.comfy.model import _import

    _import(str(args.comfyui.expanduser().resolve()), torch.device("cpu"))
    if args.check:
        print("allocated {:.1f} MB, computed {:.1f} MB".format(*check()))
        return
    for line in table(args.models, args.sizes, args.rank, args.batch):
        print(line, flush=True)


if __name__ == "__main__":
    main()
