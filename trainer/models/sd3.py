"""Stable Diffusion 3 and 3.5, and the embedded model, from a diffusers folder."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import BadInput
from ..shapes import WEIGHTS
from .base import Conditions, DiffusionModel, require_files

T5_TOKENS = 256
COMPONENTS = ["model_index.json", "transformer/config.json", "vae/config.json", "text_encoder", "text_encoder_2"]


def _folder(config: ModelConfig) -> Path:
    return WEIGHTS if config.path == "embedded" else Path(config.path)


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"model.path: {path} cannot be read as JSON: {error}") from error


class SD3Model(DiffusionModel):
    """Stable Diffusion 3 (arXiv 2403.03206): joint attention over text and image tokens, velocity prediction."""

    default_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, transformer: torch.nn.Module, vae: torch.nn.Module, height: int, width: int) -> None:
        self.module = transformer
        self.vae = vae
        self._scale = _vae_scale(vae.config)
        self.height, self.width = height, width

    @staticmethod
    def check(config: ModelConfig) -> None:
        folder = _folder(config)
        require_files(folder, COMPONENTS, "sd3")
        pipeline = _json(folder / "model_index.json").get("_class_name")
        if pipeline != "StableDiffusion3Pipeline":
            raise BadInput(
                f"model.path {str(folder)!r} holds a {pipeline}, and family sd3 takes StableDiffusion3Pipeline"
            )
        transformer = _json(folder / "transformer/config.json")
        scale = _vae_scale(_json(folder / "vae/config.json"))
        step = scale * transformer["patch_size"]
        largest = scale * transformer["patch_size"] * transformer["pos_embed_max_size"]
        for name, size in (("height", config.height), ("width", config.width)):
            if size % step or size > largest:
                raise BadInput(f"model.{name} is {size}: this model takes multiples of {step} up to {largest}")

    @classmethod
    def load(cls, config: ModelConfig, device: torch.device) -> "SD3Model":
        import diffusers

        folder = _folder(config)
        vae_class = getattr(diffusers, _json(folder / "vae/config.json")["_class_name"])
        transformer = diffusers.SD3Transformer2DModel.from_pretrained(
            folder / "transformer", dtype=getattr(torch, config.dtype), local_files_only=True
        )
        vae = vae_class.from_pretrained(folder / "vae", dtype=getattr(torch, config.vae_dtype), local_files_only=True)
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer = transformer.to(device).requires_grad_(False)
        vae = vae.to(device, memory_format=torch.channels_last).requires_grad_(False)
        return cls(transformer, vae, config.height, config.width)

    @classmethod
    @torch.no_grad()
    def encode(cls, config: ModelConfig, prompts: list[str], device: torch.device) -> Conditions:
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        folder = _folder(config)
        index = _json(folder / "model_index.json")
        absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder,
            **dict.fromkeys([*absent, "transformer", "vae"]),
            dtype=getattr(torch, config.dtype),
            local_files_only=True,
        ).to(device)
        with torch.device("meta"):  # the pipeline reads widths from the transformer's configuration
            skeleton = SD3Transformer2DModel.from_config(_json(folder / "transformer/config.json"))
        pipeline.register_modules(transformer=skeleton)
        # Without T5 the text is CLIP's tokens alone, as in ComfyUI.
        length = T5_TOKENS if pipeline.text_encoder_3 is not None else 0
        chunks = []
        for start in range(0, len(prompts), 64):
            batch = prompts[start : start + 64]
            embeds, _, pooled, _ = pipeline.encode_prompt(
                batch, batch, batch, do_classifier_free_guidance=False, max_sequence_length=length
            )
            chunks.append(Conditions({"embeds": embeds.cpu(), "pooled": pooled.cpu()}))
        result = chunks[0]
        for chunk in chunks[1:]:
            result = result.joined(chunk)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    @classmethod
    def outside_conditions(cls, config: ModelConfig, embeds: Tensor, pooled: Tensor | None) -> Conditions:
        transformer = _json(_folder(config) / "transformer/config.json")
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
        return (self.module.config.in_channels, self.height // self._scale, self.width // self._scale)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        dtype = self.module.dtype
        velocity = self.module(
            hidden_states=latents.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=conditions.tensors["embeds"].to(dtype),
            pooled_projections=conditions.tensors["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        scaled = scaled.to(self.vae.dtype, memory_format=torch.channels_last)
        images = self.vae.decode(scaled, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1).contiguous()

    def lora_key(self, module_name: str) -> str:
        # Native layers fuse q, k and v, and ComfyUI documents diffusers' names for this family.
        return f"transformer.{module_name}"


def _vae_scale(config: dict) -> int:
    """Pixels per latent along each side: one halving between the VAE's resolution levels."""
    levels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(levels) - 1)
