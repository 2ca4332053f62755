"""The probe: measures how fast this machine samples and trains, with this package's own engine and learner.

It runs as a process of its own (`python -m limbeck.runtime.probe`), because the plan, which starts it, does
not import torch. It reads one JSON line from standard input and writes one to standard output:

    {"threads": 1, "worlds": {NAME: {settings of a miniature problem source}},
     "models": {NAME: {"config": {...}, "layers": [2, 10], "optimizer": "adamw", "learn": [512, 1024],
                       "length": 64, "rows": [8, 64], "prompt": 32, "new": 12}}}
    {"gemm": FLOP/s, "memory": bytes/s, "start": CPU seconds to start, "worlds": {NAME: seconds a token},
     "models": {NAME: [{"layers", "learn": {tokens: seconds}, "roll": {rows: seconds}}]}}

A large model is measured with two numbers of layers, because its cost is linear in that number. `learn` is
one whole optimizer update on so many tokens; `roll` is the decoding of one token in each of so many sequences
(`rows`). `length` is the tokens of a training sample, `prompt` the tokens of a prompt, and `new` the tokens
decoded for one measurement. Weights are random, and sampling never meets an end token.

T  tokens of a prompt
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import allocator

if TYPE_CHECKING:
    import numpy as np

    from ..model.config import ModelConfig
    from ..model.decoder import Decoder

MEASURE_SECONDS = 0.4  # seconds for one figure, about; after the warm-up at least one timing is taken
MAX_TIMINGS = 9  # timings of one figure
MIN_ROLL_SECONDS = 1e-7  # seconds a token, the least that a noisy difference may give

Clock = Callable[[], float]


def main() -> None:
    """Read one request from standard input, measure, and print the answer."""
    request = json.loads(sys.stdin.readline())
    allocator.keep_memory()
    import torch

    torch.set_num_threads(request["threads"])
    clock = _clock(request["threads"])
    answer: dict[str, Any] = {"start": time.process_time()}
    answer["gemm"] = _measure_gemm(clock)
    answer["memory"] = _measure_memory(clock)
    answer["worlds"] = {name: _measure_corpus(world, clock) for name, world in request["worlds"].items()}
    answer["models"] = {}
    for name, settings in request["models"].items():
        depths = [_measure_model(settings, layers, clock) for layers in settings["layers"]]
        answer["models"][name] = depths
    print(json.dumps(answer))


def _clock(threads: int) -> Clock:
    """Return the clock to measure with: CPU time for one thread, because other processes hardly affect it,
    and wall time for several threads."""
    return time.process_time if threads == 1 else time.perf_counter


def _median_seconds(work: Callable[[], Any], clock: Clock) -> float:
    """Return the median time of a call of `work`, in seconds of `clock`, after one call to warm up."""
    begin = time.perf_counter()
    work()
    times: list[float] = []
    while not times or (time.perf_counter() - begin < MEASURE_SECONDS and len(times) < MAX_TIMINGS):
        before = clock()
        work()
        times.append(clock() - before)
    return sorted(times)[len(times) // 2]


# ---------------------------------------------------------------- the machine


def _measure_gemm(clock: Clock, size: int = 1024) -> float:
    """Measure a float32 product of two `size` x `size` matrices; return FLOP/s."""
    import torch

    matrix = torch.ones(size, size)
    seconds = _median_seconds(lambda: matrix @ matrix, clock)
    return 2 * size**3 / seconds


def _measure_memory(clock: Clock, values: int = 1 << 25) -> float:
    """Measure a copy of `values` float32 values, which is larger than any cache; return the bytes read and
    written per second."""
    import torch

    source = torch.ones(values)
    target = torch.empty(values)
    seconds = _median_seconds(lambda: target.copy_(source), clock)
    return 8 * values / seconds


def _measure_corpus(settings: dict[str, Any], clock: Clock, tokens: int = 20_000) -> float:
    """Measure generating and encoding `tokens` tokens of the corpus of a miniature problem source (a small
    synthetic task of this package); return the seconds per token. `settings` are the source's settings."""
    from ..config.recipe import Miniature
    from ..tasks.clock_countdown import encode_documents
    from ..tasks.registry import open_task

    task = open_task("world", Miniature(**settings))
    tokenizer = task.tokenizer()

    def write_documents() -> None:
        encode_documents(task.documents("0/probe", {}), tokenizer, tokens)

    return _median_seconds(write_documents, clock) / tokens


# ---------------------------------------------------------------- a model


def _measure_model(settings: dict[str, Any], layers: int, clock: Clock) -> dict[str, Any]:
    """Measure a model with `layers` layers: the seconds of an update by its number of tokens, and of decoding
    one token per sequence by the number of sequences. `settings` is the model's entry in the request."""
    from ..model.decoder import Decoder

    config = replace(_read_config(settings["config"]), layers=layers)
    decoder = Decoder(config).initialize(1)
    learn = {tokens: _measure_update(decoder, settings, tokens, clock) for tokens in settings["learn"]}
    roll = {rows: _measure_rollout(decoder, settings, rows, clock) for rows in settings["rows"]}
    return {"layers": layers, "learn": learn, "roll": roll}


def _read_config(entries: dict[str, Any]) -> ModelConfig:
    """Return the model configuration that a JSON object describes."""
    from ..model.config import Experts, Latent, ModelConfig

    entries = dict(entries)
    latent = entries.pop("latent")
    experts = entries.pop("experts")
    if experts:
        experts["dense"] = tuple(experts["dense"])
    entries["windows"] = tuple(entries["windows"])
    return ModelConfig(
        **entries,
        latent=latent and Latent(**latent),
        experts=experts and Experts(**experts),
    )


def _measure_update(decoder: Decoder, settings: dict[str, Any], tokens: int, clock: Clock) -> float:
    """Return the seconds of one optimizer update on about `tokens` tokens."""
    import numpy as np

    from ..config.parts import Optimizer
    from ..train.batch import pack
    from ..train.learner import Learner
    from ..train.losses import CrossEntropy
    from ..types import Sample

    draw = np.random.default_rng(0)
    length = settings["length"]
    samples = []
    for _ in range(max(1, tokens // length)):
        samples.append(Sample(draw.integers(0, decoder.config.vocab_size, length), start=1))
    optimizer = Optimizer(name=settings["optimizer"], learning_rate=1e-6)
    learner = Learner(decoder, optimizer, 1000)
    micro = settings.get("micro", 1 << 30)
    return _median_seconds(lambda: learner.update(pack(samples, micro), CrossEntropy()), clock)


class _EndlessTokenizer:
    """A tokenizer whose end token lies outside the vocabulary, so that sampling never ends early. A prompt's
    text is a number, the id of its first token."""

    def __init__(self, vocabulary: int, length: int):
        """Make a tokenizer of `vocabulary` tokens, whose prompts all have `length` tokens."""
        self.end_id = vocabulary
        self.vocabulary = vocabulary
        self.length = length

    def prompt(self, text: str) -> np.ndarray:
        """Return consecutive token ids [T] that begin with the number in `text`."""
        import numpy as np

        first = int(text)
        return np.arange(first, first + self.length) % self.vocabulary

    def decode(self, tokens: Any) -> str:
        """Return "": the probe needs no text."""
        return ""


def _measure_rollout(decoder: Decoder, settings: dict[str, Any], rows: int, clock: Clock) -> float:
    """Return the seconds of decoding one token in each of `rows` sequences. The cost of the prompts is
    removed: it is the difference of two measurements with different numbers of new tokens."""
    from ..engine.rollout import Engine
    from ..engine.sampling import SamplingParams
    from ..types import Problem

    tokenizer = _EndlessTokenizer(decoder.config.vocab_size, settings["prompt"])
    engine = Engine(decoder, tokenizer, rows)
    group_size = min(8, rows)
    problems = [Problem(id=str(i), prompt=str(i)) for i in range(max(1, rows // group_size))]

    def measure(new_tokens: int) -> float:
        sampling = SamplingParams(max_new_tokens=new_tokens)
        return _median_seconds(lambda: engine.rollout(problems, group_size, sampling, 0), clock)

    few_tokens = 2
    seconds = measure(few_tokens + settings["new"]) - measure(few_tokens)
    return max(MIN_ROLL_SECONDS, seconds / settings["new"])


if __name__ == "__main__":
    main()
