"""The frame of every page, in a browser."""

from __future__ import annotations

from itertools import pairwise

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


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [390, 360])
def test_the_header_takes_one_line_on_a_phone(visit, house, language, width):
    """All its links are in sight beside one another, the name of a person may be cut."""
    with house() as url:
        page = visit(url + "/runs", language, name="Wilhelmina Featherstonehaugh", width=width)
        boxes = [link.bounding_box() for link in page.locator("header.bar :is(a, button):visible").all()]
        assert len(boxes) == 7
        middles = [box["y"] + box["height"] / 2 for box in boxes]
        assert max(middles) - min(middles) < 8
        ends = [(box["x"], box["x"] + box["width"]) for box in boxes]
        assert ends == sorted(ends) and ends[-1][1] <= width
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
        assert page.locator("header.bar").bounding_box()["height"] < 60
        accessible(page)
        picture(page, f"header-{language}-{width}")
        page.close()
