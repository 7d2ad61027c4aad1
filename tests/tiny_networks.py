"""Tiny networks of core's further families, with what their conditions carry: arguments of `Case` in tiny_graphs.py."""

import torch
from core_networks import TINY_FLUX, TINY_HUNYUAN, TINY_QWEN, TINY_UNET_SIZE, TINY_WAN, UNET_BASE
from torch import Tensor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask() -> dict:
    return {"attention_mask": torch.ones(1, 6, dtype=torch.long)}


FLUX_SCHNELL = TINY_FLUX | {"guidance_embed": False}
CHROMA = {key: value for key, value in TINY_FLUX.items() if key != "guidance_embed"} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 32,
    "hidden_dim": 32,
    "n_layers": 1,
    "vec_in_dim": None,
}
HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [16, 16],
    "text_emb_dim": 16,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (8, 4, 4),
    "max_resolution": (16, 16),
    "llama_layers": [0, 1],
}
ERNIE = {
    "image_model": "ernie",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 32,
    "text_in_dim": 16,
    "rope_axes_dim": (4, 6, 6),
}
KREA = {
    "image_model": "krea2",
    "features": 32,
    "tdim": 16,
    "txtdim": 8,
    "heads": 2,
    "kvheads": 1,
    "multiplier": 2,
    "layers": 1,
    "txtlayers": 2,
    "txtheads": 2,
    "txtkvheads": 2,
}
KANDINSKY = {
    "image_model": "kandinsky5",
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 6, 6),
}
OMNIGEN = {
    "image_model": "omnigen2",
    "hidden_size": 32,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 16,
    "axes_dim_rope": (4, 6, 6),
    "axes_lens": (64, 32, 32),
    "text_feat_dim": 16,
    "timestep_scale": 1000.0,
}
BOOGU = {key: value for key, value in OMNIGEN.items() if key != "text_feat_dim"} | {
    "image_model": "boogu",
    "num_double_stream_layers": 1,
    "instruction_feat_dim": 16,
}
MAGE = {
    "image_model": "mage_flow",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
JOY = {
    "image_model": "joyimage",
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 1,
    "rope_dim_list": [4, 6, 6],
}
IDEOGRAM = {
    "image_model": "ideogram4",
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "intermediate_size": 32,
    "adaln_dim": 16,
    "llm_features_dim": 16,
    "mrope_section": (2, 3, 3),
}
LENS = {
    "image_model": "lens",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "enc_hidden_dim": 8,
    "axes_dims_rope": (4, 6, 6),
    "selected_layer_index": (0, 1),
}
LTX2 = {
    "image_model": "ltxav",
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "cross_attention_dim": 32,
    "caption_channels": 16,
    "audio_attention_head_dim": 8,
    "audio_num_attention_heads": 2,
    "audio_cross_attention_dim": 16,
    "connector_attention_head_dim": 8,
    "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}
COSMOS = {
    "max_img_h": 16,
    "max_img_w": 16,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 32,
    "num_blocks": 1,
    "num_heads": 2,
    "crossattn_emb_channels": 16,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "use_adaln_lora": True,
    "adaln_lora_dim": 8,
}
COSMOS1 = COSMOS | {
    "image_model": "cosmos",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
AURA = {"dim": 32, "n_layers": 2, "n_double_layers": 1, "n_heads": 2, "global_conddim": 32, "cond_seq_dim": 16}
PIXART = {
    "image_model": "pixart_alpha",
    "input_size": 32,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "caption_channels": 16,
    "micro_condition": False,
    "model_max_length": 6,
    "pe_interpolation": 1,
}
HYDIT = {
    "image_model": "hydit",
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "text_states_dim": 16,
    "text_states_dim_t5": 16,
    "text_len": 6,
    "text_len_t5": 6,
}
UNGUIDED_HUNYUAN = TINY_HUNYUAN | {"guidance_embed": False}
HUNYUAN15 = UNGUIDED_HUNYUAN | {
    "patch_size": [1, 1, 1],
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "use_cond_type_embedding": True,
    "vision_in_dim": 16,
    "meanflow_sum": True,
}
HUNYUAN_IMAGE = UNGUIDED_HUNYUAN | {
    "patch_size": [1, 1],
    "axes_dim": [8, 8],
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
}
UNET = UNET_BASE | TINY_UNET_SIZE | {"use_linear_in_transformer": True, "num_head_channels": 16}
VIDEO = (32, 48, 5)


def references(count: int = 2) -> dict:
    """Images of different sizes, as core's TextEncodeQwenImageEditPlus hands them over."""
    sizes = [(4, 6), (2, 4), (6, 2)][:count]
    images = [draw(1, 16, 1, *size, seed=9 + i) for i, size in enumerate(sizes)]
    return {"reference_latents": images, "reference_latents_method": "index_timestep_zero"}


def three_references() -> dict:
    """As Qwen-Image-Edit 2509 has them: positions by the index alone."""
    return {"reference_latents": references(3)["reference_latents"]}


def llama() -> dict:
    return {"conditioning_llama3": draw(1, 2, 6, 16, seed=11)}


def mt5() -> dict:
    ones = torch.ones(1, 6, dtype=torch.long)
    return {
        "attention_mask": ones,
        "conditioning_mt5xl": draw(1, 6, 16, seed=12),
        "attention_mask_mt5xl": ones,
    }


PARTLY_SHAPED = (
    "HiDream",
    "ErnieImage",
    "Krea2",
    "Lens",
    "PixArtAlpha",
    "PixArtSigma",
    "HunyuanDiT",
    "HunyuanVideo15",
    "LTXAV",
)
"""Networks that need values for some step, so that without weights their conditions are looked at in part."""
MORE = [
    {"core": "SD20", "config": UNET | {"adm_in_channels": None}, "text": (16, None), "size": (64, 64, 1)},
    {
        "core": "SDXLRefiner",
        "config": UNET | {"num_classes": "sequential", "adm_in_channels": 16 + 5 * 256},
        "text": (16, 16),
        "size": (64, 64, 1),
    },
    {"core": "FluxSchnell", "config": FLUX_SCHNELL, "text": (16, 16)},
    {"core": "LongCatImage", "config": FLUX_SCHNELL | {"vec_in_dim": None, "txt_ids_dims": [1, 2]}, "text": (16, None)},
    {"core": "Chroma", "config": CHROMA, "text": (16, None)},
    {"core": "HiDream", "config": HIDREAM, "text": (16, 16), "extra": llama},
    {"core": "ErnieImage", "config": ERNIE, "text": (16, None)},
    {"core": "Krea2", "config": KREA, "text": (16, None)},
    {"core": "Kandinsky5Image", "config": KANDINSKY | {"visual_embed_dim": 64}, "text": (16, 16)},
    {"core": "Kandinsky5", "config": KANDINSKY | {"visual_embed_dim": 132}, "text": (16, 16), "size": VIDEO},
    {"core": "Omnigen2", "config": OMNIGEN, "text": (16, None), "extra": mask},
    {"core": "Boogu", "config": BOOGU, "text": (16, None), "extra": mask},
    {"core": "MageFlow", "config": MAGE, "text": (16, None)},
    {"core": "JoyImage", "config": JOY, "text": (16, None)},
    {"core": "Ideogram4", "config": IDEOGRAM, "text": (16, None), "scale": 2.0},
    {"core": "Lens", "config": LENS, "text": (16, None)},
    {"core": "CosmosT2V", "config": COSMOS1, "text": (16, None), "size": (32, 48, 9)},
    {"core": "LTXAV", "config": LTX2, "text": (16, None), "size": (64, 96, 9), "extra": lambda: {"frame_rate": 24}},
    {"core": "AuraFlow", "config": AURA, "text": (16, None), "scale": 2.0},
    {"core": "PixArtAlpha", "config": PIXART, "text": (16, None), "size": (320, 320, 1)},
    {
        "core": "PixArtSigma",
        "config": PIXART | {"image_model": "pixart_sigma"},
        "text": (16, None),
        "size": (320, 320, 1),
    },
    {"core": "HunyuanDiT", "config": HYDIT, "text": (16, 1024), "extra": mt5},
    {"core": "HunyuanVideo15", "config": HUNYUAN15, "text": (16, 16), "size": VIDEO},
    {"core": "HunyuanImage21", "config": HUNYUAN_IMAGE, "text": (16, None), "size": (64, 96, 1)},
    {"core": "WAN22_T2V", "config": TINY_WAN | {"in_dim": 48, "out_dim": 48}, "text": (16, None), "size": VIDEO},
    {"core": "QwenImage", "config": TINY_QWEN, "text": (16, None), "extra": references, "name": "QwenImageEditPlus"},
    {"core": "QwenImage", "config": TINY_QWEN, "text": (16, None), "extra": three_references, "name": "QwenImageEdit3"},
]
for given in MORE:
    given["shapes"] = given["core"] not in PARTLY_SHAPED
