"""LAION aesthetic predictor v2: how much people like the look of a picture, whatever it shows."""

from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from ..config import Section
from .base import Dtype, ModelReward, dtype_option
from .clip_layout import from_transformers
from .contrastive import architecture, open_clip_network
from .files import build, file_option, fill, read_weights
from .preprocess import normalize, shortest_and_crop


class Aesthetic(ModelReward):
    """Look of a picture on a scale of about 1 to 10; the prompt is not looked at, so add a judge that looks at it.

    LAION's predictor v2 (sac+logos+ava1-l14-linearMSE): five linear layers on OpenAI's CLIP ViT-L/14.
    """

    name = "aesthetic"
    typical_range = (4.5, 7.0)
    licence = "Apache-2.0; CLIP: MIT"
    network = "ViT-L-14-quickgelu"

    class Options(Section):
        path: str = file_option(
            "aesthetic/sac+logos+ava1-l14-linearMSE.pth",
            "sac+logos+ava1-l14-linearMSE.pth of christophschuhmann/improved-aesthetic-predictor on GitHub (4 MB).",
        )
        tower: str = file_option(
            "aesthetic/clip-vit-large-patch14.safetensors",
            "model.safetensors of openai/clip-vit-large-patch14 on the Hugging Face hub (1.7 GB), or a "
            "clip_vision file of the same model.",
        )
        dtype: Dtype = dtype_option()

    def build(self) -> nn.Module:
        config = architecture(self.network)
        self.size = config["vision_cfg"]["image_size"]
        module = nn.ModuleDict(
            {"visual": build(lambda: open_clip_network(config).visual), "head": linear_head(config["embed_dim"])}
        )
        path, tower = Path(self.options.path), Path(self.options.tower)
        fill(module["visual"], vision_weights(tower, "OpenAI's CLIP ViT-L/14"), tower, "OpenAI's CLIP ViT-L/14")
        fill(module["head"], read_weights(path), path, "the aesthetic predictor")
        return module

    def judge(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = normalize(shortest_and_crop(images, self.size))
        features = unit(self.module["visual"](pixels.to(self.dtype)).float(), dim=-1)
        return self.module["head"](features.to(self.dtype)).float()[:, 0]


class LinearHead(nn.Module):
    """Five linear layers without activations, as the aesthetic predictor and ImageReward have; their dropout is off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.layers = nn.ModuleDict({place: nn.Linear(*size) for place, size in sizes.items()})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features


def linear_head(width: int) -> nn.Module:
    """A head without weights."""
    return build(lambda: LinearHead(width))


def vision_weights(path: Path, what: str) -> dict[str, Tensor]:
    """The vision tower's weights out of a transformers file, for open_clip's tower.

    Raises:
        BadInput: the file is none of a CLIP model.
    """
    found = from_transformers(read_weights(path), path, what)
    return {key.removeprefix("visual."): value for key, value in found.items() if key.startswith("visual.")}
