"""What all judges of the CLIP kind share: the cosine between an image's features and its prompt's."""

from abc import abstractmethod
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from ..base import ModelReward, TextCache


class ContrastiveReward(ModelReward):
    """Cosine between an image and its prompt in a shared space; each prompt is encoded once."""

    context: int = 77
    texts: TextCache

    def load(self) -> None:
        if self.module is None:
            super().load()
            self.texts = TextCache(self._encode, self.context, count_tokens)

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """What the network sees: `[B, 3, S, S]`, resized and normalised, float32."""

    def image_features(self, pixels: Tensor) -> Tensor:
        """`[B, D]` of the network, not normalised."""
        return self.module.encode_image(pixels)

    def text_features(self, tokens: Tensor) -> Tensor:
        """`[B, D]` of the network for CLIP's tokens `[B, context]`, not normalised."""
        return self.module.encode_text(tokens)

    def judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = self.image_features(self.pixels(images).to(self.dtype)).float()
        return (normalize(features, dim=-1) * self.texts(prompts, images.device)).sum(-1)

    def _encode(self, prompts: list[str]) -> Tensor:
        tokens = tokenizer()(prompts, context_length=self.context)
        device = next(self.module.parameters()).device
        return normalize(self.text_features(tokens.to(device)).float(), dim=-1)


@cache
def tokenizer() -> Any:
    """CLIP's tokenizer; its vocabulary comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def count_tokens(text: str) -> int:
    """Tokens of a text, with the one at its start and the one at its end."""
    return len(tokenizer().encode(text)) + 2


def open_clip_network(config: dict[str, Any]) -> nn.Module:
    """An open_clip model without weights from its configuration (`embed_dim`, `vision_cfg`, `text_cfg`, ...)."""
    from open_clip.model import CLIP, CustomTextCLIP

    settings = {key: value for key, value in config.items() if key != "custom_text"}
    return (CustomTextCLIP if config.get("custom_text") else CLIP)(**settings)


def architecture(name: str) -> dict[str, Any] | None:
    """open_clip's configuration of that name, if it has one."""
    import open_clip

    return open_clip.get_model_config(name) if name in open_clip.list_models() else None
