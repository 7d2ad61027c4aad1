"""Writes tiny random models as files that core's loaders know, under the names of the released ones.

    PYTHONPATH=ComfyUI python tiny_files.py MODELS_FOLDER

Their text is as wide as that of the embedded model's encoders, which stand in for the real ones.
"""

import sys
from pathlib import Path

import torch
from comfy.cli_args import args
from safetensors.torch import save_file

TEXT = 128
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "hidden_size": 128,
    "num_heads": 1,
    "axes_dim": [16, 56, 56],
    "context_in_dim": TEXT,
    "vec_in_dim": TEXT,
    "depth": 1,
    "depth_single_blocks": 1,
}
HUNYUAN_VIDEO = FLUX | {
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
WAN_VAE = {
    "dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}


def network(core: str, config: dict) -> torch.nn.Module:
    import comfy.supported_models

    description = getattr(comfy.supported_models, core)(dict(config))
    description.unet_config = dict(config)
    description.set_inference_dtype(torch.float32, None)
    return description.get_model({}, "", device="cpu").diffusion_model


def write(module: torch.nn.Module, file: Path) -> None:
    """Save it with random weights: small ones, and scales near 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in module.state_dict().items():
        is_scale = value.ndim == 1 and name.endswith(("scale", "gamma")) or "gamma" in name
        spread = 0.05 if value.ndim < 2 or is_scale else 0.7 / max(1.0, value[0].numel()) ** 0.5
        weights[name] = float(is_scale) + spread * torch.randn(value.shape, generator=generator)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file)


def main(models: Path) -> None:
    args.cpu = True  # before what looks for a device is imported
    from comfy.ldm.wan.vae import WanVAE

    networks = models / "diffusion_models"
    flux = FLUX | {"image_model": "flux", "txt_ids_dims": []}
    write(network("Flux", flux), networks / "flux1-dev.safetensors")
    write(network("HunyuanVideo", HUNYUAN_VIDEO), networks / "hunyuan_video_t2v_720p_bf16.safetensors")
    # Wan's autoencoder has HunyuanVideo's latents, and core builds it as wide as its file is.
    write(WanVAE(**WAN_VAE), models / "vae" / "hunyuan_video_vae_bf16.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
