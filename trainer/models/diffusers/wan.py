"""Wan 2.1: text to video, first frame to video, and single images."""

from typing import Any

import torch
from torch import Tensor

from ...config import ModelConfig
from ...utils.errors import BadInput
from ..base import IMAGE_PREFIX, Conditions
from .family import DiffusersModel
from .folders import read_json
from .vae import latent_channels

_RENAMED = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
}
_ENDINGS = {".to_out.0": ".o", ".ffn.net.0.proj": ".ffn.0", ".ffn.net.2": ".ffn.2"}
_WHOLE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}


class WanModel(DiffusersModel):
    """Wan 2.1 (arXiv 2503.20314). A folder of the image-to-video pipeline needs a first frame for every prompt."""

    family = "wan"
    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    network_class = "WanTransformer3DModel"
    encoders = ("text_encoder", "tokenizer")
    condition_widths = {"embeds": "text_dim"}
    text_tokens = 512
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")
    input_layers = ("patch_embedding.weight",)
    vae_classes = ("AutoencoderKLWan",)
    video = True

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        super().check(config)
        index = read_json(cls.folder(config) / "model_index.json")
        if (index.get("transformer_2") or [None])[0] is not None or index.get("expand_timesteps"):
            raise BadInput(f"model.path {config.path!r} holds Wan 2.2, and family wan takes Wan 2.1")

    @classmethod
    def size_step(cls, network: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int | None]:
        return vae.get("scale_factor_spatial", 8) * network["patch_size"][1], vae.get("scale_factor_temporal", 4)

    @classmethod
    def input_channels(cls, config: ModelConfig, vae: dict[str, Any]) -> int:
        latents = latent_channels(vae)
        # A first frame comes as latents under a mask of a channel per frame of a latent frame.
        return 2 * latents + vae.get("scale_factor_temporal", 4) if cls.takes_images(config) else latents

    # ----------------------------------------------------------------------------------------------- encoding

    @classmethod
    def takes_images(cls, config: ModelConfig) -> bool:
        return read_json(cls.folder(config) / "model_index.json")["_class_name"] == "WanImageToVideoPipeline"

    @classmethod
    def image_shapes(cls, config: ModelConfig) -> dict[str, tuple[int | None, ...]]:
        shapes = super().image_shapes(config)
        if shapes:
            _, step = cls.size_step(cls.network_config(config), cls.vae_config(config))
            channels, *size = shapes[f"{IMAGE_PREFIX}latents"]
            frames = (config.frames - 1) // step + 1
            shapes[f"{IMAGE_PREFIX}latents"] = (channels + step, frames, *size)  # a mask before it
            if "image_encoder" in cls.image_encoders(config):
                shapes[f"{IMAGE_PREFIX}embeds"] = (None, cls.network_config(config)["image_dim"])
        return shapes

    @classmethod
    def image_encoders(cls, config: ModelConfig) -> tuple[str, ...]:
        semantic = cls.network_config(config).get("image_dim") is not None
        return ("vae", "image_encoder", "image_processor") if semantic else ("vae",)

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=cls.text_tokens
        )
        return Conditions({"embeds": embeds})

    @classmethod
    def encode_prompt_image(cls, pipeline: Any, config: ModelConfig, image: Any) -> dict[str, Tensor]:
        height, width, device = config.height, config.width, pipeline.vae.device
        pixels = pipeline.video_processor.preprocess(image, height=height, width=width).to(device)
        channels = pipeline.vae.config.z_dim
        unused = torch.zeros(1, device=device)
        _, condition = pipeline.prepare_latents(
            pixels, 1, channels, height, width, config.frames, torch.float32, device, latents=unused
        )
        tensors = {f"{IMAGE_PREFIX}latents": condition}
        if "image_encoder" in cls.image_encoders(config):
            tensors[f"{IMAGE_PREFIX}embeds"] = pipeline.encode_image([image], device)
        return tensors

    # ----------------------------------------------------------------------------------------------- sampling

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config, vae = self.config, self.vae.config
        frames = (config.frames - 1) // vae.scale_factor_temporal + 1
        return (vae.z_dim, frames, config.height // vae.scale_factor_spatial, config.width // vae.scale_factor_spatial)

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        tensors = conditions.tensors
        if f"{IMAGE_PREFIX}latents" in tensors:
            latents = torch.cat([latents, tensors[f"{IMAGE_PREFIX}latents"].to(latents)], dim=1)
        semantic = tensors.get(f"{IMAGE_PREFIX}embeds")
        velocity = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=tensors["embeds"].to(self.dtype),
            encoder_hidden_states_image=None if semantic is None else semantic.to(self.dtype),
            return_dict=False,
        )[0]
        return velocity.float()

    def lora_key(self, module_name: str) -> str:
        native = native_name(module_name)
        if native is None:
            raise BadInput(f"lora.targets: ComfyUI has no name for {module_name!r} of Wan")
        return f"diffusion_model.{native}"


def native_name(name: str) -> str | None:
    """The original name of a linear layer of diffusers' Wan transformer, which ComfyUI uses; None where unknown."""
    if name in _WHOLE:
        return _WHOLE[name]
    if not name.startswith("blocks."):
        return None
    for ending, native in _ENDINGS.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + native
    return ".".join(_RENAMED.get(part, part) for part in name.split("."))
