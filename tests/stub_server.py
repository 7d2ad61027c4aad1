"""Web servers for tests: one whose answers a test writes, and one that speaks bytes of its own."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image


class StubServer:
    """Answers with what a test says: `answer(path, message) -> (code, bytes or data)`.

    Attributes:
        seen: path, message and headers of every request.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, Any], tuple[int, Any]] = lambda path, message: (200, {})
        self.seen: list[tuple[str, Any, dict]] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._give(json.loads(body))

            def do_GET(self) -> None:
                self._give(None)

            def _give(self, message: Any) -> None:
                stub.seen.append((self.path, message, dict(self.headers)))
                code, content = stub.answer(self.path, message)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(data)))
                with contextlib.suppress(OSError):  # the client may have given up
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def speaking(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a program that takes connections and, once a request has come, answers as it likes."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = listening.accept()
                threading.Thread(target=talk, args=(line,), daemon=True).start()

    def talk(line: socket.socket) -> None:
        with line, contextlib.suppress(OSError):
            line.recv(2**20)
            answer(line)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def drip(parts: Iterator[bytes], pause: float) -> Callable[[socket.socket], None]:
    """Send the parts one after the other."""

    def answer(line: socket.socket) -> None:
        for part in parts:
            line.sendall(part)
            time.sleep(pause)

    return answer


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def brightness_of(text: str) -> float:
    """The mean of an image file in base64, 0 to 1."""
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).mean() / 255)
