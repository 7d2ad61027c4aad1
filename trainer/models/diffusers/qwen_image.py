"""Qwen-Image, and Qwen-Image-Edit, which changes a source image."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...utils.media import open_image
from ..base import IMAGE_PREFIX, Conditions
from .family import JOINT_ATTENTION, DiffusersModel
from .latents import pack, together, unpack
from .vae import latent_channels

_NEGATIVE = f"{IMAGE_PREFIX}negative_"


class QwenImageModel(DiffusersModel):
    """Qwen-Image (arXiv 2508.02324): one attention over text and image tokens, texts of any length under a mask."""

    family = "qwen-image"
    pipelines = ("QwenImagePipeline",)
    network_class = "QwenImageTransformer2DModel"
    encoders = ("text_encoder", "tokenizer")
    condition_widths = {"embeds": "joint_attention_dim"}
    condition_masks = ("mask",)
    text_tokens = 512  # of a long prompt; usual ones have about 100
    input_layers = ("img_in.weight",)
    vae_classes = ("AutoencoderKLQwenImage",)
    default_targets = JOINT_ATTENTION

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        return 2 * _scale(vae), None

    @classmethod
    def input_channels(cls, config: ModelConfig, vae: dict[str, Any]) -> int:
        return 4 * latent_channels(vae)

    @classmethod
    def notes(cls, config: ModelConfig) -> list[str]:
        step, _ = cls.size_step(cls.network_config(config), cls.vae_config(config))
        odd = [str(size) for size in (config.height, config.width) if size // step % 2]
        if not odd:
            return []
        return [
            f"{' x '.join(odd)} pixels are an odd number of tokens, which ComfyUI places one token nearer to the text "
            f"than diffusers, where this LoRA learns: take multiples of {2 * step} for images that agree"
        ]

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        return _with_mask(*pipeline.encode_prompt(prompts))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = _scale(self.vae.config)
        return (self.module.config.in_channels // 4, self.config.height // scale, self.config.width // scale)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        _, height, width = self.latent_shape
        tokens = pack(latents)
        sources = self.source_tokens(conditions)
        shapes = [(1, height // 2, width // 2)] * (1 + len(sources))
        velocity = self.module(
            hidden_states=torch.cat([tokens, *sources], dim=1).to(self.dtype),
            timestep=sigma,
            encoder_hidden_states=conditions.tensors["embeds"].to(self.dtype),
            encoder_hidden_states_mask=conditions.tensors["mask"],
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : tokens.shape[1]], self.latent_shape).float()

    def encode_image_batch(self, images: Tensor) -> Tensor:
        return super().encode_image_batch(images)[:, :, 0]  # its VAE is one for videos

    def source_tokens(self, conditions: Conditions) -> list[Tensor]:
        """Tokens of the images that the new one is made from."""
        return []

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Mixed, then given the length that the positive branch has in every token (as the family's pipelines do)."""
        wanted = pack(positive)
        mixed = pack(super().guided(positive, negative, scale))
        mixed = mixed * (wanted.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return unpack(mixed, self.latent_shape)

    def lora_key(self, module_name: str) -> str:
        return f"diffusion_model.{module_name}"  # the native names are diffusers'


class QwenImageEditModel(QwenImageModel):
    """Qwen-Image-Edit: the text encoder sees the source image, and its latents stand beside those of the result."""

    family = "qwen-image-edit"
    pipelines = ("QwenImageEditPipeline",)

    @classmethod
    def takes_images(cls, config: ModelConfig) -> bool:
        return True

    @classmethod
    def image_shapes(cls, config: ModelConfig) -> dict[str, tuple[int | None, ...]]:
        width = cls.widths(cls.network_config(config))["embeds"]
        return super().image_shapes(config) | {f"{_NEGATIVE}embeds": (None, width), f"{_NEGATIVE}mask": (None,)}

    @classmethod
    def image_encoders(cls, config: ModelConfig) -> tuple[str, ...]:
        return ("vae", "processor")

    @classmethod
    def encode_rows(
        cls, pipeline: Any, config: ModelConfig, prompts: list[str], images: list[Path | None], negative: str
    ) -> Conditions:
        texts, rows = [], []
        for prompt, path in zip(prompts, images, strict=True):
            image = pipeline.image_processor.resize(open_image(path), config.height, config.width)
            texts.append(_with_mask(*pipeline.encode_prompt([prompt], [image])))
            # What the negative prompt says depends on the image it is read with.
            without = _with_mask(*pipeline.encode_prompt([negative], [image]))
            pixels = pipeline.image_processor.preprocess(image, config.height, config.width).unsqueeze(2)
            latents = pipeline._encode_vae_image(pixels.to(pipeline.vae.device, pipeline.vae.dtype), None)
            rows.append(Conditions({_NEGATIVE + name: value for name, value in without.tensors.items()}))
            rows[-1].tensors[f"{IMAGE_PREFIX}latents"] = latents[:, :, 0]
        return Conditions(together(texts).tensors | together(rows).tensors)

    def source_tokens(self, conditions: Conditions) -> list[Tensor]:
        return [pack(conditions.tensors[f"{IMAGE_PREFIX}latents"].float())]

    def negatives(self, conditions: Conditions, unconditional: Conditions) -> Conditions:
        own = {name: conditions.tensors[_NEGATIVE + name] for name in unconditional.tensors if not _of_image(name)}
        return Conditions(own).with_images_of(conditions)


def _of_image(name: str) -> bool:
    return name.startswith(IMAGE_PREFIX)


def _scale(vae: Any) -> int:
    """Pixels per latent along each side."""
    return 2 ** len(vae["temperal_downsample"])


def _with_mask(embeds: Tensor, mask: Tensor | None) -> Conditions:
    """The pipeline leaves out a mask of ones."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
    return Conditions({"embeds": embeds, "mask": mask})
