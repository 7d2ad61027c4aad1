"""FLUX.1: packed latents, embedded guidance."""

from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ..base import Conditions
from .family import ATTENTION, DiffusersModel
from .latents import pack, unpack
from .vae import latent_channels, vae_scale


class FluxModel(DiffusersModel):
    """FLUX.1 dev (guidance as an input) and schnell (none)."""

    family = "flux"
    pipelines = ("FluxPipeline",)
    network_class = "FluxTransformer2DModel"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    guidance = 3.5  # FluxPipeline's default, and that of the paper's scripts
    condition_widths = {"embeds": "joint_attention_dim", "pooled": "pooled_projection_dim"}
    text_tokens = 512
    input_layers = ("x_embedder.weight", "img_in.weight")
    # In double and single blocks; what DanceGRPO's LoRA script trains.
    default_targets = ATTENTION

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        return 2 * vae_scale(vae), None

    @classmethod
    def input_channels(cls, config: ModelConfig, vae: dict[str, Any]) -> int:
        return 4 * latent_channels(vae)

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        embeds, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=cls.text_tokens)
        return Conditions({"embeds": embeds, "pooled": pooled})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = vae_scale(self.vae.config)
        return (self.module.config.in_channels // 4, self.config.height // scale, self.config.width // scale)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        embeds = conditions.tensors["embeds"].to(self.dtype)
        velocity = self.module(
            hidden_states=pack(latents).to(self.dtype),
            timestep=sigma,
            guidance=self.guidance_input(len(latents), latents.device),
            pooled_projections=conditions.tensors["pooled"].to(self.dtype),
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device),
            img_ids=self._image_ids(latents.device),
            return_dict=False,
        )[0]
        return unpack(velocity, self.latent_shape).float()

    def _image_ids(self, device: torch.device) -> Tensor:
        """Row and column of every token, `[N, 3]`."""
        _, height, width = self.latent_shape
        rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
        grid = torch.cartesian_prod(rows, columns)
        return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1).float()

    def lora_key(self, module_name: str) -> str:
        # Native layers fuse q, k and v, and ComfyUI documents diffusers' names for this family.
        return f"transformer.{module_name}"
