"""Every local reward with tiny random weights in files of the original layout; imports nothing of the pack.

`write` makes the files, `shrink` makes the pack's networks as small as they are: of this pack under any name, so that
the checks inside ComfyUI use the same.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import imagereward_reference
import pytest
import qwen_reference
import torch
from clip_reference import TINY, open_clip_shapes, random_weights, to_transformers

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_WORDS = ["[UNK]", "system", "You", "are", "a", "helpful", "assistant", ".", "user", "red", "circle"]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "dog"]
ROWS = len(QWEN_WORDS) + len(SPECIAL) + 3
TEXT, SUFFIX = "Judge {text_prompt} . ", " <|Reward|>"
TEMPLATE = "Judge <|VQ_reward|> <|MQ_reward|> {text_prompt} <|TA_reward|> ."
OCR = """
import io
from types import SimpleNamespace
from PIL import Image

class RapidOCR:
    def __call__(self, content):
        return SimpleNamespace(txts=("a",) if Image.open(io.BytesIO(content)).getpixel((0, 0))[0] > 99 else None)
"""

RULES = ("shapes", "shapes-strict", "brightness", "colorfulness", "sharpness", "jpeg-size")
CONTRASTIVE = ("hps-v2.1", "clip", "pickscore")
VIDEO = ("videoalign", "videoalign-vq", "videoalign-mq", "videoalign-ta")
NETWORKS = (*CONTRASTIVE, "imagereward", "aesthetic", "preference", "hpsv3", "geneval-like", *VIDEO)
LOCAL = (*RULES, *NETWORKS, "ocr")
"""Every reward that is not behind a server."""


def prompt(name: str) -> str:
    """One that this reward can score."""
    return 'a red circle and "ab"' if name == "ocr" else "a red circle"


def write(folder: Path) -> dict[str, dict[str, object]]:
    """Make all files below a folder; gives the options of each reward."""
    import open_clip
    from PIL import Image
    from safetensors.torch import save_file

    (folder / "networks").mkdir()
    (folder / "networks" / "tiny-plain.json").write_text(json.dumps(TINY))
    (folder / "networks" / "tiny-quick.json").write_text(json.dumps({**TINY, "quick_gelu": True}))
    open_clip.add_model_config(folder / "networks")
    clip = random_weights(open_clip_shapes(TINY))
    torch.save({"state_dict": {key: value.half() for key, value in clip.items()}}, folder / "hps.pt")
    save_file(to_transformers(clip), folder / "clip.safetensors")
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    torch.save(clip, folder / "clip" / "open_clip_pytorch_model.bin")
    torch.save(random_weights(aesthetic_head()), folder / "head.pth")
    shapes = imagereward_reference.shapes(words=len(BERT_WORDS) + 2)
    torch.save(random_weights(shapes), folder / "imagereward.pt")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
    (folder / "votes" / "images").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (30, 30), (60 * number, 90, 20)).save(folder / "votes" / "images" / f"{number}.png")
    (folder / "votes" / "votes.csv").write_text("better,worse\n3.png,0.png\n2.png,1.png\n")
    _write_qwen(folder)
    _write_geneval(folder)
    (folder / "ocr").mkdir()
    (folder / "ocr" / "rapidocr.py").write_text(OCR)
    (folder / "ocr" / "onnxruntime.py").write_text("")
    named = {
        "hps-v2.1": {"path": "hps.pt"},
        "clip": {"path": "clip"},
        "pickscore": {"path": "clip.safetensors"},
        "imagereward": {"path": "imagereward.pt", "vocabulary": "vocab.txt"},
        "aesthetic": {"path": "head.pth", "tower": "clip.safetensors"},
        "preference": {"collection": "votes", "backbone": "clip.safetensors"},
        "hpsv3": {
            "path": "hpsv3.safetensors",
            "tokenizer": "tokenizer.json",
            "instruction": "instruction.txt",
            "suffix": "suffix.txt",
        },
        **{name: {"path": "video.pth", "tokenizer": "tokenizer.json", "template": "template.txt"} for name in VIDEO},
        "geneval-like": {"detector": "detector", "clip": "clip.safetensors", "prompts": "prompts.jsonl"},
    }
    found = {name: {key: str(folder / file) for key, file in files.items()} for name, files in named.items()}
    for name in ("hpsv3", *VIDEO):
        found[name]["dtype"] = "float32"
    return {name: found.get(name, {}) for name in LOCAL}


def aesthetic_head() -> dict[str, tuple[int, ...]]:
    sizes = {0: (1024, 20), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {f"layers.{place}.{kind}": size[: 2 - (kind == "bias")] for place, size in sizes.items()
            for kind in ("weight", "bias")}  # fmt: skip


def _write_qwen(folder: Path) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    body, hidden = qwen_reference.shapes(ROWS), qwen_reference.SIZES["hidden_size"]
    head = {"rm_head.0": (24, hidden), "rm_head.3": (8, 24), "rm_head.5": (2, 8)}
    head = {
        f"{name}.{kind}": size[: 2 - (kind == "bias")] for name, size in head.items() for kind in ("weight", "bias")
    }
    save_file(random_weights(body | head), folder / "hpsv3.safetensors")
    written = qwen_reference.with_lora(body | {"rm_head.weight": (1, hidden)}, rank=4)
    torch.save(random_weights(written), folder / "video.pth")
    for name, text in {"instruction": TEXT, "suffix": SUFFIX, "template": TEMPLATE}.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(QWEN_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_geneval(folder: Path) -> None:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label={0: "dog", 1: "cat", 2: "mouse"}, label2id={"dog": 0, "cat": 1, "mouse": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    asked = {"tag": "counting", "include": [{"class": "dog", "count": 9}], "prompt": "a red circle"}
    (folder / "prompts.jsonl").write_text(json.dumps(asked) + "\n")


def shrink(change: Callable[[object, str, object], object], module: Callable[[str], ModuleType]) -> None:
    """Make the pack's networks as small as the files.

    Args:
        change: pytest's `monkeypatch.setattr`.
        module: gives the pack's module of a name such as `trainer.rewards.clip.hps`.
    """
    paths = ("clip.hps", "clip.pickscore", "clip.aesthetic", "geneval_like", "image_reward")
    paths = (*paths, "qwen.network", "qwen.hpsv3", "qwen.videoalign")
    rewards = {path.split(".")[-1]: module(f"trainer.rewards.{path}") for path in paths}
    change(rewards["hps"].HPSv21, "network", "tiny-plain")
    change(rewards["pickscore"].PickScore, "network", "tiny-plain")
    change(rewards["aesthetic"].ClipLargeReward, "network", "tiny-quick")
    vision = module("trainer.rewards.clip.vision")
    change(vision, "CLIP", {vision.Layout(32, 2, 5, 14): "tiny-quick"})
    change(rewards["geneval_like"].GenEvalLike, "network", "tiny-quick")
    change(rewards["geneval_like"], "SIDE", 64)
    blip, sizes = rewards["image_reward"].ImageReward, imagereward_reference
    depth = {"num_hidden_layers": sizes.LAYERS, "num_attention_heads": 2}
    change(blip, "vision", {"hidden_size": sizes.WIDTH, "intermediate_size": 4 * sizes.WIDTH, **depth})
    text = {"vocab_size": len(BERT_WORDS) + 2, "hidden_size": sizes.TEXT, "intermediate_size": 40}
    change(blip, "text", {**text, **depth})
    change(rewards["network"], "WORDS", len(QWEN_WORDS) + len(SPECIAL))
    change(rewards["hpsv3"], "PIXELS", 4 * 28 * 28)
    change(rewards["hpsv3"].HPSv3, "sizes", qwen_reference.SIZES)
    change(rewards["hpsv3"].HPSv3, "widths", (24, 8))
    change(rewards["hpsv3"].HPSv3, "sums", (_sha(TEXT), _sha(SUFFIX)))
    change(rewards["videoalign"].VideoAlignNetwork, "sizes", qwen_reference.SIZES)
    change(rewards["videoalign"].VideoAlignNetwork, "sums", _sha(TEMPLATE))
    change(rewards["videoalign"], "SMALLEST", 2 * 28 * 28)
    change(rewards["videoalign"], "LARGEST", 4 * 28 * 28)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def import_anew(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Find the stand-in of OCR's package in the folder, whatever was imported before; until the patch is undone."""
    patch.syspath_prepend(folder)
    for name in ("rapidocr", "onnxruntime"):
        patch.setitem(sys.modules, name, None)  # undoing brings back what is there now, or nothing
        del sys.modules[name]
