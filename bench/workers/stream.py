"""One stream of completions over a bare socket: what it costs to read must not weigh on what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field


@dataclass
class Heard:
    """Times of a request and of each event with text, in seconds of one clock; `error` if it failed."""

    asked: float
    events: list[float] = field(default_factory=list)
    error: str = ""
    ended: float = 0.0


async def listen(host: str, port: int, body: dict, path: str = "/v1/completions") -> Heard:
    """Ask and read to the end."""
    data = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    heard, done = Heard(time.monotonic()), False
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            heard.error = f"{status.decode().strip()} {(await reader.read()).decode(errors='replace')[-300:]}"
        async for line in reader:
            done = done or line.startswith(b"data: [DONE]")
            if line.startswith((b'data: {"error', b"error:")):
                heard.error = line.decode(errors="replace")
            elif line.startswith(b"data: {") and b'"text":""' not in line:
                heard.events.append(time.monotonic())
        heard.error = heard.error or ("" if done else "the stream broke off")
    finally:
        writer.close()
    heard.ended = time.monotonic()
    return heard
