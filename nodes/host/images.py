"""Pictures as ComfyUI's IMAGE."""

from PIL import Image
from torch import Tensor

from ...trainer.utils.media import to_tensor


def image_output(picture: Image.Image | Tensor) -> Tensor:
    """One picture, or one image [3, height, width] in 0 to 1, as an IMAGE [1, height, width, 3]."""
    image = picture if isinstance(picture, Tensor) else to_tensor(picture)
    return image.movedim(0, -1)[None]
