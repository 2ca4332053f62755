"""A real browser before a real server: what every journey through the studio needs.

    def test_something(visit, house):
        with house(service) as url:
            page = visit(url + "/runs", language="zh")
            ...
            accessible(page)

A page that logs an error, breaks the content policy or asks another machine for anything fails its test.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import pytest

from limbeck.serve.app import build

CHROMIUM = os.environ.get("LIMBECK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 60_000  # milliseconds: the machine may have other work
PICTURES = os.environ.get("LIMBECK_PICTURES")  # a folder: `picture(page, name)` writes screenshots there


class NoModels:
    """A service that serves nothing."""

    models: Mapping[str, Any] = MappingProxyType({})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The application on a free port of loopback, in a thread; its address."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def house(tmp_path: Path) -> Callable[..., Any]:
    """`with house(service, key=None) as url`: a server over a folder of runs, by default an empty one."""
    return lambda service=None, runs=tmp_path, key=None: serving(build(runs, service or NoModels(), key))


@pytest.fixture(
    scope="module"
)  # while it lives, this thread has an event loop: `asyncio.run` has to wait for it
def chromium() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip(
            "no Chromium on this machine: "
            "install Debian's package `chromium`, or name one in LIMBECK_CHROMIUM"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`visit(url, language="en", name="Ada", width=1200, dark=False)`: a page of a browser of its own."""
    contexts, faults = [], []

    def open_page(
        url: str, language: str = "en", name: str | None = "Ada", width: int = 1200, dark: bool = False
    ) -> Any:
        context = chromium.new_context(
            locale={"en": "en-GB", "zh": "zh-CN"}[language],
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        home = "/".join(url.split("/")[:3])
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((home, "data:", "blob:"))
                else faults.append(f"asked {request.url}")
            ),
        )
        if name:
            context.request.post(f"{home}/hello", form={"name": name})
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults


def accessible(page: Any) -> None:
    """No finding of axe at the levels A and AA of WCAG 2."""
    from axe_playwright_python.sync_playwright import Axe

    found = (
        Axe()
        .run(
            page, options={"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
        )
        .response["violations"]
    )
    assert not found, [
        (one["id"], one["help"], [node["html"][:160] for node in one["nodes"]][:3]) for one in found
    ]


def picture(page: Any, name: str) -> None:
    """A screenshot of the whole page for people to look at, where one was wished for."""
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)
