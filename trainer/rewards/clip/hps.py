"""HPS-v2.1: human preference, by a fine-tuned CLIP ViT-H/14 (arXiv 2306.09341; DanceGRPO's main reward)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ...config import Section
from ..base import Dtype, dtype_option
from ..files import build, file_option, fill, read_weights
from ..preprocess import normalize, resize, rounded
from .contrastive import ContrastiveReward, architecture, open_clip_network


class HPSv21(ContrastiveReward):
    """Human preference, HPS-v2.1: the cosine similarity of image and prompt embeddings, without logit scale.

    The longest side of the image is resized to 224 pixels and the image is padded with black, as in HPSv2's code, whose
    scores are reproduced within rounding. Scores of different prompts cannot be compared. A model trained on it alone
    drifts to glossy, over-saturated images; DanceGRPO's authors advise a weight of 0.7 with 1.4 for `clip`.
    """

    name = "hps-v2.1"
    typical_range = (0.2, 0.38)
    licence = "Apache-2.0"
    network = "ViT-H-14"

    class Options(Section):
        path: str = file_option(
            "hpsv2/HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.pt of xswu/HPSv2 on the Hugging Face hub (1.97 GB)."
        )
        dtype: Dtype = dtype_option(gpu="float16")

    def build(self) -> nn.Module:
        path, config = Path(self.options.path), architecture(self.network)
        self.size = config["vision_cfg"]["image_size"]
        module = build(lambda: open_clip_network(config))
        fill(module, read_weights(path), path, f"HPS-v2.1, a CLIP {self.network}")
        return module

    def pixels(self, images: Tensor) -> Tensor:
        return normalize(longest_and_pad(rounded(images), self.size))


def longest_and_pad(images: Tensor, size: int) -> Tensor:
    """Resize the longest side to `size` (bicubic, antialiased, unrounded) and pad to a square with black."""
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    images = resize(images, height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return torch.nn.functional.pad(images, (left, size - width - left, top, size - height - top))
