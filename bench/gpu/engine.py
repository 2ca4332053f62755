"""The engine on a card: decode steps, rollouts, nano-vllm's workload, and transformers beside it."""

from __future__ import annotations

import signal
import time

import numpy as np
import torch

from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.ops.table import BLOCK
from limbeck.train.batch import pack, to_samples
from limbeck.train.scorer import Scorer
from limbeck.types import Group

from .models import Ids, decoder, nano_vllm_workload, problems
from .report import free_memory, note, once, peak, promise, seconds

RATE = 2.9e12  # bytes a second that an H100 copies, for the floor of a decode step
CONTEXT = 1000  # tokens in each row of a decode step
PEER_SECONDS = 60  # after which the peer is given up
PEER_TOKENS = 256  # tokens of each of the peer's sequences


def decode_part(quick: bool) -> None:
    """Time a captured step beside its floor, the bytes of weights, keys and values, 1,000 tokens a row."""
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B", "7B"):
        model = decoder(shape)
        sizes = model.config
        weights = 2 * sum(p.numel() for p in model.parameters())
        if not sizes.tied:
            weights -= 2 * model.embed.weight.numel()  # of which a step reads a few rows
        for rows in (1, 64, 256):
            batch = DeviceBatch(model, 0, SamplingParams(max_new_tokens=64), rows, CONTEXT)
            prompts = [(i, np.arange(1, CONTEXT + 1)) for i in range(rows)]
            with torch.no_grad():
                batch.admit(prompts, np.random.rand(rows, 64), 1)
                step = batch.capture(rows)
            cached = 4 * sizes.layers * rows * CONTEXT * sizes.kv_heads * sizes.head_dim
            floor_ms = (weights + cached) / RATE * 1e3
            took = seconds(step, 20) * 1e3
            note("decode", shape=shape, rows=rows, ms=took, floor_ms=floor_ms, share=floor_ms / took)
            del batch, step
            free_memory()
        del model
        free_memory()


def rollout_part(quick: bool) -> None:
    """Sample 32 groups of 8 x 256 tokens; compare them alone, and with the learner's forward pass."""
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B"):
        _rollout(shape)
        free_memory()


def _rollout(shape: str) -> None:
    """Run the part for one shape."""
    model = decoder(shape)
    engine = Engine(model, Ids(), rows=256)
    sampling = SamplingParams(max_new_tokens=256)
    few = problems(32, 120)
    engine.rollout(few, 8, sampling, 0)
    groups: list[Group] = []
    took = once(lambda: groups.extend(engine.rollout(few, 8, sampling, 1)))
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    note("rollout", shape=shape, tokens=tokens, seconds=took, tokens_s=round(tokens / took), GiB=peak())
    alone = engine.rollout(few[:2], 8, sampling, 1)
    same = all(
        np.array_equal(c.tokens, d.tokens) and np.array_equal(c.logprobs, d.logprobs)
        for g, h in zip(groups, alone, strict=False)
        for c, d in zip(g.completions, h.completions, strict=True)
    )
    promise("rollout", f"{shape}: the same tokens and bits alone and in company", same)
    _parity(shape, model, groups)
    promise("rollout", f"{shape}: a step never waits for the host", _never_waits(engine))


def _parity(shape: str, model, groups: list[Group]) -> None:
    """Compare the log-probabilities of a rollout with those of the learner."""
    samples = to_samples(groups, [[0.5, -0.5] * 4] * len(groups), False)
    batches = pack(samples, 16384, "cuda")
    equal = total = 0
    worst = 0.0
    for batch, logprobs_M in zip(batches, Scorer(model).logprobs(batches), strict=True):
        equal += int((logprobs_M == batch.logprobs_M).sum())
        total += len(logprobs_M)
        worst = max(worst, float((logprobs_M - batch.logprobs_M).abs().max()))
    note("rollout", shape=shape, equal_bits=equal / total, tokens=total, worst=worst)
    promise("rollout", f"{shape}: sampler = learner, bit for bit", equal == total)


def _never_waits(engine: Engine) -> bool:
    """Return True if steps run while waiting for the card is an error."""
    batch = engine._device_batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            batch._steps[max(batch._steps)]()
    except RuntimeError as problem:
        note("rollout", waits=str(problem)[:100])
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def workload_part(quick: bool) -> None:
    """nano-vllm's workload in a Qwen3-0.6B shape: 256 sequences of 100 to 1,024 tokens in and out."""
    prompts, limits = nano_vllm_workload()
    model = decoder("0.6B")
    blocks = sum(-(-(len(p) + n) // BLOCK) for p, n in zip(prompts, limits, strict=True))
    sampling = SamplingParams(temperature=0.6, max_new_tokens=1024)
    batch = DeviceBatch(model, 151935, sampling, 256, 1024, blocks)
    batch.is_stop_V.zero_()
    for turn in ("first", "captured"):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        done = 0
        with torch.no_grad():
            tokens = [(i, np.array(p)) for i, p in enumerate(prompts)]
            batch.admit(tokens, np.random.rand(256, 1024), 1, limits)
            torch.cuda.synchronize()
            prefilled = time.perf_counter() - begin
            while batch.busy:
                done += sum(len(sequence.tokens) for sequence in batch.step())
        took = time.perf_counter() - begin
        rate = round(done / took)
        note("workload", turn=turn, tokens=done, seconds=took, prefill_s=prefilled, tokens_s=rate, GiB=peak())
    promise("workload", "every sequence has its number of tokens", done == sum(limits))


def peer_part(quick: bool) -> None:
    """64 prompts of nano-vllm's workload, 256 tokens each: transformers' continuous batching, and Limbeck."""
    prompts = nano_vllm_workload()[0][:64]
    ours = _ours(prompts)
    free_memory()
    try:
        theirs = _theirs(prompts)
    except Exception as problem:  # noqa: BLE001
        note("peer", transformers=f"could not be measured: {type(problem).__name__}: {str(problem)[:200]}")
        return
    note("peer", ratio=ours / theirs)


def _ours(prompts: list[list[int]]) -> float:
    """Return Limbeck's tokens a second, its graphs captured."""
    model = decoder("0.6B")
    sampling = SamplingParams(temperature=0.6, max_new_tokens=PEER_TOKENS)
    batch = DeviceBatch(model, 151935, sampling, len(prompts), 1024)
    batch.is_stop_V.zero_()

    def run() -> None:
        tokens = [(i, np.array(p)) for i, p in enumerate(prompts)]
        batch.admit(tokens, np.random.rand(len(prompts), PEER_TOKENS), 1)
        while batch.busy:
            batch.step()

    with torch.no_grad():
        run()
        took = once(run)
    rate = len(prompts) * PEER_TOKENS / took
    note("peer", limbeck_tokens_s=round(rate), seconds=took)
    return rate


def _theirs(prompts: list[list[int]]) -> float:
    """Return the tokens a second of transformers' continuous batching, on its second turn."""
    import transformers

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer in {PEER_SECONDS} s")

    config = transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    settings = transformers.GenerationConfig(
        max_new_tokens=PEER_TOKENS, do_sample=True, temperature=0.6, eos_token_id=-1, pad_token_id=0
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    finally:
        torch.set_default_dtype(torch.float32)
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PEER_SECONDS)
    try:
        for _ in range(2):
            outputs: dict = {}
            took = once(
                lambda: outputs.update(model.generate_batch(inputs=prompts, generation_config=settings))  # noqa: B023
            )
    finally:
        signal.alarm(0)
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    note(
        "peer",
        transformers=transformers.__version__,
        tokens=tokens,
        tokens_s=round(tokens / took),
        seconds=took,
    )
    return tokens / took
