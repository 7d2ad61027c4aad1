"""`python -m trainer score`, and images of a run scored by group."""

import base64
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from trainer import rewards, score
from trainer.cli import main
from trainer.rewards.base import Reward
from trainer.rewards.remote.server import read_message
from trainer.score import score_by_group, score_files
from trainer.utils.errors import BadInput
from trainer.utils.media import read_image


def grey(path: Path, level: int, size: tuple[int, int] = (12, 8)) -> Path:
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def lines(capsys: pytest.CaptureFixture) -> tuple[list[list[str]], list[str]]:
    out, err = capsys.readouterr()
    return [line.split("\t") for line in out.splitlines()], [line for line in err.splitlines() if "error: " in line]


@pytest.mark.parametrize("bad", [0, 2, 20])
def test_one_bad_file_does_not_lose_the_other_scores(tmp_path: Path, capsys: pytest.CaptureFixture, bad: int) -> None:
    files = [grey(tmp_path / f"{level:03d}.png", level) for level in range(0, 210, 10)]
    files[bad].write_bytes(files[bad].read_bytes()[:40])
    assert main(["score", "brightness", *map(str, files), "--prompt", "a"]) == 2
    rows, errors = lines(capsys)
    assert [row[1] for row in rows] == [str(file) for file in files if file != files[bad]]
    assert [float(row[0]) for row in rows] == pytest.approx(
        [level / 255 for level in range(0, 210, 10) if level != 10 * bad], abs=1e-6
    )
    assert len(errors) == 1
    assert errors[0].startswith(f"error: image {files[bad]} ")


class Watching(Reward):
    """Brightness that keeps an eye on the images in memory; it refuses images 5 pixels wide."""

    name = "watching"
    typical_range = (0.0, 1.0)
    seen: list = []

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if images.shape[-1] == 5:
            raise ValueError("images must not be 5 pixels wide")
        self.seen.append((len(images), weakref.ref(images)))
        return images.flatten(1).mean(1)


def test_images_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watching, "seen", [])
    alive: list = []

    def read(path: Path) -> torch.Tensor:
        image = read_image(path)
        alive.append(weakref.ref(image))
        assert sum(reference() is not None for reference in alive) <= 2 * score.BATCH
        return image

    monkeypatch.setattr(score, "read_image", read)
    files = [grey(tmp_path / f"{number}.png", number) for number in range(100)]
    found = list(score_files(Watching(), files, ["a"] * 100))
    assert found == pytest.approx([number / 255 for number in range(100)], abs=1e-6)
    assert [count for count, _ in Watching.seen] == [16] * 6 + [4]
    # Large images make smaller batches.
    monkeypatch.setattr(Watching, "seen", [])
    monkeypatch.setattr(score, "BATCH_PIXELS", 12 * 8 * 3)
    assert len(list(score_files(Watching(), files, ["a"] * 100))) == 100
    assert {count for count, _ in Watching.seen} == {3, 1}


def test_an_image_that_the_reward_refuses_does_not_lose_the_others(tmp_path: Path) -> None:
    files = [grey(tmp_path / "0.png", 51), grey(tmp_path / "1.png", 51, (5, 5)), grey(tmp_path / "2.png", 102)]
    found = list(score_files(Watching(), files, ["a"] * 3))
    assert [found[0], found[2]] == pytest.approx([0.2, 0.4])
    assert isinstance(found[1], BadInput)
    assert "must not be 5 pixels wide" in str(found[1])


def test_a_prompt_that_the_reward_refuses_is_said_before_any_image_is_read(tmp_path: Path, capsys) -> None:
    assert main(["score", "shapes", str(tmp_path / "none.png"), "--prompt", "a cat"]) == 2
    _, errors = lines(capsys)
    assert len(errors) == 1
    assert "a cat" in errors[0]
    assert "none.png" not in errors[0]


class Rank(Reward):
    """An image's place among the images it is given."""

    name = "rank"
    typical_range = (0.0, 1.0)
    groupwise = True

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert len(set(prompts)) == 1
        return images.flatten(1).mean(1).argsort().argsort().float()


def test_rewards_that_compare_images_get_them_all_or_one_group(tmp_path: Path) -> None:
    files = [grey(tmp_path / f"{number}.png", 200 - number) for number in range(20)]
    assert list(score_files(Rank(), files, ["a"] * 20)) == list(range(19, -1, -1))
    # Two source images with one instruction: the same text, and two groups.
    images = torch.tensor([0.1, 0.9, 0.3, 0.2])[:, None, None, None].expand(4, 3, 2, 2).clone()
    assert score_by_group(Rank(), images, ["a"] * 4, [7, 7, 3, 3]).tolist() == [0, 1, 1, 0]
    images[1] = torch.nan
    assert score_by_group(Rank(), images, ["a"] * 4, [7, 7, 3, 3]).nan_to_num(-1).tolist() == [1, -1, 1, 0]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_score_prints_on_any_console(tmp_path: Path, encoding: str) -> None:
    file = grey(tmp_path / "bild_\u00fc.png", 255)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "score", "brightness", file, "--prompt", "a \U0001f98a\u2028in\n snow"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    shown = f"1.000000\t{file}\ta \U0001f98a in snow"
    assert done.stdout.rstrip(b"\r\n") == shown.encode(encoding, "backslashreplace")


def test_every_door_sees_the_same_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "16 bit grey.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "transparent.png")
    turned = Image.new("RGB", (20, 10), "black")
    turned.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    expected = {"16 bit grey": 0.5, "transparent": 1.0, "turned": 0.5}
    files = [tmp_path / f"{name}.png" for name in expected]
    assert main(["score", "brightness", *map(str, files), "--prompt", "a"]) == 0
    rows, _ = lines(capsys)
    assert [float(row[0]) for row in rows] == pytest.approx(list(expected.values()), abs=1e-6)
    sent = [base64.b64encode(file.read_bytes()).decode() for file in files]
    message = read_message(json.dumps({"images": sent, "prompts": ["a"] * 3}).encode(), "image")
    images = message.decoded(torch.device("cpu"))
    for file, image in zip(files, images, strict=True):
        assert torch.equal(image, read_image(file))
    upright = images[2].mean(0)
    assert upright.shape == (20, 10)
    assert (upright[:10].min(), upright[10:].max()) == (1, 0), "what was stored on the left is on top"


def test_a_message_with_a_huge_image_is_refused_by_the_reward_server() -> None:
    import io

    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    body = json.dumps({"images": [base64.b64encode(buffer.getvalue()).decode()], "prompts": ["a"]}).encode()
    with pytest.raises(ValueError, match="an image of the request has 13000 x 13000 pixels: at most 67 million"):
        read_message(body, "image")


def test_the_reward_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setitem(rewards.REWARDS, "rank", Rank)
    files = [str(grey(tmp_path / f"{level}.png", level)) for level in (9, 5)]
    assert main(["score", "rank", *files, "--prompt", "a"]) == 0
    assert [float(row[0]) for row in lines(capsys)[0]] == [1, 0]
