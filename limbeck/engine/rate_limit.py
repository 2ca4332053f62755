"""How fast an endpoint may be asked: a rate of our own, and the quiet that it asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

TICK = 0.2  # seconds between two looks at whether to stop


class Stopped(Exception):
    """Somebody asked to stop, or another request has failed for good."""


class Pace:
    """Starts of requests, evenly spaced, and none while the endpoint wants quiet."""

    def __init__(self, per_minute: float | None, stopping: Callable[[], bool]):
        self.gap = 60 / per_minute if per_minute else 0.0
        self.stopping, self.lock, self.next = stopping, threading.Lock(), 0.0

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long."""
        with self.lock:
            self.next = max(self.next, time.monotonic() + seconds)

    def wait(self) -> None:
        """Until it is this caller's turn; raises `Stopped`."""
        while True:
            if self.stopping():
                raise Stopped
            with self.lock:
                left = self.next - time.monotonic()
                if left <= 0:
                    self.next = time.monotonic() + self.gap
                    return
            time.sleep(min(left, TICK))


def retry_after(headers: Any) -> float | None:
    """Seconds that the endpoint asks to wait: a number of them, or a date (RFC 9110, section 10.2.3)."""
    given = headers.get("retry-after")
    try:
        return max(0.0, float(given))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
