"""Shared by the rewards on Qwen2-VL: the network with a head, image patches, the prompt template.

These reward models were trained with sequential positions instead of Qwen2-VL's three-dimensional ones, and their head
is applied to the hidden states of marker tokens.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ...utils.errors import BadInput
from ..base import ModelReward
from ..files import build, fill, read_weights, rename
from ..preprocess import normalize

PATCH, MERGE = 14, 2
FACTOR = PATCH * MERGE
WORDS = 151657
"""Vocabulary size of Qwen2-VL's tokenizer; the marker tokens are appended to it."""

SIZES_2B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "sections": [16, 24, 24],
    "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16},
}
SIZES_7B: dict[str, Any] = {
    **SIZES_2B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)


class QwenNetwork(nn.Module):
    """Qwen2-VL with a head on its last hidden states.

    Args:
        sizes: such as `SIZES_2B`.
        words: number of token embeddings.
        head: maps hidden states to scores.
    """

    def __init__(self, sizes: dict[str, Any], words: int, head: nn.Module) -> None:
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
            Qwen2VLTextModel,
        )

        super().__init__()
        own = {key: value for key, value in sizes.items() if key not in ("vision", "sections")}
        rope = {"type": "mrope", "mrope_section": sizes["sections"]}
        text = Qwen2VLTextConfig(
            **own, vocab_size=words, rope_theta=1e6, rope_scaling=rope, rms_norm_eps=1e-6, attn_implementation="sdpa"
        )
        vision = Qwen2VLVisionConfig(
            **sizes["vision"], hidden_size=sizes["hidden_size"], mlp_ratio=4, attn_implementation="sdpa"
        )
        self.visual = Qwen2VisionTransformerPretrainedModel(vision)
        self.language = Qwen2VLTextModel(text)
        self.head = head

    def forward(self, patches: Tensor, grid: tuple[int, int, int], tokens: Tensor, pad: int, first: int) -> Tensor:
        """Outputs of the head at every marker token, `[M, outputs]` float32.

        Args:
            patches: `[T H W, C]`, from `patchify`.
            grid: T, H, W in patches.
            tokens: `[L]` long, with a `pad` in place of each merged patch.
            first: id of the first marker token.
        """
        dtype = self.language.embed_tokens.weight.dtype
        seen = self.visual(patches.to(dtype), grid_thw=torch.tensor([grid], device=patches.device))
        seen = getattr(seen, "pooler_output", seen)
        states = self.language.embed_tokens(tokens)
        states = states.masked_scatter((tokens == pad)[:, None].expand_as(states), seen.to(dtype))
        states = self.language(inputs_embeds=states[None], use_cache=False).last_hidden_state[0]
        return self.head(states[tokens >= first].float())


class QwenReward(ModelReward):
    """A reward on Qwen2-VL; it scores one image or video at a time."""

    batch_size = 1
    gpu_dtype = cpu_dtype = "bfloat16"  # as published
    float32_parts = ("head.",)
    sizes: dict[str, Any]
    markers: tuple[str, ...]
    pad_word: str

    def make_head(self) -> nn.Module:
        """The head without weights."""
        raise NotImplementedError

    def load(self) -> None:
        if self.module is None:  # no conversion to `dtype`: the head stays float32
            self.module = self.build().eval().requires_grad_(False)

    def network(self, what: str, weights: dict[str, Tensor], path: Path) -> nn.Module:
        """The network with weights under the names of `QwenNetwork`; the head in float32."""
        words = weights.get("language.embed_tokens.weight", torch.zeros(0, 1)).shape[0]
        module = build(lambda: QwenNetwork(self.sizes, words, self.make_head()))
        fill(
            module, weights, path, what, lambda key: torch.float32 if key.startswith(self.float32_parts) else self.dtype
        )
        self.tokenizer = read_tokenizer(Path(self.options.tokenizer), self.markers)
        self.first = self.tokenizer.token_to_id(self.markers[0])
        if words <= self.tokenizer.token_to_id(self.markers[-1]):
            raise BadInput(f"{path} is not {what}: its token embedding has {words} rows, too few for its markers")
        return module

    def read_out(self, frames: Tensor, text: str) -> Tensor:
        """Outputs of the head at every marker token, `[M, outputs]`.

        Args:
            frames: `[T, 3, H, W]` in [0, 1], H and W multiples of 28, T even.
        """
        patches, grid = patchify(normalize(frames))
        count = grid[0] * grid[1] * grid[2] // MERGE**2
        chat = CHAT.replace("{pads}", self.pad_word * count, 1)
        chat = chat.replace("{text}", text, 1)
        tokens = torch.tensor(self.tokenizer.encode(chat, add_special_tokens=False).ids, device=frames.device)
        return self.module(patches, grid, tokens, self.tokenizer.token_to_id(self.pad_word), self.first)


def read_tokenizer(path: Path, markers: tuple[str, ...]) -> Any:
    """Load Qwen2-VL's tokenizer and append the marker tokens.

    Raises:
        BadInput: the file is not Qwen2-VL's tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise BadInput(f"{path} cannot be read as a tokenizer: {' '.join(str(error).split())[:200]}") from error
    needed = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size != WORDS or any(tokenizer.token_to_id(word) is None for word in needed):
        raise BadInput(f"{path} is not the tokenizer of Qwen2-VL: it has {size} tokens, expected {WORDS}")
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    return tokenizer


def plain(prompt: str) -> str:
    """Remove text of the form `<|...|>`, which would become special tokens, from a prompt."""
    return re.sub(r"<\|.*?\|>", "", prompt)


def smart_size(height: int, width: int, smallest: int, largest: int) -> tuple[int, int]:
    """Height and width as multiples of 28, with `smallest` to `largest` pixels in all (Qwen2-VL).

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width} x {height} is too long for this reward: its aspect ratio is above 200")
    rows, columns = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if rows * columns > largest:
        scale = math.sqrt(height * width / largest)
        return tuple(max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR) for side in (height, width))
    if rows * columns < smallest:
        scale = math.sqrt(smallest / (height * width))
        return tuple(math.ceil(side * scale / FACTOR) * FACTOR for side in (height, width))
    return rows, columns


def patchify(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches `[T H W, 3 x 2 x 14 x 14]` in Qwen2-VL's order (2 x 2 neighbours together), and T, H, W in patches.

    Args:
        frames: `[2 T, 3, 14 H, 14 W]`; two frames make one patch in time.
    """
    times, rows, columns = len(frames) // 2, frames.shape[-2] // PATCH, frames.shape[-1] // PATCH
    patches = rearrange(
        frames,
        "(t f) c (h my py) (w mx px) -> (t h w my mx) (c f py px)",
        f=2, my=MERGE, py=PATCH, mx=MERGE, px=PATCH,
    )  # fmt: skip
    return patches, (times, rows, columns)


def read_named(path: Path, what: str, head: str) -> dict[str, Tensor]:
    """Weights of a reward on Qwen2-VL under the names of `QwenNetwork`, without the language model's output layer.

    Args:
        head: name of the head in the file, `rm_head`.

    Raises:
        BadInput: there is an unexpected tensor.
    """
    return rename(merge_lora(read_weights(path), path), lambda key: new_name(key, head), path, what)


def new_name(key: str, head: str) -> str | None:
    """The name of a tensor in `QwenNetwork`: empty for the language model's output layer, None if it is unknown."""
    if key.endswith("lm_head.weight"):
        return ""
    for pattern, replacement in (
        (r"(model\.)?visual\.(.+)", r"visual.\2"),
        (r"model\.(language_model\.)?((embed_tokens|layers|norm)\..+)", r"language.\2"),
        (rf"{head}\.(.+)", r"head.\1"),
    ):
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    return None


def merge_lora(weights: dict[str, Tensor], path: Path, scale: float = 2.0) -> dict[str, Tensor]:
    """Merge the LoRA of a PEFT checkpoint into its weights, W + scale B A in float32; other weights are unchanged.

    Raises:
        BadInput: a matrix of the LoRA is missing.
    """
    prefix = "base_model.model."
    if not any(key.startswith(prefix) for key in weights):
        return weights
    weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    merged = {key.replace(".base_layer.", "."): value for key, value in weights.items() if ".lora_" not in key}
    for key in [key for key in weights if ".lora_A." in key]:
        other, target = key.replace(".lora_A.", ".lora_B."), re.sub(r"\.lora_A\.(default\.)?weight$", ".weight", key)
        if other not in weights or target not in merged:
            raise BadInput(f"{path} is not a complete LoRA: {other if other not in weights else target} is missing")
        merged[target] = merged[target].float() + scale * weights.pop(other).float() @ weights[key].float()
    if left := [key for key in weights if ".lora_B." in key]:
        raise BadInput(f"{path} is not a complete LoRA: there is no lora_A for {left[0]}")
    return merged
