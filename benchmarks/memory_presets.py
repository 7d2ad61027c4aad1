"""GPU memory of every preset by part, computed on the meta device from the networks of the released folders.

    python benchmarks/memory_presets.py                   # the table in docs/families.md
    python benchmarks/memory_presets.py one-gpu-sd14

Nothing is loaded: folders of configurations alone are written, with the values of the released models, and the trainer
counts the memory of the run that the preset describes, as its estimate does. Rewards count with their weights in the
dtype that `auto` is on a GPU; with several, all of them are on the GPU while they score. A preset reads a diffusers
folder, which ComfyUI's server does not load, so of the server only its GPU context is left free. Not counted: what is
left free (`FREE`), and activations of the rewards.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.core_models import FOLDER_KL, FOLDER_KL_16, FOLDER_WAN_SMALL
from trainer.config import PRESETS, RunConfig, parse_config, preset
from trainer.estimate import memory
from trainer.models import FAMILIES, run_memory
from trainer.models.memory import BYTES
from trainer.objectives import objective_class
from trainer.rewards import REWARDS as ALL_REWARDS
from trainer.rewards.qwen.videoalign import VideoAlign
from trainer.runs.capacity import iteration_bytes

GB = 2**30
CARDS = (12, 16, 24, 48, 80)
FREE = 1.5 * GB
"""GPU contexts of the training process and of ComfyUI's server (about 0.5 GB each), fragmentation and workspaces."""
NETWORKS = {
    "sd": ("UNet2DConditionModel", {"cross_attention_dim": 768}),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "hunyuanvideo": ("HunyuanVideoTransformer3DModel", {}),
    "skyreels": ("HunyuanVideoTransformer3DModel", {"in_channels": 32}),
    "wan": ("WanTransformer3DModel", FOLDER_WAN_SMALL),
}
VAES = {
    "sd": ("AutoencoderKL", FOLDER_KL),
    "flux": ("AutoencoderKL", FOLDER_KL_16),
    "qwen-image": ("AutoencoderKLQwenImage", {}),
    "hunyuanvideo": ("AutoencoderKLHunyuanVideo", {}),
    "skyreels": ("AutoencoderKLHunyuanVideo", {}),
    "wan": ("AutoencoderKLWan", {}),
}
ENCODERS = {
    "sd": 0.123e9,
    "flux": 4.89e9,
    "qwen-image": 8.29e9,
    "hunyuanvideo": 8.15e9,
    "skyreels": 8.15e9,
    "wan": 5.68e9,
}
"""Weights of the released text encoders, which are there while the prompts are encoded, and nothing else is."""
REWARDS = {
    "hps-v2.1": 0.986e9,
    "clip": 0.987e9,
    "aesthetic": 0.304e9,
    "imagereward": 0.447e9,
    "videoalign": 2.2e9,
}
"""Weights of the published reward models: ViT-H-14, DFN5B ViT-H-14-378, ViT-L-14's tower, BLIP, Qwen2-VL-2B."""


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


def parts_of(config: RunConfig) -> dict[str, int]:
    """Bytes by part, named and added up as in the trainer's estimate."""
    model, family = config.model, FAMILIES[config.model.family]
    with tempfile.TemporaryDirectory() as base:
        network, vae = write_folder(Path(base) / "model", model.family)
        model = model.model_copy(update={"path": str(Path(base) / "model")})
        counted = run_memory(family, config.model_copy(update={"model": model}))
        latents = math.prod(family.on_meta(model).latent_shape)
    return {
        memory.NETWORK: int(network * BYTES[model.quantization or model.dtype] + vae * BYTES[model.vae_dtype]),
        memory.ADAPTER: counted.adapter,
        memory.HELD: iteration_bytes(config, 1, latents),
        memory.ROLLOUT: counted.rollout,
        memory.UPDATE: counted.update,
        memory.DECODE: counted.decode,
        memory.REWARDS: reward_bytes(config),
        memory.ENCODERS: int(ENCODERS[model.family] * BYTES[model.dtype]),
    }


def reward_bytes(config: RunConfig) -> int:
    """Bytes of the rewards' weights on a GPU; the rewards of VideoAlign share one network."""
    gradient = objective_class(config.objective).needs_reward_gradients
    dtypes = {}
    for reward in config.rewards:
        kind = ALL_REWARDS[reward.name]
        name = "videoalign" if issubclass(kind, VideoAlign) else reward.name
        dtypes[name] = kind.cpu_dtype if gradient else kind.gpu_dtype
    return int(sum(REWARDS[name] * BYTES[dtype] for name, dtype in dtypes.items()))


def on_card(needed: float, card: int) -> str:
    """Whether it fits, or how many GB are missing."""
    over = needed + FREE - card * GB
    return "fits" if over <= 0 else f"{over / GB:.1f} short"


def rows(names: list[str]) -> Iterator[str]:
    titles = ["weights", "LoRA", "latents, images", "rollout", "update", "decoding", "rewards", "text encoders"]
    titles += ["peak", *(f"{card} GB" for card in CARDS)]
    yield f"| preset | {' | '.join(titles)} |"
    yield f"|{'---|' * (1 + len(titles))}"
    for name in names:
        parts = parts_of(parse_config(preset(name)))
        needed = memory.peak(parts, on_cpu=False)
        figures = [f"{size / GB:.1f}" for size in (*parts.values(), needed)]
        yield f"| `{name}` | {' | '.join([*figures, *(on_card(needed, card) for card in CARDS)])} |"


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
