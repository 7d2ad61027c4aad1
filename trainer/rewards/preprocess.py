"""What reward models do to an image before they look at it."""

import torch
from torch import Tensor

from ..utils.media import to_picture, to_tensor

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pil(images: Tensor) -> list:
    """`[B, 3, H, W]` in [0, 1] as PIL images."""
    return [to_picture(image) for image in images]


def normalize(images: Tensor, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> Tensor:
    """(x - mean) / std per channel of `[..., 3, H, W]`."""
    shape = (3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def shortest_and_crop(images: Tensor, size: int, crop: str = "torchvision") -> Tensor:
    """The shortest side resized to `size` (PIL, bicubic), the middle cropped: `[B, 3, size, size]` in [0, 1].

    Args:
        crop: where the crop begins if the margin is odd: `torchvision` rounds half to even, `transformers` down.
    """
    from PIL import Image

    results = []
    for picture in to_pil(images):
        width, height = picture.size
        short = min(width, height)
        width, height = (size if side == short else int(size * side / short) for side in (width, height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (_margin(side - size, crop) for side in (width, height))
        results.append(to_tensor(picture.crop((left, top, left + size, top + size))))
    return torch.stack(results).to(images.device)


def _margin(excess: int, crop: str) -> int:
    return round(excess / 2) if crop == "torchvision" else excess // 2
