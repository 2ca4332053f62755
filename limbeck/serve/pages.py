"""HTML pages: templates, phrases in English and Chinese, and the values that every template gets."""

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

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "zh")
THEMES = ("auto", "light", "dark")
LANGUAGE_SECONDS = 365 * 86400  # seconds that the cookie of a chosen language lasts


@cache
def phrases() -> dict[str, dict[str, str]]:
    """Return all phrases by key and language: `"chat.send" -> {"en": "Send", "zh": "发送"}`.

    They are read from the YAML files in `words/`; a key begins with the name of its file.
    """
    table: dict[str, dict[str, str]] = {}
    for path in sorted((FOLDER / "words").glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, translations in content.items():
            table[f"{path.stem}.{key}"] = dict(zip(LANGUAGES, translations, strict=True))
    return table


def say(language: str, key: str, **values: Any) -> str:
    """Return the phrase of a key in one language, with each `{name}` replaced by the value of that name.

    Raises KeyError for an unknown key.
    """
    phrase = phrases()[key][language]
    return phrase.format(**values) if values else phrase


def language_of(request: Request) -> str:
    """Return the language of a request's page, "en" or "zh".

    It is taken from `?lang=`, else from the cookie, else from the browser's preference, and else is English.
    """
    chosen = request.query_params.get("lang") or request.cookies.get("lang")
    if chosen in LANGUAGES:
        return chosen
    preferred = request.headers.get("accept-language", "")[:2].lower()
    return preferred if preferred in LANGUAGES else "en"


def is_fragment(request: Request) -> bool:
    """True if htmx requests a part of a page, False if the browser requests a whole page."""
    return "hx-request" in request.headers


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a template to an HTML response.

    Templates get `t` (returns the phrase of a key), `lang`, `person`, `path`, `static` (returns the address
    of a static file), `theme`, `fragment` (True for a part of a page) and `values`.
    """
    language = language_of(request)
    theme = request.cookies.get("theme")
    shared = {
        "t": partial(say, language),
        "lang": language,
        "person": request.scope.get("person"),
        "path": request.url.path,
        "static": _static_address,
        "theme": theme if theme in THEMES else "auto",
        "fragment": is_fragment(request),
    }
    page = _templates().get_template(template).render(**shared, **values)
    response = HTMLResponse(page, status)
    if request.query_params.get("lang") == language:
        response.set_cookie("lang", language, max_age=LANGUAGE_SECONDS, samesite="strict")
    return response


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = lambda text: Markup(to_html(text))
    return environment


@cache
def _static_address(name: str) -> str:
    """Return the address of a file in `static/`.

    It contains a hash of the file's content, so browsers may cache the file without a time limit.
    """
    content = (FOLDER / "static" / name).read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"
