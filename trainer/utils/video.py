"""Videos as files."""

import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from .files import write_atomically


def save_video(path: Path, pictures: Iterable["PIL.Image.Image"], fps: float) -> None:  # noqa: F821 - imported late
    """Write pictures of one size as an MP4 that browsers play (H.264, 4:2:0; an odd edge loses its last line).

    Raises:
        OSError: the disk is full or not writable; what stood at `path` is untouched.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = None
        for picture in pictures:
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
                stream.width, stream.height = picture.width // 2 * 2, picture.height // 2 * 2
                stream.pix_fmt = "yuv420p"
            even = picture.crop((0, 0, stream.width, stream.height))
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode(None))
    write_atomically(path, buffer.getvalue())
