"""Chat in a browser: one journey in each language, hostile text, and a thought of 64,000 tokens."""

from __future__ import annotations

import json
import re
import time

import pytest
from speaker import ANSWER, HOSTILE, THOUGHT, Stub, sums
from studio import accessible, picture

from limbeck.serve.pages import say

pytestmark = pytest.mark.slow

DONE = "[data-state=done]"


def write(page, text):
    page.locator(".composer > textarea").fill(text)
    page.keyboard.press("Enter")


def leave_the_pen(page):
    page.locator(".composer > textarea").press("Escape")
    assert page.evaluate("document.activeElement === document.body")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_conversation(visit, house, language):
    """Ask, follow, reload, stop, regenerate, edit, compare with another model, export, delete."""

    def t(key, **values):
        return say(language, f"chat.{key}", **values)

    service = Stub(sums)
    with house(service) as url:
        page = visit(url + "/chat", language)
        accessible(page)
        picture(page, f"chat-home-{language}")
        service.held = True
        write(page, "Which two numbers?")
        page.wait_for_url("**/chat/*")
        thought = page.locator(".answer .thought")
        page.locator(".answer[data-state=running] .thought[open] .flow", has_text="product").wait_for()
        picture(page, f"chat-thinking-{language}")
        page.reload()  # the answer goes on without us, and we come back to it
        twin = page.context.new_page()
        twin.goto(page.url)
        page.locator(".answer[data-state=running] .thought[open] .flow", has_text="product").wait_for()
        service.held = False
        for each in (page, twin):
            each.locator(f".answer{DONE}").wait_for()
            assert each.locator(".spoken math").count() == 1 and not each.locator(".thought").evaluate(
                "one => one.open"
            )
        twin.close()
        assert t("tokens", count=32) in thought.locator(".took").inner_text()
        leave_the_pen(page)
        page.keyboard.press("t")
        page.locator(".thought[open] math").wait_for()
        picture(page, f"chat-done-{language}")
        accessible(page)

        service.held = True
        write(page, "And with $x$?")
        second = page.locator(".turn").nth(1)
        second.locator(".answer[data-state=running]").wait_for()
        page.keyboard.press("Escape")
        second.locator(".answer[data-state=stopped]").wait_for()
        assert t("stopped") in second.inner_text() and service.open == 0

        service.held = False
        page.keyboard.press("Escape")
        page.keyboard.press("r")
        second.locator(f".answer{DONE}").wait_for()
        assert "2/2" in second.inner_text()
        second.get_by_role("button", name=t("variant_before")).click()
        second.locator(".answer[data-state=stopped]").wait_for()
        second.get_by_role("button", name=t("variant_after")).click()
        second.locator(f".answer{DONE}").wait_for()

        page.keyboard.press("e")  # a branch, from the second question on
        editor = second.locator(".edit textarea")
        assert editor.input_value() == "And with $x$?"
        editor.fill("And with y?")
        page.locator(".settings summary").click()
        page.get_by_label(t("beside")).select_option("small")
        page.get_by_label(t("temperature")).fill("1")
        page.get_by_label(t("budget")).fill("99")
        editor.press("Enter")
        second.locator(f".answer{DONE}").nth(1).wait_for()
        assert {one[0] for one in service.asked[-2:]} == {"r1", "small"} and service.asked[-1][2:] == (1, 99)
        assert service.asked[-1][1][1] == {
            "role": "assistant",
            "content": sums("r1", "Which two numbers?")[1],
        }
        assert (
            "(r1)" in second.inner_text()
            and "(small)" in second.inner_text()
            and "2/2" in second.inner_text()
        )
        page.set_viewport_size({"width": 1200, "height": 900})
        picture(page, f"chat-two-{language}")
        accessible(page)

        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        leave_the_pen(page)
        page.keyboard.press("c")
        page.get_by_text(say(language, "site.copied")).wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == sums("r1", "And with y?")[1]

        page.locator(".menu summary").first.click()
        with page.expect_download() as download:
            page.get_by_text(t("export_json")).click()
        taken = json.loads(download.value.path().read_text(encoding="utf-8"))
        assert [len(side["messages"]) for side in taken["sides"]] == [4, 4] and taken["sides"][1]["answers"][
            1
        ]["model"] == "small"
        page.get_by_label(t("title")).fill("Numbers")
        page.get_by_role("button", name=t("rename")).click()
        page.get_by_role("heading", name="Numbers", exact=True).wait_for()

        page.set_viewport_size({"width": 375, "height": 760})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        picture(page, f"chat-phone-{language}")
        accessible(page)
        page.locator(".menu summary").first.click()
        page.get_by_text(t("delete"), exact=True).click()
        page.get_by_role("button", name=t("delete_yes")).click()
        page.wait_for_url("**/chat")
        assert page.locator(".talks li").count() == 0
        page.close()  # before the server goes, which it asks now and then


def test_the_tags_around_an_answer_are_never_shown(visit, house):
    """Neither while it grows, cut inside a tag, nor at the end, where the answer is marked; what is not a tag
    stays."""
    text = "As 1 < 2 and a <an> b: <answer>5 - 1</answer>. Held here."
    watch = """() => {
      window.seen = new Set();
      const turns = document.querySelector(".turns");
      const look = () => seen.add(turns.textContent);
      new MutationObserver(look).observe(turns, { subtree: true, childList: true, characterData: true });
    }"""
    with house(Stub(lambda *_: ("", text), size=3, pause=0.08)) as url:
        page = visit(url + "/chat")
        write(page, "?")
        page.wait_for_url("**/chat/*")
        page.evaluate(watch)
        page.locator(f".answer{DONE} .final", has_text="5 - 1").wait_for()
        assert page.locator(".spoken").inner_text().strip() == "As 1 < 2 and a <an> b: 5 - 1. Held here."
        told = page.evaluate("[...window.seen]")
        assert len(told) > 5 and not any("answer>" in one or "<answer" in one for one in told)
        page.close()


def test_every_question_goes_with_the_settings(visit, house):
    """The next one, an edited one and another answer; they are there again on the conversation's page."""
    service = Stub(lambda *_: ("", "4"))
    with house(service) as url:
        page = visit(url + "/chat")
        page.locator(".settings summary").click()
        page.get_by_label("System prompt").fill("Be brief.\nBe kind.")
        page.get_by_label("Top-p").fill("0.5")
        page.get_by_label("Longest answer").fill("30")
        accessible(page)
        write(page, "2 and 2?")
        page.wait_for_url("**/chat/*")
        page.locator(f".answer{DONE}").wait_for()
        page.reload()
        page.locator(".settings summary").click()
        assert page.get_by_label("Top-p").input_value() == "0.5"
        assert page.get_by_label("Longest answer").input_value() == "30"
        field = page.get_by_label("System prompt")
        assert field.input_value() == "Be brief.\nBe kind."
        field.fill("Be long.")
        field.press("Enter")  # a line end, as in any text of several lines
        leave_the_pen(page)
        page.keyboard.press("r")
        page.locator(f".answer{DONE}", has_text="2/2").wait_for()
        page.close()
    systems = [asked[1][0] for asked in service.asked]
    assert systems == [{"role": "system", "content": text} for text in ("Be brief.\nBe kind.", "Be long.")]
    assert service.options == [{"top_p": 0.5, "max_tokens": 30}] * 2


def test_dark(visit, house):
    with house(Stub(sums)) as url:
        page = visit(url + "/chat", dark=True)
        write(page, "Which two numbers?")
        page.locator(f".answer{DONE}").wait_for()
        page.locator(".thought summary").click()
        picture(page, "chat-dark")
        accessible(page)
        page.close()


def test_nothing_runs(visit, house):
    """The corpus as question, title, thought and answer, while it grows and when it is done."""
    all_of_it = "\n\n".join(HOSTILE)
    with house(Stub(lambda *_: (all_of_it, all_of_it), pause=0.002, size=7)) as url:
        page = visit(url + "/chat")
        write(page, all_of_it.replace("\0", ""))
        page.locator(f".answer{DONE}").wait_for()
        page.locator(".thought summary").click()
        page.mouse.move(600, 400)
        page.reload()
        page.locator(".edit summary").click()
        page.locator(".menu summary").first.click()
        page.get_by_label("Title").fill(HOSTILE[7])
        page.get_by_role("button", name="Rename").click()
        page.get_by_role("heading", name="onerror").wait_for()
        page.goto(url + "/chat")
        page.locator(".talks a", has_text="onerror").click()
        page.locator(f".answer{DONE}").wait_for()
        assert (
            page.evaluate("window.harmed") is None
        )  # and the fixture has seen no violation and no request elsewhere
        assert page.locator("main :is(img, iframe, script, style, object, base), .spoken form").count() == 0
        page.close()


def test_a_thought_of_64k_tokens_freezes_nobody(visit, house):
    """The page's own processor time, so that a busy machine does not decide; and the page stays usable."""
    tokens = 64_000
    lines = ("Let $x_{%d}$ be **it**; then 2*3 = 6.\n\n", "endless " * 40 + "%d ", "- try <b>%d</b>\n")
    thought, number = "", 0
    while len(thought) < 4 * tokens:
        thought += lines[number // 200 % 3] % number
        number += 1
    thought = thought[: 4 * tokens]
    with house(
        Stub(lambda _, question: (thought, ANSWER) if question == "long" else (THOUGHT, ANSWER))
    ) as url:
        page = visit(url + "/chat")
        meter = page.context.new_cdp_session(page)
        meter.send("Performance.enable", {"timeDomain": "threadTicks"})

        def worked():
            return next(
                one["value"]
                for one in meter.send("Performance.getMetrics")["metrics"]
                if one["name"] == "TaskDuration"
            )

        def size():
            return page.evaluate("document.getElementsByTagName('*').length")

        write(page, "long")
        page.locator(".answer[data-state=running] .folded:visible").wait_for()
        before = worked()
        page.locator(".settings summary").click()  # a page that hangs would not open this
        page.get_by_label("Temperature").fill("0.7")
        # what is not rendered yet comes beside what is kept: how much depends on who is faster, page or model
        shown = "document.querySelector('.thought .flow').textContent.length"
        assert page.evaluate(shown) < len(thought) / 2 and size() < 8_000
        deadline = time.monotonic() + 30
        while page.evaluate(shown) >= 80_000:
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)
        page.locator(f".answer{DONE}").wait_for()
        busy = worked() - before
        print(f"{tokens} tokens: {busy:.2f} s of the page's processor time, {size()} elements at the end")
        assert busy < 15 and size() < 8_000
        assert "64,000 tokens" in page.locator(".thought .took").inner_text()

        page.locator(".thought summary").click()
        page.get_by_text("page 1 of").wait_for()
        page.get_by_role("link", name="Last page").click()
        page.get_by_text(re.compile(r"page (\d+) of \1")).wait_for()
        assert thought[-40:].split()[-1] in page.locator(".thought .flow").text_content()
        accessible(page)
        assert size() < 8_000
        page.close()
