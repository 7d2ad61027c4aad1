"""Image preprocessing of reward models: rounding, resizing, cropping, normalizing.

Reward models were trained on image files, so pixels are first rounded to 256 values, then resized with Pillow as in the
original code. Images that require a gradient are not rounded, and are resized with the same filter in PyTorch.
"""

import torch
from torch import Tensor

from ..utils.media import to_bytes, to_pil_image, to_tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
LONG = 16
"""Largest aspect ratio of an image that is resized as a whole."""


def luma(images: Tensor) -> Tensor:
    """Perceived brightness, `[B, H, W]` in [0, 1]."""
    return torch.einsum("bchw,c->bhw", images.float(), images.new_tensor(LUMA, dtype=torch.float32))


def rounded(images: Tensor) -> Tensor:
    """Pixels rounded to 256 values, float32 in [0, 1]; unchanged if they require a gradient."""
    return images.float() if images.requires_grad else to_bytes(images).float() / 255


def to_pil(images: Tensor) -> list:
    """`[B, 3, H, W]` in [0, 1] as PIL images."""
    return [to_pil_image(image) for image in images.detach()]


def normalize(images: Tensor, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> Tensor:
    """(x - mean) / std per channel of `[..., 3, H, W]`."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resize float images `[..., 3, H, W]` with antialiasing, differentiably, without rounding or clamping."""
    from torchvision.transforms.functional import InterpolationMode
    from torchvision.transforms.functional import resize as torchvision_resize

    return torchvision_resize(images.float(), [height, width], InterpolationMode(mode), antialias=True)


def shortest_and_crop(images: Tensor, size: int, crop: str = "torchvision") -> Tensor:
    """Resize the shortest side to `size` (bicubic) and crop the centre: `[B, 3, size, size]` in [0, 1].

    Args:
        crop: rounding of an odd margin: `torchvision` rounds half to even, `transformers` rounds down.
    """
    from PIL import Image

    images = trimmed(images)
    short = min(images.shape[-2:])
    height, width = (size if side == short else int(size * side / short) for side in images.shape[-2:])
    top, left = (_margin(side - size, crop) for side in (height, width))
    if images.requires_grad:
        return resize(images, height, width)[..., top : top + size, left : left + size]
    box = (left, top, left + size, top + size)
    crops = [image.resize((width, height), Image.Resampling.BICUBIC).crop(box) for image in to_pil(images)]
    return torch.stack([to_tensor(crop) for crop in crops]).to(images.device)


def trimmed(images: Tensor) -> Tensor:
    """Crop the centre of images `[..., H, W]` with an aspect ratio above `LONG`.

    Only the centre is used afterwards, and resizing a very long image as a whole would exhaust the memory.
    """
    limit = LONG * min(images.shape[-2:])
    top, left = (max(0, side - limit) // 2 for side in images.shape[-2:])
    return images[..., top : top + limit, left : left + limit]


def _margin(excess: int, crop: str) -> int:
    return round(excess / 2) if crop == "torchvision" else excess // 2
