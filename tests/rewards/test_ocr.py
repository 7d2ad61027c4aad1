"""Text rendering: the formula, and the reader behind a stand-in of its package."""

from pathlib import Path

import pytest
import torch
from tiny_rewards import import_anew

from trainer.config import RewardConfig
from trainer.rewards import load_reward, score
from trainer.rewards.ocr import distance, similarity, target
from trainer.utils.errors import BadInput

STAND_IN = """
import io
from types import SimpleNamespace
from PIL import Image

TEXTS = {255: ("Hello ", "WORLD"), 128: ("he1lo", "world"), 0: None}

class RapidOCR:
    def __call__(self, content):
        return SimpleNamespace(txts=TEXTS[Image.open(io.BytesIO(content)).getpixel((0, 0))[0]])
"""


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_distance(first: str, second: str, wanted: int) -> None:
    assert distance(first, second) == distance(second, first) == wanted


def test_similarity_is_that_of_flow_grpo() -> None:
    assert similarity("a sign: Hello  World!", "helloworld") == 1
    assert similarity("he1lo", "hello") == pytest.approx(0.8)
    assert similarity("", "hello") == 0
    assert similarity("nothing of the kind at all", "hello") == 0


def test_target_is_the_first_text_in_quotes() -> None:
    assert target('a sign that says "Open  Now" and "no"') == "opennow"
    assert target("a sign that says “Grüße”") == "grüße"
    assert target('an empty "" and a full "x"') == "x"
    for prompt in ("a sign", 'a "" sign', "it's 'x'", 'one " alone'):
        with pytest.raises(ValueError, match="has no text in double quotes"):
            target(prompt)


def test_what_the_reader_finds_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rapidocr.py").write_text(STAND_IN)
    (tmp_path / "onnxruntime.py").write_text("")
    import_anew(monkeypatch, tmp_path)
    tested = load_reward(RewardConfig(name="ocr"))
    images = torch.tensor([1.0, 128 / 255, 0.0])[:, None, None, None].expand(3, 3, 8, 8)
    found = score(tested, images, ['a "hello world" sign'] * 3)
    torch.testing.assert_close(found, torch.tensor([1, 0.9, 0]))
    with pytest.raises(ValueError, match="a dog"):
        tested.check_prompts(['"x"', "a dog"])


def test_without_its_package_the_reward_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="'ocr' needs the package 'rapidocr', which is not installed"):
        load_reward(RewardConfig(name="ocr"))


def test_the_real_reader_reads() -> None:
    pytest.importorskip("rapidocr", reason="rapidocr is an optional package")
    pytest.importorskip("onnxruntime", reason="onnxruntime is an optional package")
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    drawn = Image.new("RGB", (400, 120), "white")
    ImageDraw.Draw(drawn).text((30, 30), "HELLO", fill="red", font=ImageFont.load_default(60))
    image = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None] / 255
    tested = load_reward(RewardConfig(name="ocr"))
    assert score(tested, image, ['"hello"']).item() == 1
    assert score(tested, image, ['"zzzz"']).item() == 0
