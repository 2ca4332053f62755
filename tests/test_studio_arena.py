"""The arena's pages: no page names a model before the vote, a vote counts once, and votes survive a kill."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from judges import material
from studio import accessible, picture

from limbeck.eval.identity import author_name
from limbeck.serve.app import build
from limbeck.serve.questions import Questions
from limbeck.serve.votes import Answer, Refused, VoteStore
from limbeck.types import LimbeckError, Problem

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(1, 9)]


@dataclass(frozen=True)
class Usage:
    completion_tokens: int = 9
    reasoning_tokens: int = 5
    seconds: float = 0.5


@dataclass(frozen=True)
class Output:
    answer: str
    thought: str = "a-secret-thought"
    finish: str = "stop"
    usage: Usage = Usage()


class Model:
    def __init__(self, name):
        self.folder = Path("runs/store") / f"rl-{name}" / "model"


class Parrots:
    """Models that say the same phrase always, each with its own number of full stops and at its own speed;
    `says(name, prompt)` may be given."""

    def __init__(self, says=None, delays=None, names=("parrot-135m", "quickling-7b", "umpire-1b")):
        self.models = {name: Model(name) for name in names}
        self.says, self.delays, self.asked = (
            says or (lambda name, prompt: f"The answer to {prompt}" + "." * (1 + names.index(name))),
            delays or {},
            [],
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        pass

    async def answer(self, model, messages, **options):
        self.asked.append((model, messages, options))
        if model not in self.models:
            raise LimbeckError(f"{model} is not served")
        await asyncio.sleep(self.delays.get(model, 0.0))
        return Output(self.says(model, messages[-1]["content"]))


class Visitor:
    """One person at the pages, in process."""

    def __init__(self, client):
        self.client = client

    async def begin(self, **options):
        answer = await self.client.post("/arena", data=options)
        return answer.headers.get("location"), answer

    async def ready(self, path):
        for _ in range(300):
            page = await self.client.get(path)
            if 'class="duel"' in page.text or "alert" in page.text:
                return page
            await asyncio.sleep(0.02)
        raise AssertionError("the answers never came")

    async def vote(self, path, outcome, token=None):
        token = token or re.search(r'name="token" value="([^"]+)"', (await self.ready(path)).text)[1]
        return await self.client.post(path, data={"token": token, "outcome": outcome}), token


def visiting(folder, service, story, *names):
    """`await story(visitor, ...)` with one visitor for each name."""

    async def live():
        app = build(folder, service)
        clients = [
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") for _ in names
        ]
        for client, name in zip(clients, names, strict=True):
            await client.post("/hello", data={"name": name})
        return await story(*map(Visitor, clients))

    return asyncio.run(live())


def bring(folder, name="sums.jsonl", rows=PROMPTS):
    sets = folder / ".studio" / "sets"
    sets.mkdir(parents=True, exist_ok=True)
    (sets / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- blindness


def test_nothing_tells_who_speaks_before_the_vote(tmp_path):
    """Neither names nor speeds: both answers come together; after the vote the names are shown."""
    delays = {"parrot-135m": 0.3}

    async def story(ada):
        path, answer = await ada.begin(prompt="What is 2 and 2?", who=["parrot-135m", "quickling-7b"])
        seen = [str(answer.headers), answer.text, path]
        waiting = set()
        for _ in range(8):
            page = await ada.client.get(path)
            if 'class="duel"' not in page.text:
                waiting.add(page.text)
                assert "The answer to" not in page.text
            seen += [page.text, str(page.headers)]
            await asyncio.sleep(0.01)
        seen.append((await ada.ready(path)).text)
        for name in ("parrot-135m", "quickling-7b", "secret-thought", "rl-"):
            assert not any(name in text for text in seen)
        assert len(waiting) == 1  # whatever goes on behind it
        first, second = (
            side.replace(".", "")
            for side in re.findall(
                r'<section class="card side" aria-labelledby="side-(?:a|b)">(.*?)</section>',
                seen[-1],
                re.DOTALL,
            )
        )
        assert first.replace("side-a", "").replace(">A<", "") == second.replace("side-b", "").replace(
            ">B<", ""
        )
        await ada.vote(path, "a")
        told = (await ada.client.get(path)).text
        assert "parrot-135m" in told and "quickling-7b" in told and "secret-thought" in told

    visiting(tmp_path, Parrots(delays=delays), story, "Ada")


def test_both_sides_are_asked_the_same_way_and_sides_are_random(tmp_path):
    service = Parrots()

    async def story(ada):
        for _ in range(12):
            path, _ = await ada.begin(prompt="Hello?", who=["parrot-135m", "quickling-7b"])
            await ada.ready(path)

    visiting(tmp_path, service, story, "Ada")
    pairs = [service.asked[i : i + 2] for i in range(0, len(service.asked), 2)]
    assert all(one[1:] == other[1:] and one[0] != other[0] for one, other in pairs)
    db = sqlite3.connect(tmp_path / ".studio" / "votes.db")
    assert len({a for (a,) in db.execute("SELECT a FROM battles")}) == 2


LEAKS = [
    ("I am Qwen, made by Alibaba.", "who are you?", "qwen"),
    ("I'm zero.", "hi", "zero"),
    ("2 - 2 is zero.", "2 - 2?", ""),
    ("As parrot-135m I cannot say.", "hi", "parrot-135m"),
    ("我是zero。", "你是谁", "zero"),
    ("Llamas are animals, as DeepSeek says", "llama or deepseek?", ""),
    ("My name is **r1**", "hi", "r1"),
    ("let r1 = 5 and dev1 = 3", "hi", ""),
    ("GPT-4o said so", "hi", "gpt-4"),
    ("我是通义千问", "hi", "通义千问"),
]


@pytest.mark.parametrize(("answer", "prompt", "word"), LEAKS)
def test_an_answer_that_gives_its_author_away_is_found(answer, prompt, word):
    assert author_name(answer, prompt, ["zero", "r1", "dev1", "parrot-135m"]) == word


def test_a_battle_that_is_not_blind_takes_no_vote(tmp_path):
    async def story(ada):
        path, _ = await ada.begin(prompt="Who are you?")
        page = await ada.ready(path)
        assert "says who wrote it" in page.text and "ballot" not in page.text
        token = (
            sqlite3.connect(tmp_path / ".studio" / "votes.db")
            .execute("SELECT token FROM battles")
            .fetchone()[0]
        )
        refused, _ = await ada.vote(path, "a", token)
        assert refused.status_code == 409
        assert "no votes yet" in (await ada.client.get("/arena/board")).text

    visiting(tmp_path, Parrots(lambda name, prompt: f"I am {name}."), story, "Ada")


# ---------------------------------------------------------------- votes


def test_one_vote_a_battle_by_its_owner_with_its_token(tmp_path):
    async def story(ada, bob):
        path, _ = await ada.begin(prompt="What is 2 and 2?")
        await ada.ready(path)
        assert (
            "only Ada can vote" in (await bob.client.get(path)).text
            and "ballot" not in (await bob.client.get(path)).text
        )
        token = re.search(r'name="token" value="([^"]+)"', (await ada.ready(path)).text)[1]
        for visitor, outcome, given, status in (
            (bob, "a", token, 403),
            (ada, "a", "guess", 403),
            (ada, "all", token, 409),
            (ada, "b", token, 303),
            (ada, "a", token, 303),
        ):
            answer, _ = await visitor.vote(path, outcome, given)
            assert answer.status_code == status, (outcome, given)
        assert "You prefer B." in (await ada.client.get(path)).text
        assert (await ada.client.get("/arena/b/nowhere")).status_code == 404
        assert (await ada.begin())[1].status_code == 400

    visiting(tmp_path, Parrots(), story, "Ada", "Bob")
    assert [vote.outcome for vote in VoteStore(tmp_path / ".studio").votes()] == ["b"]


def test_nobody_is_asked_about_equal_answers_which_are_a_tie(tmp_path):
    """The tie enters the ratings and the draw of pairs, but no table of voters, no agreement with a judge, no
    preferences; a judge is not asked either."""
    bring(tmp_path)
    service = Parrots(lambda name, prompt: "4 " if name != "umpire-1b" else "[[A]]")

    async def story(ada):
        path, _ = await ada.begin(set="sums.jsonl", who=["parrot-135m", "quickling-7b"])
        page = (await ada.ready(path)).text
        assert "nobody is asked" in page and 'class="ballot"' not in page and "parrot-135m" in page
        assert "You called it a tie" not in page and 'data-key="n"' in page  # on to the next battle
        token = VoteStore(tmp_path / ".studio").battle(path.rpartition("/")[2]).token
        await ada.vote(path, "a", token)  # from an old page: too late
        await ada.client.post("/arena/judge", data={"name": "umpire-1b"})
        asked = len(service.asked)
        for _ in range(100):
            board = (await ada.client.get("/arena/board")).text
            if "Judge umpire-1b" in board:
                break
            await asyncio.sleep(0.02)
        assert len(service.asked) == asked == 2
        assert "1 of the ties are battles with two equal answers" in board
        assert "(identical answers)" not in board
        (row, judged) = (await ada.client.get("/arena/votes.jsonl")).text.splitlines()
        assert json.loads(row)["human"] is False and json.loads(judged)["winner"] == "tie"

    visiting(tmp_path, service, story, "Ada")
    store = VoteStore(tmp_path / ".studio")
    assert [(vote.outcome, vote.judge) for vote in store.votes()] == [("tie", False), ("tie", True)]
    assert store.broken() is None and not list(store.preferences())


def fought(
    store,
    voter="Ada",
    outcome="a",
    a="r1",
    b="base",
    prompt="2 and 2?",
    said=("4", "5"),
    sources=("rl-1", "sft-1"),
):
    battle = store.begin(voter, Problem("x", prompt, origin="typed"), (a, b), sources, {})
    store.add_answers(battle, *(Answer(text, f"thinking of {text}") for text in said), "")
    store.vote(battle.id, battle.token, voter, outcome)
    return battle


def test_votes_are_limited_by_the_hour(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.serve.votes.PER_HOUR", 3)
    store = VoteStore(tmp_path)
    for _ in range(3):
        store.begin("Ada", Problem("x", "?"), ("r1", "base"), ("", ""), {})
    with pytest.raises(Refused) as refused:
        store.begin("Ada", Problem("x", "?"), ("r1", "base"), ("", ""), {})
    assert refused.value.status == 429
    store.begin("Bob", Problem("x", "?"), ("r1", "base"), ("", ""), {})


def test_no_vote_before_the_answers(tmp_path):
    store = VoteStore(tmp_path)
    battle = store.begin("Ada", Problem("x", "?"), ("r1", "base"), ("", ""), {})
    with pytest.raises(Refused):
        store.vote(battle.id, battle.token, "Ada", "a")
    store.add_answers(battle, Answer("one"), Answer("two"), "")
    store.add_answers(battle, Answer("three"), Answer("four"), "")  # the first stay
    assert [answer.text for answer in store.battle(battle.id).answers] == ["one", "two"]


def test_a_changed_log_shows(tmp_path):
    store = VoteStore(tmp_path)
    battles = [fought(store) for _ in range(5)]
    assert store.broken() is None
    for change, first in (
        ("UPDATE votes SET outcome = 'b' WHERE number = 3", 3),
        ("DELETE FROM votes WHERE number = 2", 2),
        (f"UPDATE battles SET a = 'base' WHERE id = '{battles[0].id}'", 1),
    ):
        with sqlite3.connect(tmp_path / "votes.db") as db:
            db.execute(change)
        assert store.broken() == first


VOTER = """
import sys
from pathlib import Path
from limbeck.serve.votes import Answer, Battle, VoteStore
from limbeck.types import Problem
store = VoteStore(Path(sys.argv[1]))
while True:
    battle = store.begin("v" + str(store.broken()), Problem("x", "?"), ("r1", "base"), ("", ""), {})
    store.add_answers(battle, Answer("one"), Answer("two"), "")
    store.vote(battle.id, battle.token, battle.voter, "a")
    print(battle.id, flush=True)
"""


def test_votes_that_were_acknowledged_survive_a_kill(tmp_path):
    told = []
    for wait in (0.15, 0.3):
        process = subprocess.Popen([sys.executable, "-c", VOTER, tmp_path], stdout=subprocess.PIPE, text=True)
        told.append(process.stdout.readline().strip())
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        told += [
            line.strip() for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")
        ]
    store = VoteStore(tmp_path)
    kept = [vote.battle for vote in store.votes()]
    assert set(told) <= set(kept) and len(kept) == len(set(kept)) and store.broken() is None


def test_the_same_name_for_other_weights_is_another_model(tmp_path):
    store = VoteStore(tmp_path)
    fought(store)
    fought(store, sources=("rl-2", "sft-1"))
    assert {vote.a for vote in store.votes()} == {"r1 (rl-1)", "r1 (rl-2)"} and {
        vote.b for vote in store.votes()
    } == {"base"}


# ---------------------------------------------------------------- judges, sets, what is taken away


def test_a_judge_votes_beside_people_and_not_in_its_own_cause(tmp_path):
    """It prefers the longer answer, in both orders; where it fought itself it is not asked."""

    def says(name, prompt):
        if shown := material(prompt):
            return f"verdict: {max('AB', key=lambda side: len(shown[f'response {side}']))}"
        return f"The answer of {len(name) * 'x'}"

    async def story(ada):
        for who in (["parrot-135m", "quickling-7b"], ["parrot-135m", "umpire-1b"]):
            path, _ = await ada.begin(prompt="What?", who=who)
            await ada.vote(path, "tie")
        await ada.client.post("/arena/judge", data={"name": "umpire-1b"})
        for _ in range(200):
            await asyncio.sleep(0.02)
            if len(VoteStore(tmp_path / ".studio").votes()) == 3:
                break
        return (await ada.client.get("/arena/board")).text

    board = visiting(tmp_path, Parrots(says), story, "Ada")
    people, judged = (
        [v for v in VoteStore(tmp_path / ".studio").votes() if v.judge is judge] for judge in (False, True)
    )
    assert len(people) == 2 and [v.outcome for v in people] == ["tie", "tie"]
    assert (
        len(judged) == 1
        and judged[0].voter == "umpire-1b"
        and {judged[0].a, judged[0].b} == {"parrot-135m", "quickling-7b"}
    )
    assert "quickling-7b" == (judged[0].a if judged[0].outcome == "a" else judged[0].b)
    assert "Judge umpire-1b" in board and "Says the same" in board


def test_saved_answers_fight_too(tmp_path):
    bring(
        tmp_path,
        "old.jsonl",
        [{"prompt": "What is 1 and 1?", "completion": "<think>hm</think>Two."}, {"prompt": "Unanswered?"}],
    )

    async def story(ada):
        page = (await ada.client.get("/arena")).text
        assert "old (saved)" in page and "old.jsonl" in page
        path, _ = await ada.begin(set="old.jsonl", who=["old (saved)", "parrot-135m"])
        assert (
            "Two." in (await ada.ready(path)).text
            and "hm" not in re.findall(r"(?s)<section.*?</section>", (await ada.ready(path)).text)[1]
        )
        assert (await ada.begin(prompt="Unknown?", who=["old (saved)", "parrot-135m"]))[1].status_code == 409
        assert (await ada.begin(set="nowhere.jsonl"))[1].status_code == 400

    visiting(tmp_path, Parrots(), story, "Ada")


def test_a_file_is_brought_whole_or_not_at_all(tmp_path):
    questions = Questions(tmp_path, tmp_path / "sets")
    assert questions.add("../../my sums!.jsonl", b'{"prompt": "1?"}\n') == "my-sums.jsonl"
    for bad in (b"", b"{", b'{"question": 3}\n', b'"x"\n', b"\xff\xfe"):
        with pytest.raises(LimbeckError):
            questions.add("bad.jsonl", bad)
    assert [path.name for path in (tmp_path / "sets").iterdir()] == [
        "my-sums.jsonl"
    ] and questions.names() == ["my-sums.jsonl"]


def test_problems_of_a_run_are_asked(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "recipe.yaml").write_text(
        "name: first\nproblems: {clock: {source: miniature}}\nstages: {b: {kind: load, path: x}}\n"
    )
    questions = Questions(tmp_path, tmp_path / "sets")
    assert questions.names() == ["first/clock"] and {p.language for p in questions.open("first/clock")} == {
        "en",
        "zh",
    }


def test_votes_are_taken_away_as_preferences_that_stages_read(tmp_path):
    """TRL's columns, without ties; the reader of reward models and calibrations takes them."""
    from types import SimpleNamespace

    from limbeck.pipeline.stages.rows import preferences

    store = VoteStore(tmp_path / ".studio")
    fought(store)
    fought(store, outcome="b")
    fought(store, outcome="tie")
    fought(store, outcome="a", said=("same", "same"))
    store.judge(fought(store, outcome="bad").id, "umpire", "b")

    async def story(ada):
        return [
            (await ada.client.get(f"/arena/{name}")).text
            for name in ("preferences.jsonl", "preferences.jsonl?judge=umpire", "votes.jsonl")
        ]

    people, judge, votes = visiting(tmp_path, Parrots(), story, "Ada")
    (tmp_path / "votes.jsonl").write_text(people)
    rows = [
        row
        for _, row in preferences(SimpleNamespace(dropped=set(), inputs={}), str(tmp_path / "votes.jsonl"))
    ]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("2 and 2?", "4", "5"),
        ("2 and 2?", "5", "4"),
    ]
    assert (
        rows[1]["origin"]["chosen_model"] == {"name": "base", "from": "sft-1"}
        and rows[0]["origin"]["voter"] == "Ada"
    )
    assert [json.loads(line)["origin"]["judge"] for line in judge.splitlines()] == ["umpire"]
    winners = [json.loads(line)["winner"] for line in votes.splitlines()]
    assert winners == ["model_a", "model_b", "tie", "tie", "tie (bothbad)", "model_b"]


def test_the_leaderboard_at_a_terminal(tmp_path):
    from typer.testing import CliRunner

    from limbeck.cli import app as commands

    def arena(*options):
        return CliRunner().invoke(commands, ["arena", "--runs", str(tmp_path), *options])

    assert "nobody has voted" in str(arena().exception)
    store = VoteStore(tmp_path / ".studio")
    for outcome in ("a", "a", "tie"):
        store.judge(fought(store, outcome=outcome).id, "umpire", "b")
    assert "length or style" in str(arena("--control", "luck").exception)
    lines = [line.split() for line in arena("--control", "length").stdout.splitlines()]
    assert [(words[0], words[2]) for words in lines] == [
        ("people", "r1"),
        ("people", "base"),
        ("umpire", "base"),
        ("umpire", "r1"),
    ]
    assert arena("--out", str(tmp_path / "pairs.jsonl")).exit_code == 0
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 2


def test_without_a_name_there_is_a_door(tmp_path):
    async def story(nobody):
        nobody.client.cookies.clear()
        return [await nobody.client.get(path) for path in ("/arena", "/arena/board", "/arena/b/x")]

    assert [answer.headers["location"] for answer in visiting(tmp_path, Parrots(), story, "x")] == [
        "/hello?next=/arena",
        "/hello?next=/arena/board",
        "/hello?next=/arena/b/x",
    ]


def test_models_that_are_gone_are_told_of(tmp_path):
    service = Parrots()

    async def story(ada):
        service.answer = gone
        path, _ = await ada.begin(prompt="What?")
        return (await ada.ready(path)).text

    async def gone(*_, **__):
        raise LimbeckError("no such model parrot-135m")

    page = visiting(tmp_path, service, story, "Ada")
    assert "could not be had" in page and "parrot" not in page


# ---------------------------------------------------------------- in a browser


HOSTILE = (
    "**4**\n\n<script>alert(1)</script> ![x](http://evil.example/x.png) "
    "[a](javascript:alert(1)) $\\frac{8}{2}$"
)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_blind_battle_leads_to_a_changed_leaderboard(visit, house, tmp_path, language):
    bring(tmp_path)
    store = VoteStore(tmp_path / ".studio")
    for outcome in ("a", "b", "tie", "a"):
        fought(
            store,
            "Bob",
            outcome,
            "parrot-135m",
            "quickling-7b",
            sources=("rl-parrot-135m", "rl-quickling-7b"),
        )

    def says(name, prompt):
        return HOSTILE if name == "parrot-135m" else "It is five, I think."

    with house(Parrots(says, names=("parrot-135m", "quickling-7b"))) as url:
        page = visit(url + "/arena/board", language=language)
        before = page.locator(".board tbody").inner_text()
        page.keyboard.press("n")
        page.wait_for_url("**/arena")
        accessible(page)
        picture(page, f"arena-start-{language}")
        page.keyboard.press("n")
        for _ in range(3):
            page.wait_for_selector(".ballot")
            battle = page.url
            assert "parrot" not in page.content() and page.locator("script:not([src])").count() == 0
            mine = "a" if page.locator("#side-a + .spoken strong").count() else "b"
            accessible(page)
            picture(page, f"arena-blind-{language}")
            page.keyboard.press(mine)
            page.wait_for_selector(".side.won")
            assert "parrot-135m" in page.locator(".side.won h2").inner_text()
            page.reload()
            page.wait_for_selector(".side.won")
            picture(page, f"arena-told-{language}")
            page.keyboard.press("n")
            page.wait_for_url(lambda now, was=battle: "/b/" in now and now != was)
        page.wait_for_selector(".ballot")
        page.goto(url + "/arena/board")
        after = page.locator(".board tbody").inner_text()
        assert before != after and after.index("parrot") < after.index("quickling")
        page.select_option("[name=control]", "style")
        page.wait_for_url("**control=style**")
        page.wait_for_selector("text=/\\[[+-]\\d+/")
        accessible(page)
        picture(page, f"arena-board-{language}")
        assert len(VoteStore(tmp_path / ".studio").votes()) == 7


def test_the_arena_on_a_phone_and_in_the_dark(visit, house, tmp_path):
    bring(tmp_path)
    store = VoteStore(tmp_path / ".studio")
    for i, outcome in enumerate(("a", "b", "tie", "a", "a", "bad", "a")):
        battle = fought(store, ("Ada", "Bob", "Mei")[i % 3], outcome, "parrot-135m", "quickling-7b")
        store.judge(battle.id, "umpire-1b", ("a", "tie", "")[i % 3])
    with house(Parrots()) as url:
        page = visit(url + "/arena", width=375, dark=True)
        page.click("button.primary")
        page.wait_for_selector(".ballot")
        accessible(page)
        picture(page, "arena-phone-blind")
        for path in ("/arena", "/arena/board"):
            page.goto(url + path)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
            accessible(page)
            picture(page, f"arena-phone{path.replace('/', '-')}")
        wide = visit(url + "/arena/board", dark=True)
        picture(wide, "arena-board-dark")


LEARNING = """
name: liked
threads: 1
problems: {clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}}
stages:
  brought: {kind: load, path: model, licence: own}
  dpo:
    {kind: dpo, model: brought, pairs: {votes.jsonl: 1}, licence: own, beta: 0.5, epochs: 20,
     batch_tokens: 128, log_every: 1, optimizer: {learning_rate: 0.01}}
  valued: {kind: reward, model: brought, rows: votes.jsonl, licence: own, held_out: 0.5, batch_pairs: 8}
"""


def test_models_learn_from_the_votes(finished, tmp_path):
    """People who always prefer the answer "no": two stages learn from the table that the arena exports."""
    import tiny

    from limbeck.run_log import read_metrics

    store = VoteStore(tmp_path / "runs" / ".studio")
    for i in range(60):
        better, worse = f"{i % 3} no", f"{i % 3} yes"
        fought(
            store,
            outcome="a",
            said=(better, worse),
            prompt=f"use {i % 3} {i // 3 % 3} {i // 9 % 3} make 0 ?",
        )
    (tmp_path / "recipe.yaml").write_text(LEARNING)
    (tmp_path / "model").symlink_to(finished.recipe.parent / "model")
    code, _, errors = tiny.answer("run", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs")
    assert code == 2 and "stages.dpo.pairs: votes.jsonl is no file" in errors
    assert tiny.answer("arena", "--runs", tmp_path / "runs", "--out", tmp_path / "votes.jsonl")[0] == 0
    code, _, errors = tiny.answer("plan", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs")
    assert code == 0, errors
    code, out, errors = tiny.answer("run", tmp_path / "recipe.yaml", "--runs", tmp_path / "runs", "--json")
    assert code == 0, errors + out
    (learned,) = (tmp_path / "runs" / "store").glob("preference-*")
    history = read_metrics(learned)
    assert history[0]["loss"] == pytest.approx(np.log(2), rel=1e-3) and history[-1]["loss"] < 0.3
    manifest = json.loads((learned / "manifest.json").read_text())
    assert manifest["notes"]["pairs"] == 60 and manifest["licences"] == ["own"]
    (valued,) = (tmp_path / "runs" / "store").glob("reward-*")
    assert json.loads((valued / "manifest.json").read_text())["notes"]["pairs"] > 20
