"""200 odd images through every door: scored as one reader sees them, or refused in a sentence, everywhere."""

import base64
import http.client
import io
import json
import random
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from PIL import Image

from trainer.cli import main
from trainer.config import parse_config
from trainer.prompts.sets import read_prompts
from trainer.rewards import REWARDS, score
from trainer.rewards.remote.server import RewardServer
from trainer.utils.errors import BadInput
from trainer.utils.media import open_image, read_image
from trainer.votes import store
from trainer.votes.importing import import_folder

COUNT = 200
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F"]
SIZES = [(1, 1), (1, 40), (40, 1), (2, 2), (3, 2), (2, 2000), (7, 5), (64, 64), (33, 17)]
FORMATS = [*["PNG"] * 8, *["JPEG"] * 4, *["WEBP"] * 4, "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "EPS", "PDF", "DDS"]
SUFFIXES = [".png", ".png", ".jpg", ".jpeg", ".webp"]


def odd_image(rng: random.Random) -> bytes:
    """An image file: of any mode, size and format, sound or not; or something that is none."""
    if rng.random() < 0.08:
        return rng.choice(
            [*hostile.WHOLE, b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", rng.randbytes(300)]
        )
    size, mode = rng.choice(SIZES), rng.choice(MODES)
    bands = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    noise = Image.fromarray(np.frombuffer(rng.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3))
    image, buffer = Image.blend(bands, noise, rng.random()), io.BytesIO()
    try:
        image = image.convert(mode)
    except ValueError:
        image = image.convert("L")
    options: dict[str, object] = {}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([0, 1, 3, 6, 8, 9, 255])
        options["exif"] = exif
    if rng.random() < 0.2:
        options["transparency"] = rng.choice([0, 7, 300])
    if rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [image.copy()] * rng.randint(1, 3)}
    for kind in (rng.choice(FORMATS), "PNG"):
        try:
            buffer = io.BytesIO()
            image.save(buffer, kind, **options)
            break
        except Exception:  # noqa: BLE001 - not every format takes every mode and option
            options = {}
    content = buffer.getvalue() or b"\0"
    return hostile.damaged(content, rng) if rng.random() < 0.35 else content


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("odd"), random.Random(7)
    found = []
    for i in range(COUNT):
        path = folder / f"{i:03d}{rng.choice(SUFFIXES)}"
        path.write_bytes(odd_image(rng))
        found.append(path)
    return found


@pytest.fixture(scope="module")
def seen(files: list[Path]) -> dict[Path, torch.Tensor | str]:
    """What the one reader makes of each: pixels, or what it says."""
    found: dict[Path, torch.Tensor | str] = {}
    for path in files:
        try:
            found[path] = read_image(path)
        except BadInput as error:
            found[path] = str(error)
    sound = [value for value in found.values() if isinstance(value, torch.Tensor)]
    assert 60 < len(sound) < 180, "neither all nor none can be read"
    assert all(value.shape[0] == 3 and value.isfinite().all() for value in sound)
    return found


def assert_sentence(text: str) -> None:
    assert 10 < len(text) < 600, text
    assert "\n" not in text
    assert not hostile.traceback_in(text), text
    assert not re.search(r"<[\w. ]+ (object )?at 0x|BytesIO", text), text


def test_the_reader_refuses_in_one_sentence(seen: dict) -> None:
    for value in seen.values():
        if isinstance(value, str):
            assert_sentence(value)


@pytest.mark.parametrize("reward", ["brightness", "colorfulness", "sharpness", "jpeg-size"])
def test_the_score_command_scores_each_that_can_be_read(
    files: list[Path], seen: dict, capfd: pytest.CaptureFixture, reward: str
) -> None:
    assert main(["score", reward, *map(str, files), "--prompt", "a fox"]) == 2, "some cannot be read"
    out, err = capfd.readouterr()
    scores = {Path(line.split("\t")[1]): float(line.split("\t")[0]) for line in out.splitlines()}
    refused = err.splitlines()
    assert len(scores) + len(refused) == COUNT
    for line in refused:
        assert line.startswith("error: ")
        assert_sentence(line)
    for path, pixels in seen.items():
        if isinstance(pixels, str):
            assert path not in scores
        elif path in scores:
            expected = score(REWARDS[reward](), [pixels], ["a fox"]).item()
            assert scores[path] == pytest.approx(expected, abs=1e-5), path
    if reward in ("brightness", "colorfulness", "jpeg-size"):
        assert len(scores) == sum(not isinstance(value, str) for value in seen.values())


@pytest.fixture
def server() -> Iterator[RewardServer]:
    served = RewardServer(REWARDS["brightness"](), "127.0.0.1", 0, torch.device("cpu"))
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def test_the_reward_server_sees_what_the_command_sees_and_goes_on_answering(
    files: list[Path], seen: dict, server: RewardServer
) -> None:
    for path, pixels in seen.items():
        message = {"images": [base64.b64encode(path.read_bytes()).decode()], "prompts": ["a fox"]}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("POST", "/score", json.dumps(message), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        if isinstance(pixels, str):
            assert answer.status == 400, (path, content)
            assert_sentence(content["error"])
        else:
            assert answer.status == 200, (path, content)
            expected = score(server.reward, [pixels], ["a fox"]).item()
            assert content["scores"][0] == pytest.approx(expected, abs=1e-5)


def test_a_folder_of_them_is_imported_for_voting_and_the_rest_is_named(
    files: list[Path], seen: dict, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in files}
    collection = store.create(tmp_path / "votes", "odd")
    done = import_folder(collection, files[0].parent, "a fox")
    sound = [value for value in seen.values() if not isinstance(value, str)]
    assert done.new + done.known == len(sound)
    assert len(done.complaints) == COUNT - len(sound)
    for complaint in done.complaints:
        assert_sentence(complaint)
    assert len(collection.items()[0]) == len(collection.files()) == done.new
    for name in collection.files():
        assert open_image(collection.image_file(name)).size[0] >= 1
    assert {path: path.read_bytes() for path in files} == before, "the user's own files are as they were"


def test_as_first_frames_and_sources_they_are_refused_before_a_run(
    files: list[Path], seen: dict, tmp_path: Path
) -> None:
    for path, pixels in seen.items():
        data = {"prompts": {"file": str(tmp_path / "prompts.jsonl")}, "rewards": [{"name": "brightness"}]}
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a fox", "image": str(path)}) + "\n")
        try:
            read_prompts(parse_config(data))
        except BadInput as error:
            assert isinstance(pixels, str), path
            assert_sentence(str(error))
            continue
        if isinstance(pixels, str):  # damage behind the header is found when the text encoder is given it
            with pytest.raises(BadInput):
                open_image(path)
