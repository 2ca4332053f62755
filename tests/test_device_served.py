"""A server whose models lie on a device (`plain`): the CPU's answers over HTTP, and what it says when the
device has no room or fails."""

from __future__ import annotations

import asyncio
import os
import socket
import threading

import httpx
import openai
import pytest
import torch
from served import QUESTION, save, server, slowly, soon
from test_devices import FULL

from limbeck.engine.device_scheduler import DeviceScheduler
from limbeck.engine.device_serving import DeviceServingBatch
from limbeck.model.ops import PlainOps, devices
from limbeck.runtime import card_lock
from limbeck.serve import models
from limbeck.types import LimbeckError, Resumable

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": QUESTION}]
KINDS = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.6, "top_p": 0.9, "extra_body": {"top_k": 7, "min_p": 0.01}},
    {"temperature": 0.0, "extra_body": {"repetition_penalty": 1.3}},
    {"temperature": 0.9, "presence_penalty": 0.8, "frequency_penalty": 0.3, "stop": ["4 5", "1 1"]},
]


def block_bytes(monkeypatch, blocks: int) -> None:
    """Let devices have room for so many blocks of the tiny models."""
    each = 2 * 64 * 2 * (8 + 8) * 4
    monkeypatch.setattr(
        PlainOps, "free_bytes", lambda self, device: int(blocks * each / models.CARD_SHARE) + 1
    )


async def listen(client: openai.AsyncOpenAI, seed: int) -> str:
    """One streamed answer; its kind of sampling follows the seed."""
    text = ""
    kind = KINDS[seed % len(KINDS)]
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, seed=seed, max_tokens=40, stream=True, **kind
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    return text


def test_16_streams_at_once_say_what_the_cpu_says_to_each_alone(tmp_path, tokenizer):
    folder = save(tmp_path / "m", tokenizer)

    async def together(client) -> list[str]:
        async with client:
            return await asyncio.gather(*(listen(client, seed) for seed in range(16)))

    async def alone(client) -> list[str]:
        async with client:
            return [await listen(client, seed) for seed in range(16)]

    with server(tmp_path, f"m={folder}") as found:
        wanted = asyncio.run(alone(openai.AsyncOpenAI(**found.client)))
    with server(tmp_path, f"m={folder}", device="plain") as found:
        scheduler = found.service.models["m"].scheduler
        assert isinstance(scheduler, DeviceScheduler)
        with slowly(found.service, "m", 0.01):
            told = asyncio.run(together(openai.AsyncOpenAI(**found.client)))
        assert asyncio.run(alone(openai.AsyncOpenAI(**found.client))) == told
        pool = scheduler.serving_batch.pool
        soon(lambda: not scheduler.busy, 30)
        assert pool.free == pool.count
    assert (
        sum(one == two for one, two in zip(told, wanted, strict=True)) >= 15
    )  # a draw may fall on a rounding


def test_a_client_that_leaves_frees_its_blocks_and_thoughts_have_budgets(tmp_path, tokenizer):
    folder = save(tmp_path / "m", tokenizer, opens=True)
    with server(tmp_path, f"m={folder}", device="plain") as found:
        scheduler, client = found.service.models["m"].scheduler, openai.OpenAI(**found.client)
        pool = scheduler.serving_batch.pool
        asked = {"model": "m", "messages": MESSAGES, "stream": True, "max_tokens": 3000}
        with slowly(found.service, "m", 0.02):
            stream = client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
            next(iter(stream))
            soon(lambda: scheduler.busy == 1, 30)
            assert pool.free < pool.count
            stream.close()
            soon(lambda: scheduler.busy == 0, 30)
        assert pool.free == pool.count
        answer = client.chat.completions.create(
            model="m",
            messages=MESSAGES,
            max_tokens=60,
            seed=1,
            extra_body={"thinking_budget": 5, "ignore_eos": True},
        )
        assert answer.usage.completion_tokens_details.reasoning_tokens == 6


def test_a_full_memory_is_503_for_one_request_and_the_server_lives_on(tmp_path, tokenizer, monkeypatch):
    folder = save(tmp_path / "m", tokenizer)
    with server(tmp_path, f"m={folder}", device="plain") as found:
        client = openai.OpenAI(**found.client)
        asked = {"model": "m", "messages": MESSAGES, "max_tokens": 5}

        def fail(*arguments):
            raise torch.OutOfMemoryError(FULL)

        for stream in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(DeviceServingBatch, "prefill", fail)
                with pytest.raises(openai.APIError, match="2.50 GiB more were asked for") as caught:
                    list(client.chat.completions.create(**asked, stream=stream))
            assert stream or (caught.value.status_code, caught.value.code) == (503, "out_of_memory")
        assert client.chat.completions.create(**asked).usage.completion_tokens <= 5


def test_a_model_that_has_no_room_beside_the_others_is_503(tmp_path, tokenizer, monkeypatch):
    one, two = (save(tmp_path / name, tokenizer) for name in ("one", "two"))
    load = models.weights.load_onto

    def full(folder, device):
        if folder.name == "two":
            raise torch.OutOfMemoryError(FULL)
        return load(folder, device)

    monkeypatch.setattr(models.weights, "load_onto", full)
    with server(tmp_path, f"one={one}", f"two={two}", device="plain") as found:
        client = openai.OpenAI(**found.client)
        assert [model.id for model in client.models.list()] == ["one"]
        asked = {"messages": MESSAGES, "max_tokens": 5}
        with pytest.raises(
            openai.APIStatusError, match="two is not served: the card's memory is full"
        ) as caught:
            client.chat.completions.create(model="two", **asked)
        assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
        assert client.chat.completions.create(model="one", **asked).usage.completion_tokens <= 5


def test_a_pool_without_room_for_one_answer_is_said_before_anything_is_served(
    tmp_path, tokenizer, monkeypatch
):
    folder = save(tmp_path / "m", tokenizer)
    block_bytes(monkeypatch, 31)
    with pytest.raises(
        LimbeckError, match=r"m is not served: an answer of 2048 tokens needs 0.\d+ GiB for keys"
    ):
        models.open_service([f"m={folder}"], tmp_path / "runs", threads=1, device="plain")
    block_bytes(monkeypatch, 33)
    with server(tmp_path, f"m={folder}", device="plain") as found:
        scheduler = found.service.models["m"].scheduler
        assert scheduler.serving_batch.pool.count == 33
        with pytest.raises(openai.BadRequestError, match="max_tokens: a prompt of"):
            openai.OpenAI(**found.client).chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=3000
            )


def test_a_card_that_fails_ends_the_server_with_one_sentence(tmp_path, tokenizer, monkeypatch, call):
    folder = save(tmp_path / "m", tokenizer)
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nSearch for it")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(models, "_warm_up", lambda scheduler: None)
    monkeypatch.setattr(DeviceServingBatch, "_advance", fail)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    replies = []

    def ask() -> None:
        url = f"http://127.0.0.1:{port}"
        soon(lambda: _answers(url), 60)
        body = {"model": "m", "messages": MESSAGES}
        replies.append(httpx.post(url + "/v1/chat/completions", json=body, timeout=60))

    client = threading.Thread(target=ask)
    client.start()
    arguments = [
        "serve",
        f"m={folder}",
        "--device",
        "plain",
        "--port",
        port,
        "--runs",
        tmp_path,
        "--threads",
        1,
    ]
    ended = call(*arguments)
    client.join(60)
    assert ended.code == 75
    assert ended.err.strip().endswith(
        "the card failed (CUDA error: an illegal memory access was encountered), and this process cannot use "
        "it any more; start the server again"
    )
    assert replies[0].status_code == 500 and "m could not go on: CUDA error" in replies[0].text


def _answers(url: str) -> bool:
    """Whether a server answers at an address."""
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_the_studio_alone_takes_no_device(call):
    ended = call("serve", "--device", "cuda")
    assert ended.code == 2 and "--device cuda: the studio alone computes nothing; name a model" in ended.err


def test_who_computes_on_a_card_says_so_to_those_that_wait(tmp_path, monkeypatch):
    done = []
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    for name in ("identity", "prepare"):
        monkeypatch.setattr(devices, name, lambda device: "GPU-1")
    monkeypatch.setattr(devices, "release", lambda: done.append("release"))
    told = []

    def held(owner, stop=lambda: False):
        return card_lock.device_lock("cuda:0", owner, told.append, stop)

    with held("limbeck serve r1"), pytest.raises(Resumable), held("stage zero in runs", lambda: bool(told)):
        pass
    assert told == [f"waits for the card, which limbeck serve r1 (process {os.getpid()}) uses"]
    assert done == ["release"]
    with pytest.raises(RuntimeError), held("limbeck serve r1"):
        raise RuntimeError("CUDA error: unspecified launch failure")  # nothing more is asked of the card
    assert done == ["release"]
    with card_lock.device_lock("plain", "", told.append):
        assert not (tmp_path / "card-plain.lock").exists()
