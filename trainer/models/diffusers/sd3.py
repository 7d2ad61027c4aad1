"""Stable Diffusion 3 and 3.5, and the embedded model, from a diffusers folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...shapes import WEIGHTS
from ...utils.errors import BadInput
from ..base import Conditions
from .family import JOINT_ATTENTION, DiffusersModel
from .folders import read_json
from .vae import vae_scale

T5_TOKENS = 256


class SD3Model(DiffusersModel):
    """Stable Diffusion 3 (arXiv 2403.03206): joint attention over text and image tokens, velocity prediction."""

    family = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    network_class = "SD3Transformer2DModel"
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    condition_widths = {"embeds": "joint_attention_dim", "pooled": "pooled_projection_dim"}
    text_tokens = 77 + T5_TOKENS
    input_layers = ("pos_embed.proj.weight", "x_embedder.proj.weight")
    default_targets = JOINT_ATTENTION
    scheduler_spaces = True

    @classmethod
    def folder(cls, config: ModelConfig) -> Path:
        return WEIGHTS if config.path == "embedded" else Path(config.path)

    @classmethod
    def prompt_tokens(cls, config: ModelConfig) -> int:
        """Those of CLIP, and of T5 where the folder has it."""
        folder = cls.folder(config)
        file = folder / "text_encoder" / "config.json"
        clip = read_json(file).get("max_position_embeddings", 77) if file.is_file() else 77
        return clip + (T5_TOKENS if (folder / "text_encoder_3").is_dir() else 0)

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        return vae_scale(vae) * network["patch_size"], None

    @classmethod
    def check_size(cls, config: ModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> None:
        super().check_size(config, network, vae)
        step, _ = cls.size_step(network, vae)
        largest = step * network["pos_embed_max_size"]
        for name, size in (("height", config.height), ("width", config.width)):
            if size > largest:
                raise BadInput(f"model.{name} is {size}: this model takes multiples of {step} up to {largest}")

    @classmethod
    def _encoders(cls, config: ModelConfig, device: torch.device) -> Any:
        from diffusers import StableDiffusion3Pipeline

        folder = cls.folder(config)
        index = read_json(folder / "model_index.json")
        absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder,
            **dict.fromkeys([*absent, "transformer", "vae"]),
            dtype=getattr(torch, config.dtype),
            local_files_only=True,
            use_safetensors=True,
        ).to(device)
        pipeline.register_modules(transformer=cls.skeleton(config))  # it reads widths from the configuration
        return pipeline

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        # Without T5 the text is CLIP's tokens alone, as in ComfyUI.
        length = T5_TOKENS if pipeline.text_encoder_3 is not None else 0
        device = pipeline.text_encoder.device
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return Conditions({"embeds": embeds, "pooled": pooled})

    @classmethod
    def outside_conditions(cls, config: ModelConfig, embeds: Tensor, pooled: Tensor | None) -> Conditions:
        transformer = read_json(cls.folder(config) / "transformer/config.json")
        given = (embeds.shape[-1], 0 if pooled is None else pooled.shape[-1])
        wanted = (transformer["joint_attention_dim"], transformer["pooled_projection_dim"])
        if given != wanted:
            raise BadInput(
                f"the text encoders give conditions {given[0]} and {given[1]} wide, and this model takes {wanted[0]} "
                f"and {wanted[1]}: connect the CLIP that belongs to it"
            )
        return Conditions({"embeds": embeds, "pooled": pooled})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = vae_scale(self.vae.config)
        return (self.module.config.in_channels, self.config.height // scale, self.config.width // scale)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=conditions.tensors["embeds"].to(self.dtype),
            pooled_projections=conditions.tensors["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def lora_key(self, module_name: str) -> str:
        # Native layers fuse q, k and v, and ComfyUI documents diffusers' names for this family.
        return f"transformer.{module_name}"
