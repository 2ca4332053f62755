"""Conversations without a browser: branches, prompts of models, storage, and events of a page."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from served import QUESTION, save, server, slowly, soon
from speaker import HOSTILE, Stub, sums
from studio import serving

from limbeck.serve.app import build
from limbeck.serve.chat_replies import Replies
from limbeck.serve.conversations import Conversations, Meter, Settings
from limbeck.serve.markdown_stream import MAX_BLOCK, MAX_PAGE, MarkdownStream, render_page, split_pages
from limbeck.serve.sessions import Sessions
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

ONE, BOTH = Settings(("r1",)), Settings(("r1", "small"))


@pytest.fixture
def store(tmp_path):
    return Conversations(tmp_path / "chats.db")


def said(store, name, parent, text, with_=ONE):
    """A turn whose answers are done: `a` and the question."""
    numbers = store.ask(name, parent, text, with_)
    for number in numbers:
        store.save(number, "", f"a {text}", Meter(), "done")
    return store.read(name).turns[-1]


def view(store, name):
    return [(turn.content, *(answer.content for answer in turn.answers)) for turn in store.read(name).turns]


def test_an_edited_question_begins_a_branch_and_the_old_one_waits(store):
    name = store.start("Ada", ONE)
    first = said(store, name, None, "one")
    second = said(store, name, first.id, "two")
    said(store, name, second.id, "three")
    store.save(*store.edit(name, second.id, "deux", ONE), "", "a deux", Meter(), "done")
    assert view(store, name) == [("one", "a one"), ("deux", "a deux")]
    assert len(store.read(name).turns[1].variants) == 2
    store.show(name, turn=second.id)
    assert view(store, name) == [("one", "a one"), ("two", "a two"), ("three", "a three")]


def test_what_followed_a_variant_stays_with_it(store):
    name = store.start("", ONE)
    first = said(store, name, None, "one")
    said(store, name, first.id, "two")
    again = store.regenerate(name, first.answers[0], ONE)
    store.save(again, "", "b one", Meter(), "done")
    assert view(store, name) == [("one", "b one")]
    store.show(name, answer=first.answers[0].id)
    assert view(store, name) == [("one", "a one"), ("two", "a two")]
    third = store.edit(name, first.id, "eins", ONE)
    assert store.messages(third[0]) == [{"role": "user", "content": "eins"}]


def test_each_side_is_asked_with_its_own_history(store):
    name = store.start("", ONE)
    first = said(store, name, None, "one")
    numbers = store.ask(
        name, first.id, "two", BOTH
    )  # the second model joins later: it is told what the first one said
    store.save(numbers[0], "hm", "left", Meter(), "done")
    store.save(numbers[1], "hm", "right", Meter(), "done")
    numbers = store.ask(name, store.read(name).turns[-1].id, "three", BOTH)
    assert [[one["content"] for one in store.messages(number)] for number in numbers] == [
        ["one", "a one", "two", "left", "three"],
        ["one", "a one", "two", "right", "three"],
    ]
    assert not any("reasoning_content" in one for one in store.messages(numbers[0]))


def test_lists_are_ones_own(store):
    for owner in ("Ada", "Mei", ""):
        said(store, store.start(owner, ONE), None, f"of {owner}")
    assert [one.owner for one in store.recent("Ada")] == ["", "Ada"]
    assert [one.owner for one in store.recent("Ada", before=store.recent("Ada")[0].changed)] == ["Ada"]
    assert store.read("nobody's") is None and store.version("nobody's") is None


TEXTS = st.lists(
    st.sampled_from(
        [
            "a",
            "word ",
            "\n",
            "\n\n",
            "```",
            "```\n",
            "$$",
            "$x$",
            "- a\n",
            "    ",
            "\\[",
            "\\]",
            "*b*",
            "<b>",
            "# t\n",
            "汉字",
            "~~~\n",
        ]
    ),
    max_size=60,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.integers(1, 7))
def test_however_a_text_comes_it_is_shown_whole(text, size):
    """Blocks and tail together are the text, at every moment, and a block once shown is never taken back."""
    stream, before = MarkdownStream(), []
    left = text
    for at in range(0, len(text), size):
        stream.add(text[at : at + size])
        blocks, _, length = found = stream.render()
        assert (length > 0) == stream.ready() == bool(blocks)
        left = left[length:]
        stream.commit(found)
        assert stream.blocks[: len(before)] == before
        assert left.startswith(stream.tail) and text[: at + size].endswith(stream.tail)
        before = list(stream.blocks)
    assert stream.render(everything=True)[2] == len(stream.tail)


@settings(max_examples=50, deadline=None)
@given(TEXTS, st.integers(1, 2000))
@example("aaword - a\n```aword word word word ", 1370)
def test_pages_lose_nothing(text, times):
    long = (text * times)[: 4 * MAX_PAGE]
    found = split_pages(long)
    assert all(len(page) <= MAX_PAGE + 100 for page in found)
    ends = {
        0
    }  # where the pages so far may end: a line that opens code again may look like the text that follows
    for page in found:
        starts = (0, len(page.partition("\n")[0]) + 1)
        ends = {
            end + len(page) - start
            for end in ends
            for start in starts
            if long[end : end + len(page) - start] == page[start:]
        }
    assert len(long) in ends


def test_code_that_a_page_cuts_goes_on_as_code():
    long = "Before.\n\n```python\n" + "# a comment\n\nx = 1\n\n" * 3000 + "```\n\nAfter *all*."
    found = [render_page(page) for page in split_pages(long)]
    assert len(found) > 2 and not any("<h1>" in page for page in found)
    assert "<em>all</em>" in found[-1] and "Before" in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * MAX_BLOCK,
        "![" * MAX_BLOCK,
        "*a **a " * MAX_BLOCK,
        "> " * MAX_BLOCK,
        "$a$ " * MAX_BLOCK,
        "- a\n" * MAX_BLOCK,
    ],
)
def test_hostile_length_costs_little(text):
    """Each of these takes Markdown seconds or minutes in one piece."""
    before = time.process_time()
    assert render_page(split_pages(text)[0])
    assert time.process_time() - before < 60


def followed(tmp_path, script, act, **stub):
    """The events of one answer while `act(replies, name, number)` goes on, and the store."""
    store, service = Conversations(tmp_path / "chats.db"), Stub(script, **stub)
    events = []

    async def go():
        replies = Replies(store, service)
        name = store.start("", ONE)
        (number,) = store.ask(name, None, "?", ONE)
        replies.begin(name, number, "r1", Settings(("r1",), 0.7, 100))

        async def listen():
            async for event in replies.follow(name):
                events.append(json.loads(json.dumps(event, default=vars)))

        await asyncio.gather(listen(), act(replies, name, number))
        assert not replies.running(name)
        return store.answer(number)[1]

    return asyncio.run(go()), events, service


async def wait(replies, name, number):
    pass


def heard(events, part):
    """What a page shows that takes every event."""
    blocks = tail = ""
    for growth in (event["parts"][part] for event in events if part in event.get("parts", {})):
        blocks = growth["html"] if growth["fresh"] else blocks + growth["html"]
        tail = tail[: growth["at"]] + growth["tail"] if not growth["html"] or growth["at"] else growth["tail"]
    return blocks, tail


def test_a_follower_hears_everything_and_the_end(tmp_path):
    answer, events, service = followed(tmp_path, sums, wait, pause=0.004)
    thought, content = sums("r1", "?")
    assert (answer.state, answer.thought, answer.content) == ("done", thought, content)
    assert events[-1] == {"answer": answer.id, "ended": True} and len(events) > 2
    blocks, tail = heard(events, "thought")
    assert "<math" in blocks and thought.endswith(tail)
    assert (
        answer.meter.thought_tokens == -(-len(thought) // 4)
        and answer.meter.seconds >= answer.meter.thought_seconds > 0
    )
    assert service.asked == [("r1", [{"role": "user", "content": "?"}], 0.7, 100)]


def test_an_answer_without_a_thought_shows_none(tmp_path):
    answer, events, _ = followed(tmp_path, lambda *_: ("", "at once"), wait, pause=0.1)
    assert (answer.thought, answer.content) == ("", "at once") and heard(events, "answer") == ("", "at once")
    assert not any("thought" in event.get("parts", {}) for event in events)


def test_whoever_comes_late_gets_the_end_of_a_long_thought(tmp_path):
    long = "".join(f"Line {i} of this thought.\n\n" for i in range(20_000))

    async def come_late(replies, name, number):
        while sum(map(len, replies.running(name)[0].streams["thought"].blocks)) < 4 * MAX_PAGE:
            await asyncio.sleep(0.02)
        late = await anext(replies.follow(name))
        growth = late["parts"]["thought"]
        assert growth["fresh"] and growth["folded"] and MAX_PAGE <= len(growth["html"]) < 2 * MAX_PAGE
        await replies.stop(name)

    answer, _, service = followed(tmp_path, lambda *_: (long, ""), come_late, pause=0.0001, size=200)
    assert (
        answer.state == "stopped" and long.startswith(answer.thought) and len(answer.thought) > 2 * MAX_PAGE
    )
    assert service.open == 0  # its seat is free


def test_a_refusal_is_said_and_a_fault_is_not_hidden(tmp_path):
    def refuse(*_):
        raise LimbeckError("the model is full; try again in 3 seconds")

    answer, _, _ = followed(tmp_path, refuse, wait)
    assert (answer.state, answer.why) == ("failed", "the model is full; try again in 3 seconds")


def test_the_page_may_go_the_answer_goes_on(tmp_path):
    """Also: whose it is, what is refused, and what may be fetched by whom."""
    service = Stub(sums, pause=0.01)
    with (
        serving(build(tmp_path, service)) as url,
        httpx.Client(base_url=url) as ada,
        httpx.Client(base_url=url) as mei,
    ):
        for client, name in ((ada, "Ada"), (mei, "Mei")):
            client.cookies.set("limbeck", Sessions(tmp_path / ".studio", None).open(name))
        begun = ada.post(
            "/chat", data={"text": "2 and 3?\r\nplease", "model": "r1", "temperature": "0.3", "budget": ""}
        )
        place = begun.headers["location"]
        assert begun.status_code == 303
        for what in ("say", "edit", "again"):  # one thing after the other
            assert ada.post(f"{place}/{what}", data={"text": "x", "turn": 1, "answer": 1}).status_code == 409
        while 'data-state="running"' in ada.get(place).text:
            time.sleep(0.1)
        assert service.asked == [("r1", [{"role": "user", "content": "2 and 3?\nplease"}], 0.3, None)]
        assert "<math" in mei.get(place).text and 'action="' + place not in mei.get(place).text.replace(
            "/show", ""
        )
        for what in ("say", "edit", "again", "show", "stop", "rename", "delete"):
            assert (
                mei.post(
                    f"{place}/{what}", data={"text": "x", "title": "x", "turn": 1, "answer": 1}
                ).status_code
                == 403
            )
        other = ada.post("/chat", data={"text": "other", "model": "r1"}).headers["location"]
        assert ada.get(f"{other}/answers/1").status_code == 404  # another conversation's
        assert ada.post("/chat", data={"text": "x", "model": "r2"}).status_code == 400
        assert ada.post("/chat", data={"text": "", "model": "r1"}).status_code == 422
        for huge in (2**63, -1):
            assert (
                ada.get(f"{place}/answers/{huge}").status_code
                == ada.post(f"{place}/show", data={"turn": 2**63}).status_code
                == 422
            )
        assert [len(client.get("/chat").text.split('href="/chat/')) - 1 for client in (ada, mei)] == [2, 0]
        exported = ada.get(f"{place}/export.json").json()
        assert [one["role"] for one in exported["sides"][0]["messages"]] == ["user", "assistant"]
        assert exported["sides"][0]["answers"][0]["temperature"] == 0.3
        assert sums("r1", "2 and 3?\nplease")[1] in ada.get(f"{place}/export.md").text
        assert ada.post(f"{place}/delete").status_code == 303 and ada.get(place).status_code == 404


def test_real_models_answer_are_stopped_and_refuse(tmp_path, tokenizer):
    """The service itself, over two tiny random models of one row each and one place in the line."""
    plain, thinker = save(tmp_path / "plain", tokenizer), save(tmp_path / "thinker", tokenizer, opens=True)
    with server(
        tmp_path,
        f"plain={plain}",
        f"thinker={thinker}",
        rows=1,
        waiting=1,
        max_tokens=600,
        prices=["thinker=10/20"],
    ) as found:
        one = found.service.models["plain"]
        with httpx.Client(base_url=found.url, headers=found.headers, timeout=60) as client:

            def ask(**form):
                return client.post("/chat", data={"text": QUESTION, **form}).headers["location"]

            def ended(place):
                soon(lambda: 'data-state="running"' not in client.get(place).text, 60)
                return client.get(f"{place}/export.json").json()["sides"]

            left, right = ended(
                ask(model="plain", beside="thinker", budget="6", temperature="0")
            )  # greedy: the same each time
            assert [side["answers"][0]["model"] for side in (left, right)] == ["plain", "thinker"]
            told = right["answers"][0]
            assert (
                told["thought_tokens"] == 7 and told["tokens"] > 7 and told["cost"] > 0
            )  # the budget, and the tag that ends it
            thought = right["messages"][1]["reasoning_content"]
            assert len(thought.split()) == 6 and "think>" not in thought
            with slowly(found.service, "plain", 0.05):
                long = ask(model="plain")
                soon(lambda: one.busy == 1, 30)
                waiting = ask(model="plain")
                soon(lambda: one.waiting == 1, 30)
                refused = ask(model="plain")
                assert (
                    ended(refused)[0]["answers"][0]["state"] == "failed"
                    and "waiting already" in client.get(refused).text
                )
                client.post(f"{waiting}/stop")
                client.post(f"{long}/stop")
                soon(lambda: one.busy == 0, 30)
            assert ended(long)[0]["answers"][0]["state"] == "stopped"


SERVER = """
import sys
from pathlib import Path
from served import QUESTION, save, server, slowly, soon
from speaker import Stub
from studio import serving
from limbeck.serve.app import build
service = Stub(lambda *_: ("step by step. " * 5000, "never"), pause=0.01)
with serving(build(Path(sys.argv[1]), service)) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def test_after_kill_9_what_was_said_is_there(tmp_path):
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=here,
    )
    try:
        url = server.stdout.readline().strip()
        place = httpx.post(f"{url}/chat", data={"text": "go", "model": "r1"}).headers["location"]
        while "step by step" not in httpx.get(url + place).text:
            time.sleep(0.1)
        time.sleep(2.5)
        before = httpx.get(url + place).text.count("step by step")
        os.kill(server.pid, signal.SIGKILL)
    finally:
        server.kill()
        server.wait()
    with serving(build(tmp_path, Stub(sums))) as url:
        page = httpx.get(url + place).text
        assert 'data-state="interrupted"' in page and page.count("step by step") >= before > 0
        assert (
            "event" not in httpx.get(f"{url}{place}/follow?after=9").text
        )  # nothing grows, and nobody waits


CAPABLE = {
    "script",
    "img",
    "svg",
    "iframe",
    "style",
    "object",
    "base",
    "meta",
    "link",
    "title",
    "form",
    "input",
    "button",
    "textarea",
}


class Reader(HTMLParser):
    """Active parts of a page: tags, handlers, and addresses that are neither ours nor a plain link."""

    def __init__(self, page):
        super().__init__()
        self.found = Counter()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.update([tag] if tag in CAPABLE else [])
        for name, value in attributes:
            if name.startswith(("on", "srcdoc", "style")) or (
                name in ("href", "src") and re.match(r"\s*(javascript|data|vbscript)", value, re.IGNORECASE)
            ):
                self.found[(tag, name, value)] += 1


def test_nothing_that_is_said_is_more_than_text(tmp_path):
    """In titles, questions, thoughts and answers: a page with hostile text has no more active parts."""
    with (
        serving(build(tmp_path, Stub(lambda _, question: (question, question), size=1000))) as url,
        httpx.Client(base_url=url) as client,
    ):

        def capable(text):
            place = client.post("/chat", data={"text": text, "model": "r1"}).headers["location"]
            while 'data-state="running"' in (page := client.get(place).text):
                time.sleep(0.02)
            answer = place + "/answers/" + re.search('data-answer="([0-9]+)"', page)[1]
            assert client.get(f"{answer}/text").headers["content-type"].startswith("text/plain")
            assert "attachment" in client.get(f"{place}/export.md").headers["content-disposition"]
            return [Reader(client.get(path).text).found for path in (place, answer, f"{answer}/thought")]

        harmless = capable("hello")
        for text in HOSTILE:
            assert capable(text) == harmless, text
