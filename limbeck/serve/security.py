"""The guard between the network and every route: it checks host name, origin, key and size of a request.

It is a plain ASGI application around the other one. FastAPI's middleware would hide a client's disconnect
from the routes, so abandoned requests would run on.
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

from .sessions import COOKIE, Person, Sessions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PUBLIC_PATHS = ("/health", "/hello")  # open without the key, as is everything below /static/
STATIC_PATH = "/static/"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # `no-referrer` would hide the server's own origin from it
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """Limits on a request's body: its size in bytes, and the seconds until it has arrived.

    `Limits(body_bytes=1024)` refuses a body of more than 1024 bytes with HTTP status 413.
    """

    body_bytes: int = 8 << 20
    body_seconds: float = 20.0


@dataclass(frozen=True)
class Refusal:
    """The refusal of a request: its HTTP status and its message.

    `location` is the address to go to if the status is a redirect, else empty.
    """

    status: int
    message: str
    location: str = ""


class Guard:
    """The outermost ASGI application: it checks each request and passes it on to `app` or refuses it.

    `hosts` are the host names that requests may address. `key` is the key that clients must send; None
    requires no key, which is safe only for a server that listens on the loopback interface.
    """

    def __init__(
        self, app: App, hosts: frozenset[str], key: str | None, sessions: Sessions, limits: Limits = Limits()
    ):
        self.app = app
        self.hosts = hosts
        self.key = key
        self.sessions = sessions
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        send = _with_headers(send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        scope["person"] = self.sessions.read(_session_cookie(headers))
        refusal = self._check(scope, headers)
        if refusal is not None:
            return await _send_refusal(send, refusal)
        body = await self._read_body(headers, receive)
        if isinstance(body, Refusal):
            return await _send_refusal(send, body)
        return await self.app(scope, _replay(body, receive), send)

    def _check(self, scope: Scope, headers: dict[str, str]) -> Refusal | None:
        """Return the refusal of a request as judged by its method, path and headers; None if it may pass."""
        if _host_name(headers.get("host", "")) not in self.hosts:  # against DNS rebinding
            return Refusal(421, "this server does not go by that name; start it with --allow-host NAME")
        if scope["method"] not in SAFE_METHODS and not _same_origin(headers):
            return Refusal(403, "a request from another site may change nothing here")
        path = scope["path"]
        public = path in PUBLIC_PATHS or path.startswith(STATIC_PATH)
        if public or self._authenticated(headers, scope["person"]):
            return None
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            return Refusal(303, "the key, please", f"/hello?next={quote(path)}")
        return Refusal(401, "a key is needed: send it as `Authorization: Bearer KEY`")

    def _authenticated(self, headers: dict[str, str], person: Person | None) -> bool:
        """True if no key is required, the request has the key, or its session was opened with the key.

        `person` is the person of the request's session, None without a valid session.
        """
        if self.key is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return hmac.compare_digest(token.strip().encode(), self.key.encode())
        return person is not None  # the key salts the signature of the session's cookie

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes | Refusal:
        """Return the whole body, or the refusal of one that is too long, too slow or incomplete."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limits.body_bytes:
            return self._too_long()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                return await self._receive_body(receive)
        except TimeoutError:
            return Refusal(408, f"the body took longer than {self.limits.body_seconds:.0f} seconds")

    async def _receive_body(self, receive: Receive) -> bytes | Refusal:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return Refusal(400, "the request ended before its body did")
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self.limits.body_bytes:
                return self._too_long()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_long(self) -> Refusal:
        return Refusal(413, f"a request may have {self.limits.body_bytes} bytes")


def _host_name(header: str) -> str:
    """Return the name in a Host header in lower case, without the port; empty if it is malformed."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _same_origin(headers: dict[str, str]) -> bool:
    """True if the request was sent by a page of this server, or by a client that is no browser."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == headers.get("host", "").lower()


def _session_cookie(headers: dict[str, str]) -> str:
    """Return the value of the session's cookie; empty if the request has none."""
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns the body, which has been read already.

    Later calls return the messages that really follow, which is how a route learns of a disconnect.
    """
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if pending:
            return pending.pop()
        return await receive()

    return replay


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds `HEADERS` to every response.

    A header that the route sets takes precedence.
    """

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            for name, value in HEADERS.items():
                if name.encode() not in present:
                    headers.append((name.encode(), value.encode()))
            message = {**message, "headers": headers}
        await send(message)

    return send_with_headers


async def _send_refusal(send: Send, refusal: Refusal) -> None:
    """Send a refusal as a JSON object in the shape of OpenAI's errors."""
    kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
    code = {401: "invalid_api_key", 413: "request_too_large"}.get(refusal.status)
    error = {"message": refusal.message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.location:
        headers.append((b"location", refusal.location.encode()))
    if refusal.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
