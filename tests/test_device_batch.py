"""The batch on the device, on `plain` operations: the CPU engine's tokens in any company, and no wait."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import MODES, PROBLEMS, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.config.parts import Optimizer
from limbeck.engine import device_batch
from limbeck.engine.block_pool import BlockPool
from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.config import Experts, Latent
from limbeck.model.ops import PlainOps, place, use
from limbeck.model.paged import PagedCache
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.types import LimbeckError, Problem, Sample

FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "before"},
    "hunyuan": {"qk_norm": "after", "share_kv": 2},
    "windows": {"windows": (5, 0)},
    "untied": {"tied": False},
    "gemma3": {
        "windows": (5, 0), "qk_norm": "before", "gelu": True, "norms_from_one": True, "post_norms": True,
        "scaled_embeddings": True, "local_theta": 100.0, "query_scalar": 10.0,
    },
    "experts": {"experts": Experts(4, 2, 16)},
    "latent": {"latent": Latent(8, 6, 4, 5), "kv_heads": 4, "head_dim": 10},
    "deepseek": {
        "latent": Latent(8, 6, 4, 5, q_rank=6), "kv_heads": 4, "head_dim": 10,
        "experts": Experts(
            6, 2, 16, 8, sigmoid=True, balanced=True, normalize=True, scale=1.5, groups=3, top_groups=2,
            dense=(0,),
        ),
    },
}  # fmt: skip
LONG = [Problem(f"long/{i}", " ".join(["say", *"123456" * i, "?"])) for i in (3, 11, 13)]


class Card(PlainOps):
    """Operations of a device with so much free memory."""

    def __init__(self, free: int | None = None):
        self.free = free

    def free_bytes(self, device):
        return self.free


class NoWait(TorchDispatchMode):
    """Forbids every operation whose result the host must wait for, as a captured graph does."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        assert name not in self.WAITS, f"a step waits for {function.name()}"
        return function(*args, **(kwargs or {}))


def same(groups, others) -> None:
    assert tokens_of(groups) == tokens_of(others)
    for group, other in zip(groups, others, strict=True):
        for mine, theirs in zip(group.completions, other.completions, strict=True):
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-6)
            assert mine.stopped == theirs.stopped
            for name in ("kept", "routes"):
                one, two = getattr(mine, name), getattr(theirs, name)
                assert (one is None) == (two is None), name
                if one is not None:
                    assert [np.sort(a).tolist() for a in one] == [np.sort(a).tolist() for a in two], name


def device_engine(model, tokenizer, rows: int, ops: PlainOps | None = None) -> Engine:
    return Engine(use(copy.deepcopy(model), ops or PlainOps()), tokenizer, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpu_engine_s_tokens_in_every_family(decoder, tokenizer, family):
    """Prompts shorter and longer than a block, one of them shared by a group of three."""
    model = decoder(torch.float64, **FAMILIES[family])
    sampling = SamplingParams(max_new_tokens=16)
    problems = [*PROBLEMS, *LONG]
    wanted = Engine(model, tokenizer, 256).rollout(problems, 3, sampling, "seed")
    engine = device_engine(model, tokenizer, 8)
    same(engine.rollout(problems, 3, sampling, "seed"), wanted)
    assert isinstance(engine._device_batch, DeviceBatch) and not engine._device_batch.busy
    assert engine._device_batch.pool.free == engine._device_batch.pool.count


@pytest.mark.parametrize("mode", [*MODES, "forced", "stopped", "everything"])
def test_the_cpu_engine_s_sampling(decoder, tokenizer, mode):
    say = int(tokenizer.prompt("say")[-1]) if mode not in MODES else 0
    others = {
        "forced": SamplingParams(0.7, 1.0, 20, force={say: say + 1, tokenizer.end_id: say}),
        "stopped": SamplingParams(1.0, 1.0, 20, stop_ids=(say, say + 2)),
        "everything": SamplingParams(
            0.7, 0.8, 20, keep_mask=False, force={say: say + 1}, stop_ids=(say + 3,)
        ),
    }
    sampling = MODES[mode] if mode in MODES else others[mode]
    model = decoder(torch.float64)
    wanted = Engine(model, tokenizer, 256).rollout(PROBLEMS, 4, sampling, ("seed", 3))
    same(device_engine(model, tokenizer, 9).rollout(PROBLEMS, 4, sampling, ("seed", 3)), wanted)


def test_neither_rows_nor_the_pool_nor_the_host_s_looks_change_a_completion(decoder, tokenizer, monkeypatch):
    model = decoder(torch.float64)
    sampling = SamplingParams(max_new_tokens=20)
    problems = [*PROBLEMS, *LONG]
    wanted = Engine(model, tokenizer, 256).rollout(problems, 2, sampling, 0)
    block = device_batch.PagedCache.block_bytes(model.config, torch.float64)
    for rows, blocks, poll in ((256, 999, 16), (2, 5, 1), (3, 6, 3), (7, 9, 16)):
        monkeypatch.setattr(device_batch, "POLL", poll)
        free = int(blocks * block / device_batch.POOL_SHARE)
        engine = device_engine(model, tokenizer, rows, Card(free))
        same(engine.rollout(problems, 2, sampling, 0), wanted)
        assert engine._device_batch.pool.count <= blocks
        assert engine._device_batch.poll == poll


def test_the_next_rollout_takes_the_same_batch_and_an_interrupted_one_leaves_nothing(decoder, tokenizer):
    model = decoder(torch.float64)
    engine = device_engine(model, tokenizer, 8)
    sampling = SamplingParams(max_new_tokens=20)
    first = engine.rollout(PROBLEMS, 2, sampling, 0)
    batch = engine._device_batch
    same(engine.rollout(PROBLEMS, 2, sampling, 0), first)
    assert engine._device_batch is batch

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.rollout(PROBLEMS, 2, sampling, 0, stop)
    same(engine.rollout(PROBLEMS, 2, sampling, 0), first)


def test_the_pool_leaves_what_the_learner_will_take(decoder, tokenizer):
    """Moments and gradients that are not there yet; gradients alone once the moments are there."""
    model = decoder()
    learner = Learner(model, Optimizer(), 4)
    weights = list(model.parameters())
    numbers = sum(weight.numel() for weight in weights)
    missing = learner.optimizer.missing_bytes()
    assert missing == 12 * numbers + 4 * len(weights)  # each weight's count of updates, too
    block = PagedCache.block_bytes(model.config, torch.float32)
    engine = device_engine(model, tokenizer, 4, Card(missing + int(10 * block / device_batch.POOL_SHARE)))
    engine.reserve = learner.optimizer.missing_bytes
    engine.rollout(PROBLEMS, 2, SamplingParams(max_new_tokens=100), 0)
    assert engine._device_batch.pool.count == 10
    learner.update(pack([Sample(np.arange(3, 9), start=1)], 64), CrossEntropy())
    assert learner.optimizer.missing_bytes() == 4 * numbers
    tight = device_engine(model, tokenizer, 4, Card(int(10 * block / device_batch.POOL_SHARE)))
    tight.reserve = lambda: 1 << 40
    assert len(tight.rollout(PROBLEMS, 2, SamplingParams(max_new_tokens=100), 0)) == len(PROBLEMS)
    assert tight._device_batch.pool.count == 4  # one group's, though the learner will take all that is free


def test_a_stream_gives_the_completion_in_order(decoder, tokenizer):
    model = decoder(torch.float64)
    sampling = SamplingParams(max_new_tokens=40)
    prompt = tokenizer.prompt(PROBLEMS[0].prompt)
    wanted = list(Engine(model, tokenizer).stream(prompt, sampling, 5))
    engine = device_engine(model, tokenizer, 4)
    assert list(engine.stream(prompt, sampling, 5)) == wanted
    next(engine.stream(prompt, sampling, 5))  # and one that is left early
    assert list(engine.stream(prompt, sampling, 5)) == wanted


def test_each_row_ends_at_its_own_limit(decoder, tokenizer):
    model = use(decoder(torch.float64), PlainOps())
    batch = DeviceBatch(model, tokenizer.end_id, SamplingParams(max_new_tokens=30), 4, 8)
    batch.is_stop_V.zero_()
    prompts = [(i, tokenizer.prompt("say 4 ?")) for i in range(3)]
    with torch.no_grad():
        batch.admit(prompts, np.random.default_rng(0).random((3, 30)), 1, [1, 17, 30])
        ended = []
        while batch.busy:
            ended += batch.step()
    assert batch.sampled_tokens == 1 + 17 + 30
    assert sorted((s.problem, len(s.tokens)) for s in ended) == [(0, 1), (1, 17), (2, 30)]
    assert batch.pool.free == batch.pool.count


def test_a_step_waits_for_nothing(decoder, tokenizer):
    """And no tensor of the batch moves, so that a graph of the step may be replayed."""
    sampling = SamplingParams(0.7, 0.9, 20, force={3: 4})
    for family in ("qwen2", "qwen3", "windows", "deepseek"):
        model = use(decoder(**FAMILIES[family]), PlainOps())
        batch = DeviceBatch(model, tokenizer.end_id, sampling, 6, 8)
        with torch.no_grad():
            batch.admit([(0, tokenizer.prompt("say 4 ?"))], np.random.default_rng(0).random((3, 20)), 3)
            places = [tensor.data_ptr() for tensor in (*batch.state.tensors(), batch.cache.keys)]
            with NoWait():
                batch._step(4)
            batch.step()
        assert places == [tensor.data_ptr() for tensor in (*batch.state.tensors(), batch.cache.keys)]
    with pytest.raises(AssertionError, match="a step waits"), NoWait():
        bool(torch.ones(2).any())


@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_moves_when_weights_are_updated_or_loaded(decoder, tokenizer, family, dtype):
    """So a graph that was captured before a step of learning samples from the weights after it."""
    model = place(decoder(**FAMILIES[family]), "plain", dtype)
    engine = Engine(model, tokenizer, 8)
    learner = Learner(model, Optimizer(), 2)
    sampling = SamplingParams(max_new_tokens=6)
    groups = engine.rollout(PROBLEMS[:2], 2, sampling, 0)
    batch = engine._device_batch

    def places() -> list[int]:
        tensors = [*model.state_dict().values(), *model.buffers(), *batch.state.tensors(), batch.is_stop_V]
        return [tensor.data_ptr() for tensor in (*tensors, batch.cache.keys, batch.cache.values)]

    def values() -> list[torch.Tensor]:
        return [weight.clone() for weight in model.parameters()]

    before, weights = places(), values()
    learner.update(pack(to_samples(groups, [[1.0, -1.0]] * 2, False), 4096), CrossEntropy())
    assert any(not torch.equal(*pair) for pair in zip(weights, values(), strict=True))
    assert places() == before
    engine.load_weights(learner.weights())
    engine.rollout(PROBLEMS[:2], 2, sampling, 1)
    assert engine._device_batch is batch and places() == before
    other = decoder(seed=2, **FAMILIES[family]).to(dtype)
    engine.load_weights(other.state_dict())
    assert places() == before
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), values(), strict=True))


def test_what_a_card_has_no_room_for_is_said(decoder, tokenizer):
    model = decoder()
    engine = device_engine(model, tokenizer, 4, Card(10_000))
    with pytest.raises(LimbeckError, match=r"max_new_tokens: 4 completions of a prompt of \d+ tokens need 0"):
        engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=64), 0)
    with pytest.raises(LimbeckError, match="sampling.presence_penalty: rollouts on a GPU do not apply it"):
        engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=4, presence_penalty=0.5), 0)
    with pytest.raises(LimbeckError, match="speculate: drafts are verified on the CPU only"):
        Engine(use(decoder(predicted=1), PlainOps()), tokenizer, speculate=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_engines_in_16_bits(decoder, tokenizer, dtype):
    """The host's engine and the device's on weights in bf16: log-probabilities come from float32 logits."""
    model = place(decoder(), "cpu", dtype)
    assert model.cos.dtype == torch.float32 and model.ops.on_host
    sampling = SamplingParams(max_new_tokens=12)
    host = Engine(model, tokenizer).rollout(PROBLEMS, 2, sampling, 0)
    device = device_engine(model, tokenizer, 8).rollout(PROBLEMS, 2, sampling, 0)
    close = 0.0
    for group, other in zip(host, device, strict=True):
        for one, two in zip(group.completions, other.completions, strict=True):
            assert one.logprobs.dtype == two.logprobs.dtype == np.float32
            assert len(np.unique(one.logprobs.view(np.int32) & 0xFFFF)) > 1 or len(one.logprobs) < 2
            if one.tokens[0] == two.tokens[0]:
                close = max(close, abs(one.logprobs[0] - two.logprobs[0]))
    assert close < (0.1 if dtype == torch.bfloat16 else 1e-4)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(1, 4)), max_size=40))
def test_no_block_is_leaked_shared_or_freed_twice(actions):
    """Against the naive account: the set of blocks of each reader."""
    pool = BlockPool(2, 24)
    rows: list[list[int]] = []
    for take, count, readers in actions:
        if take:
            if count > pool.free:
                with pytest.raises(IndexError):
                    pool.take(count, readers)
                continue
            before = set().union(*rows)
            blocks = pool.take(count, readers)
            assert len(set(blocks)) == count and not before & set(blocks)
            assert all(2 <= block < 26 for block in blocks)
            rows += [blocks] * readers
        elif rows:
            pool.release(rows.pop(count % len(rows)))
        held = set().union(*rows)
        assert pool.free == 24 - len(held)
        assert set(pool.readers) == held
    for blocks in rows:
        pool.release(blocks)
    assert pool.free == 24 and not pool.readers
    with pytest.raises(KeyError):
        pool.release([2])
