"""Serves a reward to other programs over HTTP: `python -m trainer reward-server`, the other end of `external`."""

import base64
import contextlib
import hmac
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from ...utils.errors import BadInput, RunFailed
from ...utils.media import read_image
from .. import Reward, score

KEY = "DANCEGRPO_SERVER_KEY"
LARGEST = 512 * 2**20
"""Bytes of a message."""


def serve(reward: Reward, host: str, port: int, device: torch.device) -> int:
    """Answer until interrupted; returns the exit code.

    Raises:
        BadInput: the address cannot be listened on.
    """
    try:
        server = make_server(reward, host, port, device)
    except OSError as error:
        raise BadInput(f"{host}:{port} cannot be listened on: {error.strerror}") from error
    key = f"with the key in {KEY}" if os.environ.get(KEY) else "to anyone who can reach it"
    print(f"reward {reward.name} at http://{host}:{server.server_port}/score, {key}; stop with Ctrl+C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        server.server_close()
    return 0


def make_server(reward: Reward, host: str, port: int, device: torch.device) -> ThreadingHTTPServer:
    """A server that answers `POST /score`; messages are read side by side, scored one after the other."""
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                with_key = os.environ.get(KEY)
                given = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if with_key and not hmac.compare_digest(given.encode(), with_key.encode()):
                    return self._answer(401, {"error": "the key is missing or wrong"})
                if self.path.rstrip("/") != "/score":
                    return self._answer(404, {"error": "POST /score is all there is"})
                images, prompts = read_message(self._body(), reward.media)
                with turn:
                    values = score(reward, [image.to(device) for image in images], prompts)
            except (BadInput, ValueError) as error:
                return self._answer(400, {"error": str(error)})
            except (RunFailed, RuntimeError) as error:
                return self._answer(500, {"error": str(error)})
            return self._answer(200, {"scores": [value if value == value else None for value in values.tolist()]})

        def _body(self) -> bytes:
            length = int(self.headers.get("Content-Length") or -1)
            if not 0 <= length <= LARGEST:
                raise ValueError(f"Content-Length must be given, from 0 to {LARGEST}")
            return self.rfile.read(length)

        def _answer(self, code: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            with contextlib.suppress(ConnectionError):  # who asked may have given up
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the terminal for what matters."""

    return ThreadingHTTPServer((host, port), Handler)


def read_message(body: bytes, media: str) -> tuple[list[Tensor], list[str]]:
    """Images `[3, H, W]` or videos `[F, 3, H, W]` in [0, 1], and the prompts, of a message.

    Raises:
        ValueError: the message is of another form.
    """
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ValueError(f"the message is no JSON: {error}") from error
    name = "videos" if media == "video" else "images"
    if not isinstance(message, dict) or not isinstance(message.get(name), list):
        raise ValueError(f"the message holds no list {name!r}")
    prompts = message.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the message holds no list 'prompts' of texts")
    if media == "image":
        return [_image(text) for text in message[name]], prompts
    return [_video(frames) for frames in message[name]], prompts


def _video(frames: Any) -> Tensor:
    if not isinstance(frames, list) or not frames:
        raise ValueError("a video must be a list of at least one image")
    return torch.stack([_image(frame) for frame in frames])


def _image(text: Any) -> Tensor:
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an image is not a file in base64: {error}") from error
    return read_image(content, "an image of the message")
