"""Peers on the same card, each in a process of its own that is ended when its time is over: the continuous
batching of transformers, and TRL's GRPO."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import tokenizers
import torch

from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Problem

from .card import Card
from .models import config, decoder, nano_vllm_workload
from .report import left, note, spare

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def ask(module: str, settings: dict, seconds: float) -> list[dict]:
    """Return what `python -m bench.gpu.MODULE` tells in lines of JSON within so many seconds, and how it
    failed if it did. It is ended with all its processes when the time is over."""
    command = [sys.executable, "-m", f"bench.gpu.{module}", json.dumps(settings)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, **OFFLINE},
    )
    over = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    over.start()
    try:
        out, err = process.communicate()
    finally:
        over.cancel()
    told = [json.loads(line) for line in out.splitlines() if line.startswith('{"')]
    if process.returncode == -signal.SIGKILL:
        told.append({"failed": f"no more within {seconds:.0f} s"})
    elif process.returncode:
        told.append({"failed": (err.strip().splitlines() or ["no word"])[-1][:200]})
    return told


def missing(part: str, *packages: str) -> bool:
    """Return True, and say so, if a package is not installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        note(part, left_out=f"{', '.join(absent)} is not installed")
    return bool(absent)


# ---------------------------------------------------------------- transformers


def transformers_part(card: Card, quick: bool) -> None:
    """64 prompts of nano-vllm's workload, 256 tokens each: Limbeck, and transformers' continuous batching."""
    prompts = nano_vllm_workload(card)[0][:64]
    new = card.size(256, 8)
    ours = _ours(card, prompts, new)
    card.free()
    if missing("transformers", "transformers"):
        return
    settings = {
        "config": config(card, "0.6B").to_hf(None, None),
        "prompts": prompts,
        "new": new,
        "device": card.device,
        "dtype": str(card.dtype).removeprefix("torch."),
    }
    told = ask("transformers_batching", settings, max(card.size(10, 60), left()))
    for line in told:
        note("transformers", **line)
    rates = [line["tokens_s"] for line in told if line.get("turn") in ("first", "warm")]
    if rates:
        note("transformers", limbeck_over_transformers=ours / rates[-1])


def _ours(card: Card, prompts: list[list[int]], new: int) -> float:
    """Return Limbeck's tokens a second, its graphs captured."""
    model = decoder(card, "0.6B")
    sampling = SamplingParams(temperature=0.6, max_new_tokens=new)
    batch = DeviceBatch(model, 0, sampling, len(prompts), max(map(len, prompts)))
    batch.is_stop_V.zero_()

    def run() -> None:
        tokens = [(i, np.array(p)) for i, p in enumerate(prompts)]
        batch.admit(tokens, np.random.rand(len(prompts), new), 1)
        while batch.busy:
            batch.step()

    with torch.no_grad():
        run()
        took = card.once(run)
    rate = len(prompts) * new / took
    note("transformers", limbeck_tokens_s=round(rate), seconds=took)
    return rate


# ---------------------------------------------------------------- TRL


def trl_part(card: Card, quick: bool) -> None:
    """One GRPO step, Limbeck's and TRL's: the same weights, prompts, groups and lengths, without vLLM."""
    if missing("trl", "trl", "transformers", "datasets", "accelerate"):
        return
    for shape in ("135M",) if quick or card.rehearsed else ("135M", "0.5B"):
        if not spare("trl", shape, card.size(12, 0)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            _compare_with_trl(card, shape, Path(folder))
        card.free()


def _compare_with_trl(card: Card, shape: str, folder: Path) -> None:
    """Run the part for one shape: 8 prompts of 64 tokens, 8 completions of 128 tokens each."""
    model = decoder(card, shape)
    tokenizer = words(model.config.vocab_size)
    weights.save(model, folder, tokenizer)
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size - 2, (8, card.size(64, 8)))
    work = {
        "texts": [" ".join(f"w{word}" for word in row) for row in drawn.tolist()],
        "group": 8,
        "new": card.size(128, 6),
        "steps": 3,
    }
    ours = _grpo(card, model, tokenizer, work)
    note("trl", shape=shape, limbeck_seconds=ours, GiB=card.peak())
    del model
    card.free()
    settings = {"model": str(folder), "cpu": card.rehearsed, "folder": str(folder / "trl"), **work}
    told = ask("trl_grpo", settings, max(card.size(10, 120), left()))
    for line in told:
        note("trl", shape=shape, **line)
    times = [line["trl_seconds"] for line in told if "trl_seconds" in line][1:]
    if times:
        note("trl", shape=shape, trl_over_limbeck=min(times) / ours)


def words(count: int) -> Tokenizer:
    """Return a tokenizer of so many ids whose tokens are the words w0, w1 and so on."""
    ids = {f"w{i}": i for i in range(count - 2)} | {"<end>": count - 2, "<pad>": count - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, "{{ messages[0].content }}", "<end>", "<pad>")


def _grpo(card: Card, model, tokenizer: Tokenizer, work: dict) -> float:
    """Return the seconds of Limbeck's step, the shortest but the first."""
    learner = Learner(model, Optimizer(learning_rate=1e-6), work["steps"])
    engine = Engine(model, tokenizer, rows=64)
    problems = [Problem(str(i), text) for i, text in enumerate(work["texts"])]
    sampling = SamplingParams(max_new_tokens=work["new"])
    loss = PolicyGradient(Policy(), work["new"])

    def step(number: int) -> None:
        groups = engine.rollout(problems, work["group"], sampling, number)
        rewards = np.array([[c.tokens[0] % 7 for c in g.completions] for g in groups], np.float64)
        advantages = rewards - rewards.mean(1, keepdims=True)
        learner.update(pack(to_samples(groups, advantages, False), 16384, card.device), loss)

    times = [card.once(lambda: step(number)) for number in range(work["steps"])]  # noqa: B023
    return min(times[1:])
