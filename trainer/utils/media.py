"""Reads and writes image and video files, and converts between images and tensors."""

import io
import warnings
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import BadInput
from .files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP"}
"""Accepted image formats, by Pillow's name. Pillow's decoders of other formats are less well tested."""
MAX_PIXELS = 8192 * 8192
"""Largest number of pixels of an image. A small file can contain a very large image."""


# ------------------------------------------------------------------------------------------------------------- reading


def open_image(source: Path | bytes, name: str | None = None) -> "Image.Image":
    """Decode an image to 8-bit RGB.

    The EXIF orientation is applied, transparency is composited on white, 16 bits per channel are reduced to 8, and the
    first frame of an animation is used. Colour profiles are ignored, as in ComfyUI.

    Args:
        source: a path, or the content of a file.
        name: name of the image in messages; by default its path.

    Raises:
        BadInput: there is no such file, it is not a PNG, JPEG or WebP image, it is damaged, or it has more than
            MAX_PIXELS pixels.
    """
    from PIL import ImageOps

    what = _name(source, name)
    try:
        with _open(source, what) as image:
            image.load()
            return _on_white(_eight_bits(ImageOps.exif_transpose(image)))
    except BadInput:
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


def read_image(source: Path | bytes, name: str | None = None) -> Tensor:
    """An image as `[3, H, W]` float32 in [0, 1]; see `open_image`."""
    return to_tensor(open_image(source, name))


def check_image(source: Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height from the file's header, without decoding pixels.

    Raises:
        BadInput: see `open_image`; damage after the header is not detected.
    """
    what = _name(source, name)
    try:
        with _open(source, what) as image:
            return image.size
    except BadInput:
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


def _name(source: Path | bytes, name: str | None) -> str:
    return name or ("image" if isinstance(source, bytes) else f"image {source}")


def _open(source: Path | bytes, what: str) -> "Image.Image":
    """The image before its pixels are decoded, with its size checked."""
    from PIL import Image

    if not isinstance(source, bytes) and not Path(source).is_file():
        raise BadInput(f"{what} cannot be read: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=tuple(FORMATS))
    except Image.DecompressionBombError as error:
        raise BadInput(f"{what} is too large: {_LIMIT}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise BadInput(f"{what} has {width} x {height} pixels: {_LIMIT}")
    return image


_LIMIT = f"at most {MAX_PIXELS / 1e6:.0f} million pixels (8192 x 8192) are read"


def _unreadable(what: str, error: Exception) -> BadInput:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        *others, last = FORMATS.values()
        return BadInput(f"{what} is not a {', '.join(others)} or {last} image, or is damaged")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return BadInput(f"{what} cannot be read: {' '.join(reason.split())}")


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Convert 16-bit grey to 8-bit grey, which Pillow would clip to white; other images are unchanged."""
    if image.mode.partition(";")[0] != "I":
        return image
    import numpy as np
    from PIL import Image

    levels = np.asarray(image).astype(np.int64)
    grey = Image.fromarray(np.rint(levels.clip(0, 65535) / 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


# ---------------------------------------------------------------------------------------------------------- conversion


def to_tensor(image: "Image.Image") -> Tensor:
    """An image as `[3, H, W]` float32 in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pil_image(image: Tensor) -> "Image.Image":
    """`[3, H, W]` in [0, 1] as an 8-bit RGB image."""
    from PIL import Image

    return Image.fromarray(to_bytes(image).permute(1, 2, 0).cpu().numpy())


def to_bytes(images: Tensor) -> Tensor:
    """Convert pixels in [0, 1] to uint8, with rounding; same shape."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------- writing


def save_image(path: Path, image: "Image.Image") -> None:
    """Write an image as PNG.

    Raises:
        OSError: the disk is full or not writable; an existing file at `path` is not changed.
    """
    write_atomically(path, png(image))


def png(image: "Image.Image") -> bytes:
    """The content of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save_video(path: Path, images: Iterable["Image.Image"], fps: float) -> None:
    """Write images of one size as an MP4 for browsers: H.264 with 4:2:0, cropped to even width and height.

    Raises:
        OSError: the disk is full or not writable; an existing file at `path` is left as it was.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for image in images:
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
                stream.width, stream.height = image.width // 2 * 2, image.height // 2 * 2
                stream.pix_fmt = "yuv420p"
            even = image.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode(None))
    write_atomically(path, buffer.getvalue())
