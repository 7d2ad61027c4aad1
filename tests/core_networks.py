"""ComfyUI's own networks: what all sizes of a family have in common, released sizes, and tiny ones.

They are given by their configurations, as ComfyUI reads them from files. Here are those that tests and benchmarks
share; those that only one file needs are in that file. Nothing here imports ComfyUI before `core_model`.
"""

from typing import Any

import torch


def core_model(
    name: str, config: dict, weights: torch.dtype, compute: torch.dtype | None, device: Any, marks: tuple[str, ...] = ()
) -> Any:
    """Core's `BaseModel` as its loader makes it, before any weights are read.

    Args:
        name: of a class of `comfy.supported_models`.
        config: of the network, as core reads it from a file.
        weights, compute: dtypes of the weights and, where it is another one, of the computation.
        marks: names of empty tensors by which core recognises a kind of file.
    """
    import comfy.supported_models

    description = getattr(comfy.supported_models, name)(dict(config))
    description.unet_config = dict(config)  # without what the class would add for the released size
    description.set_inference_dtype(weights, compute)
    return description.get_model(dict.fromkeys(marks, torch.empty(0)), "", device=device)


# ----------------------------------------------------------------------------------------------------- Stable Diffusion

UNET_BASE = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SD_BASE = UNET_BASE | {"use_linear_in_transformer": False, "num_head_channels": -1, "adm_in_channels": None}
SDXL_BASE = UNET_BASE | {"use_linear_in_transformer": True, "num_heads": -1, "num_classes": "sequential"}
SD15 = SD_BASE | {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "num_heads": 8,
}
SDXL = SDXL_BASE | {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "num_head_channels": 64,
    "adm_in_channels": 2816,
}
TINY_UNET_SIZE = {
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": 16,
}
SDXL_DIFFUSERS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL's released size for diffusers' `UNet2DConditionModel`."""

# ------------------------------------------------------------------------------------------------ FLUX and HunyuanVideo

FLUX_BASE = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
HUNYUAN_BASE = {name: value for name, value in FLUX_BASE.items() if name != "txt_ids_dims"} | {
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
_FLUX_WIDTH = {
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "context_in_dim": 4096,
    "vec_in_dim": 768,
}
_TINY_FLUX_SIZE = {
    "hidden_size": 32,
    "num_heads": 2,
    "axes_dim": [4, 6, 6],
    "context_in_dim": 16,
    "vec_in_dim": 16,
    "depth": 1,
    "depth_single_blocks": 1,
}
FLUX = FLUX_BASE | _FLUX_WIDTH | {"depth": 19, "depth_single_blocks": 38}
HUNYUAN = HUNYUAN_BASE | _FLUX_WIDTH | {"depth": 20, "depth_single_blocks": 40}
TINY_FLUX = FLUX_BASE | _TINY_FLUX_SIZE
TINY_HUNYUAN = HUNYUAN_BASE | _TINY_FLUX_SIZE

# --------------------------------------------------------------------------------------------------------------- others

SD3_BASE = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "input_size": None,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
LUMINA_BASE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "qk_norm": True,
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
}
Z_IMAGE_BASE = LUMINA_BASE | {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
WAN_BASE = {"image_model": "wan2.1", "model_type": "t2v"}
WAN_1_3B = WAN_BASE | {
    "dim": 1536,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "text_dim": 4096,
    "num_heads": 12,
    "num_layers": 30,
}
WAN_14B = WAN_1_3B | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
TINY_WAN = WAN_BASE | {"dim": 24, "ffn_dim": 16, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 1}
TINY_QWEN = {
    "image_model": "qwen_image",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
