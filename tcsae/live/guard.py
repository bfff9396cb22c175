"""Who may ask the live view: this machine's own browser, with the token, in small requests.

A page from elsewhere can make a browser send requests here. It cannot read the token; a name that
it lets resolve to this machine shows in Host, and its own address in Origin.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 64 * 1024
"""Bytes of a request's body; no more are ever read."""
BODY_SECONDS = 20.0
"""In which the body must have come."""
_HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # The address has the token in it.
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
"""Of every answer, unless it has its own."""


class Guard:
    """An application behind /TOKEN/: everything else is refused, and nothing large is read.

    Args:
        app: sees paths without the token.
        token: the first part of every path.
    """

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a WebSocket: there is none here
            return await send({"type": "websocket.close", "code": 1008})
        headers = {name.lower(): value for name, value in scope["headers"]}
        _, _, path = scope["path"].partition("/")
        first, slash, rest = path.partition("/")
        if refused := self._foreign(headers, first) or (not slash and "not found"):
            return await _answer(send, 403, refused)
        if int_of(headers.get(b"content-length", b"0")) > LARGEST_BODY:
            return await _answer(send, 413, f"more than {LARGEST_BODY} bytes")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            return await _answer(send, 408, "the request did not come to its end")
        if body is None:
            return await _answer(send, 413, f"more than {LARGEST_BODY} bytes")
        inner = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode(), "root_path": ""}
        await self._app(inner, _again(body, receive), _with_headers(send))

    def _foreign(self, headers: MutableMapping[bytes, bytes], token: str) -> str:
        """Why the request is none of this page's; "": it is."""
        host = headers.get(b"host", b"").decode("latin-1")
        name, _, port = host.partition(":")
        if name not in _HOSTS or not (port.isdigit() or not port):
            return "this page is for 127.0.0.1 alone"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") != f"http://{host}":
            return "another page asks"
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self._token):
            return "the address lacks its token: open the one that `tcsae serve` printed"
        return ""


def int_of(text: bytes) -> int:
    """A header's number; what is none counts as too large."""
    return int(text) if text.isdigit() else LARGEST_BODY + 1


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None: it is longer than is read."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more."""
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return parts.pop() if parts else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in own]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return sent


async def _answer(send: Send, status: int, why: str) -> None:
    body = why.encode()
    own = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    sent = _with_headers(send)
    await sent({"type": "http.response.start", "status": status, "headers": own})
    await sent({"type": "http.response.body", "body": body})
