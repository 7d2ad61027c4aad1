"""The one reader of image files: what is seen, and what is refused."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from trainer.utils.errors import BadInput
from trainer.utils.media import MAX_PIXELS, check_image, open_image, read_image, save_video, to_pil_image, to_tensor


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG file whose header promises an image of any size, all of it black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join(lines.compress(row) for _ in range(min(height, 20_000))) + lines.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_16_bit_grey_is_as_bright_as_its_8_bit_copy() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    deep = read_image(content(Image.fromarray(ramp)))
    shallow = read_image(content(Image.fromarray(np.rint(ramp / 257).astype(np.uint8))))
    assert torch.equal(deep, shallow)
    assert deep.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert deep.shape == (3, 256, 256)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif_is_applied(orientation: int) -> None:
    upright = np.zeros((6, 4, 3), np.uint8)
    upright[0, 0], upright[0, 3], upright[5, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How a camera that is held in this way stores the upright image (EXIF 2.32, tag 0x0112).
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 3),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_image(content(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    assert np.array_equal(np.asarray(image), upright)


def transparent_images() -> dict[str, Image.Image]:
    """Left half opaque black, right half fully transparent."""
    alpha = Image.fromarray(np.repeat([[255, 255, 0, 0]], 4, 0).astype(np.uint8))
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    rgba.putalpha(alpha)
    grey = Image.new("LA", (4, 4), (0, 255))
    grey.putalpha(alpha)
    palette = Image.fromarray(np.repeat([[0, 0, 1, 1]], 4, 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    deep = Image.fromarray(np.repeat([[0, 0, 500, 500]], 4, 0).astype(np.uint16))
    return {"RGBA": rgba, "LA": grey, "P": palette, "16 bit": deep}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "16 bit"])
def test_transparency_is_laid_on_white(kind: str) -> None:
    options = {"P": {"transparency": 1}, "16 bit": {"transparency": 500}}.get(kind, {})
    image = read_image(content(transparent_images()[kind], **options))
    assert image[:, :, :2].max() == 0
    assert image[:, :, 2:].min() == 1


def test_half_transparent_red_is_half_way_to_white() -> None:
    image = read_image(content(Image.new("RGBA", (2, 2), (255, 0, 0, 51))))
    assert image[:, 0, 0].tolist() == pytest.approx([1.0, 0.8, 0.8], abs=1 / 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_is_read(mode: str) -> None:
    levels = np.full((5, 7), 40000 if mode == "I;16" else 200, np.uint16 if mode == "I;16" else np.uint8)
    saved = Image.fromarray(levels) if mode == "I;16" else Image.fromarray(levels).convert(mode)
    expected = {"1": 1.0, "I;16": 40000 / 65535}.get(mode, 200 / 255)
    image = read_image(content(saved))
    assert image.shape == (3, 5, 7)
    if mode != "1":  # dithered
        assert image.mean().item() == pytest.approx(expected, abs=0.5 / 255)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_jpeg_and_webp_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a").write_bytes(content(Image.new("RGB", (16, 8), (255, 0, 0)), kind))
    image = read_image(tmp_path / "a")
    assert image.shape == (3, 8, 16)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.03)


def test_a_cmyk_jpeg_and_the_first_frame_of_an_animation_are_read() -> None:
    cyan = content(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")
    assert read_image(cyan).mean((1, 2)).tolist() == pytest.approx([0, 1, 1], abs=0.05)
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    moving = content(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert read_image(moving).mean((1, 2)).tolist() == [1, 0, 0]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadInput, match="^image is not a PNG, JPEG or WebP image, or is damaged$"):
        read_image(content(Image.new("RGB", (16, 16)), kind))


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [(8193, 8192, "image has 8193 x 8192 pixels"), (13_000, 13_000, "13000 x 13000"), (60_000, 60_000, "is too large")],
)
def test_too_many_pixels_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int, words: str
) -> None:
    small_file = png_of_size(width, height)
    assert len(small_file) < 300_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(BadInput, match=f"{words}.*at most 67 million pixels"):
        read_image(small_file)
    with pytest.raises(BadInput, match=words):
        check_image(small_file)


def test_the_largest_image_passes_the_check() -> None:
    assert check_image(png_of_size(8192, 8192)) == (8192, 8192)
    assert MAX_PIXELS == 8192 * 8192


@pytest.mark.parametrize("spoil", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"\0" * 200, lambda c: c[:30]])
def test_a_damaged_file_is_one_sentence_with_its_name(tmp_path: Path, spoil) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP"):
        (tmp_path / "odd.png").write_bytes(spoil(content(image, kind)))
        with pytest.raises(BadInput) as raised:
            read_image(tmp_path / "odd.png")
        assert str(raised.value).startswith(f"image {tmp_path / 'odd.png'} ")
        assert "\n" not in str(raised.value)


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(rng.integers(0, 255, (24, 24, 4), dtype=np.uint8))
    wholes = [content(image, exif=exif), content(image.convert("RGB"), "JPEG", exif=exif)]
    wholes += [content(image, "WEBP", exif=exif), content(image.convert("P"), transparency=3)]
    read = 0
    for whole in wholes:
        for _ in range(100):
            spoiled = bytearray(whole)
            for place in rng.integers(0, len(spoiled), 4):
                spoiled[place] = rng.integers(0, 256)
            try:
                read += read_image(bytes(spoiled)).shape[0] == 3
            except BadInput:
                continue
    assert 0 < read < 400


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadInput, match="cannot be read: there is no such file"):
            read_image(path)


def test_tensor_and_image_are_inverses() -> None:
    levels = torch.randint(0, 256, (3, 9, 5), generator=torch.Generator().manual_seed(0))
    image = levels.float() / 255
    assert torch.equal(to_tensor(to_pil_image(image)), image)
    assert torch.equal(to_tensor(to_pil_image(image + 0.4 / 255)), image), "rounded to the nearest level"
    assert to_tensor(to_pil_image(torch.full((3, 1, 1), 7.0))).max() == 1


def test_a_video_has_its_frames_and_rate(tmp_path: Path) -> None:
    import av

    save_video(tmp_path / "a.mp4", [Image.new("RGB", (33, 17), (g, g, g)) for g in range(0, 250, 50)], fps=8.0)
    with av.open(tmp_path / "a.mp4") as container:
        (stream,) = container.streams.video
        frames = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(stream)]
        assert (stream.width, stream.height, float(stream.average_rate)) == (32, 16, 8.0)
    assert frames == pytest.approx(range(0, 250, 50), abs=6)
