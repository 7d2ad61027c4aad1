"""Rewards at real size: `python benchmarks/rewards_full_size.py hps-v2.1 --images 4`, one reward per process.

Writes a file in the original layout (every key of the published file, random numbers), loads it through the reward's
own loader, scores images, and prints a row of a table: seconds to load, seconds per image, peak memory.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import imagereward_reference  # noqa: E402 - the layouts of the published files, as the tests know them
import qwen_reference  # noqa: E402
from clip_reference import open_clip_shapes, to_transformers  # noqa: E402

from trainer.config import RewardConfig  # noqa: E402
from trainer.rewards import load_reward, score  # noqa: E402
from trainer.rewards.clip.contrastive import architecture  # noqa: E402

Shapes = dict[str, tuple[int, ...]]
Options = dict[str, object]


def small(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Weights small enough for any depth."""
    return torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)


def random_file(shapes: Shapes, dtype: torch.dtype, draw: Callable[..., Tensor] = small) -> dict[str, Tensor]:
    """Random weights; norms are the identity, so that numbers stay finite at any depth.

    Args:
        draw: gives a weight of at least two dimensions.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for key, shape in shapes.items():
        if len(shape) < 2:
            found[key] = torch.full(shape, float(key.endswith("weight")), dtype=dtype)
        else:
            found[key] = draw(shape, dtype, generator)
    return found


def hps(folder: Path) -> Options:
    shapes = open_clip_shapes(architecture("ViT-H-14"))
    torch.save({"state_dict": random_file(shapes, torch.float16)}, folder / "HPS_v2.1_compressed.pt")
    return {"path": str(folder / "HPS_v2.1_compressed.pt")}


def clip(folder: Path) -> Options:
    config = architecture("ViT-H-14-378-quickgelu")
    written = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash", "interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    torch.save(random_file(open_clip_shapes(config), torch.float32), folder / "open_clip_pytorch_model.bin")
    return {"path": str(folder)}


def pickscore(folder: Path) -> Options:
    return {"path": str(transformers_clip(folder, "ViT-H-14"))}


def aesthetic(folder: Path) -> Options:
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    head = {f"layers.{place}.weight": size for place, size in sizes.items()}
    head |= {f"layers.{place}.bias": size[:1] for place, size in sizes.items()}
    torch.save(random_file(head, torch.float32), folder / "head.pth")
    return {"path": str(folder / "head.pth"), "tower": str(transformers_clip(folder, "ViT-L-14"))}


def transformers_clip(folder: Path, network: str) -> Path:
    from safetensors.torch import save_file

    save_file(
        to_transformers(random_file(open_clip_shapes(architecture(network)), torch.float32)), folder / "m.safetensors"
    )
    return folder / "m.safetensors"


def imagereward(folder: Path) -> Options:
    shapes = imagereward_reference.shapes(**imagereward_reference.PUBLISHED)
    torch.save(random_file(shapes, torch.float32), folder / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox"]
    words += [f"[unused{i}]" for i in range(30522 - len(words))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return {"path": str(folder / "ImageReward.pt"), "vocabulary": str(folder / "vocab.txt")}


def videoalign(folder: Path) -> Options:
    from trainer.rewards.qwen.videoalign import VideoAlignNetwork

    shapes = qwen_reference.with_lora(
        qwen_reference.shapes(151660, qwen_reference.SIZES_2B) | {"rm_head.weight": (1, 1536)}
    )
    torch.save(random_file(shapes, torch.bfloat16), folder / "model.pth")
    write_tokenizer(folder / "tokenizer.json")
    # As long as the original's text, which is not this project's to hand on.
    text = "Judge " * 800 + "{text_prompt} " + " ".join(VideoAlignNetwork.markers)
    (folder / "template.txt").write_text(text)
    import hashlib

    VideoAlignNetwork.sums = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"path": str(folder / "model.pth"), "tokenizer": str(folder / "tokenizer.json"),
            "template": str(folder / "template.txt")}  # fmt: skip


def write_tokenizer(path: Path) -> None:
    """A tokenizer with as many words as Qwen2-VL's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = ["[UNK]", "Judge", *(f"word{i}" for i in range(151657 - len(special) - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))


FILES: dict[str, Callable[[Path], Options]] = {
    "hps-v2.1": hps,
    "clip": clip,
    "pickscore": pickscore,
    "imagereward": imagereward,
    "aesthetic": aesthetic,
    "videoalign": videoalign,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reward", choices=FILES)
    parser.add_argument("--images", type=int, default=4, help="images (or videos of 53 frames) that are timed")
    parser.add_argument("--side", type=int, default=512, help="their height and width")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reward = load_reward(RewardConfig(name=args.reward, options=FILES[args.reward](Path(folder))))
        loading = clock(reward.load)
        shape = (args.images, *((53,) if reward.media == "video" else ()), 3, args.side, args.side)
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        prompts = ["a red fox"] * args.images
        if args.device != "cpu":
            score(reward, images[:1], prompts[:1])  # the first one sets the accelerator up
        found = []
        scoring = clock(lambda: found.append(score(reward, images, prompts)))
    assert found[0].isfinite().all()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if args.device != "cpu" else ""
    print("| reward | device, threads | load, s | s per item | peak memory, GiB | of the GPU |")
    print(f"| `{args.reward}` | {args.device}, {torch.get_num_threads()} | {loading:.1f} | {scoring / args.images:.2f} "
          f"| {memory:.1f} | {gpu} |")  # fmt: skip


def clock(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
