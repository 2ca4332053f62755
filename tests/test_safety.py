"""The guard before every route: names, origins, keys, and how much and how long."""

from __future__ import annotations

import asyncio
from types import MappingProxyType

import httpx
import pytest
from served import routes

from limbeck.serve.app import build
from limbeck.serve.markup import finished_length, to_html
from limbeck.serve.security import Guard, Limits
from limbeck.serve.sessions import Sessions


class Nobody:
    """A service without models."""

    models = MappingProxyType({})

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass


def asked(app, *requests, **options):
    """Answers to `(method, path, options)` in turn, in one client."""

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost:8000", **options
        ) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


@pytest.fixture
def locked(tmp_path):
    return build(tmp_path, Nobody(), key="sesame", limits=Limits(body_bytes=1000, body_seconds=0.2))


def test_every_route_but_the_door_is_closed_without_a_key(locked):
    open_paths = {"/health", "/hello", "/static/{name:path}"}
    closed = [
        (m, r.path.replace("{", "").replace("}", ""), {})
        for r in routes(locked)
        if r.path not in open_paths
        for m in r.methods
    ]
    closed += [
        ("GET", "/nowhere", {}),
        ("GET", "/openapi.json", {}),
        ("POST", "/", {"headers": {"authorization": "Bearer wrong"}}),
    ]
    assert {answer.status_code for answer in asked(locked, *closed)} == {401}
    assert (
        asked(locked, ("GET", "/openapi.json", {"headers": {"authorization": "Bearer sesame"}}))[
            0
        ].status_code
        == 200
    )


def test_the_door_opens_to_the_key_and_leads_inside_only(locked):
    where, refused, entered = asked(
        locked,
        ("GET", "/runs/a", {"headers": {"accept": "text/html"}}),
        ("POST", "/hello", {"data": {"name": "Mei", "given": "please"}}),
        ("POST", "/hello", {"data": {"name": " Mei  Li ", "given": "sesame", "next": "//evil.example"}}),
    )
    assert (where.status_code, where.headers["location"]) == (303, "/hello?next=/runs/a")
    assert refused.status_code == 401
    assert entered.status_code == 303 and entered.headers["location"] == "/"
    assert "HttpOnly" in entered.headers["set-cookie"] and "SameSite=strict" in entered.headers["set-cookie"]
    cookies = {"limbeck": entered.cookies["limbeck"]}
    assert asked(locked, ("GET", "/openapi.json", {}), cookies=cookies)[0].status_code == 200


def test_a_session_ends_with_its_key(tmp_path):
    cookie = Sessions(tmp_path, "old").open("Mei")
    assert Sessions(tmp_path, "old").read(cookie).name == "Mei"
    assert Sessions(tmp_path, "new").read(cookie) is None
    assert Sessions(tmp_path, "old").read(cookie + "x") is None
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1", "169.254.0.1"]
)
def test_other_names_are_not_ours(tmp_path, host):
    app = build(tmp_path, Nobody())
    assert asked(app, ("GET", "/hello", {"headers": {"host": host}}))[0].status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://localhost:1"},
    ],
)
def test_other_sites_change_nothing(tmp_path, headers):
    app = build(tmp_path, Nobody())
    assert asked(app, ("POST", "/hello", {"headers": headers, "data": {"name": "x"}}))[0].status_code == 403
    own = {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}
    assert asked(app, ("POST", "/hello", {"headers": own, "data": {"name": "x"}}))[0].status_code == 303


def test_a_body_may_be_neither_long_nor_slow(locked):
    async def stream(pieces, pause):
        for piece in pieces:
            await asyncio.sleep(pause)
            yield piece

    key = {"authorization": "Bearer sesame"}
    declared, streamed = asked(
        locked,
        ("POST", "/hello", {"content": b"x" * 1001}),
        ("POST", "/hello", {"content": stream([b"x" * 600] * 2, 0), "headers": key}),
    )
    assert (declared.status_code, streamed.status_code) == (413, 413)
    assert declared.json()["error"].keys() == {"message", "type", "param", "code"}
    assert declared.json()["error"]["code"] == "request_too_large"
    assert asked(locked, ("POST", "/hello", {"content": stream([b"x"] * 5, 0.1)}))[0].status_code == 408


def test_the_body_arrives_whole_and_the_disconnect_after_it():
    heard = []

    async def inner(scope, receive, send):
        heard.extend([await receive(), await receive()])

    class Open:
        def read(self, cookie):
            return None

    coming = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"c"},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return coming.pop(0)

    async def send(message):
        pass

    guard = Guard(inner, frozenset({"localhost"}), None, Open())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))
    assert heard == [
        {"type": "http.request", "body": b"abc", "more_body": False},
        {"type": "http.disconnect"},
    ]


@pytest.mark.parametrize(
    "path",
    [
        "../app.py",
        "%2e%2e/app.py",
        "..%2fapp.py",
        "%2fetc%2fpasswd",
        "vendor/../../app.py",
        "a%00b",
        "..\\app.py",
    ],
)
def test_files_are_served_from_one_folder(tmp_path, path):
    app = build(tmp_path, Nobody())
    assert asked(app, ("GET", f"/static/{path}", {}))[0].status_code in (404, 422)
    assert asked(app, ("GET", "/static/studio.css", {}))[0].status_code == 200


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](data:text/html,<script>1</script>)",
    "![x](http://evil.example/leak.png)",
    "<svg onload=alert(1)>",
    "`<iframe src=javascript:alert(1)>`",
    "$\\href{javascript:alert(1)}{x}$",
    "<math><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    "```html\n<script>1</script>\n```",
    '<a href="x" onclick="alert(1)">x</a>',
    "$\\text{<script>alert(1)</script>}$",
    "<style>body{display:none}</style>",
    "<form action=/x><input name=y></form>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_can_do_nothing(text):
    from html.parser import HTMLParser

    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.append((tag, dict(attributes)))

    Reader().feed(to_html(text))
    assert not {tag for tag, _ in found} & {
        "script",
        "img",
        "svg",
        "iframe",
        "style",
        "form",
        "input",
        "object",
        "embed",
        "link",
        "meta",
        "base",
    }
    for _, attributes in found:
        assert not any(name.startswith("on") or name in ("src", "style", "xlink:href") for name in attributes)
        assert attributes.get("href", "https:").startswith(("http:", "https:", "mailto:"))


def test_formulas_become_mathml_and_bombs_stay_text():
    assert (
        "<mfrac>" in to_html("$\\frac{1}{2}$")
        and "<msup>" in to_html("\\(x^2\\)")
        and 'display="block"' in to_html("\\[x\\]")
    )
    assert "<math" not in to_html("$" + "{" * 500 + "}" * 500 + "$")
    assert "<code>" in to_html("$\\frac{$")


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\ntwo", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("```\na\n\nb", ""),
        ("$$\nx\n\ny\n$$\n\nz", "$$\nx\n\ny\n$$\n\n"),
        ("- a\n\n  b", ""),
        ("", ""),
    ],
)
def test_blocks_are_finished_when_nothing_can_change_them(text, done):
    assert text[: finished_length(text)] == done
