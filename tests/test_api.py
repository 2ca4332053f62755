"""The API as its clients use it: OpenAI's own package, plain HTTP, many at once, and those who leave."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import tiny
from served import KEY, QUESTION, routes, save, server, slowly, soon

pytestmark = pytest.mark.slow

ASK = {"model": "plain", "messages": [{"role": "user", "content": QUESTION}]}
LONG = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("served")
    plain, thinker = save(folder / "plain", tokenizer), save(folder / "thinker", tokenizer, opens=True)
    with server(folder, f"plain={plain}", f"thinker={thinker}", prices=["1/2", "thinker=10/20"]) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(**served.client)


def test_models_are_told_by_name(client):
    assert [model.id for model in client.models.list()] == ["plain", "thinker"]
    assert client.models.retrieve("thinker").max_model_len == 4096
    with pytest.raises(openai.NotFoundError, match="plain, thinker"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(**{**ASK, "model": "gpt-4"})


def test_a_seed_says_the_same_again(client):
    first, again, other = (
        client.chat.completions.create(**ASK, max_tokens=30, seed=seed) for seed in (1, 1, 2)
    )
    assert (
        first.choices[0].message.content
        == again.choices[0].message.content
        != other.choices[0].message.content
    )
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert first.usage.cost == pytest.approx(
        (first.usage.prompt_tokens + 2 * first.usage.completion_tokens) / 1e6
    )


def test_a_thought_comes_apart_under_both_names_and_ends_with_its_budget(client, served):
    asked = {
        **ASK,
        "model": "thinker",
        "seed": 3,
        "max_tokens": 40,
        "extra_body": {"thinking_budget": 6, "ignore_eos": True},
    }
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.reasoning_content == message.reasoning and len(message.reasoning.split()) <= 6
    assert message.content and "think>" not in message.content + message.reasoning
    assert whole.usage.completion_tokens_details.reasoning_tokens == 7 and whole.usage.completion_tokens == 40
    assert whole.usage.cost == pytest.approx((10 * whole.usage.prompt_tokens + 20 * 40) / 1e6)
    parts = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in parts} == {parts[0].id}
    deltas = [chunk.choices[0].delta for chunk in parts if chunk.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == message.reasoning
    assert "".join(d.content or "" for d in deltas) == message.content and deltas[0].role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in parts if chunk.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens_details.reasoning_tokens == 7
    none = client.chat.completions.create(
        **{**ASK, "model": "thinker"}, max_tokens=20, reasoning_effort="none"
    )
    assert not hasattr(none.choices[0].message, "reasoning_content")
    assert none.usage.completion_tokens_details.reasoning_tokens == 1  # the closing mark


def test_history_comes_with_a_thought_or_without(client):
    turn = {"role": "assistant", "content": "5 -1 -6"}
    forms = [
        turn,
        {**turn, "reasoning_content": "try 5 -1"},
        {**turn, "reasoning": "try 5 -1"},
        {**turn, "content": "<think>try 5 -1</think>5 -1 -6"},
        {**turn, "tool_calls": None, "refusal": None, "annotations": []},
        {**turn, "content": [{"type": "text", "text": "5 -1 -6"}]},
    ]
    more = {"model": "plain", "max_tokens": 12, "seed": 5}
    talks = [[*ASK["messages"], form, {"role": "user", "content": "say 4 ?"}] for form in forms]
    answers = [client.chat.completions.create(messages=talk, **more) for talk in talks]
    assert len({(a.usage.prompt_tokens, a.choices[0].message.content) for a in answers}) == 1
    kept = [
        client.chat.completions.create(messages=talk, **more, extra_body={"keep_reasoning": True})
        for talk in talks
    ]
    assert [a.usage.prompt_tokens - answers[0].usage.prompt_tokens for a in kept] == [0, 5, 5, 5, 0, 0]


def test_choices_stops_and_logprobs(client, served):
    asked = {**ASK, "max_tokens": 25, "seed": 7, "extra_body": {"ignore_eos": True}}
    many = client.chat.completions.create(**asked, n=3, logprobs=True, top_logprobs=2)
    texts = [choice.message.content for choice in many.choices]
    assert len(set(texts)) == 3 and many.usage.completion_tokens == 75
    assert texts[0] == client.chat.completions.create(**asked).choices[0].message.content
    for choice in many.choices:
        told = choice.logprobs.content
        assert all(
            len(one.top_logprobs) == 2 and one.logprob <= one.top_logprobs[0].logprob <= 0 for one in told
        )
        assert " ".join(one.token for one in told).split() == choice.message.content.split()
    stop = texts[0].split()[8]
    cut = client.chat.completions.create(**asked, stop=[stop])
    assert (
        cut.choices[0].message.content == texts[0][: texts[0].index(stop)].rstrip()
        and cut.choices[0].finish_reason == "stop"
    )
    assert cut.usage.completion_tokens == 1 + next(i for i, w in enumerate(texts[0].split()) if stop in w)
    soon(lambda: served.service.models["plain"].busy == 0, 30)


def test_completions_in_every_form(client, tokenizer):
    text = "<bos> User: say 4 ? Assistant:"
    ids = tokenizer.encode(text)
    more = {"model": "plain", "max_tokens": 6, "seed": 2, "extra_body": {"ignore_eos": True}}
    answers = [client.completions.create(prompt=prompt, **more) for prompt in (text, [text], ids, [ids])]
    assert len({a.choices[0].text for a in answers}) == 1 and answers[0].usage.completion_tokens == 6
    batch = client.completions.create(prompt=[text, "say 1 ?"], n=2, echo=True, logprobs=1, **more)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    assert [
        choice.text.startswith(prompt)
        for choice, prompt in zip(batch.choices, [text, text, "say 1 ?", "say 1 ?"], strict=True)
    ] == [True] * 4
    assert batch.choices[0].text == text + answers[0].choices[0].text
    told = batch.choices[0].logprobs
    assert told.token_logprobs[0] is None and len(told.tokens) == len(ids) + 6 == len(
        told.top_logprobs
    ) == len(told.text_offset)
    alone = client.completions.create(prompt=text, model="plain", max_tokens=0, echo=True, logprobs=1)
    assert alone.choices[0].text == text and len(alone.choices[0].logprobs.tokens) == len(ids)
    parts = list(
        client.completions.create(prompt=[text, "say 1 ?"], n=2, echo=True, logprobs=1, stream=True, **more)
    )
    for choice in batch.choices:
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        assert [o for part in mine for o in part.logprobs.text_offset] == choice.logprobs.text_offset


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages.0.content"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 65}, "n: "),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "not supported: tools"),
        ({"messages": [{"role": "user", "content": "?", "audio": 1}]}, "not supported: messages.0.audio"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"max_tokens": 5000}, "4096 positions"),
        ({"stop": [""]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"\ud800": 1}, "unicode"),
    ],
)
def test_mistakes_are_told_in_one_sentence(served, changes, says):
    answer = httpx.post(
        served.url + "/v1/chat/completions",
        content=json.dumps({**ASK, **changes}),
        headers={**served.headers, "content-type": "application/json"},
        timeout=60,
    )
    error = answer.json()["error"]
    assert (
        answer.status_code == 400 and says in error["message"] and error["type"] == "invalid_request_error"
    ), error


def test_what_asks_for_nothing_is_taken(client):
    client.chat.completions.create(
        **ASK,
        max_tokens=2,
        frequency_penalty=0,
        presence_penalty=0,
        tools=[],
        logit_bias={},
        user="me",
        metadata={"a": "b"},
        response_format={"type": "text"},
        store=False,
    )


def test_every_sampling_parameter_changes_what_is_said_and_a_seed_says_it_again(client):
    """Each parameter alone, in chat and text completions; a penalty against saying anything twice is kept."""

    def chat(**extra):
        extra_body = {"ignore_eos": True, **extra}
        made = client.chat.completions.create(
            **ASK, max_tokens=24, seed=11, temperature=1, top_p=1, logprobs=True, extra_body=extra_body
        )
        return [token.token for token in made.choices[0].logprobs.content]

    def complete(**extra):
        extra_body = {"ignore_eos": True, **extra}
        made = client.completions.create(
            model="plain", prompt=QUESTION, max_tokens=24, seed=11, logprobs=0, extra_body=extra_body
        )
        return made.choices[0].logprobs.tokens

    for said in (chat, complete):
        plainly = said()
        assert len(set(plainly)) < len(plainly)
        assert plainly == said(top_k=-1, min_p=0, presence_penalty=0, repetition_penalty=1)
        for change in (
            {"top_k": 2},
            {"min_p": 0.3},
            {"presence_penalty": 2.0},
            {"frequency_penalty": -2.0},
            {"repetition_penalty": 5.0},
        ):
            assert said(**change) == said(**change) != plainly
        assert said(top_k=1) == said(temperature=0) == said(min_p=1)


@pytest.mark.parametrize("model", ["plain", "thinker"])
def test_the_example_of_the_documentation_works_on_models_that_think_or_do_not(served, model):
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "serve-a-model.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for old, new in (
        ("http://127.0.0.1:8000", served.url),
        ('api_key="none"', f'api_key="{KEY}"'),
        ("client.models.list().data[0].id", repr(model)),
    ):
        assert old in example
        example = example.replace(old, new)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    thought, answer = re.fullmatch(r"thought: (.*)\nanswer: (.*)\n", done.stdout, re.DOTALL).groups()
    assert (thought == "None") == (model == "plain") and (answer or model == "thinker")


def test_every_error_is_the_same_object(served):
    """Unknown paths, wrong methods, no key, unknown fields, a bug of ours; 413 and 408 are in test_safety."""
    with httpx.Client(base_url=served.url, headers=served.headers, timeout=60) as found:
        answers = {
            404: found.get("/v1/embeddings"),
            405: found.get("/v1/chat/completions"),
            401: httpx.get(served.url + "/v1/models"),
            400: found.post(
                "/v1/completions", json={"model": "plain", "prompt": "?", "logit_bias": {"1": 2}}
            ),
        }
        service = served.service
        service.model, model = lambda name: 1 / 0, service.model
        answers[500] = found.post("/v1/chat/completions", json=ASK)
        service.model = model
        assert found.get("/runs/nothing").headers["content-type"].startswith("text/html")
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/json"
        (error,) = answer.json().values()
        assert error.keys() == {"message", "type", "param", "code"} and error["message"], error
    assert answers[405].headers["allow"] == "POST"
    told = answers[400].json()["error"]
    assert told == {
        "message": "not supported: logit_bias",
        "type": "invalid_request_error",
        "param": "logit_bias",
        "code": "unsupported_parameter",
    }
    assert answers[500].json()["error"]["type"] == "server_error"


def test_bodies_that_are_no_json(served):
    for body, kind in (
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"a=b", "application/x-www-form-urlencoded"),
        (b"\xff", "application/json"),
    ):
        answer = httpx.post(
            served.url + "/v1/completions", content=body, headers={**served.headers, "content-type": kind}
        )
        assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_nothing_is_told_without_the_key(served):
    open_paths = {"/health", "/hello", "/static/{name:path}"}
    closed = [
        (m, route.path.replace("{", "").replace("}", ""))
        for route in routes(served.app)
        for m in route.methods
        if route.path not in open_paths
    ]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= {
        path for _, path in closed
    }
    with httpx.Client(base_url=served.url) as plain:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert {plain.request(method, path, headers=headers).status_code for method, path in closed} == {
                401
            }
        assert plain.get("/health").json() == {"status": "ok"}


def test_many_streams_at_once_are_all_served_and_alike(served):
    """64 at once; they end together; whoever else is served, a seed says the same."""
    told = {}

    async def listen(client, i):
        more = {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
        stream = await client.chat.completions.create(**ASK, stream=True, seed=i, max_tokens=48, **more)
        text, usage = "", None
        async for chunk in stream:
            text, usage = text + (chunk.choices[0].delta.content or "" if chunk.choices else ""), chunk.usage
        told[i] = text, usage.completion_tokens, time.monotonic()

    async def all_of_them():
        async with openai.AsyncOpenAI(**served.client) as client:
            await asyncio.gather(*(listen(client, i) for i in range(64)))
            alone = await client.chat.completions.create(
                **ASK, seed=5, max_tokens=48, extra_body={"ignore_eos": True}
            )
            return alone.choices[0].message.content

    with slowly(served.service, "plain", 0.02):
        begin = time.monotonic()
        alone = asyncio.run(all_of_them())
    assert told[5][0] == alone and [tokens for _, tokens, _ in told.values()] == [48] * 64
    ends = sorted(end - begin for *_, end in told.values())
    assert ends[-1] < 4 * ends[0]  # one after the other, the last would take 64 times as long as the first


def test_a_model_that_fails_says_so_and_goes_on(served, client):
    asked = {**ASK, "max_tokens": 5}
    for stream in (False, True):
        served.service.models["plain"].scheduler.serving_batch.step = lambda: 1 / 0
        with pytest.raises(openai.APIError, match="plain could not go on: division") as caught:
            list(client.chat.completions.create(**asked, stream=stream))
        assert stream or caught.value.status_code == 500 and caught.value.type == "server_error"
    assert client.chat.completions.create(**asked).usage.completion_tokens <= 5


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_who_leaves_frees_the_row_within_a_second(served, stream):
    """The answer would take two minutes; the connection is cut, with nothing said."""
    body = json.dumps({**ASK, "stream": stream, "max_tokens": 3000, "ignore_eos": True}).encode()
    host, port = served.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    one = served.service.models["plain"]
    with slowly(served.service, "plain", 0.04):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head.encode() + body)
            soon(lambda: one.busy == 1 and one.scheduler.serving_batch.busy == 1, 30)
            if stream:
                assert b"200 OK" in line.recv(1000)
        steps = one.scheduler.steps
        waited = soon(lambda: one.busy == 0, 30)
    print(f"free after {waited:.2f} s and {one.scheduler.steps - steps} steps")
    assert one.scheduler.steps - steps < 25  # a second's worth, on a machine that has nothing else to do


def test_too_many_are_told_to_come_back(tmp_path, tokenizer):
    folder = save(tmp_path / "m", tokenizer)
    with server(tmp_path, f"m={folder}", rows=1, waiting=1) as found, slowly(found.service, "m", 0.05):
        one, client = found.service.models["m"], openai.OpenAI(**found.client)
        asked = {**ASK, "model": "m", "max_tokens": 3000, "stream": True, "extra_body": {"ignore_eos": True}}
        first = client.chat.completions.create(**asked)
        soon(lambda: one.busy == 1, 30)
        second = client.chat.completions.create(**asked)
        soon(lambda: one.waiting == 1, 30)
        with pytest.raises(openai.RateLimitError, match="waiting already") as caught:
            client.chat.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        second.close()
        soon(lambda: one.waiting == 0, 30)
        first.close()
        soon(lambda: one.busy == 0, 30)
        assert (
            client.chat.completions.create(
                **{**asked, "stream": False, "max_tokens": 3}
            ).usage.completion_tokens
            == 3
        )
        told = httpx.get(found.url + "/metrics", headers=found.headers).text
    for line in (
        'limbeck_requests_total{end="refused",model="m"} 1.0',
        'limbeck_requests_total{end="left",model="m"} 2.0',
        'limbeck_requests_total{end="length",model="m"} 1.0',
        'limbeck_rows_busy{model="m"} 0.0',
        'limbeck_rows{model="m"} 1.0',
    ):
        assert line in told


def test_told_to_stop_it_finishes_what_it_says_and_takes_nothing_new(tmp_path, tokenizer):
    folder = save(tmp_path / "m", tokenizer)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = tiny.limbeck(
        "serve",
        f"m={folder}",
        "--runs",
        tmp_path,
        "--port",
        port,
        "--threads",
        1,
        env=tiny.environment(OMP_NUM_THREADS="1"),
    )
    try:
        assert f":{port} serves m" in process.stdout.readline()
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=10, timeout=120
        )
        stream = client.chat.completions.create(
            **{**ASK, "model": "m"}, stream=True, max_tokens=800, extra_body={"ignore_eos": True}
        )
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        reader = threading.Thread(target=lambda: chunks.extend(stream))
        reader.start()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                break
            time.sleep(0.01)
        refused = time.monotonic() - asked
        reader.join(120)
        print(f"refused after {refused:.2f} s, all said after {time.monotonic() - asked:.2f} s")
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["nowhere"], "nowhere"),
        (["a=x", "--price", "dear"], "READ/SAID"),
        (["MODEL", "MODEL"], "NAME="),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, tokenizer, arguments, says):
    folder = save(tmp_path / "x", tokenizer)
    arguments = [str(folder) if a == "MODEL" else a.replace("=x", f"={folder}") for a in arguments]
    code, _, errors = tiny.answer("serve", *arguments, "--runs", tmp_path)
    assert code == 2 and says in errors and errors.count("\n") == 1


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, out, errors = tiny.answer("serve", "--port", taken.getsockname()[1], "--runs", tmp_path)
    assert code == 2 and "in use" in errors and errors.count("\n") == 1 and not out
