"""Image files as tensors."""

from pathlib import Path

import torch
from torch import Tensor

from .errors import BadInput


def read_images(paths: list[Path]) -> list[Tensor]:
    """RGB images `[3, H, W]` in [0, 1]; transparency is laid on white.

    Raises:
        BadInput: a file is missing or no image.
    """
    return [_read(path) for path in paths]


def _read(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            rgba = picture.convert("RGBA")
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"image {path} cannot be read: {error}") from error
    white = Image.new("RGBA", rgba.size, "white")
    array = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
