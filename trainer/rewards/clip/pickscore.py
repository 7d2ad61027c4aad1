"""PickScore: human preference between two images, by a fine-tuned CLIP ViT-H/14 (arXiv 2305.01569)."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ...config import Section
from ..base import Dtype, dtype_option
from ..files import build, file_option, fill, read_weights
from ..preprocess import normalize, shortest_and_crop
from .contrastive import ContrastiveReward, architecture, open_clip_network
from .layout import from_transformers


class PickScore(ContrastiveReward):
    """Human preference, PickScore v1: the cosine similarity of image and prompt embeddings.

    It keeps images more natural than HPS-v2.1 does. The shortest side of the image is resized and its centre cropped;
    the prompt is normalized as by transformers' CLIP tokenizer.
    """

    name = "pickscore"
    typical_range = (0.19, 0.24)
    licence = "see its page; none is stated"
    network = "ViT-H-14"
    clean = "transformers"

    class Options(Section):
        path: str = file_option(
            "pickscore/model.safetensors",
            "model.safetensors of yuvalkirstain/PickScore_v1 on the Hugging Face hub (3.9 GB).",
        )
        scale: Literal["cosine", "official"] = Field(
            "cosine",
            description="cosine similarity, as DanceGRPO reports it; or official: times the logit scale, about 100.",
        )
        dtype: Dtype = dtype_option(gpu="float16")

    def build(self) -> nn.Module:
        path, config, what = Path(self.options.path), architecture(self.network), "PickScore, a CLIP ViT-H/14"
        self.size = config["vision_cfg"]["image_size"]
        module = build(lambda: open_clip_network(config))
        fill(module, from_transformers(read_weights(path), path, what), path, what)
        return module

    def pixels(self, images: Tensor) -> Tensor:
        return normalize(shortest_and_crop(images, self.size, crop="transformers"))

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = super().score_batch(images, prompts)
        return cosine * self.module.logit_scale.float().exp() if self.options.scale == "official" else cosine
