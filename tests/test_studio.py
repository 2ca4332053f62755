"""The frame of every page, in a browser."""

from __future__ import annotations

import pytest
from studio import accessible, picture


@pytest.mark.parametrize(("language", "greeting"), [("en", "Who are you?"), ("zh", "您是哪位？")])
def test_the_door(visit, house, language, greeting):
    with house(key="sesame") as url:
        page = visit(url + "/hello?next=/hello", language, name=None)
        assert page.locator("h1").inner_text() == greeting
        accessible(page)
        page.get_by_role("textbox").first.fill("Mei")
        page.locator("input[type=password]").fill("sesame")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="Mei").wait_for()
        picture(page, f"door-{language}")
        page.locator("header form button").click()  # to the dark side, kept by the browser
        page.wait_for_selector("html[data-theme=dark]")
        accessible(page)
        page.locator("header [hreflang]").click()
        page.wait_for_selector(f"html[lang={'en' if language == 'zh' else 'zh'}]")
