"""Images as ComfyUI's IMAGE."""

from PIL import Image
from torch import Tensor

from ...trainer.utils.media import to_tensor


def image_output(image: Image.Image | Tensor) -> Tensor:
    """One image, or its pixels [3, height, width] in 0 to 1, as an IMAGE [1, height, width, 3]."""
    pixels = image if isinstance(image, Tensor) else to_tensor(image)
    return pixels.movedim(0, -1)[None]
