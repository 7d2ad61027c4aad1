"""Writes a tiny random FLUX.1 as a file that core's loader knows, under the released one's name.

    PYTHONPATH=ComfyUI python tiny_files.py MODELS_FOLDER

Its text is as wide as that of the embedded model's encoders, which stand in for the real ones.
"""

import sys
from pathlib import Path

import torch
from comfy.cli_args import args
from safetensors.torch import save_file

TEXT = 128
FLUX = {
    "image_model": "flux",
    "txt_ids_dims": [],
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
    write(network("Flux", FLUX), models / "diffusion_models" / "flux1-dev.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
