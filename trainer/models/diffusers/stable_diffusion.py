"""Stable Diffusion 1.x and 2.x, and SDXL: UNets that predict noise or v, sampled with DDIM."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...diffusion.process import VP, VP_V
from ...utils.errors import BadInput
from ..base import Conditions
from .family import DiffusersModel
from .folders import read_json
from .vae import vae_scale


class StableDiffusionModel(DiffusersModel):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752). A noise level is sqrt(1 - alpha_bar) of a training timestep.

    Instances that predict v are of process VP_V.
    """

    family = "sd"
    pipelines = ("StableDiffusionPipeline",)
    component = "unet"
    network_class = "UNet2DConditionModel"
    encoders = ("text_encoder", "tokenizer")
    condition_widths = {"embeds": "cross_attention_dim"}
    text_tokens = 77
    input_layers = ("conv_in.weight", "input_blocks.0.0.weight")
    default_targets = ("to_q", "to_k", "to_v", "to_out.0")
    process = VP
    pipeline_options = {"requires_safety_checker": False}  # no image is made by it, so its warning says nothing
    embedding_inputs = {"addition_embed_type": None}
    """Fields of the network's configuration that ask for more inputs, with the value of this family."""

    def __init__(self, module: nn.Module, vae: nn.Module, config: ModelConfig) -> None:
        super().__init__(module, vae, config)
        self.scheduler = _scheduler(self.folder(config))
        levels = (1 - self.scheduler.alphas_cumprod.double()).sqrt()
        self._levels = levels.to(next(module.parameters()).device)
        self.process = VP_V if self.scheduler.config.prediction_type == "v_prediction" else VP

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        super().check(config)
        scheduler = read_json(cls.folder(config) / "scheduler" / "scheduler_config.json")
        kind = scheduler.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise BadInput(
                f"model.path: the scheduler's prediction_type is {kind!r}, and only epsilon and v_prediction are known"
            )
        if scheduler.get("rescale_betas_zero_snr") and kind == "epsilon":
            raise BadInput(
                "model.path: the scheduler has rescale_betas_zero_snr with prediction_type epsilon, but with zero "
                "terminal SNR a prediction of noise determines no image: set prediction_type to v_prediction if the "
                "model predicts v"
            )

    @classmethod
    def check_channels(cls, config: ModelConfig, network: dict[str, Any], vae: dict[str, Any]) -> None:
        super().check_channels(config, network, vae)
        known = dict.fromkeys(("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type")) | cls.embedding_inputs
        other = {name: network.get(name) for name, value in known.items() if network.get(name) != value}
        if other:
            named = ", ".join(f"{name} {value!r}" for name, value in other.items())
            raise BadInput(
                f"model.path: {cls.folder(config) / cls.component} has {named}: its network needs an input that family "
                f"{cls.family} does not provide"
            )

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
        return Conditions({"embeds": embeds})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        scale = vae_scale(self.vae.config)
        return (self.module.config.in_channels, self.config.height // scale, self.config.width // scale)

    def sigmas(self, steps: int, shift: float | None) -> list[float]:
        """The levels of DDIM's timesteps; the last is the scheduler's final one, which may be above 0."""
        self.scheduler.set_timesteps(steps)
        alphas = [self.scheduler.alphas_cumprod[t] for t in self.scheduler.timesteps]
        return [(1 - alpha.double()).sqrt().item() for alpha in [*alphas, self.scheduler.final_alpha_cumprod]]

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        timestep = (sigma.double()[:, None] - self._levels).abs().argmin(1)
        return self.module(
            latents.to(self.dtype),
            timestep,
            encoder_hidden_states=conditions.tensors["embeds"].to(self.dtype),
            added_cond_kwargs=self.added_conditions(conditions),
            return_dict=False,
        )[0].float()

    def added_conditions(self, conditions: Conditions) -> dict[str, Tensor] | None:
        """What the UNet takes beside the text."""
        return None

    def lora_key(self, module_name: str) -> str:
        upsampled_after = [len(getattr(block, "attentions", ())) > 0 for block in self.module.up_blocks]
        native = native_name(module_name, self.module.config.layers_per_block, upsampled_after)
        if native is None:
            raise BadInput(f"lora.targets: ComfyUI has no name for {module_name!r} of this UNet")
        return f"diffusion_model.{native}"


class SDXLModel(StableDiffusionModel):
    """SDXL (arXiv 2307.01952): two text encoders, and the image's size as a condition."""

    family = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline_options = {}
    embedding_inputs = {"addition_embed_type": "text_time"}

    @classmethod
    def widths(cls, network: dict[str, Any]) -> dict[str, int]:
        # Beside the pooled text stand six embedded numbers: the sizes.
        pooled = network["projection_class_embeddings_input_dim"] - 6 * network["addition_time_embed_dim"]
        return super().widths(network) | {"pooled": pooled}

    @classmethod
    def encode_prompts(cls, pipeline: Any, config: ModelConfig, prompts: list[str]) -> Conditions:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, device=pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return Conditions({"embeds": embeds, "pooled": pooled})

    def added_conditions(self, conditions: Conditions) -> dict[str, Tensor]:
        height, width = self.config.height, self.config.width
        pooled = conditions.tensors["pooled"].to(self.dtype)
        # Original size, top left corner of the crop, target size: the pipeline's defaults.
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}


def _scheduler(folder: Path) -> Any:
    """DDIM with the folder's settings; with zero terminal SNR, from the level without signal on, as ComfyUI samples."""
    from diffusers import DDIMScheduler

    config = read_json(folder / "scheduler" / "scheduler_config.json")
    trailing = {"timestep_spacing": "trailing"} if config.get("rescale_betas_zero_snr") else {}
    return DDIMScheduler.from_config(config | trailing)


_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)")
_RESIZE = re.compile(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv")
_MIDDLE = re.compile(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)")
_FIXED = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


_INNER = {
    "time_emb_proj": "emb_layers.1",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block."""


def native_name(name: str, layers: int, attends: Sequence[bool]) -> str | None:
    """The original name of a linear or convolution layer of diffusers' UNet, which ComfyUI uses; None without one.

    Args:
        layers: residual layers per block of the UNet's way down; its way up has one more.
        attends: whether each block of its way up has attention.
    """
    if name in _FIXED:
        return _FIXED[name]
    if match := _BLOCK.fullmatch(name):
        way, block, kind, layer, rest = match.groups()
        if way == "down":
            block_name = f"input_blocks.{1 + int(block) * (layers + 1) + int(layer)}"
        else:
            block_name = f"output_blocks.{int(block) * (layers + 1) + int(layer)}"
        return f"{block_name}.{int(kind == 'attentions')}.{_INNER.get(rest, rest)}"
    if match := _RESIZE.fullmatch(name):
        way, block = match[1], int(match[2])
        if way == "down":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.conv"
    if match := _MIDDLE.fullmatch(name):
        kind, layer, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{_INNER.get(rest, rest)}"
    return None
