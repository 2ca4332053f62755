"""How fast this machine samples and learns, measured on this package's own engine and learner.

A process of its own (`python -m limbeck.runtime.probe`): the plan asks, and imports no torch itself. A request is one
JSON line on standard input, the answer one on standard output:

    {"threads": 1, "worlds": {NAME: {settings of a miniature}}, "models": {NAME: {"config": {...}, "layers": [2, 10], "optimizer": "adamw",
                                     "learn": [512, 1024], "length": 64, "rows": [8, 64], "prompt": 32, "new": 12}}}
    {"gemm": FLOP/s, "memory": bytes/s, "start": s, "worlds": {NAME: s a token}, "models": {NAME: [{"layers", "learn": {tokens: s}, "roll": {rows: s}}]}}

A large model is measured at two depths: its cost is linear in the number of layers. `learn` is one update, all
of it; `roll` one token for each of so many rows. Weights are random, and what is sampled never ends by itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import allocator

PATIENCE = 0.4  # seconds for one figure, about; two times at least


def main() -> None:
    request = json.loads(sys.stdin.readline())
    allocator.keep_memory()
    import torch

    torch.set_num_threads(request["threads"])
    clock = _clock(request["threads"])
    answer: dict[str, Any] = {"start": time.process_time(), "gemm": _gemm(clock), "memory": _memory(clock)}
    answer["worlds"] = {name: _write(settings, clock) for name, settings in request["worlds"].items()}
    answer["models"] = {
        name: [_measure(asked, layers, clock) for layers in asked["layers"]]
        for name, asked in request["models"].items()
    }
    print(json.dumps(answer))


def _clock(threads: int) -> Callable[[], float]:
    """With one thread the processor's time, which others beside us lengthen little; else that of the wall."""
    return time.process_time if threads == 1 else time.perf_counter


def _typical(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Median seconds of several times, after one that warms up: a run is not always lucky either."""
    begin = time.perf_counter()
    work()
    times: list[float] = []
    while not times or (time.perf_counter() - begin < PATIENCE and len(times) < 9):
        before = clock()
        work()
        times.append(clock() - before)
    return sorted(times)[len(times) // 2]


def _gemm(clock: Callable[[], float], size: int = 1024) -> float:
    import torch

    a = torch.ones(size, size)
    return 2 * size**3 / _typical(lambda: a @ a, clock)


def _memory(clock: Callable[[], float], values: int = 1 << 25) -> float:
    """Bytes a second of a copy, both ways, larger than any cache."""
    import torch

    a, b = torch.ones(values), torch.empty(values)
    return 8 * values / _typical(lambda: b.copy_(a), clock)


def _write(settings: dict[str, Any], clock: Callable[[], float], tokens: int = 20_000) -> float:
    """Seconds for a token of a miniature's corpus: written, and made ids."""
    from ..config.recipe import Miniature
    from ..tasks.clock_countdown import encode_documents
    from ..tasks.registry import open_task

    task = open_task("world", Miniature(**settings))
    tokenizer = task.tokenizer()
    return (
        _typical(lambda: encode_documents(task.documents("0/probe", {}), tokenizer, tokens), clock) / tokens
    )


def _measure(asked: dict[str, Any], layers: int, clock: Callable[[], float]) -> dict[str, Any]:
    from ..model.decoder import Decoder

    decoder = Decoder(replace(_config(asked["config"]), layers=layers)).initialize(1)
    learned = {tokens: _learn(decoder, asked, tokens, clock) for tokens in asked["learn"]}
    rolled = {rows: _roll(decoder, asked, rows, clock) for rows in asked["rows"]}
    return {"layers": layers, "learn": learned, "roll": rolled}


def _config(told: dict[str, Any]) -> Any:
    from ..model.config import Experts, Latent, ModelConfig

    told = dict(told)
    latent, experts = told.pop("latent"), told.pop("experts")
    if experts:
        experts["dense"] = tuple(experts["dense"])
    told["windows"] = tuple(told["windows"])
    return ModelConfig(**told, latent=latent and Latent(**latent), experts=experts and Experts(**experts))


def _learn(decoder: Any, asked: dict[str, Any], tokens: int, clock: Callable[[], float]) -> float:
    """One update on about so many tokens."""
    import numpy as np

    from ..config.parts import Optimizer
    from ..train.batch import pack
    from ..train.learner import Learner
    from ..train.losses import cross_entropy
    from ..types import Sample

    draw, length = np.random.default_rng(0), asked["length"]
    samples = [
        Sample(draw.integers(0, decoder.config.vocab_size, length), start=1)
        for _ in range(max(1, tokens // length))
    ]
    learner = Learner(decoder, Optimizer(name=asked["optimizer"], learning_rate=1e-6), 1000)
    return _typical(lambda: learner.update(pack(samples, asked.get("micro", 1 << 30)), cross_entropy), clock)


class _Endless:
    """A tokenizer in the engine's eyes, whose end no model can say."""

    def __init__(self, vocabulary: int, length: int):
        self.end_id, self.vocabulary, self.length = vocabulary, vocabulary, length

    def prompt(self, text: str) -> Any:
        import numpy as np

        return np.arange(int(text), int(text) + self.length) % self.vocabulary

    def decode(self, tokens: Any) -> str:
        return ""


def _roll(decoder: Any, asked: dict[str, Any], rows: int, clock: Callable[[], float]) -> float:
    """Seconds for one token of each row, without the prompts: the difference of two lengths."""
    from ..engine.rollout import Engine
    from ..engine.sampling import SamplingParams
    from ..types import Problem

    engine = Engine(decoder, _Endless(decoder.config.vocab_size, asked["prompt"]), rows)
    group = min(8, rows)
    problems = [Problem(id=str(i), prompt=str(i)) for i in range(max(1, rows // group))]

    def sample(new: int) -> float:
        return _typical(lambda: engine.rollout(problems, group, SamplingParams(max_new_tokens=new), 0), clock)

    few, many = 2, 2 + asked["new"]
    return max(1e-7, (sample(many) - sample(few)) / asked["new"])


if __name__ == "__main__":
    main()
