"""Serves a reward to other programs over HTTP: `python -m trainer reward-server`, the other end of `external`."""

import contextlib
import hmac
import json
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from ...utils.errors import BadInput, RunFailed
from ..base import Reward
from ..scoring import score
from .message import read_message

KEY = "DANCEGRPO_SERVER_KEY"
LARGEST_BODY = 512 * 2**20
"""Bytes of one message."""
MOST_BYTES = 2**30
"""Bytes of all messages that are in memory at once."""
MOST_CONNECTIONS = 64
READING = 120.0
"""Seconds in which a request must have arrived."""
SILENCE = 30.0
"""Seconds that a connection may say nothing, or not take the answer."""


class Busy(Exception):
    """Too much is being worked on; the client may try again."""


def serve(reward: Reward, host: str, port: int, device: torch.device) -> int:
    """Answer until interrupted; returns the exit code.

    Raises:
        BadInput: the server cannot listen on the address.
    """
    check_port(port)
    try:
        server = RewardServer(reward, host, port, device)
    except OSError as error:
        raise BadInput(f"the server cannot listen on {host[:100]}:{port}: {error.strerror or error}") from error
    key = f"with the key in {KEY}" if os.environ.get(KEY) else "to anyone who can reach it"
    print(f"reward {reward.name} at http://{host}:{server.server_port}/score, {key}; stop with Ctrl+C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        server.server_close()
    return 0


def check_port(port: int) -> None:
    """Raise BadInput unless `port` is a number that a server can listen on."""
    if not 0 <= port <= 65_535:
        raise BadInput(f"--port is {port}: give a number from 1 to 65535")


class RewardServer(ThreadingHTTPServer):
    """Answers `POST /score`: requests are read in parallel, within bounds, and scored one after the other."""

    daemon_threads = True

    def __init__(self, reward: Reward, host: str, port: int, device: torch.device) -> None:
        self.reward, self.device = reward, device
        self.scoring = threading.Lock()
        self.counting, self.bytes, self.connections = threading.Lock(), 0, 0
        super().__init__((host, port), Handler)

    def answer(self, body: bytes) -> list[float | None]:
        """The scores of a message.

        Raises:
            BadInput, ValueError: the message is malformed, or the reward cannot score it.
        """
        message = read_message(body, self.reward.media)
        with self.scoring:
            values = score(self.reward, message.decoded(self.device), message.prompts)
        return [value if value == value else None for value in values.tolist()]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Count a connection.

        Raises:
            Busy: there are too many already.
        """
        with self.counting:
            if self.connections >= MOST_CONNECTIONS:
                raise Busy
            self.connections += 1
        try:
            yield
        finally:
            with self.counting:
                self.connections -= 1

    @contextlib.contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count a message's bytes.

        Raises:
            Busy: messages of other requests take the memory.
        """
        with self.counting:
            if self.bytes + size > MOST_BYTES:
                raise Busy
            self.bytes += size
        try:
            yield
        finally:
            with self.counting:
                self.bytes -= size


class Handler(BaseHTTPRequestHandler):
    """One connection: a request in `READING` seconds, an answer, and the end."""

    server: RewardServer
    timeout = SILENCE

    def handle(self) -> None:
        deadline = threading.Timer(READING, self._hang_up)
        deadline.daemon = True
        deadline.start()
        self.arrived = deadline.cancel
        try:
            with self.server.connected():
                super().handle()
        except (Busy, OSError, ValueError):  # too many clients, or this one has gone
            self.close_connection = True
        finally:
            deadline.cancel()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def do_POST(self) -> None:
        self.unread = 0
        code, content = self._result()
        self._answer(code, content)
        self._discard()

    def _result(self) -> tuple[int, dict[str, Any]]:
        try:
            self.unread = self._length()
        except ValueError as error:
            return 400, {"error": str(error)}
        key = os.environ.get(KEY)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            return 401, {"error": "the key is missing or wrong"}
        if self.path.rstrip("/") != "/score":
            return 404, {"error": "only POST /score is answered"}
        try:
            with self.server.holding(self.unread):
                body, size = self.rfile.read(self.unread), self.unread
                self.unread = 0
                self.arrived()
                if len(body) < size:
                    return 400, {"error": "the message was cut short"}
                return 200, {"scores": self.server.answer(body)}
        except Busy:
            return 503, {"error": "too many requests at once; try again later"}
        except (BadInput, ValueError) as error:
            return 400, {"error": str(error)}
        except (RunFailed, RuntimeError, MemoryError) as error:
            return 500, {"error": str(error) or type(error).__name__}

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= LARGEST_BODY):
            raise ValueError(f"Content-Length must be given, from 0 to {LARGEST_BODY}")
        return int(text)

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        with contextlib.suppress(OSError):  # who asked may have given up
            self.end_headers()
            self.wfile.write(data)

    def _discard(self) -> None:
        """Read what is left of a message that was answered early; else the client loses the answer with its line."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            while self.unread > 0 and (part := self.rfile.read(min(self.unread, 2**16))):
                self.unread -= len(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal for what matters."""
