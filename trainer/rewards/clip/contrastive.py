"""Base of the CLIP rewards: the cosine similarity of image and prompt embeddings."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..base import ModelReward
from .text import TextCache, tokenizer


class ContrastiveReward(ModelReward):
    """Cosine similarity of image and prompt embeddings; each prompt is encoded once."""

    differentiable = True
    gpu_dtype = "float16"
    clean: ClassVar[str] = "lower"
    """How prompts are cleaned before they are tokenized; see `text.tokenizer`."""
    context: int = 77
    texts: TextCache

    def load(self) -> None:
        if self.module is None:
            super().load()
            self.texts = TextCache(self._encode, self.context, lambda text: len(tokenizer(self.clean).encode(text)) + 2)

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """The network's input: `[B, 3, S, S]`, resized and normalized, float32."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """Image embeddings `[B, D]`, not normalized."""
        return self.module.encode_image(pixels)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Text embeddings `[B, D]` of CLIP's tokens `[B, context]`, not normalized."""
        return self.module.encode_text(tokens)

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = self.image_features(self.pixels(images).to(self.dtype)).float()
        return (normalize(features, dim=-1) * self.texts(prompts, images.device)).sum(-1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Image embeddings `[B, D]` of images `[B, 3, H, W]` in [0, 1], on their device; not normalized."""
        self.move_to(images.device)
        parts = images.split(self.batch_size)
        return torch.cat([self.image_features(self.pixels(part).to(self.dtype)).float() for part in parts])

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids `[B, context]`; longer prompts are truncated before the end token."""
        return tokenizer(self.clean)(prompts, context_length=self.context)

    def _encode(self, prompts: list[str]) -> Tensor:
        device = next(self.module.parameters()).device
        return normalize(self.text_features(self.tokens(prompts).to(device)).float(), dim=-1)


def open_clip_network(config: dict[str, Any]) -> nn.Module:
    """An open_clip model without weights from its configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...)."""
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {key: value for key, value in config.items() if key != "custom_text"}
    # Otherwise timm would download weights, which are replaced afterwards.
    settings["vision_cfg"] = {**settings["vision_cfg"], "timm_model_pretrained": False}
    return (CustomTextCLIP if config.get("custom_text") else CLIP)(**settings)


def architecture(name: str) -> dict[str, Any] | None:
    """open_clip's configuration of that name, if it has one."""
    import open_clip

    return open_clip.get_model_config(name) if name in open_clip.list_models() else None
