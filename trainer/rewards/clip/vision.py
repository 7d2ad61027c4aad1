"""Image encoders of CLIP and SigLIP, from the files in ComfyUI's `models/clip_vision`.

The architecture is detected from the shapes of the tensors. Supported are OpenAI's CLIP ViT-L/14 at 224 and 336
pixels (also as part of LLaVA), OpenCLIP's ViT-H/14 and ViT-bigG/14, and SigLIP SO400M at 384 and 512 pixels, with the
tensor names of transformers or, for CLIP, of OpenCLIP.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.functional import normalize as unit

from ...utils.errors import BadInput
from ..files import build, fill, read_weights
from ..preprocess import OPENAI_MEAN, OPENAI_STD, normalize
from .contrastive import architecture, open_clip_network
from .layout import from_transformers


@dataclass(frozen=True)
class Layout:
    """Sizes of a network, from the shapes of its tensors.

    Attributes:
        width: hidden size.
        layers: number of layers.
        positions: number of position embeddings: patches, and for CLIP the class token.
        patch: side of a patch in pixels.
    """

    width: int
    layers: int
    positions: int
    patch: int


CLIP = {
    Layout(1024, 24, 257, 14): "ViT-L-14-quickgelu",
    Layout(1024, 24, 577, 14): "ViT-L-14-336-quickgelu",
    Layout(1280, 32, 257, 14): "ViT-H-14",
    Layout(1664, 48, 257, 14): "ViT-bigG-14",
}
"""Name of the network in open_clip."""
SIGLIP = {Layout(1152, 27, 729, 14): 384, Layout(1152, 27, 1024, 16): 512}
"""Side of the image in pixels."""
SIGLIP_SIZES = {"num_attention_heads": 16, "intermediate_size": 4304}
_POSITIONS = "vision_model.embeddings.position_embedding.weight"
_PATCHES = "vision_model.embeddings.patch_embedding.weight"


def load_vision_encoder(path: Path) -> "VisionEncoder":
    """Load the network of a file, float32 on the CPU.

    Raises:
        BadInput: the file cannot be read, or its architecture is not supported.
    """
    weights = read_weights(path)
    layout = _layout(weights)
    if layout in CLIP:
        return _load_clip(weights, CLIP[layout], path)
    if layout in SIGLIP:
        return _load_siglip(weights, layout, path)
    raise BadInput(
        f"{path} is not a supported CLIP or SigLIP vision model: choose CLIP ViT-L/14, ViT-H/14 or "
        "ViT-bigG/14, or SigLIP SO400M at 384 or 512 pixels"
    )


class VisionEncoder(nn.Module):
    """Normalized image embeddings `[B, D]` float32 of images `[B, 3, H, W]` in [0, 1].

    The central square of an image is resized (bicubic, antialiased) without rounding, so it is differentiable.

    Args:
        network: returns embeddings `[B, D]` of normalized images.
        size: side of the network's input in pixels.
        mean, std: normalization per channel.
    """

    def __init__(
        self, network: nn.Module, size: int, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
    ) -> None:
        super().__init__()
        self.network, self.size, self.mean, self.std = network, size, mean, std

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        pixels = normalize(square(images.float(), self.size), self.mean, self.std)
        return unit(self.network(pixels.to(dtype)).float(), dim=-1)


def square(images: Tensor, size: int) -> Tensor:
    """Crop the central square of `[B, 3, H, W]` and resize it: `[B, 3, size, size]` in [0, 1]."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[..., top : top + side, left : left + side]
    if side == size:
        return images
    return interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def _layout(weights: dict[str, Tensor]) -> Layout | None:
    """Detect the sizes from names and shapes, in either naming scheme; None if neither fits."""
    schemes = (
        (_POSITIONS, _PATCHES, "vision_model.encoder.layers.{}.mlp.fc1.weight"),
        ("visual.positional_embedding", "visual.conv1.weight", "visual.transformer.resblocks.{}.mlp.c_fc.weight"),
    )
    for positions, patches, layer in schemes:
        if [weights[key].ndim for key in (positions, patches) if key in weights] == [2, 4]:
            layers = 0
            while layer.format(layers) in weights:
                layers += 1
            count, width = weights[positions].shape
            return Layout(width, layers, count, weights[patches].shape[-1])
    return None


def _load_clip(weights: dict[str, Tensor], name: str, path: Path) -> VisionEncoder:
    what, config = f"CLIP {name.removesuffix('-quickgelu')}", architecture(name)
    weights = {key: value for key, value in weights.items() if not key.startswith("multi_modal_projector.")}
    if _POSITIONS in weights:
        weights = from_transformers(weights, path, what)
    weights = {key.removeprefix("visual."): value for key, value in weights.items() if key.startswith("visual.")}
    visual = build(lambda: open_clip_network(config).visual)
    if "proj" not in weights:  # left out of files that are made for LLaVA
        visual.proj = None
    fill(visual, weights, path, what)
    return VisionEncoder(visual, config["vision_cfg"]["image_size"])


class Siglip(nn.Module):
    """SigLIP's image encoder with its pooling head; without the head, the mean over patches.

    Args:
        size: side of the image in pixels.
        pooling: whether the file has the weights of the head.
    """

    def __init__(self, layout: Layout, size: int, pooling: bool) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        shape = {"hidden_size": layout.width, "num_hidden_layers": layout.layers, "patch_size": layout.patch}
        config = SiglipVisionConfig(**shape, **SIGLIP_SIZES, image_size=size, vision_use_head=pooling)
        self.encoder = SiglipVisionModel(config)

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.encoder(pixels)
        return found.last_hidden_state.mean(1) if found.pooler_output is None else found.pooler_output


def _load_siglip(weights: dict[str, Tensor], layout: Layout, path: Path) -> VisionEncoder:
    weights = {key: value for key, value in weights.items() if key.startswith("vision_model.")}
    weights.pop("vision_model.embeddings.position_ids", None)  # 0, 1, 2, ..., written by older versions
    network = build(lambda: Siglip(layout, SIGLIP[layout], "vision_model.head.probe" in weights))
    if not any(key.startswith("vision_model.") for key in network.encoder.state_dict()):  # transformers 5
        weights = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    fill(network.encoder, weights, path, "SigLIP SO400M")
    return VisionEncoder(network, SIGLIP[layout], mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
