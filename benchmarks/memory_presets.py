"""GPU memory of every preset by part, computed on the meta device from the networks of the released folders.

    python benchmarks/memory_presets.py                   # the table in docs/families.md
    python benchmarks/memory_presets.py one-gpu-sd14

Nothing is loaded: folders of configurations alone are written, with the values of the released models, and the trainer
counts the memory of the run that the preset describes (`trainer.models.run_memory`). Rewards count with their weights
in float32; with several, all of them are on the GPU while they score. Not counted: the GPU's own context (about 0.5
GB), fragmentation, and workspaces of kernels.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.config import PRESETS, RunConfig, parse_config, preset
from trainer.models import FAMILIES, RunMemory, run_memory
from trainer.models.memory import BYTES

GB = 2**30
CARDS = (12, 16, 24, 48, 80)
CONTEXT = 1.5 * GB
"""Left free for what is not counted."""
KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
WAN_SMALL = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
NETWORKS = {
    "sd": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "hunyuanvideo": ("HunyuanVideoTransformer3DModel", {}),
    "skyreels": ("HunyuanVideoTransformer3DModel", {"in_channels": 32}),
    "wan": ("WanTransformer3DModel", WAN_SMALL),
}
VAES = {
    "sd": ("AutoencoderKL", KL),
    "flux": ("AutoencoderKL", KL | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "qwen-image": ("AutoencoderKLQwenImage", {}),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", {}),
    "skyreels": ("AutoencoderKLHunyuanVideo", {}),
    "wan": ("AutoencoderKLWan", {}),
}
REWARDS = {"hps-v2.1": 0.986e9, "clip": 0.987e9, "videoalign-vq": 2.2e9, "videoalign-mq": 2.2e9}
"""Weights of the published reward models: ViT-H-14, DFN5B ViT-H-14-378, Qwen2-VL-2B."""


def write_folder(folder: Path, family: str) -> tuple[int, int]:
    """A diffusers folder of configurations alone; returns the weights of its network and VAE."""
    import diffusers

    sizes = []
    for part, (name, settings) in ((FAMILIES[family].component, NETWORKS[family]), ("vae", VAES[family])):
        with torch.device("meta"):
            module = getattr(diffusers, name)(**settings)
        sizes.append(sum(value.numel() for value in module.parameters()))
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(dict(module.config) | {"_class_name": name}))
    (folder / "scheduler").mkdir()
    diffusers.DDIMScheduler().save_config(folder / "scheduler")
    index = {"_class_name": FAMILIES[family].pipelines[0]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return tuple(sizes)


def memory_of(name: str) -> tuple[RunConfig, RunMemory, int]:
    """A preset's description, its memory, and that of its rewards."""
    config = parse_config(preset(name))
    with tempfile.TemporaryDirectory() as base:
        network, vae = write_folder(Path(base) / "model", config.model.family)
        model = config.model.model_copy(update={"path": str(Path(base) / "model")})
        parts = run_memory(FAMILIES[model.family], config.model_copy(update={"model": model}))
    weights = network * BYTES[model.quantization or model.dtype] + vae * BYTES[model.vae_dtype]
    counted = RunMemory(int(weights), parts.adapter, parts.rollout, parts.update, parts.decode)
    return config, counted, int(sum(4 * REWARDS[reward.name] for reward in config.rewards))


def rows(names: list[str]) -> Iterator[str]:
    yield "| preset | weights | LoRA | rollout | update | decoding | rewards | total | smallest card |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in names:
        _, parts, rewards = memory_of(name)
        total = parts.total(rewards)
        card = next((f"{size} GB" for size in CARDS if total + CONTEXT <= size * GB), f"none of {CARDS[-1]} GB")
        figures = (parts.weights, parts.adapter, parts.rollout, parts.update, parts.decode, rewards, total)
        yield f"| `{name}` | {' | '.join(f'{figure / GB:.1f}' for figure in figures)} | {card} |"


def main() -> None:
    known = [path.stem for path in sorted(PRESETS.glob("*.yaml"))]
    known = [
        name for name in known if yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"]["family"] != "sd3"
    ]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="all of diffusers folders by default")
    for row in rows(parser.parse_args().presets or known):
        print(row, flush=True)


if __name__ == "__main__":
    main()
