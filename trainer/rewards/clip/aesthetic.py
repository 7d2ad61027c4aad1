"""LAION aesthetic predictor v2: predicts how people rate the look of an image."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from ...config import Section
from ..base import Dtype, ModelReward, dtype_option
from ..files import build, file_option, fill, read_weights, stored_elements
from ..preprocess import normalize, shortest_and_crop
from .contrastive import architecture, open_clip_network
from .layout import from_transformers


class _Tower(Section):
    tower: str = file_option(
        "aesthetic/clip-vit-large-patch14.safetensors",
        "model.safetensors of openai/clip-vit-large-patch14 on the Hugging Face hub (1.7 GB), or a clip_vision file "
        "of the same model.",
    )
    dtype: Dtype = dtype_option(gpu="float16")


class ClipLargeReward(ModelReward):
    """A reward on the image encoder of OpenAI's CLIP ViT-L/14, which ignores the prompt."""

    network = "ViT-L-14-quickgelu"
    differentiable = True
    gpu_dtype = "float16"
    Options = _Tower

    def build(self) -> nn.Module:
        config, path, what = architecture(self.network), Path(self.options.tower), "OpenAI's CLIP ViT-L/14"
        self.size = config["vision_cfg"]["image_size"]
        visual = build(lambda: open_clip_network(config).visual)
        fill(visual, vision_weights(path, what), path, what)
        return visual

    def stored_elements(self) -> int:
        return stored_elements(Path(self.options.tower), "vis")  # vision_model, visual_projection; no text encoder

    def features(self, visual: nn.Module, images: Tensor) -> Tensor:
        """Image embeddings of length 1, `[B, 768]` float32."""
        pixels = normalize(shortest_and_crop(images, self.size)).to(self.dtype)
        return unit(visual(pixels).float(), dim=-1)


class Aesthetic(ClipLargeReward):
    """Aesthetic score from about 1 to 10. It ignores the prompt, so combine it with a reward that uses it.

    LAION's predictor v2 (sac+logos+ava1-l14-linearMSE): five linear layers on OpenAI's CLIP ViT-L/14.
    """

    name = "aesthetic"
    float32_parts = ("head.",)
    typical_range = (4.5, 7.0)
    licence = "Apache-2.0; CLIP: MIT"

    class Options(_Tower):
        path: str = file_option(
            "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
            "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor on GitHub (4 MB).",
        )

    def build(self) -> nn.Module:
        path, visual = Path(self.options.path), super().build()
        head = build(lambda: LinearHead(visual.output_dim))
        fill(head, read_weights(path), path, "the aesthetic predictor")
        return nn.ModuleDict({"visual": visual, "head": head})

    def stored_elements(self) -> int:
        return super().stored_elements() + stored_elements(Path(self.options.path))

    def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = self.features(self.module["visual"], images)
        return self.module["head"](features)[:, 0]


class LinearHead(nn.Module):
    """Five linear layers without activations or dropout: the head of the aesthetic predictor and of ImageReward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.layers = nn.ModuleDict({index: nn.Linear(*size) for index, size in sizes.items()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features


def vision_weights(path: Path, what: str) -> dict[str, Tensor]:
    """Load the image encoder's weights from a transformers file, renamed for open_clip.

    Raises:
        BadInput: the file is not a CLIP model.
    """
    found = from_transformers(read_weights(path), path, what)
    return {key.removeprefix("visual."): value for key, value in found.items() if key.startswith("visual.")}
