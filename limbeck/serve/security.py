"""What stands between the network and every route: nothing behind it is reached without its leave.

One pure ASGI layer (a middleware that hides disconnects would keep abandoned requests at work): names that the server
answers to, origins that may change things, the key, and how long and how large a request may be.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import quote, urlsplit

from .sessions import COOKIE, Sessions

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN = ("/health", "/hello", "/static/")  # what anybody may see: that we live, the door, and its paint
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # `no-referrer` would hide our own origin from us
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """`Limits(body_bytes=1024)` answers 413 to anything longer than a kibibyte."""

    body_bytes: int = 8 << 20
    body_seconds: float = 20.0


class Guard:
    """The outermost layer. `key=None` asks for none, which only a server on loopback may do."""

    def __init__(
        self, app: App, hosts: frozenset[str], key: str | None, sessions: Sessions, limits: Limits = Limits()
    ):
        self.app, self.hosts, self.key = app, hosts, key
        self.sessions, self.limits = sessions, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks anything else
            return await send({"type": "websocket.close", "code": 1008})
        send = _dressed(send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        scope["person"] = self.sessions.read(_cookie(headers))
        refusal = self._refuse(scope, headers)
        if refusal is None:
            body = await self._body(headers, receive)
            if isinstance(body, bytes):
                return await self.app(scope, _replayed(body, receive), send)
            refusal = body
        await _answer(send, *refusal)

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, sentence and where to go instead; None lets the request pass."""
        if (
            _host(headers.get("host", "")) not in self.hosts
        ):  # a name that somebody pointed at us: DNS rebinding
            return 421, "this server does not go by that name; start it with --allow-host NAME", ""
        if scope["method"] not in SAFE and not _own(headers):
            return 403, "a request from another site may change nothing here", ""
        path = scope["path"]
        if self.key is None or path == OPEN[0] or path == OPEN[1] or path.startswith(OPEN[2]):
            return None
        if self._knows(headers, scope["person"]):
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return 303, "the key, please", f"/hello?next={quote(path)}"
        return 401, "a key is needed: send it as `Authorization: Bearer KEY`", ""

    def _knows(self, headers: dict[str, str], person: Any) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return hmac.compare_digest(token.strip().encode(), self.key.encode())
        return person is not None  # a session is opened with the key, and signed with it

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | tuple[int, str, str]:
        """The whole body, or why it was not waited for."""
        most, long = self.limits.body_bytes, (413, f"a request may have {self.limits.body_bytes} bytes", "")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            return long
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return 400, "the request ended before its body did", ""
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return long
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            return 408, f"the body took longer than {self.limits.body_seconds:.0f} seconds", ""


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _own(headers: dict[str, str]) -> bool:
    """Whether a page of ours, or no page at all, sent this."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def _cookie(headers: dict[str, str]) -> str:
    try:
        held = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return held[COOKIE].value if COOKIE in held else ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, and afterwards what really comes: the disconnect."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return replay


def _dressed(send: Send) -> Send:
    """A `send` whose answers carry the headers above, where a route has not set its own."""

    async def dress(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            have = {name.lower() for name, _ in message.get("headers", [])}
            more = [
                (name.encode(), value.encode())
                for name, value in HEADERS.items()
                if name.encode() not in have
            ]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return dress


async def _answer(send: Send, status: int, sentence: str, where: str) -> None:
    """A refusal, in the shape that clients of OpenAI's API read."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": sentence, "type": kind, "param": None, "code": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if where:
        headers.append((b"location", where.encode()))
    if status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
