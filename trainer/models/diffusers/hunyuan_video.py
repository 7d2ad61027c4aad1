"""HunyuanVideo: text to video and single images; SkyReels-I2V, which continues a first frame."""

import re
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...config import ModelConfig
from ...utils.errors import BadInput
from ..base import IMAGE_PREFIX, Conditions, FusedRows
from .family import ATTENTION, DiffusersModel
from .vae import latent_channels


class HunyuanVideoModel(DiffusersModel):
    """HunyuanVideo (arXiv 2412.03603): embedded guidance, llama's tokens and CLIP's summary as conditions."""

    family = "hunyuanvideo"
    pipelines = ("HunyuanVideoPipeline",)
    network_class = "HunyuanVideoTransformer3DModel"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    guidance = 6.0  # HunyuanVideoPipeline's default
    condition_widths = {"embeds": "text_embed_dim", "pooled": "pooled_projection_dim"}
    condition_masks = ("mask",)
    text_tokens = 256
    default_targets = ATTENTION
    input_layers = ("x_embedder.proj.weight", "img_in.proj.weight")
    vae_classes = ("AutoencoderKLHunyuanVideo",)
    video = True

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        spatial = vae.get("spatial_compression_ratio", 8) * network["patch_size"]
        return spatial, vae.get("temporal_compression_ratio", 4)

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        embeds, pooled, mask = pipeline.encode_prompt(prompts)
        return Conditions({"embeds": embeds, "pooled": pooled, "mask": mask})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config, vae = self.config, self.vae.config
        frames = (config.frames - 1) // vae.temporal_compression_ratio + 1
        scale = vae.spatial_compression_ratio
        return (self.module.config.out_channels, frames, config.height // scale, config.width // scale)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        guidance = self.guidance_input(len(latents), latents.device)
        velocity = self.module(
            hidden_states=self.network_input(latents, conditions).to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=conditions.tensors["embeds"].to(self.dtype),
            encoder_attention_mask=conditions.tensors["mask"],
            pooled_projections=conditions.tensors["pooled"].to(self.dtype),
            guidance=None if guidance is None else guidance * 1000,
            return_dict=False,
        )[0]
        return velocity.float()

    def network_input(self, latents: Tensor, conditions: Conditions) -> Tensor:
        return latents

    def lora_key(self, module_name: str) -> str | FusedRows:
        config = self.module.config
        native = native_name(module_name, config.num_attention_heads * config.attention_head_dim, config.mlp_ratio)
        if native is None:
            raise BadInput(f"lora.targets: ComfyUI has no name for {module_name!r} of HunyuanVideo")
        return native


class SkyReelsModel(HunyuanVideoModel):
    """SkyReels-V1 I2V: HunyuanVideo with the first frame's latents as 16 more input channels; trained with CFG."""

    family = "skyreels"
    pipelines = ("HunyuanSkyreelsImageToVideoPipeline",)
    guidance = 1.0  # the pipeline's default, and the 1000 of the paper's script

    @classmethod
    def takes_images(cls, config: ModelConfig) -> bool:
        return True

    @classmethod
    def input_channels(cls, config: ModelConfig, vae: dict[str, Any]) -> int:
        return 2 * latent_channels(vae)

    @classmethod
    def encode_prompt_image(cls, pipeline: Any, config: ModelConfig, image: Any) -> dict[str, Tensor]:
        vae = pipeline.vae
        pixels = pipeline.video_processor.preprocess(image, height=config.height, width=config.width)
        moments = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
        # The middle of the distribution, where the pipeline draws from it: a condition should not be random.
        return {f"{IMAGE_PREFIX}latents": moments.mode()[:, :, 0] * vae.config.scaling_factor}

    def network_input(self, latents: Tensor, conditions: Conditions) -> Tensor:
        first = rearrange(conditions.tensors[f"{IMAGE_PREFIX}latents"].to(latents), "b c h w -> b c 1 h w")
        later_frames = (0, 0, 0, 0, 0, latents.shape[2] - 1)
        return torch.cat([latents, nn.functional.pad(first, later_frames)], dim=1)


_DOUBLE = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
_SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.(.+)")
_REFINER = re.compile(r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.(.+)")
_DOUBLE_NAMES = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_REFINER_NAMES = {"attn.to_out.0": "self_attn.proj", "ff.net.0.proj": "mlp.0", "ff.net.2": "mlp.2"}
_PARTS = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
_THIRDS = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}


def native_name(name: str, width: int, mlp_ratio: float) -> str | FusedRows | None:
    """Where ComfyUI keeps a linear layer of diffusers' HunyuanVideo transformer; None where it has no name for it.

    Args:
        width: of the transformer.
        mlp_ratio: width of its feed-forward layers over `width`.
    """
    if match := _DOUBLE.fullmatch(name):
        prefix, rest = f"diffusion_model.double_blocks.{match[1]}", match[2]
        if rest in _PARTS:
            layer, third = _PARTS[rest]
            return FusedRows(f"{prefix}.{layer}", third * width, 3 * width)
        return f"{prefix}.{_DOUBLE_NAMES[rest]}" if rest in _DOUBLE_NAMES else None
    if match := _SINGLE.fullmatch(name):
        prefix, rest = f"diffusion_model.single_blocks.{match[1]}", match[2]
        total = 3 * width + int(mlp_ratio * width)
        if rest in _THIRDS:
            return FusedRows(f"{prefix}.linear1", _THIRDS[rest] * width, total)
        if rest == "proj_mlp":
            return FusedRows(f"{prefix}.linear1", 3 * width, total)
        names = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
        return f"{prefix}.{names[rest]}" if rest in names else None
    if match := _REFINER.fullmatch(name):
        prefix, rest = f"diffusion_model.txt_in.individual_token_refiner.blocks.{match[1]}", match[2]
        if rest in _THIRDS:
            return FusedRows(f"{prefix}.self_attn.qkv", _THIRDS[rest] * width, 3 * width)
        return f"{prefix}.{_REFINER_NAMES[rest]}" if rest in _REFINER_NAMES else None
    return None
