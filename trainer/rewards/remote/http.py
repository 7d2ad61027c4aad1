"""Asking a server over HTTP: JSON both ways, patience with a slow one, and a clear failure instead of a made-up answer.

A key is taken from the environment variable `DANCEGRPO_KEYS` only, as `host=key` or `host:port=key`, several separated
by commas. Each key goes to its own host, so a workflow cannot send it anywhere else.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ...utils.errors import BadInput, RunFailed
from ..preprocess import to_pil

KEYS = "DANCEGRPO_KEYS"
LONGEST_ANSWER = 16 * 2**20
LARGEST = torch.finfo(torch.float32).max
PAUSE = 1.0
"""Seconds before the second try; each further one waits twice as long."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """The answer must come from where it was asked for."""


def check_url(url: str, reward: str) -> None:
    """Raise BadInput unless `url` is an address of a web server."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise BadInput(
            f"reward {reward!r}: url is {url!r}: give the address of its server, such as http://localhost:8100"
        )
    if parts.username or parts.password:
        raise BadInput(f"reward {reward!r}: url holds a name or password: give keys in the variable {KEYS} instead")


def ask(url: str, body: dict | None, *, timeout: float, retries: int, check: Any) -> Any:
    """What the server answers, checked.

    Args:
        body: sent as JSON; None asks with GET.
        timeout: seconds for one try, from the question to the end of the answer.
        retries: further tries where the server is away, busy, slow or its answer is no good.
        check: takes the decoded answer and returns what the caller wants of it; ValueError where it is no good.

    Raises:
        RunFailed: no good answer came.
    """
    reason = ""
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return check(_once(url, body, timeout))
        except urllib.error.HTTPError as error:
            reason = f"answered {error.code} {error.reason}: {_start(error)}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            reason = f"gave an answer of another form: {error!r}"
        except ValueError as error:
            reason = f"gave no usable answer: {error}"
        except RecursionError:
            reason = "gave no usable answer: it is nested too deeply"
        except OSError as error:
            reason = f"cannot be reached: {getattr(error, 'reason', error)}"
        except http.client.HTTPException as error:
            reason = f"does not speak HTTP: {error!r}"
    raise RunFailed(f"the server {url} {_printable(reason)}")


def _once(url: str, body: dict | None, timeout: float) -> Any:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := _key(url):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    end = time.monotonic() + timeout
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
        return json.loads(_read(answer, end))


def _read(answer: http.client.HTTPResponse, end: float) -> bytes:
    """The whole answer; a server that sends it in drops cannot draw it out beyond `end`."""
    text = b""
    while part := answer.read1(2**16):
        text += part
        if len(text) > LONGEST_ANSWER:
            raise ValueError(f"it is longer than {LONGEST_ANSWER} bytes")
        if time.monotonic() > end:
            raise TimeoutError("timed out in the middle of its answer")
    return text


def _start(error: urllib.error.HTTPError) -> str:
    try:
        return error.read1(300).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _printable(text: str) -> str:
    """In one line, without the control characters that could take over a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _key(url: str) -> str | None:
    parts = urlsplit(url)
    for entry in os.environ.get(KEYS, "").split(","):
        host, separator, key = entry.strip().partition("=")
        if separator and host in (parts.netloc, parts.hostname):
            return key
    return None


def number(value: Any) -> float:
    """A finite number of an answer, within the range of float32.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is no finite number")
    return float(value)


def to_png(images: Tensor, largest: int | None = None) -> list[str]:
    """`[B, 3, H, W]` in [0, 1] as PNG files in base64.

    Args:
        largest: larger images are made so small that their longest side has this many pixels.
    """
    files = []
    for picture in to_pil(images):
        if largest:
            picture.thumbnail((largest, largest))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        files.append(base64.b64encode(buffer.getvalue()).decode())
    return files
