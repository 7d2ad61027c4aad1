"""The reward server: a served reward scores as a local one, and no client can take its memory or its time."""

import base64
import io
import json
import re
import resource
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from stub_server import free_port

from trainer.cli import main
from trainer.config import RewardConfig
from trainer.rewards import Reward, load_reward, score
from trainer.rewards.remote import http, message, server
from trainer.rewards.remote.http import to_png
from trainer.rewards.remote.server import KEY, RewardServer
from trainer.utils.errors import RunFailed

IMAGES = torch.rand(5, 3, 6, 9, generator=torch.Generator().manual_seed(0))


def reward(name: str, **options: object) -> Reward:
    return load_reward(RewardConfig(name=name, options=options))


@pytest.fixture
def servers() -> list[RewardServer]:
    """Those that `serving` has started."""
    return []


@pytest.fixture
def serving(servers: list[RewardServer]) -> Iterator[Callable[[Reward], str]]:
    def start(served: Reward) -> str:
        servers.append(RewardServer(served, "127.0.0.1", 0, torch.device("cpu")))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/score"

    yield start
    for each in servers:
        each.shutdown()
        each.server_close()


def post(url: str, body: bytes | dict) -> tuple[int, str]:
    """Status, and the answer or what its `error` says."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def port_of(url: str) -> int:
    return int(url.split(":")[2].split("/")[0])


def test_a_served_reward_gives_the_scores_of_a_local_one(serving: Callable) -> None:
    for name in ("brightness", "jpeg-size", "sharpness"):
        served = reward("external", url=serving(reward(name)), batch=3)
        served.load()
        rounded = (IMAGES * 255).round() / 255
        torch.testing.assert_close(score(served, IMAGES, list("abcde")), score(reward(name), rounded, list("abcde")))


def test_videos_are_served(serving: Callable) -> None:
    class Length(Reward):
        name, typical_range, media = "length", (0.0, 1.0), "video"

        def score(self, images: list, prompts: list[str]) -> torch.Tensor:
            return torch.tensor([len(video) + video.mean() for video in images])

    url = serving(Length())
    videos = [torch.ones(3, 3, 6, 6), torch.zeros(5, 3, 4, 8)]
    assert score(reward("external", url=url, media="video"), videos, ["a", "b"]).tolist() == [4, 5]
    (wide,), (high,) = to_png(torch.ones(1, 3, 8, 4)), to_png(torch.ones(1, 3, 4, 8))
    for videos, words in (([[wide, high]], "frames of a video differ in size"), ([[]], "at least one image")):
        code, text = post(url, {"videos": videos, "prompts": ["a"]})
        assert (code, words in text) == (400, True), text


def test_images_of_different_sizes_are_served(serving: Callable) -> None:
    files = to_png(torch.ones(1, 3, 8, 4)) + to_png(torch.zeros(1, 3, 5, 5))
    code, text = post(serving(reward("brightness")), {"images": files, "prompts": ["a", "b"]})
    assert code == 200
    assert json.loads(text)["scores"] == pytest.approx([1.0, 0.0])


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> str:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_images_of_any_kind_are_read_as_seen(serving: Callable) -> None:
    ramp = Image.new("I;16", (256, 1))
    for x in range(256):
        ramp.putpixel((x, 0), 257 * x)
    bright_left = Image.new("RGB", (4, 2))
    bright_left.paste("white", (0, 0, 2, 2))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    files = {
        encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0))): 1.0,  # transparency is laid on white
        encoded(ramp): 0.5,  # 16 bits of grey
        encoded(Image.new("L", (2, 2), 51)): 0.2,
        encoded(Image.new("P", (2, 2), 0)): 0.0,
        encoded(Image.new("RGB", (8, 8), "white"), "JPEG"): 1.0,
        encoded(Image.new("RGB", (8, 8), "white"), "WEBP"): 1.0,
    }
    code, text = post(serving(reward("brightness")), {"images": list(files), "prompts": ["a"] * len(files)})
    assert code == 200, text
    assert json.loads(text)["scores"] == pytest.approx(list(files.values()), abs=0.005)
    body = json.dumps({"images": [encoded(bright_left, exif=turned)], "prompts": ["a"]}).encode()
    (upright,) = message.read_message(body, "image").decoded(torch.device("cpu"))
    assert upright[:, 0].mean(0).tolist() == [0, 0, 1, 1]


def test_the_server_says_what_is_wrong(serving: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    url = serving(reward("shapes"))
    with pytest.raises(RunFailed, match="answered 400 .*a dog"):
        score(reward("external", url=url), IMAGES[:1], ["a dog"])
    (good,) = to_png(torch.ones(1, 3, 8, 8))
    damaged = base64.b64encode(base64.b64decode(good)[:-30]).decode()
    for body, words in {
        b"{": "not JSON",
        b"[" * 10**5: "not JSON",
        b"[]": "no list 'images'",
        b'{"images": [], "prompts": [1]}': "no list 'prompts' of strings",
        b'{"images": ["?"], "prompts": ["a"]}': "not a file in base64",
        b'{"images": [7], "prompts": ["a"]}': "not a file in base64",
        b'{"images": ["aGVsbG8="], "prompts": ["a"]}': "an image of the request is not a PNG, JPEG or WebP image",
        b'{"images": [], "prompts": ["a"]}': "0 images but 1 prompts",
        json.dumps({"images": [damaged], "prompts": ["a red circle"]}).encode(): "request cannot be read",
        json.dumps({"images": [good], "prompts": ["a" * 20_000]}).encode(): "more than 10000 characters",
    }.items():
        code, text = post(url, body)
        assert (code, words in text) == (400, True), text
    assert post(url.replace("score", "else"), b"{}")[0] == 404
    monkeypatch.setenv(KEY, "secret")
    assert post(url, b"{}") == (401, "the key is missing or wrong")
    monkeypatch.setenv(http.KEYS, f"127.0.0.1:{port_of(url)}=secret")
    reward("external", url=url).load()


# ------------------------------------------------------------------------------------------------------------- bounds


def bomb(side: int) -> str:
    """A small PNG of many pixels, of one colour."""
    return encoded(Image.new("1", (side, side)), optimize=True)


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(serving: Callable) -> None:
    url = serving(reward("brightness"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for side, words in {
        13_000: "an image of the request has 13000 x 13000 pixels",
        4_100: "an image has 4100 x 4100 pixels; at most 16777216 pixels are accepted",
    }.items():
        code, text = post(url, {"images": [bomb(side)] * 6, "prompts": ["a"] * 6})
        assert (code, words in text) == (400, True), text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB: decoded it takes 1.9 GB


def test_pixels_and_images_of_a_message_are_limited_together(
    serving: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message, "MOST_PIXELS_TOGETHER", 200)
    monkeypatch.setattr(message, "MOST_IMAGES", 4)
    url, file = serving(reward("brightness")), bomb(10)
    for count, words in {
        2: None,
        3: "more than 200 pixels in total: send fewer",
        5: "5 images; at most 4 are accepted",
    }.items():
        code, text = post(url, {"images": [file] * count, "prompts": ["a"] * count})
        assert (code == 200) == (words is None), text
        assert words is None or words in text


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000"])
def test_other_formats_are_not_opened(serving: Callable, form: str) -> None:
    code, text = post(serving(reward("brightness")), {"images": [encoded(Image.new("RGB", (16, 16)), form)],
                                                      "prompts": ["a"]})  # fmt: skip
    assert (code, "is not a PNG, JPEG or WebP image" in text) == (400, True)


def talk(url: str, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send parts of a request, and give what comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=30) as line:
        try:
            for part in parts:
                line.sendall(part)
                time.sleep(pause)
            answer = b""
            while part := line.recv(2**16):
                answer += part
        except OSError:
            return b""
        return answer


HEAD = b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize("head", [HEAD[:9], HEAD[:30], HEAD], ids=["request line", "headers", "body"])
def test_a_request_in_drops_is_hung_up_on(serving: Callable, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(server, "READING", 0.4)
    url, begun = serving(reward("brightness")), time.monotonic()
    assert b" 200 " not in talk(url, head, *[b" "] * 1000, pause=0.2)
    assert time.monotonic() - begun < 100
    assert post(url, {"images": [], "prompts": []}) == (200, '{"scores": []}')


@pytest.mark.parametrize(
    "length", [b"", b"Content-Length: -5\r\n", b"Content-Length: x\r\n", b"Content-Length: 999999999999999999999\r\n",
               b"Content-Length: 600000000\r\n", b"Transfer-Encoding: chunked\r\n"]
)  # fmt: skip
def test_a_length_must_be_given_and_is_limited(serving: Callable, length: bytes) -> None:
    answer = talk(serving(reward("brightness")), b"POST /score HTTP/1.1\r\n" + length + b"\r\n")
    assert b" 400 " in answer
    assert b"Content-Length is required: give a number of bytes from 0 to 536870912" in answer


def test_a_message_that_is_cut_short_is_not_scored(serving: Callable) -> None:
    with socket.create_connection(("127.0.0.1", port_of(serving(reward("brightness"))))) as line:
        line.sendall(HEAD + b'{"images": [], "prompts": []}')
        line.shutdown(socket.SHUT_WR)
        answer = b""
        while part := line.recv(2**16):
            answer += part
    assert b"the request is incomplete" in answer


def test_messages_and_connections_beyond_the_limit_are_told_to_come_again(
    serving: Callable, servers: list[RewardServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PAUSE", 0.05)
    monkeypatch.setattr(server, "MOST_BYTES", 1500)
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
    url = serving(reward("brightness"))
    held = [socket.create_connection(("127.0.0.1", port_of(url)))]
    held[0].sendall(HEAD)
    wait_until(lambda: servers[0].bytes == 1000)
    body = {"images": to_png(torch.ones(1, 3, 64, 64)), "prompts": ["a" * 900]}
    wait_until(lambda: post(url, body)[0] == 503)
    threading.Timer(0.3, held[0].close).start()
    assert score(reward("external", url=url, retries=10), torch.ones(1, 3, 64, 64), ["a" * 900]).tolist() == [1]
    held = [socket.create_connection(("127.0.0.1", port_of(url))) for _ in range(2)]
    wait_until(lambda: talk(url, HEAD) == b"")
    for line in held:
        line.close()
    wait_until(lambda: post(url, {"images": [], "prompts": []})[0] == 200)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("it did not happen")


# ------------------------------------------------------------------------------------------------------- command line


def test_command_line_refuses_what_it_cannot_serve(capsys: pytest.CaptureFixture) -> None:
    assert main(["reward-server", "taste"]) == 2
    assert main(["reward-server", "hps-v2.1", "--set", "path=/no/such.pt"]) == 2
    assert "path '/no/such.pt' does not exist; HPS_v2.1_compressed.pt of" in capsys.readouterr().err
    for port in ("70000", "99999999999999999999"):
        with pytest.raises(SystemExit) as end:
            main(["reward-server", "brightness", "--port", port])
        assert end.value.code == 2
        assert "argument --port: " in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["reward-server", "brightness", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1:" in capsys.readouterr().err


def test_the_adapter_of_geneval_in_the_documentation_works(tmp_path: Path) -> None:
    """Started as the page says, beside a stand-in of GenEval's script with the same functions."""
    page = (ROOT / "docs" / "external-scorers.md").read_text(encoding="utf-8")
    (tmp_path / "serve_geneval.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    for name, text in {"evaluation/evaluate_images.py": GENEVAL, "prompts/evaluation_metadata.jsonl": METADATA}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    port = free_port()
    command = [sys.executable, "serve_geneval.py", str(port), "weights"]
    process = subprocess.Popen(command, cwd=tmp_path)
    try:
        scorer = reward("external", url=f"http://127.0.0.1:{port}", retries=6)
        scorer.load()
        images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)])
        assert score(scorer, images, ["a photo of a dog", "a photo of a dog"]).tolist() == [1, 0]
        with pytest.raises(RunFailed, match="not a prompt of GenEval: a cat"):
            score(scorer, images[:1], ["a cat"])
    finally:
        process.kill()
        process.wait()


METADATA = '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}\n'
GENEVAL = """
import argparse
from PIL import Image

def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("imagedir")
    parser.add_argument("--model-path")
    return parser.parse_args()

def load_models(args):
    assert (args.imagedir, args.model_path) == ("unused", "weights")
    return "detector", ("clip", "transform", "tokenizer"), ["dog"]

def evaluate_image(filepath, metadata):
    assert (object_detector, clip_model, transform, tokenizer, classnames) == (
        "detector", "clip", "transform", "tokenizer", ["dog"])
    assert (THRESHOLD, COUNTING_THRESHOLD, MAX_OBJECTS, NMS_THRESHOLD, POSITION_THRESHOLD) == (0.3, 0.9, 16, 1.0, 0.1)
    assert metadata["include"][0]["class"] == "dog" and args.model_path == "weights"
    return {"correct": Image.open(filepath).getpixel((0, 0)) == (255, 255, 255)}
"""
