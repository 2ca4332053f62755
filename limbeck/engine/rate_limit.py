"""Rate limiting of requests to an endpoint, by a rate that the recipe sets and by pauses that the endpoint
demands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

CHECK_INTERVAL = 0.2  # seconds between two calls of `stopping` while a request waits


class Stopped(Exception):
    """Raised in a waiting request that must not be sent any more, because the stage is stopping or another
    request has failed and will not be retried."""


class RateLimiter:
    """Spaces the starts of requests evenly, at most `per_minute` of them in a minute (None: no limit), and
    lets no request start during a pause. `stopping` returns True once waiting requests should be
    abandoned."""

    def __init__(self, per_minute: float | None, stopping: Callable[[], bool]):
        self.interval = 60 / per_minute if per_minute else 0.0  # seconds
        self.stopping = stopping
        self.lock = threading.Lock()
        self.next_start = 0.0  # seconds, monotonic

    def pause(self, seconds: float) -> None:
        """Let no request start for the next `seconds`; a longer pause that is already in force stays."""
        with self.lock:
            self.next_start = max(self.next_start, time.monotonic() + seconds)

    def wait(self) -> None:
        """Block until a request may start. Raises `Stopped` once `stopping()` returns True."""
        while True:
            if self.stopping():
                raise Stopped
            with self.lock:
                remaining = self.next_start - time.monotonic()
                if remaining <= 0:
                    self.next_start = time.monotonic() + self.interval
                    return
            time.sleep(min(remaining, CHECK_INTERVAL))


def retry_after(headers: Any) -> float | None:
    """Return the seconds that a `Retry-After` header demands, whether it holds a number or a date (RFC 9110,
    section 10.2.3); None if the header is absent or invalid."""
    value = headers.get("retry-after")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
