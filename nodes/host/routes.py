"""HTTP routes of this pack on ComfyUI's server, `/dancegrpo/...`. They take names, never paths."""

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from ...trainer.utils.errors import BadInput, RunFailed

PREFIX = "/dancegrpo"
LARGEST_BODY = 1_000_000
"""Largest request body in bytes. Images are imported by folder name, so no body contains image data."""

Body = dict | None
Handler = Callable[[web.Request, Body], dict | web.StreamResponse]
"""Handles a request in a thread, outside the event loop. The body is None for GET; a dict is sent as JSON."""


class Routes:
    """Registers handlers: they run in a thread, answer with JSON, and report errors in one sentence.

    Args:
        table: ComfyUI's own route table.
    """

    def __init__(self, table: web.RouteTableDef) -> None:
        self.table = table

    def get(self, path: str, handler: Handler) -> None:
        """Answer GET requests below `/dancegrpo`."""
        self.table.get(PREFIX + path)(_answering(handler, reads_body=False))

    def post(self, path: str, handler: Handler) -> None:
        """Answer POST requests below `/dancegrpo`: JSON bodies from this server's own pages or from programs."""
        self.table.post(PREFIX + path)(_answering(handler, reads_body=True))


def number(request: web.Request, name: str) -> int:
    """A non-negative integer of the query; 0 if it is absent.

    Raises:
        BadInput: it is not one.
    """
    text = request.query.get(name, "0")
    if not text.isascii() or not text.isdecimal() or len(text) > int(math.log10(2**53)):
        raise BadInput(f"{name} is {text[:40]!r}: it must be a whole number, 0 or more")
    return int(text)


def _answering(handler: Handler, reads_body: bool) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            body = await _body(request) if reads_body else None
            result = await asyncio.to_thread(handler, request, body)
        except (BadInput, RunFailed) as error:
            return web.json_response({"error": str(error)}, status=400)
        except OSError as error:
            reason = error.strerror or str(error)
            return web.json_response({"error": f"a file could not be read or written: {reason}"}, status=500)
        except Exception:
            logging.exception("DanceGRPO: %s %s failed", request.method, request.path)
            return web.json_response({"error": "this request failed; see ComfyUI's log"}, status=500)
        if isinstance(result, dict):
            return web.json_response(result, headers={"Cache-Control": "no-store"})
        return result

    return answer


async def _body(request: web.Request) -> dict:
    """The JSON object of a request that may change something.

    Raises:
        BadInput: it comes from a page of another origin, is too large, or is not a JSON object.
    """
    _refuse_other_sites(request)
    if request.content_type != "application/json":
        raise BadInput("send JSON, with Content-Type application/json")
    raw = bytearray()
    async for piece in request.content.iter_any():  # `read(n)` would return the first piece alone
        raw += piece
        if len(raw) > LARGEST_BODY:
            raise BadInput(f"the request is larger than {LARGEST_BODY} bytes")
    try:
        body = json.loads(raw or b"{}")
    except (ValueError, RecursionError) as error:
        raise BadInput("the request is not JSON") from error
    if not isinstance(body, dict):
        raise BadInput("the request is not a JSON object")
    return body


def _refuse_other_sites(request: web.Request) -> None:
    """Refuse cross-site requests of browsers. Other programs send neither of these headers."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        raise BadInput("requests from pages of other sites are refused")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
        raise BadInput("requests from pages of other sites are refused")
