"""Annotated grids: captions, marks, and what happens to text that no font can draw."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.runs.sample_grids import Sample, before_after, boxes, captioned, read_samples, wrapped, write_samples

TEXTS = ["a red circle", "two triangles", "a 🦊 \ud83e \x00 fox\u2028in snow", "x" * 3000]


def grid(path: Path, verdicts: list[float], level: int) -> Path:
    places = boxes(len(TEXTS), 2, 64, 64)
    image = Image.new("RGB", (140, 140), "white")
    for place in places:
        image.paste((level, level, level), place)
    image.save(path)
    texts = [text.replace("\ud83e", "") for text in TEXTS]
    write_samples(
        path,
        [
            Sample(text, f"1234/{i}", {"strict": verdict, "score": None}, place)
            for i, (text, verdict, place) in enumerate(zip(texts, verdicts, places, strict=True))
        ],
    )
    return path


def test_samples_come_back(tmp_path: Path) -> None:
    path = grid(tmp_path / "a.png", [0, 1, 1, 0], 90)
    samples = read_samples(path)
    assert [sample.seed for sample in samples] == ["1234/0", "1234/1", "1234/2", "1234/3"]
    assert samples[1].prompt == "two triangles"
    assert samples[1].scores == {"strict": 1.0, "score": None}
    assert [sample.box for sample in samples] == [
        (4, 4, 68, 68),
        (72, 4, 136, 68),
        (4, 72, 68, 136),
        (72, 72, 136, 136),
    ]


@pytest.mark.parametrize(
    "content", ["", "null", "[]", '{"cells": 3}', '{"cells": [{"box": [1, 2]}]}', '{"cells": [5]}']
)
def test_a_grid_without_a_sound_file_is_shown_as_it_is(tmp_path: Path, content: str) -> None:
    path = grid(tmp_path / "a.png", [0, 1, 1, 0], 90)
    path.with_suffix(".json").write_text(content)
    assert read_samples(path) == []
    assert captioned(path).size == (140, 140)
    assert not before_after(path, path, tmp_path / "both.png")
    assert not (tmp_path / "both.png").exists()


def test_cells_outside_their_image_are_left_out(tmp_path: Path) -> None:
    path = grid(tmp_path / "a.png", [0, 1, 1, 0], 90)
    data = json.loads(path.with_suffix(".json").read_text())
    for cell in data["cells"]:
        cell["box"] = [0, 0, 100_000, 100_000]
    path.with_suffix(".json").write_text(json.dumps(data))
    assert captioned(path).size == (140, 140)


def test_before_is_above_after_and_changes_are_framed(tmp_path: Path) -> None:
    before, after = grid(tmp_path / "a.png", [0, 1, 1, 0], 90), grid(tmp_path / "b.png", [1, 1, 0, 0], 200)
    assert before_after(before, after, tmp_path / "both.png")
    pixels = np.asarray(Image.open(tmp_path / "both.png")).astype(int)
    dark, light = (np.argwhere((pixels == level).all(-1)) for level in (90, 200))
    assert dark[:, 0].max() < light[:, 0].min(), "every image before lies above those after"
    for color in ((0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)):
        assert (pixels == color).all(-1).sum() > 2 * 4 * 60, "a frame around both images"


def test_without_a_checker_nothing_is_marked(tmp_path: Path) -> None:
    before, after = grid(tmp_path / "a.png", [0.5, 1, 1, 0], 90), grid(tmp_path / "b.png", [1, 1, 0, 0], 200)
    assert before_after(before, after, tmp_path / "both.png")
    pixels = np.asarray(Image.open(tmp_path / "both.png")).astype(int)
    assert not ((pixels == (0x1A, 0x7F, 0x37)).all(-1) | (pixels == (0xCF, 0x22, 0x2E)).all(-1)).any()


@pytest.mark.parametrize(
    ("text", "width", "most", "lines"),
    [
        ("a b c", 5, 3, ["a b c"]),
        ("abc def ghi", 7, 3, ["abc def", "ghi"]),
        ("abc def ghi", 7, 1, ["abc..."]),
        ("abcdefgh", 3, 5, ["abc", "def", "gh"]),
        ("", 5, 3, []),
        ("a\ud83e\x00\n b", 9, 3, ["a\ufffd\ufffd b"]),
    ],
)
def test_text_is_wrapped_cut_and_made_printable(text: str, width: int, most: int, lines: list[str]) -> None:
    assert wrapped(text, width, len, most) == lines
