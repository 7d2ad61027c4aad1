"""The judges at their real size, with random weights in files of the original layout: do they load, and how fast.

    python benchmarks/rewards_full_size.py [NAME ...]

For each: a file with every name, shape and type of the published one is written to a temporary folder, loaded by the
reward itself, and images are scored, in a process of its own. Prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

IMAGES, SIZE = 4, 512
HEAD = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
"""The aesthetic predictor's layers: outputs, inputs."""


def random(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: (torch.randn(shape) * 0.02).to(dtype) for name, shape in shapes.items()}


def clip_weights(architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:
    import open_clip
    from clip_reference import open_clip_shapes

    config = open_clip.get_model_config(architecture)
    config["vision_cfg"].setdefault("patch_size", 14)
    return random(open_clip_shapes(config), dtype)


def hps(folder: Path) -> dict[str, str]:
    torch.save({"state_dict": clip_weights("ViT-H-14", torch.float16)}, folder / "HPS_v2.1_compressed.pt")
    return {"path": str(folder / "HPS_v2.1_compressed.pt")}


def clip(folder: Path) -> dict[str, str]:
    import open_clip

    name = "ViT-H-14-378-quickgelu"
    network = {**open_clip.get_model_config(name)}
    preparation = {"resize_mode": "squash", "interpolation": "bicubic"}
    description = json.dumps({"model_cfg": network, "preprocess_cfg": preparation})
    (folder / "open_clip_config.json").write_text(description)
    torch.save(clip_weights(name, torch.float32), folder / "open_clip_pytorch_model.bin")
    return {"path": str(folder)}


def pickscore(folder: Path) -> dict[str, str]:
    from clip_reference import to_transformers
    from safetensors.torch import save_file

    save_file(to_transformers(clip_weights("ViT-H-14", torch.float32)), folder / "model.safetensors")
    return {"path": str(folder / "model.safetensors")}


def aesthetic(folder: Path) -> dict[str, str]:
    from clip_reference import to_transformers
    from safetensors.torch import save_file

    save_file(to_transformers(clip_weights("ViT-L-14-quickgelu", torch.float32)), folder / "clip.safetensors")
    layers = {f"layers.{place}.weight": shape for place, shape in HEAD.items()}
    layers |= {f"layers.{place}.bias": shape[:1] for place, shape in HEAD.items()}
    torch.save(random(layers, torch.float32), folder / "head.pth")
    return {"path": str(folder / "head.pth"), "tower": str(folder / "clip.safetensors")}


def image_reward(folder: Path) -> dict[str, str]:
    from test_reward_imagereward import shapes

    full = shapes(width=1024, text_width=768, blocks=24, layers=12, inner=3072, words=30524)
    torch.save(random(full, torch.float32), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(30517))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return {"path": str(folder / "ImageReward.pt"), "vocabulary": str(folder / "vocab.txt")}


JUDGES: dict[str, Callable[[Path], dict[str, str]]] = {
    "hps-v2.1": hps,
    "clip": clip,
    "pickscore": pickscore,
    "imagereward": image_reward,
    "aesthetic": aesthetic,
}


def measure(name: str, options: dict[str, str]) -> dict[str, float]:
    """Load and score in this process."""
    from trainer.config import RewardConfig
    from trainer.records import peak_memory
    from trainer.rewards import load_reward, score

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.rand(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    prompts = ["a red fox asleep on a mossy log"] * IMAGES
    begun = time.perf_counter()
    judge = load_reward(RewardConfig(name=name, options=options))
    judge.load()
    loaded = time.perf_counter()
    score(judge, images[:1], prompts[:1])  # the text, and whatever is slow once
    ready = time.perf_counter()
    scores = score(judge, images, prompts)
    seconds = (time.perf_counter() - ready) / IMAGES
    assert scores.isfinite().all() and len(scores) == IMAGES
    parameters = sum(p.numel() for p in judge.module.parameters())
    return {
        "parameters": parameters,
        "load": loaded - begun,
        "seconds": seconds,
        "memory": peak_memory(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JUDGES)}; all where none is given")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(JUDGES):
        parser.error(f"{min(unknown)} is none of {', '.join(JUDGES)}")
    if args.one:
        print(json.dumps(measure(args.names[0], json.loads(args.one))))
        return
    print("| reward | parameters | file | load, s | s per image | peak memory |\n|---|---|---|---|---|---|")
    for name in args.names or JUDGES:
        with tempfile.TemporaryDirectory() as folder:
            options = JUDGES[name](Path(folder))
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e9
            command = [sys.executable, __file__, name, "--one", json.dumps(options)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(answer.splitlines()[-1])
        print(
            f"| {name} | {found['parameters'] / 1e6:.0f} M | {size:.2f} GB | {found['load']:.1f} "
            f"| {found['seconds']:.2f} | {found['memory'] / 1024:.1f} GiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
