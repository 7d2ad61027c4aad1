"""`python -m trainer reward-server`: serves a reward over HTTP, for the reward `external` of another process."""

import contextlib
import hmac
import json
import math
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
"""Largest size of a request in bytes."""
MOST_BYTES = 2**30
"""Largest total size in bytes of the requests in memory."""
MOST_CONNECTIONS = 64
READING = 120.0
"""Seconds within which a request must have arrived."""
SILENCE = 30.0
"""Seconds that a connection may be idle."""


class Busy(Exception):
    """The server has too many requests; the client may try again."""


def serve(reward: Reward, host: str, port: int, device: torch.device) -> int:
    """Serve requests until interrupted; returns the exit code.

    Raises:
        BadInput: the server cannot listen on the address.
    """
    check_port(port)
    try:
        server = RewardServer(reward, host, port, device)
    except OSError as error:
        raise BadInput(f"the server cannot listen on {host[:100]}:{port}: {error.strerror or error}") from error
    key = f"key required ({KEY})" if os.environ.get(KEY) else f"no key required (set {KEY} to require one)"
    print(f"reward {reward.name} at http://{host}:{server.server_port}/score, {key}; stop with Ctrl+C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        server.server_close()
    return 0


def check_port(port: int) -> None:
    """Raise BadInput unless `port` is a valid port number."""
    if not 0 <= port <= 65_535:
        raise BadInput(f"--port is {port}: give a number from 1 to 65535")


class RewardServer(ThreadingHTTPServer):
    """Answers `POST /score`. Requests are read in parallel, within limits, and scored one at a time."""

    daemon_threads = True

    def __init__(self, reward: Reward, host: str, port: int, device: torch.device) -> None:
        self.reward, self.device = reward, device
        self.scoring = threading.Lock()
        self.counting, self.bytes, self.connections = threading.Lock(), 0, 0
        super().__init__((host, port), Handler)

    def answer(self, body: bytes) -> list[float | None]:
        """The scores for a request.

        Raises:
            BadInput, ValueError: the request is malformed, or the reward cannot score it.
        """
        message = read_message(body, self.reward.media)
        with self.scoring:
            values = score(self.reward, message.decoded(self.device), message.prompts)
        return [None if math.isnan(value) else value for value in values.tolist()]

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Count a connection.

        Raises:
            Busy: there are too many connections.
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
        """Reserve memory for a request.

        Raises:
            Busy: other requests use the memory.
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
    """Handles a connection with one request, which must arrive within `READING` seconds."""

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
        except (Busy, OSError, ValueError):  # too many clients, or the client disconnected
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
            return 404, {"error": "not found: use POST /score"}
        try:
            with self.server.holding(self.unread):
                body, size = self.rfile.read(self.unread), self.unread
                self.unread = 0
                self.arrived()
                if len(body) < size:
                    return 400, {"error": "the request is incomplete"}
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
            raise ValueError(f"Content-Length is required: give a number of bytes from 0 to {LARGEST_BODY}")
        return int(text)

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        with contextlib.suppress(OSError):  # the client may have disconnected
            self.end_headers()
            self.wfile.write(data)

    def _discard(self) -> None:
        """Read the rest of a request that was answered early; else the client may not receive the answer."""
        with contextlib.suppress(OSError):
            self.wfile.flush()
            while self.unread > 0 and (part := self.rfile.read(min(self.unread, 2**16))):
                self.unread -= len(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""
