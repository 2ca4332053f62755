"""What every page and route is given: where runs lie, which models are served, who may come in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException, Request

from .sessions import Person, Sessions


@dataclass(frozen=True)
class AppState:
    """`AppState(Path("runs"), sessions, service)`; `service` serves models and may have none."""

    runs: Path
    sessions: Sessions
    service: Any

    @property
    def desk(self) -> Path:
        """The folder of the studio's own files: conversations, drafts, votes."""
        return self.runs / ".studio"


def person(request: Request) -> Person | None:
    """Who asks, if they have said so."""
    return request.scope.get("person")


def asker(request: Request) -> Person:
    """Who asks; whoever has given no name is sent to the door first."""
    found = person(request)
    if found is None:
        raise HTTPException(303, headers={"location": f"/hello?next={quote(request.url.path)}"})
    return found
