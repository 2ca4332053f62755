"""State that every route shares: the folder of runs, the sessions and the served models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fastapi import HTTPException, Request

from .service import Service
from .sessions import Person, Sessions


@dataclass(frozen=True)
class AppState:
    """`AppState(Path("runs"), sessions, service)`; `service` may serve no model."""

    runs: Path
    sessions: Sessions
    service: Service

    @property
    def studio_folder(self) -> Path:
        """The folder of the studio's own files: conversations, drafts, votes."""
        return self.runs / ".studio"

    def model_names(self) -> list[str]:
        """Names of the served models, in the order of the command line."""
        return list(self.service.models)


def person(request: Request) -> Person | None:
    """The person of the request's session, None without a session."""
    return request.scope.get("person")


def signed_in(request: Request) -> Person:
    """The person of the request's session; without a session, a redirect to the page that asks for a name."""
    user = person(request)
    if user is None:
        raise HTTPException(303, headers={"location": f"/hello?next={quote(request.url.path)}"})
    return user
