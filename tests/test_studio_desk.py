"""The review page in use: rows of a real run, two reviewers, drafts, and a stage that resumes by itself."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from studio import NoModels, accessible, picture
from tiny import limbeck, until

from limbeck.config.load import dump, load
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.pipeline.review import curate, queue_list, review_queue
from limbeck.serve import jobs
from limbeck.serve.app import build
from limbeck.serve.studio import review as page_of
from limbeck.tasks.clock_countdown import Countdown
from limbeck.tasks.registry import open_task

pytestmark = pytest.mark.slow

RECIPE = """
name: tiny
threads: 1
problems: {clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}}
stages:
  brought: {kind: load, path: model, licence: own}
  traces: {kind: sample, model: brought, problems: {clock: 1}, prompts: 10, samples: 1, correct: false,
    wellformed: false, sampling: {max_new_tokens: 500}}
  coldstart: {kind: curate, rows: traces}
  dev1: {kind: sft, model: brought, rows: {coldstart: 1}, epochs: 1}
"""
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> "
    "[a](javascript:alert(1)) \" ' </textarea> {{ 7 * 7 }}"
)


def thought(words: str) -> str:
    return f"<think> {words} </think> <answer> 1 +1 +2 </answer>"


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder of runs with one desk of six rows, as a run leaves it; no model had to be made for it."""
    (tmp_path / "model").mkdir()
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    recipe = load(path)
    run, rows = tmp_path / "runs/tiny", tmp_path / "runs/store/sample-1"
    run.mkdir(parents=True), rows.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump(recipe))
    (run / "stages.json").write_text('{"traces": "sample-1"}')
    (rows / "manifest.json").write_text('{"digest": "0123456789abcdef0"}')
    problems = [
        p for p in Countdown("clock", recipe.problems["clock"]).problems("train") if p.language == "en"
    ][:4]
    texts = ["try 1 +1 gives 2", "试 1 +1 gives 2", "no wait 1 +1 gives 2 " * 9, HOSTILE, "yes"]
    asked = [(p.id, p.prompt) for p in problems] + [("clock/gone", HOSTILE)]
    made = [
        {
            "id": f"{name}#0",
            "prompt": prompt,
            "language": "en",
            "completion": thought(text),
            "reasoning_content": text,
            "content": "",
            "origin": {},
        }
        for (name, prompt), text in zip(asked, texts, strict=True)
    ]
    curate.write_queue(tmp_path / "runs/store/.queues/0123456789abcdef", lambda: made, "Is it good?")
    return tmp_path / "runs"


@pytest.fixture
def resumed(monkeypatch) -> list[Path]:
    """Runs that were told to go on; none is."""
    told: list[Path] = []
    monkeypatch.setattr(page_of.jobs, "resume", told.append)
    monkeypatch.setattr(page_of.jobs, "state", lambda folder: jobs.State("waits"))
    return told


class Browser:
    """One person, without a browser: `Browser(app, "Ada").get("/desk")`."""

    def __init__(self, app, name: str | None = None):
        self.app, self.cookies = app, {}
        if name:
            self.post("/hello", name=name)

    def get(self, path: str, **headers) -> httpx.Response:
        return self._ask("GET", path, headers=headers)

    def post(self, path: str, **form) -> httpx.Response:
        return self._ask("POST", path, data=form)

    def send(self, path: str, **body) -> httpx.Response:
        return self._ask("POST", path, json=body)

    def _ask(self, method: str, path: str, **more) -> httpx.Response:
        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost:8000", cookies=self.cookies
            ) as client:
                answer = await client.request(method, path, **more)
                self.cookies.update(client.cookies)
                return answer

        found: list[
            httpx.Response
        ] = []  # a thread of its own: where a browser lives, this one has an event loop
        thread = threading.Thread(target=lambda: found.append(asyncio.run(ask())))
        thread.start(), thread.join()
        return found[0]


AT = "/desk/tiny/coldstart"


def queue_of(home: Path) -> Path:
    return queue_list.find_queue(home, "tiny", "coldstart").queue


def decide(browser, number: int, verdict: str, home: Path, **more) -> httpx.Response:
    return browser.post(
        f"{AT}/{number}",
        id=review_queue.review_states(queue_of(home))[number - 1].id,
        verdict=verdict,
        **more,
    )


def test_a_queue_is_found_by_what_its_run_left(home, resumed):
    ada = Browser(build(home, NoModels()), "Ada")
    assert AT in ada.get("/desk").text and "0 of 5 rows settled" in ada.get("/desk").text
    page = ada.get(AT).text
    assert "Is this thought correct" in page and page.count(f'href="{AT}/') >= 6
    assert Browser(build(home, NoModels())).get(f"{AT}/1").headers["location"] == f"/hello?next={AT}/1"
    for path in (
        "/desk/tiny/traces",
        "/desk/nowhere/coldstart",
        "/desk/%2e%2e/coldstart",
        "/desk/store/coldstart",
        f"{AT}/0",
        f"{AT}/6",
        "/desk/../coldstart/1",
    ):
        assert ada.get(path).status_code == 404, path
    assert ada.get(f"{AT}/one").status_code == 422


def test_a_row_shows_its_problem_the_verified_answer_and_what_is_odd(home, resumed):
    ada = Browser(build(home, NoModels()), "Ada")
    page = ada.get(f"{AT}/2").text
    assert "<mark>试</mark>" in page and '<span class="tag">&lt;think&gt;</span>' in page
    assert "1 +1 +2" in page and re.search("✓ verified|✗ not right", page) and "50 %" in page
    assert "cannot be verified here" in ada.get(f"{AT}/5").text  # the recipe has no such problem
    assert '<span class="mono">clock/' in page


def test_the_default_button_follows_the_verifier(home, resumed, monkeypatch):
    """Accept where the answer is verified or cannot be, else Reject."""

    def default(number: int) -> str:
        page = ada.get(f"{AT}/{number}").text
        (text,) = re.findall(r'class="(?:button )?primary"[^>]*>(\w+)', page)
        return text

    ada = Browser(build(home, NoModels()), "Ada")
    refuted = "✗ not right" in ada.get(f"{AT}/1").text
    accuracy = {True: 1.0, False: 0.0}
    assert default(5) == "Accept" and default(1) == ("Reject" if refuted else "Accept")
    verify = queue_list.verify

    def found(*arguments):
        finding = verify(*arguments)
        parts = {**finding.score.parts, "accuracy": accuracy[right]}
        return replace(finding, score=replace(finding.score, parts=parts))

    monkeypatch.setattr(queue_list, "verify", found)
    for right, button in ((True, "Accept"), (False, "Reject")):
        assert default(1) == button


def test_verdicts_are_on_disk_before_anybody_is_told(home, resumed):
    ada = Browser(build(home, NoModels()), "Ada")
    went = decide(ada, 1, "accept", home, seconds="4.2")
    assert (went.status_code, went.headers["location"]) == (303, f"{AT}/2?after=1")
    assert (
        decide(ada, 2, "reject", home, why=["mixed languages", "unsafe"], reason=" and dull ").headers[
            "location"
        ]
        == f"{AT}/3?after=2"
    )
    decide(ada, 3, "edit", home, completion="<think> short </think>\r\n<answer> 1 </answer>", seconds="-3")
    said = [
        {k: v for k, v in event.items() if k not in ("at", "id")}
        for event in review_queue.events(queue_of(home))
    ]
    assert said == [
        {"reviewer": "Ada", "verdict": "accept", "seconds": 4.2},
        {"reviewer": "Ada", "verdict": "reject", "reason": "mixed languages; unsafe; and dull"},
        {"reviewer": "Ada", "verdict": "edit", "completion": "<think> short </think>\n<answer> 1 </answer>"},
    ]
    assert decide(ada, 4, "edit", home, completion=thought(HOSTILE) + "\n").status_code == 303
    assert (
        review_queue.review_states(queue_of(home))[3].verdict["verdict"] == "accept"
    )  # an edit that changed nothing
    assert "Row 4: accepted." in ada.get(f"{AT}/5?after=4").text
    assert ada.post(f"{AT}/4/undo").headers["location"] == f"{AT}/4"
    assert review_queue.review_states(queue_of(home))[3].state == "open" and not resumed
    for wrong in ({"verdict": "edit", "completion": " "}, {"verdict": "perhaps"}):
        assert ada.post(f"{AT}/5", id="clock/gone#0", **wrong).status_code == 400
    assert ada.post(f"{AT}/5", id="another", verdict="accept").status_code == 409
    assert ada.post(f"{AT}/5", id="clock/gone#0", verdict="accept", resolves="true").status_code == 409


def test_the_run_goes_on_when_the_last_row_is_settled_and_not_before(home, resumed, monkeypatch):
    app = build(home, NoModels())
    ada = Browser(app, "Ada")
    for number in range(1, 5):
        decide(ada, number, "accept", home)
        assert not resumed
    assert decide(ada, 5, "accept", home).headers["location"] == f"{AT}?after=5"
    assert resumed == [home / "tiny"]
    page = ada.get(AT).text
    assert "Every row is settled" in page and "goes on by itself" in page
    monkeypatch.setattr(page_of.jobs, "state", lambda folder: jobs.State("running"))
    ada.post(f"{AT}/5/undo")
    decide(ada, 5, "reject", home)
    assert len(resumed) == 1  # whoever is at work sees it


def test_a_second_person_does_not_see_the_first_verdict_and_disagreements_are_settled(home, resumed):
    app = build(home, NoModels())
    ada, grace, mary = (Browser(app, name) for name in ("Ada", "Grace", "Mary"))
    assert ada.post(f"{AT}/second", share="1.0").status_code == 303
    for number in range(1, 6):
        decide(ada, number, "reject", home, reason="zweifelhaft")
    assert not resumed and "wait for a second person" in ada.get(AT).text
    for path in (
        f"{AT}/1",
        f"{AT}/1?edit=1",
        f"{AT}/1?reject=1",
        f"{AT}/1?resolve=1",
        AT,
        f"{AT}?q=zweifelhaft",
        f"{AT}/disagreements",
    ):
        page = grace.get(path).text
        assert "zweifelhaft</q>" not in page and page.count("zweifelhaft") == page.count(
            'value="zweifelhaft"'
        ), path
        assert "rejected</span>" not in page, path
    decide(grace, 1, "accept", home)
    decide(grace, 2, "reject", home)
    for number in (3, 4, 5):
        decide(grace, number, "reject", home)
    assert not resumed  # one row is open
    page = mary.get(f"{AT}/disagreements").text
    assert "zweifelhaft</q>" in page and "Take Ada&#39;s" in page and "Take Grace&#39;s" in page
    assert "Nothing is left for you" in mary.get(AT).text
    settled = decide(
        mary, 1, "edit", home, completion="<think> both </think> <answer> 1 </answer>", resolves="true"
    )
    assert settled.headers["location"] == f"{AT}/disagreements" and resumed == [home / "tiny"]
    assert review_queue.review_states(queue_of(home))[0].people == ["Mary"]
    page = mary.get(AT).text
    assert "80 % of 5 rows" in page and "Krippendorff" in page and "n = 5" in page


def test_two_people_at_once_get_different_rows(home, resumed):
    app = build(home, NoModels())
    ada, grace = Browser(app, "Ada"), Browser(app, "Grace")
    first = ada.get(f"{AT}/next").headers["location"]
    ada.get(first)
    second = grace.get(f"{AT}/next").headers["location"]
    assert (first, second) == (f"{AT}/1", f"{AT}/2")
    grace.get(second)
    assert ada.get(f"{AT}/next?after=1").headers["location"] == f"{AT}/3"


def test_drafts_outlive_the_server(home, resumed):
    ada = Browser(build(home, NoModels()), "Ada")
    row = review_queue.review_states(queue_of(home))[1]
    shown = ada.send(f"{AT}/2/draft", id=row.id, text=thought("try 1 +1 gives 2 <b>"))
    assert (
        '<ins><span class="unseen">added: </span>try ' in shown.text
        and "&lt;b&gt;" in shown.text
        and "100 %" in shown.text
    )
    ada.send(f"{AT}/2/draft", id=row.id, reason="mixed languages; dull")
    again = Browser(build(home, NoModels()), "Ada")  # as after kill -9: nothing but the disk is left
    page = again.get(f"{AT}/2").text
    assert (
        "gives 2 &lt;b&gt;" in page
        and "Your draft was kept" in page
        and '<textarea name="completion"' in page
    )
    page = again.get(f"{AT}/2?reject=1").text
    assert 'value="mixed languages" data-key="3" checked' in page and 'value="dull"' in page
    assert "draft" in again.get(f"{AT}?show=draft").text and "1 rows" in again.get(f"{AT}?show=draft").text
    assert "&lt;b&gt;" not in Browser(build(home, NoModels()), "Grace").get(f"{AT}/2").text
    assert '<textarea name="completion"' not in again.get(f"{AT}/2?read=1").text
    assert again.send(f"{AT}/2/draft", id="another", text="x").status_code == 409
    decide(again, 2, "accept", home)
    again.post(f"{AT}/2/undo")
    assert "Your draft was kept" not in again.get(f"{AT}/2").text


class Served(NoModels):
    """A service whose only model translates everything alike."""

    def __init__(self):
        self.models = {"r1": object()}

    async def answer(self, name, messages, **options):
        self.asked = name, messages[0]["content"]
        return type("Answered", (), {"answer": " the same in English "})()


def test_helpers_trim_and_translate(home, resumed, monkeypatch):
    service = Served()
    ada, poor = Browser(build(home, service), "Ada"), Browser(build(home, NoModels()), "Ada")
    assert (
        ada.send(f"{AT}/3/trim", text=thought("no wait 1 +1 gives 2 " * 9)).json()["text"].count("wait") == 1
    )
    own = ada.send(f"{AT}/2/translate", text=thought("试 1 +1 gives 2"))
    assert own.json()["text"] == thought("try 1 +1 gives 2")  # the task has a dictionary
    by_model = ada.send(f"{AT}/5/translate", text=thought("试试"), model="r1").json()["text"]
    assert (
        by_model == thought("the same in English")
        and "into English" in service.asked[1]
        and "试试" in service.asked[1]
    )
    assert (
        ada.send(f"{AT}/5/translate", text="试试", model="r1").json()["text"] == "the same in English"
    )  # there was no thought
    refused = poor.send(f"{AT}/5/translate", text=thought("试试"))
    assert refused.status_code == 400 and "no model is served" in refused.json()["detail"]


def test_the_steps_of_a_sum_are_proposed_where_the_policy_writes_them(home, resumed):
    (home / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} + 5 - 9", "answer": str(n - 4)}) + "\n" for n in range(9))
    )
    path, plain = home / "tiny/recipe.yaml", load(home / "tiny/recipe.yaml").model_dump(mode="json")
    ada = Browser(build(home, NoModels()), "Ada")
    assert f'data-help="{AT}/1/steps"' not in ada.get(f"{AT}/1?edit=1").text
    plain["problems"]["clock"] = {"source": "files", "path": str(home / "sums.jsonl"), "held_out": 1}
    plain["stages"]["coldstart"]["policy"] = "steps"
    path.write_text(json.dumps(plain))
    (known, *_) = open_task("clock", load(path).problems["clock"]).problems("train")
    queue = queue_of(home) / review_queue.QUEUE
    first, *others = queue.read_text().splitlines()
    queue.write_text("\n".join([json.dumps({**json.loads(first), "id": f"{known.id}#0"}), *others]) + "\n")
    ada = Browser(build(home, NoModels()), "Ada")
    assert f'data-help="{AT}/1/steps"' in ada.get(f"{AT}/1?edit=1").text
    n = int(known.answer) + 4
    assert ada.send(f"{AT}/1/steps", text="x").json()["text"] == (
        f"<think> First {n} + 5 = {n + 5}. Then {n + 5} - 9 = {n - 4}. </think> "
        f"The answer is \\boxed{{{n - 4}}}."
    )
    refused = ada.send(f"{AT}/2/steps", text="x")
    assert refused.status_code == 400 and "asks for no sum" in refused.json()["detail"]


def test_long_queues_are_paged_searched_and_filtered(home, resumed):
    rows = [
        {
            "id": f"clock/{i}#0",
            "prompt": f"problem {i}",
            "language": "zh" if i % 3 else "en",
            "completion": thought(f"word{i}"),
            "origin": {},
        }
        for i in range(3000)
    ]
    queue = queue_of(home)
    (queue / review_queue.QUEUE).unlink()
    curate.write_queue(queue, lambda: rows, "good?")
    for name, verdict in (("7", "accept"), ("8", "reject")):
        review_queue.review(queue, {"id": f"clock/{name}#0", "verdict": verdict, "reviewer": "Ada"})
    ada = Browser(build(home, NoModels()), "Ada")

    def numbers(query: str) -> list[int]:
        part = ada.get(f"{AT}?{query}", **{"hx-request": "true"}).text
        assert "<html" not in part
        return [int(n) for n in re.findall(rf'href="{AT}/(\d+)"', part)]

    assert numbers("") == list(range(1, 51)) and numbers("page=60") == list(range(2951, 3001)) == numbers(
        "page=999"
    )
    assert numbers("q=WORD2999") == [3000] and numbers("q=problem 77")[0] == 78 and numbers("q=nothing") == []
    assert (
        numbers("show=accept") == [8]
        and numbers("show=reject") == [9]
        and numbers("show=todo&lang_of=en")[:3] == [1, 4, 7]
    )
    assert ada.get(f"{AT}?show=todo&q=word1&page=2").text.count("show=todo") >= 2  # links keep what was asked
    began = time.process_time()
    ada.get(f"{AT}?q=word29")
    assert time.process_time() - began < 30


def test_hostile_rows_are_text(home, resumed):
    ada = Browser(build(home, NoModels()), "<b>Ada</b>")
    ada.send(f"{AT}/4/draft", id=review_queue.review_states(queue_of(home))[3].id, text=thought(HOSTILE * 2))
    decide(ada, 5, "reject", home, reason=HOSTILE)
    Browser(ada.app, "Eve").post(f"{AT}/second", share="1")
    for path in (
        "/desk",
        AT,
        f"{AT}/4",
        f"{AT}/4?read=1",
        f"{AT}/4?reject=1",
        f"{AT}/5",
        f"{AT}/5?after=5",
        f"{AT}/disagreements",
        f"{AT}?q={HOSTILE}",
    ):
        page = ada.get(path).text
        assert (
            "<script>alert" not in page
            and "<img" not in page
            and 'href="javascript' not in page
            and "<b>Ada" not in page
        ), path
        assert (
            page.count("</textarea>") == page.count("<textarea") and "49" not in page.split("{{ 7")[0][-3:]
        ), path


# ---------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def waiting(tmp_path_factory, tokenizer) -> Path:
    """A real run that waits for people to review ten rows."""
    folder = tmp_path_factory.mktemp("desk")
    model = Decoder(ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=1024)).initialize(
        0
    )
    with torch.no_grad():
        model.head.weight.zero_()  # every word is as likely as the end, which so comes in time for all rows
    weights.save(model, folder / "model", tokenizer)
    (folder / "tiny.yaml").write_text(RECIPE)
    run = limbeck("run", folder / "tiny.yaml", "--runs", folder / "runs")
    _, err = run.communicate(timeout=200)
    assert run.returncode == 75, err
    assert len(review_queue.pending(queue_of(folder / "runs"))) == 10
    return folder / "runs"


def test_ten_rows_are_curated_and_the_waiting_stage_goes_on(visit, house, waiting):
    with house(runs=waiting) as url:
        page = visit(f"{url}/desk")
        page.get_by_role("link", name="tiny / coldstart").click()
        accessible(page)
        page.keyboard.press("n")
        page.wait_for_url("**/coldstart/1")
        accessible(page)
        picture(page, "desk-row-en")
        page.keyboard.press("a")
        page.wait_for_url("**/coldstart/2?after=1")
        page.keyboard.press("u")  # and takes it back
        page.wait_for_url("**/coldstart/1")
        page.keyboard.press("a")
        page.wait_for_url("**/coldstart/2?after=1")
        page.keyboard.press("e")
        page.wait_for_url("**/coldstart/2?edit=1")
        text = page.locator("textarea")
        text.fill("<think> area </think> <answer> 1 </answer>")
        text.press("a")  # typed, not pressed
        page.locator(".keeping", has_text="Draft saved").wait_for()
        assert page.locator("#change ins").count() and page.url.endswith("2?edit=1")
        accessible(page)
        picture(page, "desk-edit-en")
        page.goto(f"{url}/desk/tiny/coldstart/2")  # left, and come back to
        assert "area" in page.locator("textarea").input_value()
        page.locator("textarea").press("Control+Enter")
        page.wait_for_url("**/coldstart/3?after=2")
        page.keyboard.press("r")
        page.wait_for_url("**/coldstart/3?reject=1")
        page.keyboard.press("3")
        page.get_by_label("In your own words").fill("really")
        accessible(page)
        page.keyboard.press("Enter")
        for number in range(4, 10):
            page.wait_for_url(f"**/coldstart/{number}?after={number - 1}")
            page.keyboard.press("a")
        page.wait_for_url("**/coldstart/10?after=9")
        assert "goes on" not in page.content()
        page.keyboard.press("a")
        page.wait_for_url("**/coldstart?after=10")
        page.get_by_text("Every row is settled").wait_for()
        page.locator("#state .label.done").wait_for(timeout=120_000)  # by itself
        picture(page, "desk-done-en")
        until(lambda: jobs.state(waiting / "tiny").name == "finished")
    stages = json.loads((waiting / "tiny/stages.json").read_text())
    notes = json.loads((waiting / "store" / stages["coldstart"] / "manifest.json").read_text())["notes"]
    assert (notes["accepted"], notes["edited"], notes["rejected"], notes["reviewers"]) == (8, 1, 1, ["Ada"])
    said = [e for e in review_queue.events(queue_of(waiting)) if e["verdict"] == "reject"]
    assert said[0]["reason"] == "mixed languages; really" and said[0]["seconds"] > 0
    assert "dev1" in stages


def test_a_disagreement_is_settled_in_chinese_on_a_phone(visit, house, home, resumed):
    with house(runs=home) as url:
        ada = Browser(build(home, NoModels()), "Ada")
        ada.post(f"{AT}/second", share="1.0")
        decide(ada, 1, "reject", home, reason="读不懂")
        page = visit(f"{url}{AT}", language="zh", name="小梅", width=375)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        accessible(page)
        picture(page, "desk-queue-zh-phone")
        page.get_by_role("link", name="开始审阅").click()
        page.wait_for_url("**/coldstart/1")
        assert "读不懂" not in page.content()
        page.get_by_role("button", name="接受").click()
        page.goto(f"{url}{AT}/disagreements")
        page.get_by_text("读不懂").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        accessible(page)
        picture(page, "desk-disputes-zh-phone")
        page.get_by_role("button", name="采用 Ada 的结论").click()
        page.get_by_text("没有分歧").wait_for()
        assert review_queue.review_states(queue_of(home))[0].verdict["reason"] == "读不懂"
        page.goto(f"{url}{AT}/4")  # a hostile row
        accessible(page)
        page.get_by_role("button", name="专注").click()
        assert not page.locator(".bar").is_visible() and page.url.endswith("/4")


def test_what_is_typed_while_the_server_is_down_is_saved_when_it_is_back(chromium, house, home, resumed):
    with (
        house(runs=home) as url,
        chromium.new_context() as context,
    ):  # not `visit`: here errors in the console are due
        context.request.post(f"{url}/hello", form={"name": "Ada"})
        page = context.new_page()
        page.goto(f"{url}{AT}/1?edit=1")
        page.route("**/draft", lambda route: route.abort())
        page.locator("textarea").fill(thought("kept"))
        page.locator(".keeping", has_text="Not saved yet").wait_for()
        page.unroute("**/draft")
        page.locator(".keeping", has_text="Draft saved").wait_for()
        page.reload()
        assert "kept" in page.locator("textarea").input_value()
