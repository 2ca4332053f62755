"""The state that all routes share: the folder of runs, the sessions of people, and the served models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fastapi import HTTPException, Request

from .service import Service
from .sessions import Person, Sessions


@dataclass(frozen=True)
class AppState:
    """The folder of runs, the signer of session cookies, and the service over the served models.

    `AppState(Path("runs"), sessions, service)`; the service may have no model at all.
    """

    runs: Path
    sessions: Sessions
    service: Service

    @property
    def studio_folder(self) -> Path:
        """The folder of the studio's own files: conversations, review drafts and arena votes."""
        return self.runs / ".studio"

    def model_names(self) -> list[str]:
        """Return the names of the served models, in the order of the command line."""
        return list(self.service.models)


def person(request: Request) -> Person | None:
    """Return the person of the request's session, None without a session."""
    return request.scope.get("person")


def signed_in(request: Request) -> Person:
    """Return the person of the request's session.

    Without a session, raises an HTTPException that redirects to the page that asks for a name.
    """
    user = person(request)
    if user is None:
        raise HTTPException(303, headers={"location": f"/hello?next={quote(request.url.path)}"})
    return user
