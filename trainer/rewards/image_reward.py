"""ImageReward v1.0: human preference, by a BLIP model on image and prompt (arXiv 2304.05977)."""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import Section
from ..utils.errors import BadInput
from .base import Dtype, ModelReward, dtype_option
from .clip.aesthetic import LinearHead
from .clip.text import warn_truncated
from .files import build, file_option, fill, read_weights, rename
from .preprocess import normalize, shortest_and_crop

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
UNUSED = frozenset(
    {
        "blip.vision_proj.weight",
        "blip.vision_proj.bias",
        "blip.text_proj.weight",
        "blip.text_proj.bias",
        "blip.text_encoder.embeddings.position_ids",
    }
)
"""Tensors in the published file that are not used: heads of contrastive training, and position indices."""

_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.(weight|bias)", r"embeddings.patch_embedding.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(weight|bias)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"encoder.layers.\1.self_attn.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"encoder.layers.\1.self_attn.projection.\2"),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"encoder.layers.\1.mlp.fc\2.\3"),
    (r"norm\.(weight|bias)", r"post_layernorm.\1"),
)


class ImageReward(ModelReward):
    """Human preference, ImageReward v1.0, normalized to mean 0 and std 1 on its authors' images.

    Useful as a metric and together with other rewards. FLUX trained on it alone produces corrupted images, as the
    authors of DanceGRPO report. It reads the first 35 tokens of a prompt.
    """

    name = "imagereward"
    differentiable = True
    gpu_dtype = "float16"
    float32_parts = ("mlp.",)
    typical_range = (-2.2, 2.0)
    licence = "Apache-2.0"
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"vocab_size": 30524, "num_attention_heads": 12}
    size = 224

    class Options(Section):
        path: str = file_option(
            "imagereward/ImageReward.pt", "ImageReward.pt of zai-org/ImageReward on the Hugging Face hub (1.8 GB)."
        )
        vocabulary: str = file_option(
            "imagereward/vocab.txt",
            "vocab.txt of google-bert/bert-base-uncased on the Hugging Face hub (232 kB).",
            suffixes=(".txt",),
        )
        dtype: Dtype = dtype_option(gpu="float16")

    def build(self) -> nn.Module:
        path, what = Path(self.options.path), "ImageReward v1.0"
        self.tokenizer, self.warned = self._tokenizer(), set[str]()
        module = build(self._network)
        fill(module, rename(read_weights(path), new_name, path, what), path, what)
        return module

    def _network(self) -> nn.Module:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        vision = BlipVisionConfig(
            **self.vision, image_size=self.size, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu"
        )
        text = BlipTextConfig(**self.text, encoder_hidden_size=vision.hidden_size)
        return nn.ModuleDict(
            {
                "vision": BlipVisionModel(vision),
                "text": BlipTextModel(text, add_pooling_layer=False),
                "mlp": LinearHead(text.hidden_size),
            }
        )

    def _tokenizer(self) -> object:
        from tokenizers import BertWordPieceTokenizer

        path = Path(self.options.vocabulary)
        try:
            words = path.read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise BadInput(f"{path} is not the vocabulary of bert-base-uncased: it is not UTF-8 text") from error
        missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in words]
        if missing or len(words) + 2 != self.text["vocab_size"]:
            expected = self.text["vocab_size"] - 2
            raise BadInput(
                f"{path} is not the vocabulary of bert-base-uncased: {len(words)} words, expected {expected}"
            )
        tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
        tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
        return tokenizer

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalize(shortest_and_crop(images, self.size)).to(self.dtype)
        seen = self.module["vision"](pixel_values=pixels).last_hidden_state
        tokens, mask = self._tokens(prompts)
        read = self.module["text"](
            input_ids=tokens.to(images.device),
            attention_mask=mask.to(images.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=images.device),
        ).last_hidden_state
        return (self.module["mlp"](read[:, 0].float())[:, 0] - MEAN) / STD

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, `[B, 35]` long."""
        tokens, mask = torch.zeros(2, len(prompts), TOKENS, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids = self.tokenizer.encode(prompt).ids
            if len(ids) > TOKENS:
                self._warn(prompt, len(ids))
                ids = [*ids[: TOKENS - 1], ids[-1]]
            tokens[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        return tokens, mask

    def _warn(self, prompt: str, count: int) -> None:
        if prompt not in self.warned:
            self.warned.add(prompt)
            warn_truncated(prompt, count, TOKENS)


def new_name(key: str) -> str | None:
    """The name of a tensor of ImageReward.pt in `ImageReward._network`: empty if unused, None if it is unknown."""
    if key in UNUSED:
        return ""
    if key.startswith("blip.text_encoder."):
        return key.replace("blip.text_encoder", "text")
    if key.startswith("mlp."):
        return key
    inner = key.removeprefix("blip.visual_encoder.")
    for pattern, replacement in _VISION if inner != key else ():
        if match := re.fullmatch(pattern, inner):
            return f"vision.{match.expand(replacement)}"
    return None
