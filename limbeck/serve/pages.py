"""Pages: templates, the two languages, and what every page shares."""

from __future__ import annotations

import hashlib
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .markup import to_html

ROOM = Path(__file__).parent
LANGUAGES = ("en", "zh")
THEMES = ("auto", "light", "dark")


@cache
def words() -> dict[str, dict[str, str]]:
    """`"chat.send" -> {"en": "Send", "zh": "发送"}`, from every file in `words/`: the file's name is the first part."""
    return {
        f"{path.stem}.{key}": dict(zip(LANGUAGES, said, strict=True))
        for path in sorted((ROOM / "words").glob("*.yaml"))
        for key, said in yaml.safe_load(path.read_text(encoding="utf-8")).items()
    }


def say(language: str, key: str, **values: Any) -> str:
    """One phrase in one language; `{name}` in it is filled. Unknown keys raise KeyError: a page never shows a gap."""
    phrase = words()[key][language]
    return phrase.format(**values) if values else phrase


def language_of(request: Request) -> str:
    """`?lang=zh` first, then the browser's cookie, then what the browser prefers, then English."""
    wished = request.query_params.get("lang") or request.cookies.get("lang")
    if wished in LANGUAGES:
        return wished
    preferred = request.headers.get("accept-language", "")[:2].lower()
    return preferred if preferred in LANGUAGES else "en"


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """An HTML answer. Templates get `t` (phrases), `lang`, `person`, `path`, `static` and the values."""
    language = language_of(request)
    theme = request.cookies.get("theme")
    page = (
        _templates()
        .get_template(template)
        .render(
            t=partial(say, language),
            lang=language,
            person=request.scope.get("person"),
            path=request.url.path,
            static=_static,
            theme=theme if theme in THEMES else "auto",
            fragment="hx-request" in request.headers,
            **values,
        )
    )
    answer = HTMLResponse(page, status)
    if request.query_params.get("lang") == language:
        answer.set_cookie("lang", language, max_age=365 * 86400, samesite="strict")
    return answer


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ROOM / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = lambda text: Markup(to_html(text))
    return environment


@cache
def _static(name: str) -> str:
    """Where a file of `static/` is to be had; the address changes with its bytes, so that it can be cached for good."""
    return f"/static/{name}?v={hashlib.sha256((ROOM / 'static' / name).read_bytes()).hexdigest()[:12]}"
