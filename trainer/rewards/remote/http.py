"""HTTP requests with JSON in both directions, a timeout, and retries; failures raise instead of returning a default.

API keys are read only from the environment variable `DANCEGRPO_KEYS`, as `host=key` or `host:port=key`, separated by
commas. Each key is sent only to its host, so a workflow cannot send it elsewhere.
"""

import asyncio
import base64
import contextlib
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ...utils.errors import BadInput, RunFailed
from ...utils.media import png
from ..preprocess import to_pil

if TYPE_CHECKING:
    import aiohttp

KEYS = "DANCEGRPO_KEYS"
LONGEST_ANSWER = 16 * 2**20
LARGEST = torch.finfo(torch.float32).max
PAUSE = 1.0
"""Seconds before the second attempt; doubled for each further attempt."""
LOOK = 0.1
"""Seconds between calls of the interrupt callback."""

Body = dict[str, Any] | Callable[[int], dict[str, Any]] | None
"""JSON data to send, or a function of the number of invalid answers so far that returns it; None for GET."""

_interrupt: ContextVar[Callable[[], object] | None] = ContextVar("interrupt", default=None)


class Unusable(RunFailed):
    """The server answered, but its answer is invalid."""


class Refused(RunFailed):
    """The server refused the request (status 4xx)."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class RetryPolicy:
    """Timeout and retries of a request.

    Attributes:
        timeout: seconds for one attempt, from connecting to the end of the answer.
        retries: further attempts if there is no valid answer.
    """

    timeout: float
    retries: int


@contextlib.contextmanager
def interruptible(callback: Callable[[], object]) -> Iterator[None]:
    """Call `callback` every 0.1 seconds while waiting for an answer; if it raises, the waiting ends."""
    token = _interrupt.set(callback)
    try:
        yield
    finally:
        _interrupt.reset(token)


def check_url(url: str, reward: str) -> None:
    """Raise BadInput unless `url` is a valid http or https address."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and len(url) <= 2048
    except ValueError:  # a port that is not a number, a bracket that is not closed
        usable = False
    if not usable or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise BadInput(
            f"reward {reward!r}: url is {url[:100]!r}: give the address of its server, such as http://localhost:8100"
        )
    if parts.username or parts.password:
        raise BadInput(
            f"reward {reward!r}: url contains a user name or password: give keys in the variable {KEYS} instead"
        )


def ask(url: str, body: Body, retry_policy: RetryPolicy, check: Callable[[Any], Any]) -> Any:
    """Send a request and return the checked answer.

    Args:
        check: validates the decoded answer and returns the result; raises ValueError, KeyError, TypeError, IndexError
            or AttributeError if the answer is invalid.

    Raises:
        Unusable: the last attempt got an invalid answer.
        Refused: the server answered 4xx (other than 408 and 429), which is not retried.
        RunFailed: the server is unreachable, busy or too slow, or is not an HTTP server.
    """
    (answer,) = ask_all(url, [body], retry_policy, check, parallel=1)
    if isinstance(answer, RunFailed):
        raise answer
    return answer


def ask_all(
    url: str, bodies: Sequence[Body], retry_policy: RetryPolicy, check: Callable[[Any], Any], parallel: int
) -> list[Any]:
    """Send several requests and return the checked answers in order; `Unusable` or `Refused` for failed requests.

    Args:
        parallel: number of concurrent requests.

    Raises:
        RunFailed: the server is unreachable, busy or too slow, or is not an HTTP server.
    """
    return _wait_for(_ask_all(url, bodies, retry_policy, check, parallel))


def _wait_for(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Run a coroutine while polling the interrupt callback.

    It runs in its own thread and event loop, because ComfyUI already runs nodes inside an event loop.
    """
    loop, done, interrupt = asyncio.new_event_loop(), threading.Event(), _interrupt.get()
    task = loop.create_task(work)

    def serve() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
        finally:
            loop.close()
            done.set()

    threading.Thread(target=serve, daemon=True, name="asking a server").start()
    try:
        while not done.wait(LOOK):
            if interrupt is not None:
                interrupt()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the loop has just been closed
            loop.call_soon_threadsafe(task.cancel)
        done.wait(1.0)
        raise
    return task.result()


async def _ask_all(
    url: str, bodies: Sequence[Body], retry_policy: RetryPolicy, check: Callable[[Any], Any], parallel: int
) -> list[Any]:
    import aiohttp

    limit = asyncio.Semaphore(parallel)
    connector = aiohttp.TCPConnector(limit=0)
    jar = aiohttp.DummyCookieJar()
    async with aiohttp.ClientSession(connector=connector, cookie_jar=jar, auto_decompress=False) as session:

        async def one(body: Body) -> Any:
            async with limit:
                return await _ask(session, url, body, retry_policy, check)

        tasks = [asyncio.ensure_future(one(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(
    session: "aiohttp.ClientSession", url: str, body: Body, retry_policy: RetryPolicy, check: Callable[[Any], Any]
) -> Any:
    """The checked answer, `Refused`, or `Unusable` if the last attempt got an invalid answer."""
    unusable, reason = 0, None
    for attempt in range(retry_policy.retries + 1):
        if attempt and not isinstance(reason, Unusable):
            await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            text = await _once(session, url, body(unusable) if callable(body) else body, retry_policy.timeout)
            return _checked(url, text, check)
        except Refused as error:
            return error
        except Unusable as error:
            unusable, reason = unusable + 1, error
        except RunFailed as error:
            reason = error
    if isinstance(reason, Unusable):
        return reason
    raise reason


async def _once(session: "aiohttp.ClientSession", url: str, body: dict[str, Any] | None, timeout: float) -> bytes:
    """One attempt; returns the body of the answer.

    Raises:
        Refused, RunFailed
    """
    import aiohttp

    try:
        async with session.request(
            "GET" if body is None else "POST",
            url,
            data=None if body is None else json.dumps(body).encode(),
            headers=_headers(url),
            allow_redirects=False,
            proxy=_proxy(url),
            timeout=aiohttp.ClientTimeout(total=timeout),
        ) as answer:
            text = await _read(answer)
    except asyncio.TimeoutError as error:
        raise _failed(url, f"gave no complete answer within {timeout:g} s") from error
    except aiohttp.ServerDisconnectedError as error:
        raise _failed(url, "closed the connection without an answer") from error
    except aiohttp.ClientPayloadError as error:
        raise _failed(url, f"cut its answer short: {error}") from error
    except aiohttp.ClientResponseError as error:
        raise _failed(url, f"did not answer with valid HTTP: {error.message}") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise _failed(url, f"cannot be reached: {error}") from error
    if answer.status < 300:
        return text
    reason = f"answered {answer.status} {answer.reason}: {text[:300].decode(errors='replace')}"
    if answer.status >= 500 or answer.status in (408, 429):
        raise _failed(url, reason)
    raise Refused(answer.status, str(_failed(url, reason)))


def _headers(url: str) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    if key := _key(url):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _proxy(url: str) -> str | None:
    """The proxy of the environment (`http_proxy`, `no_proxy`, ...), if there is one for this address."""
    parts = urlsplit(url)
    return None if urllib.request.proxy_bypass(parts.netloc) else urllib.request.getproxies().get(parts.scheme)


async def _read(answer: "aiohttp.ClientResponse") -> bytes:
    text = bytearray()
    async for part in answer.content.iter_any():
        text += part
        if len(text) > LONGEST_ANSWER:
            raise _failed(str(answer.url), f"gave an answer of more than {LONGEST_ANSWER} bytes")
    return bytes(text)


def _checked(url: str, text: bytes, check: Callable[[Any], Any]) -> Any:
    try:
        return check(json.loads(text))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"gave an answer in an unexpected format ({type(error).__name__}: {error})"
    except ValueError as error:
        reason = f"gave an invalid answer: {error}"
    except RecursionError:
        reason = "gave an invalid answer: it is nested too deeply"
    raise Unusable(str(_failed(url, reason)))


def _failed(url: str, reason: str) -> RunFailed:
    return RunFailed(f"the server {url} {_printable(reason)}")


def _printable(text: str) -> str:
    """A text in one line of at most 500 characters, without control characters that could affect a terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:500]


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
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{str(value)[:40]!r} is not a finite number")
    return float(value)


def to_png(images: Tensor, largest: int | None = None) -> list[str]:
    """`[B, 3, H, W]` in [0, 1] as PNG files in base64.

    Args:
        largest: larger images are scaled down to this longest side in pixels.
    """
    small = to_pil(images)
    for image in small:
        if largest:
            image.thumbnail((largest, largest))
    return [base64.b64encode(png(image)).decode() for image in small]
