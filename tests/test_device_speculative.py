"""Drafts on the device, on `plain` operations: the tokens of plain decoding, the CPU's drafts, no wait."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_device_batch import FAMILIES, LONG, Card, NoWait, same
from test_engine import MODES, PROBLEMS

from limbeck.engine import device_batch
from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.device_speculative import DeviceSpeculation
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.ops import PlainOps, use
from limbeck.model.ops.table import BLOCK
from limbeck.types import LimbeckError

KINDS = ("qwen2", "windows", "latent", "deepseek")
SAMPLING = SamplingParams(max_new_tokens=20)


@pytest.fixture
def talker(decoder):
    """`talker(family)`: a model whose next tokens are nearly open, so that draws from the module's states and
    from the model's own are the same token about as often as not."""

    def build(family: str):
        model = decoder(torch.float64, predicted=1, **FAMILIES[family])
        with torch.no_grad():
            model.norm.weight.mul_(0.15)
            model.ahead[0].head_norm.weight.mul_(0.15)
        return model

    return build


def engines(model, tokenizer, rows: int = 8, ops: PlainOps | None = None) -> tuple[Engine, Engine]:
    """One that decodes plainly on the device, and one that drafts."""
    model = use(copy.deepcopy(model), ops or PlainOps())
    return Engine(model, tokenizer, rows), Engine(model, tokenizer, rows, speculate=True)


def batch_of(model, tokenizer, kind=DeviceSpeculation, sampling=SAMPLING, **settings) -> DeviceBatch:
    batch = kind(use(model, PlainOps()), tokenizer.end_id, sampling, 6, 2 * BLOCK + 2, **settings)
    batch.is_stop_V.zero_()
    return batch


def finished(batch: DeviceBatch) -> list:
    """The sequences of all rows, in order; every block is free afterwards."""
    ended = []
    while batch.busy:
        ended += batch.step()
    assert batch.pool.free == batch.pool.count
    return sorted(ended, key=lambda sequence: (sequence.problem, sequence.sample))


@pytest.mark.parametrize("family", KINDS)
def test_drafts_change_no_token_and_are_those_of_the_cpu(talker, tokenizer, family):
    model = talker(family)
    problems = [*PROBLEMS, *LONG]
    host = Engine(model, tokenizer, 256, speculate=True)
    host.rollout(problems, 3, SAMPLING, "seed")
    plain, bold = engines(model, tokenizer)
    wanted = plain.rollout(problems, 3, SAMPLING, "seed")
    same(bold.rollout(problems, 3, SAMPLING, "seed"), wanted)
    assert isinstance(bold._device_batch, DeviceSpeculation) and not bold._device_batch.busy
    assert bold._device_batch.pool.free == bold._device_batch.pool.count
    assert (bold.drafted, bold.accepted) == (host.drafted, host.accepted)
    assert 0.1 < bold.acceptance < 0.9
    assert bold.take_usage() == {"accepted_drafts": host.acceptance}
    same(bold.rollout(problems, 3, SAMPLING, "seed"), wanted)  # with the same batch, which counts anew
    assert (bold.drafted, bold.accepted) == (host.drafted, host.accepted)


@pytest.mark.parametrize("mode", [*MODES, "forced", "stopped", "everything"])
def test_every_way_of_sampling(talker, tokenizer, mode):
    say = int(tokenizer.prompt("say")[-1])
    others = {
        "forced": SamplingParams(0.7, 1.0, 20, force={say: say + 1, tokenizer.end_id: say, 0: 5}),
        "stopped": SamplingParams(1.0, 1.0, 20, stop_ids=(say, say + 2)),
        "everything": SamplingParams(0.7, 0.8, 20, True, {say: say + 1}, (say + 3,), 9, 0.02),
    }
    sampling = MODES[mode] if mode in MODES else others[mode]
    plain, bold = engines(talker("deepseek"), tokenizer, 9)
    same(bold.rollout(PROBLEMS, 4, sampling, 3), plain.rollout(PROBLEMS, 4, sampling, 3))
    assert bold.drafted > 50
    prompt = tokenizer.prompt("say 4 ?")
    assert list(bold.stream(prompt, sampling, 1)) == list(plain.stream(prompt, sampling, 1))


@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
def test_neither_rows_nor_the_pool_nor_the_host_s_looks_change_a_completion(
    talker, tokenizer, family, monkeypatch
):
    model = talker(family)
    problems = [*PROBLEMS, *LONG]
    wanted = engines(model, tokenizer)[0].rollout(problems, 2, SAMPLING, 0)
    block = device_batch.PagedCache.block_bytes(model.config, torch.float64, 1)
    for rows, blocks, poll in ((256, 999, 16), (2, 5, 1), (3, 6, 3), (7, 9, 5)):
        monkeypatch.setattr(device_batch, "POLL", poll)
        card = Card(int(blocks * block / device_batch.POOL_SHARE))
        engine = engines(model, tokenizer, rows, card)[1]
        same(engine.rollout(problems, 2, SAMPLING, 0), wanted)
        assert engine._device_batch.pool.count <= blocks


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "latent"])
def test_prompts_around_a_block_and_limits_of_each_row(talker, tokenizer, family):
    """Prompts of one token, and of as many as fill a block or nearly; each row ends at its limit, the last
    one with the last position that the model has."""
    model = talker(family)
    assert model.config.max_positions == 2 * BLOCK
    random = np.random.default_rng(0)
    lengths = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 20)
    limits = [1, 2, 3, 19, 20, 20]
    prompts = [(i, random.integers(3, tokenizer.size, length)) for i, length in enumerate(lengths)]
    for i in range(0, 6, 2):
        ended = []
        for kind in (DeviceBatch, DeviceSpeculation):
            batch = batch_of(model, tokenizer, kind, poll=3)
            numbers = np.random.default_rng(i).random((6, 20))
            batch.admit(prompts[i : i + 2], numbers, 3, limits[i : i + 2])
            if kind is DeviceSpeculation:  # no row writes into a block of another
                block_B1 = batch.state.lengths_B[:, None].long() // BLOCK
                assert len(batch.state.table.gather(1, block_B1).unique()) == 6
            ended.append(finished(batch))
            assert batch.sampled_tokens == 3 * sum(limits[i : i + 2])
        for one, other in zip(*ended, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert len(one.tokens) == limits[one.problem]
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


@torch.no_grad()
def test_a_draft_that_is_not_accepted_leaves_nothing(talker, tokenizer, monkeypatch):
    """What it wrote beyond a row's length may be anything: no later state depends on it."""
    model = talker("deepseek")
    prompts = [(0, tokenizer.prompt("say 4 ?"))]
    random = np.random.default_rng(0).random((6, 20))
    batch = batch_of(model, tokenizer)
    batch.admit(prompts, random, 6)
    wanted = [sequence.tokens.tolist() for sequence in finished(batch)]

    def step(batch: DeviceSpeculation, rows: int) -> None:
        DeviceSpeculation._step(batch, rows)
        state = batch.state
        for row in range(batch.busy):
            position = int(state.lengths_B[row])
            slot = int(state.table[row, position // BLOCK]) + position % BLOCK
            batch.cache.keys[:, slot] = 1e3
            batch.cache.values[:, slot] = 1e3

    batch = batch_of(model, tokenizer, poll=1)
    batch.admit(prompts, random, 6)
    monkeypatch.setattr(batch, "_step", lambda rows: step(batch, rows))
    assert [sequence.tokens.tolist() for sequence in finished(batch)] == wanted
    assert 0 < batch.accepted < batch.drafted


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "experts", "deepseek"])
def test_a_step_waits_for_nothing(talker, tokenizer, family):
    """And no tensor of the batch moves, so that a graph of the step may be replayed; a step of rows that have
    ended changes nothing, so that it may be captured."""
    model = talker(family)
    batch = batch_of(model, tokenizer, sampling=SamplingParams(0.7, 0.9, 20, True, {3: 4}, top_k=9))
    batch.admit([(0, tokenizer.prompt("say 4 ?"))], np.random.default_rng(0).random((3, 20)), 3)

    def tensors() -> list[torch.Tensor]:
        return [*batch.state.tensors(), batch.cache.keys, batch.cache.values, batch._counts, batch._mask_BSV]

    places = [tensor.data_ptr() for tensor in tensors()]
    before = [tensor.clone() for tensor in (*batch.state.tensors(), batch._counts)]
    batch.capture(4)()
    changed = [tensor.clone() for tensor in (*batch.state.tensors(), batch._counts)]
    assert not all(map(torch.equal, before, changed))
    with NoWait():
        batch._step(4)
    assert places == [tensor.data_ptr() for tensor in tensors()]
    batch.state.alive_B.zero_()
    fixed = ("tokens_BT", "logprobs_BT", "previous_B", "sampled_B", "alive_B", "lengths_B", "table")
    still = [getattr(batch.state, name).clone() for name in fixed] + [batch._counts.clone()]
    batch._step(4)
    after = [getattr(batch.state, name) for name in fixed] + [batch._counts]
    assert all(map(torch.equal, still, after))


@torch.no_grad()
def test_the_steps_that_good_drafts_save(talker, tokenizer):
    """A model whose next token depends on nothing is easy to foresee: ten steps for twenty tokens."""
    model = talker("qwen2")
    model.norm.weight.zero_()
    model.ahead[0].head_norm.weight.zero_()
    batch = batch_of(model, tokenizer, poll=1)
    batch.admit([(0, tokenizer.prompt("say 4 ?"))], np.random.default_rng(0).random((2, 20)), 2)
    for _ in range(10):
        assert batch.busy
        batch.step()
    assert not batch.busy and batch.sampled_tokens == 40
    assert batch.drafted == batch.accepted == 20


def test_what_there_is_no_room_for_is_said(talker, tokenizer):
    engine = engines(talker("qwen2"), tokenizer, 4, Card(10_000))[1]
    with pytest.raises(LimbeckError, match=r"max_new_tokens: 4 completions of a prompt of \d+ tokens need 0"):
        engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=64), 0)
    with pytest.raises(LimbeckError, match="sampling.presence_penalty: rollouts on a GPU do not apply it"):
        engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=4, presence_penalty=0.5), 0)
