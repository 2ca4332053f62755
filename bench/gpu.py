"""Measurements on one NVIDIA card: what is exact, and what it costs. `python -m bench.gpu [part …]`.

Every part prints its floor first (memory or arithmetic at the measured rates of the card), then what was
measured. `--out FILE` writes all numbers as JSON.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch

from limbeck.model.cuda import attention, products, sampling
from limbeck.model.ops.plain import BLOCK

SHAPES = {  # hidden, layers, heads, key heads, head size, intermediate, vocabulary
    "0.5B": (896, 24, 14, 2, 64, 4864, 151936),
    "1.5B": (1536, 28, 12, 2, 128, 8960, 151936),
    "7B": (3584, 28, 28, 4, 128, 18944, 152064),
}
ROWS = (1, 2, 17, 64, 256, 2048)
RESULTS: dict = {}


def note(part: str, **numbers) -> None:
    """Print one line of numbers and keep it for the JSON file."""
    RESULTS.setdefault(part, []).append(numbers)
    words = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in numbers.items())
    print(f"[{part}]", *words, flush=True)


def microseconds(call, repeats: int = 20, calls: int = 10) -> float:
    """Return the median device time of `call` in microseconds, from replays of a CUDA graph of calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return sorted(times)[len(times) // 2]


def seconds(call, repeats: int = 10) -> float:
    """Return the median time of `call` in seconds, without a graph."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def floor() -> None:
    """Measure the card's copy rate and its rate of bf16 products."""
    import triton

    card = torch.cuda.get_device_properties(0)
    note("floor", card=card.name, processors=card.multi_processor_count, torch=torch.__version__,
         triton=triton.__version__, cuda=torch.version.cuda)
    x = torch.randn(1 << 29, device="cuda", dtype=torch.float32)
    y = torch.empty_like(x)
    took = seconds(lambda: y.copy_(x))
    note("floor", copy_TB_s=2 * x.numel() * 4 / took / 1e12)
    del x, y
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    took = seconds(lambda: a @ a)
    note("floor", product_TFLOP_s=2 * 8192**3 / took / 1e12)


def weights(shape: str):
    """Yield the name and the size (rows, columns) of each kind of weight of a model."""
    hidden, _, heads, kv_heads, width, inner, _ = SHAPES[shape]
    yield "qkv", (heads + 2 * kv_heads) * width, hidden
    yield "out", hidden, heads * width
    yield "gate_up", 2 * inner, hidden
    yield "down", hidden, inner


def routes():
    """Return the ways to compute a product, by name."""
    F = torch.nn.functional

    def split_off(x, w):
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
        y = F.linear(x, w)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (True, True)
        torch.backends.cuda.preferred_blas_library("cublas")
        return y

    return {"triton": products.linear, "cublas": F.linear, "cublaslt_split_off": split_off}


def product_bits() -> None:
    """Compare the bits of the same rows computed alone and in company, for every route and weight."""
    exact = {}
    for shape in SHAPES:
        for name, columns, inner in weights(shape):
            w = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5
            x = torch.randn(ROWS[-1], inner, device="cuda", dtype=torch.bfloat16)
            for route, call in routes().items():
                whole = call(x, w)
                same = [rows for rows in ROWS if torch.equal(call(x[:rows], w), whole[:rows])]
                exact.setdefault(route, []).append(len(same) == len(ROWS))
                costs = {f"us{rows}": round(microseconds(lambda: call(x[:rows], w)), 1) for rows in (1, 64, 256, 2048)}
                floor_us = columns * inner * 2 / 3.0e6
                note("products", shape=shape, weight=name, route=route, same=same, floor_us=round(floor_us, 1), **costs)
    note("products", exact={route: f"{sum(each)}/{len(each)}" for route, each in exact.items()})


def attention_part() -> None:
    """Check attention against float64, its bits in decoding against a whole pass, and its rate."""
    for shape, (_, _, heads, kv_heads, width, _, _) in SHAPES.items():
        length, count = 700, 4
        keys, values, table = blocks(count, length, kv_heads, width)
        q = torch.randn(count * length, heads, width, device="cuda", dtype=torch.bfloat16) * 2
        starts = torch.arange(0, count * length + 1, length, device="cuda", dtype=torch.int32)
        lengths = torch.full((count,), length, device="cuda", dtype=torch.int32)
        scale = width**-0.5
        places = (table.long()[:, :, None] + torch.arange(BLOCK, device="cuda")).flatten(1)[:, :length]
        k, v = (x[places].transpose(1, 2).double() for x in (keys, values))
        qd = q.view(count, length, heads, width).transpose(1, 2).double()
        right = torch.nn.functional.scaled_dot_product_attention(qd, k, v, is_causal=True, scale=scale, enable_gqa=True)
        right = right.transpose(1, 2).flatten(0, 1)
        for window in (0, 100):
            outs = {}
            for block_m in (16, 32, 64, 128):
                out, lse = attention.attend(q, keys, values, table, starts, lengths, scale, length, window, block_m)
                us = microseconds(lambda: attention.attend(q, keys, values, table, starts, lengths, scale, length, window, block_m), 5)
                outs[block_m] = out
                note("attention", shape=shape, window=window, block_m=block_m, us=round(us),
                     error=float((out.double() - right).norm() / right.norm()) if not window else -1.0)
            ones = torch.empty_like(q)
            for pick in range(length):
                rows = torch.arange(count, device="cuda") * length + pick
                seen = torch.full((count,), pick + 1, device="cuda", dtype=torch.int32)
                ones[rows] = attention.attend_one(q[rows], keys, values, table, seen, scale, window)
            note("attention", shape=shape, window=window,
                 differ={block_m: int((out != ones).sum()) for block_m, out in outs.items()}, of=ones.numel())
        for rows in (1, 64, 256):
            keys, values, table = blocks(rows, 1024, kv_heads, width)
            q = torch.randn(rows, heads, width, device="cuda", dtype=torch.bfloat16)
            lengths = torch.full((rows,), 1024, device="cuda", dtype=torch.int32)
            us = microseconds(lambda: attention.attend_one(q, keys, values, table, lengths, scale), 5)
            note("attention", shape=shape, decode_rows=rows, us=round(us, 1), TB_s=4 * keys.numel() / us / 1e6)


def blocks(rows: int, length: int, kv_heads: int, width: int):
    """Return keys, values and a table for `rows` rows of `length` tokens in shuffled blocks."""
    each = -(-length // BLOCK)
    keys = torch.randn(rows * each * BLOCK, kv_heads, width, device="cuda", dtype=torch.bfloat16)
    table = BLOCK * torch.randperm(rows * each, device="cuda").int().view(rows, each)
    return keys, torch.randn_like(keys), table


CONFIGS = {
    "0.5B": dict(family="qwen2", vocab_size=151936, hidden_size=896, layers=24, heads=14, kv_heads=2, head_dim=64,
                 intermediate_size=4864, qkv_bias=True),
    "0.6B": dict(family="qwen3", vocab_size=151936, hidden_size=1024, layers=28, heads=16, kv_heads=8, head_dim=128,
                 intermediate_size=3072, qk_norm="before"),
    "1.5B": dict(family="qwen2", vocab_size=151936, hidden_size=1536, layers=28, heads=12, kv_heads=2, head_dim=128,
                 intermediate_size=8960, qkv_bias=True),
    "4B": dict(family="qwen3", vocab_size=151936, hidden_size=2560, layers=36, heads=32, kv_heads=8, head_dim=128,
               intermediate_size=9728, qk_norm="before"),
    "7B": dict(family="qwen2", vocab_size=152064, hidden_size=3584, layers=28, heads=28, kv_heads=4, head_dim=128,
               intermediate_size=18944, qkv_bias=True, tied=False),
}


def decoder(shape: str, positions: int = 4096):
    """Return a decoder of random weights on the card, with a head that makes its distributions peaked."""
    from limbeck.model.config import ModelConfig
    from limbeck.model.decoder import Decoder
    from limbeck.model.ops import place

    config = ModelConfig(**CONFIGS[shape], rope_theta=1e6, max_positions=positions)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Decoder(config)
    torch.set_default_dtype(torch.float32)
    from limbeck.model.decoder import rope_table

    model.cos, model.sin = (x.cuda() for x in rope_table(config))
    random = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                scale = 0.1 if "embed" in name else weight.shape[-1] ** -0.5
                weight.normal_(0.0, scale, generator=random)
            elif "bias" in name:
                weight.normal_(0.0, 0.1, generator=random)
    return place(model, "cuda")


class Ids:
    """A tokenizer whose texts are token ids."""

    end_id = 0

    def prompt(self, text: str):
        return np.array([int(word) for word in text.split()])

    def decode(self, tokens) -> str:
        return ""


def problems(count: int, length: int, seed: int = 0):
    """Return problems of random token ids."""
    from limbeck.types import Problem

    random = np.random.default_rng(seed)
    return [
        Problem(id=f"{seed}-{i}", prompt=" ".join(map(str, random.integers(1, 10000, length + i % 7))))
        for i in range(count)
    ]


def tune_part() -> None:
    """Time tiles for every weight of the shapes and every bucket of rows; use the fastest from here on."""
    few = [(16, 16, 2, 5), (16, 32, 2, 5), (16, 32, 4, 5), (16, 16, 4, 6)]
    some = [(32, 32, 4, 5), (64, 16, 4, 5), (64, 32, 4, 5), (64, 64, 4, 4), (64, 128, 4, 4)]
    many = [(64, 64, 4, 4), (128, 64, 4, 4), (128, 128, 8, 4), (128, 128, 4, 3), (128, 256, 8, 3)]
    for shape, given in CONFIGS.items():
        config = {"qkv_bias": False, **given}
        hidden, heads, kv = config["hidden_size"], config["heads"], config["kv_heads"]
        width, inner, vocabulary = config["head_dim"], config["intermediate_size"], config["vocab_size"]
        sizes = {"qkv": ((heads + 2 * kv) * width, hidden), "out": (hidden, heads * width),
                 "gate_up": (2 * inner, hidden), "down": (hidden, inner), "head": (vocabulary, hidden)}
        for name, (columns, inputs) in sizes.items():
            w = torch.randn(columns, inputs, device="cuda", dtype=torch.bfloat16)
            dtype = torch.float32 if name == "head" else torch.bfloat16
            spans = -(-inputs // products.span(inputs))
            for rows in (1, 64, 256, 8192 if name != "head" else 512):
                x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
                trials = []
                for tile in few if rows <= 16 else some if rows <= 64 else many:
                    for split in (0, 1) if spans > 1 and rows <= 256 and name != "head" else (0,):
                        try:
                            us = microseconds(lambda: products.linear(x, w, None, dtype, (*tile, split)), 4, 2 if rows > 256 else 5)
                            trials.append((round(us, 1), (*tile, split)))
                        except Exception:
                            pass
                trials.sort()
                products.TUNED[f"{products.bucket(rows)} {columns} {inputs}"] = trials[0][1]
                y = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
                blas = microseconds(lambda: torch.mm(x, w.T, out=y), 4, 5) if name != "head" else 0.0
                note("tune", shape=shape, weight=name, rows=rows, best=trials[0], second=trials[1], cublas=round(blas, 1),
                     floor=round(max(columns * inputs * 2 / 2.9e6, 2 * rows * columns * inputs / 7e8), 1))
    print(json.dumps(products.TUNED))


def exact_part() -> None:
    """Compare a whole GRPO step, exact and not: sampling and one update of 256 completions."""
    from limbeck.config.parts import Optimizer as Settings
    from limbeck.config.parts import Policy
    from limbeck.engine.rollout import Engine
    from limbeck.engine.sampling import SamplingParams
    from limbeck.model.ops import place
    from limbeck.train.batch import pack, to_samples
    from limbeck.train.learner import Learner
    from limbeck.train.losses import PolicyGradient

    for shape in ("0.5B", "1.5B"):
        model = decoder(shape)
        learner = Learner(model, Settings(), 100, recompute=True)
        for exact in (True, False, True, False):
            place(model, "cuda", exact=exact)
            engine = Engine(model, Ids(), rows=256)
            times = []
            for step in range(3):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                groups = engine.rollout(problems(32, 120, step), 8, SamplingParams(max_new_tokens=256), step)
                torch.cuda.synchronize()
                middle = time.perf_counter()
                samples = to_samples(groups, [[0.5, -0.5] * 4] * 32, False)
                metrics = learner.update(pack(samples, 16384, "cuda"), PolicyGradient(Policy(), 256))
                torch.cuda.synchronize()
                times.append((time.perf_counter() - begin, middle - begin, time.perf_counter() - middle))
            best = min(times)
            note("exact", shape=shape, exact=exact, step_s=best[0], sample_s=best[1], learn_s=best[2],
                 drift=metrics["max_drift"], kl=metrics["kl_old"], peak_GiB=torch.cuda.max_memory_allocated() / 2**30)
            del engine
        del model, learner
        torch.cuda.empty_cache()


def peer_part() -> None:
    """nano-vllm's workload through transformers' continuous batching, on a Qwen3-0.6B of random weights."""
    import random

    import transformers

    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    limits = [random.randint(100, 1024) for _ in range(256)]
    config = transformers.Qwen3Config(vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                                      num_key_value_heads=8, head_dim=128, intermediate_size=3072,
                                      tie_word_embeddings=True, max_position_embeddings=4096)
    note("peer", transformers=transformers.__version__)
    for attention_name in ("paged|sdpa", "sdpa"):
        try:
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("cuda"):
                model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)
            torch.set_default_dtype(torch.float32)
            settings = transformers.GenerationConfig(max_new_tokens=256, do_sample=True, temperature=0.6, eos_token_id=None,
                                                     pad_token_id=0)
            begin = time.perf_counter()
            out = model.generate_batch(inputs=prompts[:64], generation_config=settings)
            tokens = sum(len(o.generated_tokens) for o in out.values())
            took = time.perf_counter() - begin
            note("peer", attention=attention_name, sequences=64, tokens=tokens, seconds=took, tokens_s=round(tokens / took))
            return
        except Exception as problem:
            note("peer", attention=attention_name, failed=str(problem)[:200])


def rollout_part() -> None:
    """Sample 32 groups of 8 x 256 tokens: no waiting for the host, same tokens alone; compare learner's bits."""
    from limbeck.config.parts import Optimizer as Settings
    from limbeck.engine.rollout import Engine
    from limbeck.engine.sampling import SamplingParams
    from limbeck.train.batch import pack, to_samples
    from limbeck.train.scorer import Scorer

    for shape in ("0.5B", "0.6B", "1.5B"):
        model = decoder(shape)
        engine = Engine(model, Ids(), rows=256)
        sampling = SamplingParams(max_new_tokens=256)
        few = problems(32, 120)
        engine.rollout(few, 8, sampling, 0)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        groups = engine.rollout(few, 8, sampling, 1)
        took = time.perf_counter() - begin
        tokens = sum(len(c.tokens) for g in groups for c in g.completions)
        note("rollout", shape=shape, tokens=tokens, tokens_s=round(tokens / took), seconds=took,
             peak_GiB=torch.cuda.max_memory_allocated() / 2**30)
        alone = engine.rollout(few[:2], 8, sampling, 1)
        same = [np.array_equal(c.tokens, d.tokens) and np.array_equal(c.logprobs, d.logprobs)
                for g, h in zip(groups, alone) for c, d in zip(g.completions, h.completions)]
        note("rollout", shape=shape, same_alone=f"{sum(same)}/{len(same)}")
        samples = to_samples(groups, [[0.5, -0.5] * 4] * 32, False)
        batches = pack(samples, 16384, "cuda")
        equal = total = 0
        worst = 0.0
        for batch, logprobs_M in zip(batches, Scorer(model).logprobs(batches)):
            equal += int((logprobs_M == batch.logprobs_M).sum())
            total += len(logprobs_M)
            worst = max(worst, float((logprobs_M - batch.logprobs_M).abs().max()))
        note("rollout", shape=shape, equal_bits=equal / total, tokens=total, worst=worst)
        whole = pack([dataclasses.replace(s, tokens=np.array(s.tokens)) for s in samples[::8]], 16384, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = engine._device_batch[1]
            for _ in range(4):
                batch.steps[max(batch.steps)]()
            note("rollout", shape=shape, waits_for_host=False)
        except RuntimeError as problem:
            note("rollout", shape=shape, waits_for_host=str(problem)[:100])
        torch.cuda.set_sync_debug_mode("default")
        del model, engine, batches, batch, whole
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def decode_part() -> None:
    """Time a captured step of the engine beside its floor of memory traffic, with 1,000 tokens in each row."""
    from limbeck.engine.device_batch import DeviceBatch
    from limbeck.engine.sampling import SamplingParams

    for shape in ("0.5B", "1.5B", "7B"):
        model = decoder(shape)
        size = 2 * sum(p.numel() for p in model.parameters())
        config = model.config
        if not config.tied:
            size -= 2 * model.embed.weight.numel()
        for rows in (1, 64, 256):
            batch = DeviceBatch(model, 0, SamplingParams(max_new_tokens=64), rows, 1000)
            with torch.no_grad():
                batch.admit([(i, np.arange(1, 1001)) for i in range(rows)], np.random.rand(rows, 64), 1)
                step = batch._capture(rows)
            floor_ms = (size + 4 * config.layers * rows * 1000 * config.kv_heads * config.head_dim) / 2.98e9
            took = seconds(step, 20) * 1e3
            note("decode", shape=shape, rows=rows, ms=took, floor_ms=floor_ms, share=floor_ms / took,
                 tokens_s=round(rows / took * 1e3))
            if rows == 64 and shape == "0.5B":
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    step()
                    torch.cuda.synchronize()
                for event in sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:14]:
                    note("profile", shape=shape, rows=rows, kernel=event.key[:40], count=event.count,
                         us=round(event.device_time_total))
            del batch, step
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()


def workload_part() -> None:
    """nano-vllm's workload on a Qwen3-0.6B shape: 256 sequences of 100 to 1,024 tokens in and out."""
    import random

    from limbeck.engine.device_batch import DeviceBatch
    from limbeck.engine.sampling import SamplingParams

    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    limits = [random.randint(100, 1024) for _ in range(256)]
    model = decoder("0.6B")
    blocks_needed = sum(-(-(len(p) + n) // BLOCK) for p, n in zip(prompts, limits))
    sampling = SamplingParams(temperature=0.6, max_new_tokens=1024)
    for turn in range(2):
        batch = DeviceBatch(model, 151935, sampling, 256, 1024, blocks_needed) if not turn else batch
        batch.is_stop_V.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        done = 0
        with torch.no_grad():
            batch.admit([(i, np.array(p)) for i, p in enumerate(prompts)], np.random.rand(256, 1024), 1, limits)
            torch.cuda.synchronize()
            prefilled = time.perf_counter()
            while batch.busy:
                done += sum(len(sequence.tokens) for sequence in batch.step())
        took = time.perf_counter() - begin
        note("workload", turn=turn, tokens=done, seconds=took, prefill_s=prefilled - begin, tokens_s=round(done / took))


def learner_part() -> None:
    """Time an update of 16,384 tokens, its peak memory, its bits over two runs, and one of 2 x 8,192 (SFT)."""
    from limbeck.config.parts import Optimizer as Settings
    from limbeck.config.parts import Policy
    from limbeck.train.batch import pack
    from limbeck.train.learner import Learner
    from limbeck.train.losses import PolicyGradient
    from limbeck.types import Sample

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    random = np.random.default_rng(0)
    for shape, recompute in (("0.6B", False), ("0.6B", "keep_attention"), ("0.6B", True)):
        model = decoder(shape, 16640)
        torch.cuda.reset_peak_memory_stats()
        learner = Learner(model, Settings(), 10, recompute)
        for name, lengths in (("2 x 8,192", [8192] * 2), ("1 x 16,384", [16384])):
            torch.cuda.reset_peak_memory_stats()
            samples = [
                Sample(tokens=random.integers(1, 10000, n + 1), start=1, advantage=1.0,
                       logprobs=np.full(n, -9.0, np.float32))
                for n in lengths
            ]
            try:
                times = []
                for _ in range(4):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    learner.update(pack(samples, 1 << 15, "cuda"), PolicyGradient(Policy(), max(lengths)))
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - begin)
                parameters = sum(p.numel() for p in model.parameters())
                rate = sum(lengths) / min(times)
                note("learner", shape=shape, recompute=recompute, batch=name, seconds=min(times), tokens_s=round(rate),
                     MFU=6 * parameters * rate / 989e12, peak_GiB=torch.cuda.max_memory_allocated() / 2**30)
            except torch.OutOfMemoryError:
                note("learner", shape=shape, recompute=recompute, batch=name, failed="out of memory")
        if shape == "0.6B" and recompute:
            batches = pack(samples, 1 << 15, "cuda")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                learner.update(batches, PolicyGradient(Policy(), max(lengths)))
                torch.cuda.synchronize()
            for event in sorted(profile.key_averages(), key=lambda e: -e.device_time_total)[:16]:
                note("profile", learner=shape, kernel=event.key[:60], count=event.count,
                     us=round(event.device_time_total))
        del model, learner
        torch.cuda.empty_cache()


def resume_part() -> None:
    """Six steps against three, a saved state, and three: the same digest of all weights."""
    import hashlib

    from limbeck.config.parts import Optimizer as Settings
    from limbeck.config.parts import Policy
    from limbeck.engine.rollout import Engine
    from limbeck.engine.sampling import SamplingParams
    from limbeck.train.batch import pack, to_samples
    from limbeck.train.learner import Learner
    from limbeck.train.losses import PolicyGradient

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False

    def steps(learner, engine, begin, end):
        drifts = []
        for step in range(begin, end):
            groups = engine.rollout(problems(8, 60, step), 8, SamplingParams(max_new_tokens=96), step)
            rewards = [[float(c.tokens[0] % 2) + (c.tokens % 3 == 0).mean() for c in g.completions] for g in groups]
            advantages = [np.array(r) - np.mean(r) for r in rewards]
            batches = pack(to_samples(groups, advantages, False), 8192, "cuda")
            metrics = learner.update(batches, PolicyGradient(Policy(), 96))
            drifts.append(metrics["max_drift"])
        return drifts

    def digest(learner) -> str:
        sha = hashlib.sha256()
        for name, weight in learner.model.state_dict().items():
            sha.update(weight.cpu().view(torch.int16).numpy().tobytes())
        return sha.hexdigest()[:16]

    def make():
        model = decoder("0.5B")
        return Learner(model, Settings(learning_rate=1e-5), 6), Engine(model, Ids(), rows=64)

    learner, engine = make()
    begin = digest(learner)
    drifts = steps(learner, engine, 0, 6)
    whole = digest(learner)
    del learner, engine
    learner, engine = make()
    steps(learner, engine, 0, 3)
    state = {"model": {k: v.clone() for k, v in learner.model.state_dict().items()},
             "optimizer": copy.deepcopy(learner.optimizer.state_dict()), "step": learner.step}
    del learner, engine
    torch.cuda.empty_cache()
    learner, engine = make()
    learner.load_state_dict(state)
    steps(learner, engine, 3, 6)
    note("resume", begin=begin, whole=whole, resumed=digest(learner), same=whole == digest(learner), max_drift=drifts)


def lora_part() -> None:
    """Two steps of adapters with the sampler, whose drift must be 0; then time and memory of 16,384 tokens."""
    from limbeck.config.parts import LoRA as Settings
    from limbeck.config.parts import Optimizer, Policy
    from limbeck.engine.rollout import Engine
    from limbeck.engine.sampling import SamplingParams
    from limbeck.model.lora import LoRA
    from limbeck.train.batch import pack, to_samples
    from limbeck.train.learner import Learner
    from limbeck.train.losses import PolicyGradient
    from limbeck.types import Sample

    model = decoder("0.5B")
    learner = Learner(model, Optimizer(learning_rate=1e-3), 6, False, LoRA(model, Settings(), 0))
    engine = Engine(model, Ids(), rows=64)
    for step in range(3):
        groups = engine.rollout(problems(8, 60, step), 8, SamplingParams(max_new_tokens=96), step)
        advantages = [np.array([float(c.tokens[0] % 2) - 0.5 for c in group.completions]) for group in groups]
        batches = pack(to_samples(groups, advantages, False), 8192, "cuda")
        metrics = learner.update(batches, PolicyGradient(Policy(), 96))
        note("lora", step=step, max_drift=metrics["max_drift"], gradient_norm=metrics["gradient_norm"])
    del model, learner, engine
    torch.cuda.empty_cache()
    model = decoder("4B", 16640)
    learner = Learner(model, Optimizer(), 10, "keep_attention", LoRA(model, Settings(), 0))
    random = np.random.default_rng(0)
    tokens = random.integers(1, 10000, 16385)
    samples = [Sample(tokens, start=1, advantage=1.0, logprobs=np.full(16384, -9.0, np.float32))]
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        learner.update(pack(samples, 1 << 15, "cuda"), PolicyGradient(Policy(), 16384))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    learner.lora.merge()
    torch.cuda.synchronize()
    note("lora", shape="4B", seconds=min(times), tokens_s=round(16384 / min(times)),
         merge_seconds=time.perf_counter() - begin, peak_GiB=torch.cuda.max_memory_allocated() / 2**30)


def draw_part() -> None:
    """Check and time the sampling of tokens at a large vocabulary."""
    for rows in (1, 64, 256):
        logits = torch.randn(rows, 151936, device="cuda") * 3
        uniform = torch.rand(rows, device="cuda")
        tokens, logprobs = sampling.draw(logits, uniform, 0.7)
        right = (logits.double() / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        wanted = torch.searchsorted((logits.double() / 0.7).softmax(-1).cumsum(-1), uniform.double()[:, None], right=True)[:, 0]
        note("draw", rows=rows, same_tokens=float((tokens == wanted).float().mean()), error=float((logprobs - right).abs().max()),
             bits=torch.equal(sampling.logprob(logits, tokens, 0.7), logprobs),
             us=round(microseconds(lambda: sampling.draw(logits, uniform, 0.7), 5), 1))


PARTS = {
    "floor": floor, "tune": tune_part, "exact": exact_part, "peer": peer_part, "rollout": rollout_part, "decode": decode_part, "workload": workload_part, "learner": learner_part,
    "resume": resume_part, "lora": lora_part, "attention": attention_part, "draw": draw_part, "products": product_bits,
}


def main() -> int:
    """Run the parts that the command line names (all without any); return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    failed = 0
    for name in options.parts or PARTS:
        begin = time.perf_counter()
        try:
            PARTS[name]()
        except Exception:
            traceback.print_exc()
            failed = 1
        print(f"-- {name}: {time.perf_counter() - begin:.1f} s", flush=True)
        if options.out:
            options.out.write_text(json.dumps(RESULTS, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
