"""Writes a tiny random FLUX.1 as a file that core's loader knows, under the released one's name.

    PYTHONPATH=ComfyUI python tiny_files.py MODELS_FOLDER

Its text is as wide as that of the embedded model's encoders, which stand in for the real ones.
"""

import sys
from pathlib import Path

import torch
from comfy.cli_args import args
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from core_networks import TINY_FLUX, core_model

TEXT = 128
FLUX = TINY_FLUX | {
    "hidden_size": 128,
    "num_heads": 1,
    "axes_dim": [16, 56, 56],
    "context_in_dim": TEXT,
    "vec_in_dim": TEXT,
}


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
    network = core_model("Flux", FLUX, torch.float32, None, "cpu").diffusion_model
    write(network, models / "diffusion_models" / "flux1-dev.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
