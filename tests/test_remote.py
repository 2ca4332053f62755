"""A remote teacher: asked politely, never twice for the same, and its key is written nowhere."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import stub as stubs
from stub import KEY, Stub, completion, fault
from tiny import answer, children, limbeck, open_run, until

from limbeck.config.load import load
from limbeck.config.recipe import Remote
from limbeck.engine.openai_client import Endpoint
from limbeck.engine.rate_limit import RateLimiter, Stopped, retry_after
from limbeck.engine.sampling import SamplingParams
from limbeck.types import LimbeckError, Problem, Resumable

pytestmark = pytest.mark.slow

openai = pytest.importorskip("openai")
stamina = pytest.importorskip("stamina")

PROBLEMS = [Problem(f"p/{i}", f"question {i}") for i in range(3)]
BRIEF = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=50)


@pytest.fixture(autouse=True)
def hasty():
    """Retries as they are, without the waits between them."""
    with stamina.set_testing(True, attempts=3):
        yield


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    return "TEACHER_KEY"


def endpoint(url: str, folder: Path, **settings) -> Endpoint:
    return Endpoint("stages.teacher", Remote(kind="remote", url=url, model="wise", **settings), folder)


def told(error) -> str:
    """The message, which is one sentence and holds no key."""
    text = str(error.value)
    assert KEY not in text and KEY[:8] not in text and "\n" not in text
    return text


# ---------------------------------------------------------------- what is asked, and what comes back


def test_a_request_says_what_the_recipe_says_and_nothing_of_this_machine(tmp_path, key, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-somebody")
    with Stub() as stub:
        endpoint(stub.url, tmp_path, key=key, extra={"reasoning_effort": "high", "top_p": None}).rollout(
            PROBLEMS[:1], 1, BRIEF
        )
    assert stub.asked == [
        {
            "model": "wise",
            "messages": [{"role": "user", "content": "question 0"}],
            "temperature": 0.7,
            "max_tokens": 50,
            "reasoning_effort": "high",
        }
    ]
    (sent,) = ({name.lower(): value for name, value in headers.items()} for headers in stub.headers)
    assert sent["authorization"] == f"Bearer {KEY}"
    assert not [name for name in sent if "stainless" in name or "organization" in name]


@pytest.mark.parametrize("message, text", [
    ({"content": "4", "reasoning_content": "2 and 2"}, "<think>\n2 and 2\n</think>\n\n4"),
    ({"content": "4", "reasoning": "2 and 2"}, "<think>\n2 and 2\n</think>\n\n4"),
    ({"content": "<think>2 and 2</think> 4"}, "<think>2 and 2</think> 4"),
    ({"content": "<think>2</think> 4", "reasoning": "2"}, "<think>2</think> 4"),
    ({"content": " 4 "}, "4"),
    ({"content": None}, ""),
])  # fmt: skip
def test_a_thought_is_found_wherever_the_endpoint_puts_it(tmp_path, message, text):
    with Stub(lambda body, n: (200, {}, completion(**message))) as stub:
        (group,) = endpoint(stub.url, tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)
    assert group.completions[0].text == text


def test_groups_come_in_the_order_of_the_problems_with_what_is_known(tmp_path):
    with Stub(
        lambda body, n: (
            200,
            {},
            completion(
                body["messages"][0]["content"].upper(), "length" if "1" in str(body["messages"]) else "stop"
            ),
        )
    ) as stub:
        groups = endpoint(stub.url, tmp_path, max_concurrency=3).rollout(PROBLEMS, 2, BRIEF)
    assert [[c.text for c in g.completions] for g in groups] == [[f"QUESTION {i}"] * 2 for i in range(3)]
    assert [[c.sample for c in g.completions] for g in groups] == [[0, 1]] * 3
    assert [g.completions[0].stopped for g in groups] == [True, False, True]
    assert all(len(c.tokens) == 7 and set(c.tokens) == {-1} for g in groups for c in g.completions)
    assert Counter(stub.questions()) == {f"question {i}": 2 for i in range(3)}


def test_logprobs_come_where_they_are_asked_for_and_given(tmp_path):
    def reply(body, n):
        made = completion("4")
        if body.get("logprobs"):
            made["choices"][0]["logprobs"] = {
                "content": [{"token": "4", "logprob": -0.25, "bytes": None, "top_logprobs": []}]
            }
        return 200, {}, made

    with Stub(reply) as stub:
        for asked, given in ((True, [-0.25]), (False, [])):
            (group,) = endpoint(stub.url, tmp_path, logprobs=asked).rollout(PROBLEMS[:1], 1, BRIEF)
            np.testing.assert_allclose(group.completions[0].logprobs, given)


def test_tokens_and_money_are_counted_also_of_what_was_found(tmp_path):
    prices = {"input": 2.0, "output": 8.0}
    with Stub() as stub:
        for _ in range(2):
            teacher = endpoint(stub.url, tmp_path, prices=prices)
            teacher.rollout(PROBLEMS, 2, BRIEF)
            assert teacher.take_usage() == {
                "prompt_tokens": 66,
                "response_tokens": 42,
                "money": pytest.approx((66 * 2 + 42 * 8) / 1e6),
            }
            assert teacher.take_usage()["response_tokens"] == 0
    assert len(stub.asked) == 6


# ---------------------------------------------------------------- nothing twice


def test_what_was_answered_is_never_asked_again(tmp_path):
    with Stub() as stub:
        first = endpoint(stub.url, tmp_path).rollout(PROBLEMS, 2, BRIEF)
        again = endpoint(stub.url, tmp_path, max_concurrency=9, timeout=5).rollout(
            PROBLEMS, 2, BRIEF, seed="another"
        )
    assert len(stub.asked) == 6
    assert [c.text for g in again for c in g.completions] == [c.text for g in first for c in g.completions]
    more = endpoint(stub.url, tmp_path)
    assert len(more.rollout(PROBLEMS[:1], 2, BRIEF)[0].completions) == 2  # the server is gone


@pytest.mark.parametrize("change", [
    {"model": "wiser"}, {"extra": {"seed": 1}}, {"logprobs": True},
    {"sampling": SamplingParams(temperature=0.8)}, {"samples": 2},
])  # fmt: skip
def test_whatever_decides_a_response_is_part_of_its_key(tmp_path, change):
    samples, sampling = change.pop("samples", 1), change.pop("sampling", BRIEF)
    with Stub() as stub:
        endpoint(stub.url, tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)
        settings = Remote(**{"kind": "remote", "url": stub.url, "model": "wise", **change})
        Endpoint("stages.teacher", settings, tmp_path).rollout(PROBLEMS[:1], samples, sampling)
    assert len(stub.asked) == 2


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path):
    def reply(body, n):
        time.sleep(0.2)
        return 200, {}, completion(f"answer {n}")

    with Stub(reply) as stub:
        teachers = [endpoint(stub.url, tmp_path) for _ in range(3)]
        texts = []
        threads = [
            threading.Thread(
                target=lambda t=t: texts.append(t.rollout(PROBLEMS[:1] * 2, 1, BRIEF)[1].completions[0].text)
            )
            for t in teachers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == ["answer 0"] * 3 and len(stub.asked) == 1


def test_a_torn_response_is_asked_again(tmp_path):
    with Stub() as stub:
        endpoint(stub.url, tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)
        (file,) = tmp_path.rglob("*.json")
        file.write_text(file.read_text()[:20])
        assert (
            endpoint(stub.url, tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)[0].completions[0].text == "answer 1"
        )


# ---------------------------------------------------------------- pace and patience


def test_429_then_success(tmp_path):
    with Stub(
        lambda body, n: (
            (429, {"retry-after": "0"}, fault("slow down")) if n < 2 else (200, {}, completion("4"))
        )
    ) as stub:
        (group,) = endpoint(stub.url, tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)
    assert group.completions[0].text == "4" and len(stub.asked) == 3


def test_the_quiet_that_an_endpoint_asks_for_is_kept_by_everybody(tmp_path):
    times = []

    def reply(body, n):
        times.append(time.monotonic())
        return (429, {"retry-after": "1"}, fault("slow down")) if n == 0 else (200, {}, completion("4"))

    with Stub(reply) as stub:
        endpoint(stub.url, tmp_path, max_concurrency=1).rollout(PROBLEMS, 1, BRIEF)
    assert len(times) == 4 and times[1] - times[0] > 0.95


def test_requests_a_minute_and_at_once_are_bounded(tmp_path):
    times = []

    def reply(body, n):
        times.append(time.monotonic())
        time.sleep(0.05)
        return 200, {}, completion("4")

    with Stub(reply) as stub:
        endpoint(stub.url, tmp_path, requests_per_minute=600, max_concurrency=2).rollout(PROBLEMS, 2, BRIEF)
    assert (
        times[-1] - times[0] > 0.4
    )  # five gaps of a tenth of a second; the first request takes longest to arrive
    with Stub(reply) as stub:
        endpoint(stub.url, tmp_path / "other", max_concurrency=2).rollout(PROBLEMS, 4, BRIEF)
    assert stub.busy == 2


def test_retry_after_is_seconds_or_a_date():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_whoever_waits_its_turn_can_be_stopped():
    limiter = RateLimiter(None, lambda: time.monotonic() > began + 0.3)
    limiter.pause(60)
    began = time.monotonic()
    with pytest.raises(Stopped):
        limiter.wait()
    assert time.monotonic() - began < 30


def test_asked_to_stop_it_stops_and_keeps_what_came(tmp_path):
    with Stub() as stub:
        settings = Remote(kind="remote", url=stub.url, model="wise", max_concurrency=1)
        teacher = Endpoint("stages.teacher", settings, tmp_path, stopping=lambda: len(stub.answered) >= 2)
        with pytest.raises(Resumable, match="the same command goes on"):
            teacher.rollout(PROBLEMS, 2, BRIEF)
        asked = len(stub.asked)
        endpoint(stub.url, tmp_path).rollout(PROBLEMS, 2, BRIEF)
    assert asked < 6 and len(stub.asked) == 6


# ---------------------------------------------------------------- what goes wrong


def test_500_for_ever_is_one_sentence_and_nothing_is_lost(tmp_path, key):
    with Stub(
        lambda body, n: (
            (500, {}, fault("boom")) if "2" in str(body["messages"]) else (200, {}, completion("4"))
        )
    ) as stub:
        with pytest.raises(Resumable) as error:
            endpoint(stub.url, tmp_path, key=key, max_concurrency=1).rollout(PROBLEMS, 1, BRIEF)
        assert f"stages.teacher: {stub.url} keeps answering 500; what was answered is kept" in told(error)
        assert Counter(stub.questions()) == {"question 0": 1, "question 1": 1, "question 2": 3}
    assert len(list(tmp_path.rglob("*.json"))) == 2


@pytest.mark.parametrize("status, body, sentence", [
    (401, fault(f"Incorrect API key provided: {KEY[:8]}***"),
     "stages.teacher.key: {url} refuses the key in $TEACHER_KEY (401)"),
    (404, fault("The model `wise` does not exist"), "stages.teacher.model: {url} knows no model wise"),
    (404, fault("nope", "model_not_found"), "stages.teacher.model: {url} knows no model wise"),
    (404, "<html>not here</html>",
     "stages.teacher.url: {url} answers, but not as a chat API does; most addresses end in /v1"),
    (200, "<html>welcome</html>", "stages.teacher.url: {url} answers, but not as a chat API does"),
    (200, {"error": "x"}, "stages.teacher.url: {url} answers, but not as a chat API does"),
    (400, fault(f"max_tokens is not for me, {KEY}"),
     "stages.teacher: {url} refuses the request (400: max_tokens is not for me, [key])"),
    (429, fault("pay", "insufficient_quota"), "stages.teacher: the account at {url} has no credit left"),
])  # fmt: skip
def test_mistakes_are_one_sentence_and_are_not_tried_again(tmp_path, key, status, body, sentence):
    with Stub(lambda _, n: (status, {}, body)) as stub, pytest.raises(LimbeckError) as error:
        endpoint(stub.url, tmp_path, key=key, max_concurrency=1).rollout(PROBLEMS, 1, BRIEF)
    assert sentence.format(url=stub.url) in told(error) and len(stub.asked) == 1


def test_a_wrong_address(tmp_path):
    with pytest.raises(
        LimbeckError, match=r"stages.teacher.url: http://127.0.0.1:9/v1 cannot be reached .*check the address"
    ):
        endpoint("http://127.0.0.1:9/v1", tmp_path).rollout(PROBLEMS, 1, BRIEF)


def test_a_wrong_path(tmp_path):
    with Stub() as stub, pytest.raises(LimbeckError, match="most addresses end in /v1"):
        endpoint(stub.url.removesuffix("/v1"), tmp_path).rollout(PROBLEMS, 1, BRIEF)


def test_an_endpoint_that_says_nothing(tmp_path):
    def reply(body, n):
        time.sleep(1)
        return 200, {}, completion("late")

    with Stub(reply) as stub, pytest.raises(Resumable, match="did not answer within 0.1 seconds"):
        endpoint(stub.url, tmp_path, timeout=0.1).rollout(PROBLEMS[:1], 1, BRIEF)


def test_a_key_that_is_not_set(tmp_path):
    with pytest.raises(
        LimbeckError, match="stages.teacher.key names the environment variable NO_SUCH_KEY, which is not set"
    ):
        endpoint("http://127.0.0.1:9/v1", tmp_path, key="NO_SUCH_KEY")


# ---------------------------------------------------------------- as a stage

RECIPE = """
name: away
threads: 1
problems: {{clock: {{source: miniature, modulus: 3, numbers: 3, largest: 2}}}}
stages:
  teacher: {{kind: remote, url: {url}, model: wise, key: TEACHER_KEY, licence: MIT, max_concurrency: 3,
            prices: {{input: 1, output: 2}}}}
  outputs:
    kind: sample
    model: teacher
    problems: {{clock: 1}}
    prompts: 12
    samples: 2
    keep_per_problem: 2
    correct: false
    wellformed: false
    save_every: 0.01
"""


@pytest.fixture
def away(tmp_path, key):
    """`away(stub)`: a recipe with a teacher behind the stub."""

    def write(stub: Stub) -> Path:
        (tmp_path / "away.yaml").write_text(RECIPE.format(url=stub.url))
        return tmp_path / "away.yaml"

    return write


def varied(body: dict, n: int) -> stubs.Reply:
    return 200, {}, completion(f"<answer> {n} </answer>", reasoning_content=f"thought {n}")


def rows(home: Path) -> list[dict]:
    (file,) = home.glob("store/sample-*/rows.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_of_a_teacher_are_text_and_say_who_wrote_them(away, tmp_path):
    with Stub(varied) as stub:
        code, _, err = answer("run", away(stub), "--runs", tmp_path / "runs")
        assert code == 0, err
        made, asked = rows(tmp_path / "runs"), len(stub.asked)
        code, _, err = answer(
            "run", away(stub), "--runs", tmp_path / "runs", "--set", "stages.outputs.samples=1"
        )
        assert code == 0 and len(stub.asked) == asked, "what was paid for is used again"
    assert len(made) == asked == 24
    assert all("tokens" not in row and row["reasoning_content"].startswith("thought") for row in made)
    assert {(row["origin"]["endpoint"], row["origin"]["model"]) for row in made} == {(stub.url, "wise")}
    manifests = [json.loads(path.read_text()) for path in tmp_path.glob("runs/store/sample-*/manifest.json")]
    manifest = next(m for m in manifests if m["settings"]["samples"] == 2)
    assert (
        manifest["notes"]["money"] == pytest.approx(24 * (11 + 2 * 7) / 1e6)
        and manifest["notes"]["currency"] == "USD"
    )
    assert manifest["notes"]["response_tokens"] == 24 * 7 == manifest["tokens"]
    assert manifest["licences"] == ["MIT"]
    assert any("wise at " in name for name in manifest["sources"]["models"])


def test_the_key_is_nowhere_on_disk_and_in_no_output(away, tmp_path):
    def reply(body, n):
        return (200, {}, completion("4")) if n < 5 else (400, {}, fault(f"key {KEY} is odd"))

    with Stub(reply) as stub:
        code, out, err = answer("run", away(stub), "--runs", tmp_path / "runs", "--json")
        assert code == 2 and "refuses the request" in err
        assert {
            value
            for headers in stub.headers
            for name, value in headers.items()
            if name.lower() == "authorization"
        } == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in out + err


def test_killed_in_the_middle_and_run_again_nothing_answered_is_asked_twice(away, tmp_path):
    """The stub keeps the 9th request and those after it waiting until the run is dead."""
    dead = threading.Event()

    def reply(body, n):
        if n >= 8:
            dead.wait(60)
        return varied(body, n)

    def kept() -> int:
        return len(list(tmp_path.glob("runs/store/.responses/*/*.json")))

    with Stub(reply) as stub:
        run = limbeck("run", away(stub), "--runs", tmp_path / "runs", start_new_session=True)
        until(lambda: kept() == 8 and stub.now == 3)
        for pid in [run.pid, *children(run.pid)]:
            os.kill(pid, signal.SIGKILL)
        run.communicate()
        lost = stub.questions()[8:]
        dead.set()
        until(lambda: stub.now == 0)
        code, _, err = answer("run", away(stub), "--runs", tmp_path / "runs")
        assert code == 0, err
        asked = Counter(stub.questions())
    asked.subtract(lost)  # these were on their way, and answered to nobody
    assert len(lost) == 3 and set(asked.values()) == {2} and len(asked) == 12
    assert kept() == 24 and len(rows(tmp_path / "runs")) == 24


def test_a_wrong_key_is_known_before_anything_else_and_a_missing_one_before_that(away, tmp_path, monkeypatch):
    with Stub(varied) as stub:
        stub.greet = lambda headers: (401, {}, fault("no"))
        code, _, err = answer("run", away(stub), "--runs", tmp_path / "runs")
        assert (
            code == 2 and "stage teacher: stages.teacher.key:" in err and not stub.asked and stub.lists == 1
        )
        monkeypatch.delenv("TEACHER_KEY")
        code, _, err = answer("run", away(stub), "--runs", tmp_path / "runs")
        assert code == 2 and "TEACHER_KEY, which is not set" in err and stub.lists == 1


def test_how_it_is_asked_changes_no_key_and_whom_does(away, tmp_path):
    with Stub() as stub:
        recipe = away(stub)
    key = open_run(recipe, tmp_path / "runs").graph.nodes["teacher"].key
    for quiet in (
        "key=''",
        "prices={input: 9, output: 9}",
        "max_concurrency=9",
        "requests_per_minute=9",
        "timeout=9",
        "licence=MIT",
    ):
        assert (
            open_run(recipe, tmp_path / "runs", f"stages.teacher.{quiet}").graph.nodes["teacher"].key == key
        )
    for loud in ("model=wiser", "url=http://other/v1", "extra={seed: 1}", "logprobs=true"):
        assert open_run(recipe, tmp_path / "runs", f"stages.teacher.{loud}").graph.nodes["teacher"].key != key


@pytest.mark.parametrize("settings, sentence", [
    ("{kind: sft, model: teacher, rows: {outputs: 1}}",
     "stages.x.model needs a model, but teacher is remote: it gives text, no weights and no logits"),
    ("{kind: rl, model: teacher, problems: {clock: 1}}",
     "withholds learning, evaluation, logit and on-policy distillation"),
    ("{kind: sample, model: teacher, problems: {clock: 1}, sampling: {speculate: true}}",
     "stages.x.sampling.speculate is not for teacher"),
    ("{kind: remote, url: nowhere, model: wise}", "stages.x.url"),
    ("{kind: remote, url: 'http://x/v1', model: wise, key: 'sk-123 456'}", "stages.x.key"),
])  # fmt: skip
def test_what_a_remote_model_cannot_do_is_said_before_anything_runs(away, tmp_path, settings, sentence):
    with Stub() as stub:
        recipe = away(stub)
    with pytest.raises(LimbeckError) as error:
        load(recipe, [f"stages.x={settings}"])
    assert sentence in str(error.value)


def test_the_client_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(LimbeckError, match="pip install"):
        endpoint("http://127.0.0.1:9/v1", tmp_path).rollout(PROBLEMS[:1], 1, BRIEF)
