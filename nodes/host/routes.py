"""Routes under `/dancegrpo/` of ComfyUI's own server, for the panel and for headless clients.

A handler is a plain function of a `Call` that returns plain data, which is sent as JSON, or a `File`. It runs in a
thread, so the server goes on meanwhile. It takes names and never paths, and raises BadInput, which becomes status 400
with `{"error": "one sentence"}`. What changes something is a POST of JSON. A POST from a page of another origin is
refused, since a browser would send it with the user's rights.
"""

import asyncio
import functools
import json
import logging
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from ...trainer.utils.errors import BadInput

PREFIX = "/dancegrpo"
LARGEST_BODY = 1 << 20
"""Bytes of a POST."""
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_workers = ThreadPoolExecutor(max_workers=8, thread_name_prefix="dancegrpo")


@dataclass(frozen=True)
class File:
    """An answer that is not JSON.

    Attributes:
        content_type: fixed, whatever the content looks like.
        seconds: that a browser may keep it.
    """

    content: bytes
    content_type: str
    seconds: int = 0


@dataclass(frozen=True)
class Call:
    """A request, checked as far as all of them are.

    Attributes:
        names: the named parts of the path.
        fields: of the JSON body of a POST, or of the query of a GET.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def text(self, name: str, default: str | None = None) -> str:
        """
        Raises:
            BadInput: it is missing and has no default, or is not text.
        """
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise BadInput(f"{name} is missing" if value is None else f"{name} must be text")
        return value

    def choice(self, name: str, choices: Sequence[str], default: str | None = None) -> str:
        """
        Raises:
            BadInput: it is none of the choices, or missing and has no default.
        """
        value = self.text(name, default)
        if value not in choices:
            raise BadInput(f"{name} is {value[:80]!r}: choose one of {', '.join(choices)}")
        return value

    def number(self, name: str, low: int, high: int, default: int) -> int:
        """
        Raises:
            BadInput: it is not a whole number, or out of range.
        """
        value = self.fields.get(name, default)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BadInput(f"{name} must be a whole number from {low} to {high}")
        return value


Handler = Callable[[Call], Any]
_routes: list[tuple[str, str, Handler]] = []


def get(path: str) -> Callable[[Handler], Handler]:
    """Make a function the handler of GET requests of `/dancegrpo` + path; it must not change anything."""
    return functools.partial(_add, "GET", path)


def post(path: str) -> Callable[[Handler], Handler]:
    """Make a function the handler of POST requests of `/dancegrpo` + path."""
    return functools.partial(_add, "POST", path)


def _add(method: str, path: str, handler: Handler) -> Handler:
    _routes.append((method, PREFIX + path, handler))
    return handler


def register(routes: web.RouteTableDef) -> None:
    """Add the routes to ComfyUI's; it adds them under `/api` too."""
    for method, path, handler in _routes:
        routes.route(method, path)(functools.partial(_answer, handler))


# ------------------------------------------------------------------------------------------------------------ requests


async def _answer(handler: Handler, request: web.Request) -> web.Response:
    try:
        call = Call(dict(request.match_info), await _fields(request))
        result = await asyncio.get_running_loop().run_in_executor(_workers, handler, call)
    except Refused as error:
        return _json({"error": str(error)}, error.status)
    except BadInput as error:
        return _json({"error": str(error)}, 400)
    except Exception as error:
        logging.exception("DanceGRPO: %s %s failed", request.method, request.path)
        return _json({"error": f"{type(error).__name__}: {error}"}, 500)
    if isinstance(result, File):
        keep = {"Cache-Control": f"private, max-age={result.seconds}, immutable" if result.seconds else "no-store"}
        return web.Response(body=result.content, content_type=result.content_type, headers=SAFE | keep)
    return _json(result)


def _json(data: Any, status: int = 200) -> web.Response:
    headers = SAFE | {"Cache-Control": "no-store"}
    return web.json_response(data, status=status, headers=headers, dumps=functools.partial(json.dumps, allow_nan=False))


class Refused(Exception):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


async def _fields(request: web.Request) -> dict[str, Any]:
    """The query of a GET, or the JSON object of a POST.

    Raises:
        Refused: it comes from another origin, is not JSON, or is too large.
        BadInput: the JSON is not an object.
    """
    if request.method != "POST":
        return dict(request.query)
    if not same_origin(request.headers):
        raise Refused(403, "refused: the request comes from a page of another origin")
    if request.content_type != "application/json":
        raise Refused(415, "refused: the body must be JSON, with the content type application/json")
    body = await _body(request)
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise BadInput("the body is not JSON") from error
    if not isinstance(found, dict):
        raise BadInput("the body must be a JSON object")
    return found


async def _body(request: web.Request) -> bytes:
    """The body, which ComfyUI's own limit would let be as large as an upload."""
    content = b""
    while len(content) <= LARGEST_BODY:
        part = await request.content.read(LARGEST_BODY + 1 - len(content))
        if not part:
            return content
        content += part
    raise Refused(413, f"refused: the body is larger than {LARGEST_BODY} bytes")


def same_origin(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this server's own pages, or from a program that is not a browser.

    Browsers say so in Sec-Fetch-Site where the page is trustworthy (HTTPS or localhost), and name the page's origin in
    every POST. Other programs send neither.
    """
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is None or urllib.parse.urlsplit(origin).netloc.lower() == headers.get("Host", "").lower() != ""
