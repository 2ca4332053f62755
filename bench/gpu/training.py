"""The learner on a card: updates and their memory, exact and fast steps, an exact resume."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import torch

from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.train.batch import Batch, pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy, PolicyGradient
from limbeck.types import Group, Sample

from .card import Card
from .kernels import product_rate
from .models import Ids, decoder, largest_id, problems
from .report import note, promise, spare


def random_samples(card: Card, lengths: list[int], seed: int = 0) -> list[Sample]:
    """Return sequences of random tokens to learn from."""
    ids = np.random.default_rng(seed)
    return [
        Sample(
            tokens=ids.integers(1, largest_id(card), length + 1),
            start=1,
            advantage=1.0,
            logprobs=np.full(length, -9.0, np.float32),
        )
        for length in lengths
    ]


def digest(learner: Learner) -> str:
    """Return the SHA-256 of all weights, shortened."""
    sha = hashlib.sha256()
    for weight in learner.model.state_dict().values():
        sha.update(weight.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def learner_part(card: Card, quick: bool) -> None:
    """Time updates in a 0.6B shape and their peak memory: SFT on 8,192 tokens, RL on 16,384 in one sequence
    and in two; repeat one, bit for bit."""
    _repeat(card)
    sft = card.size([1024] * 8, [30] * 4)
    rl = card.size([[16384], [8192] * 2], [[120], [60] * 2])
    for recompute in ("keep_attention",) if quick else ("keep_attention", False, True):
        for what, lengths in (("sft", sft), ("rl", rl[0]), ("rl", rl[1])):
            card.free()
            card.deterministic()
            if spare("learner", f"{what} {lengths}, recompute {recompute}", card.size(2, 0)):
                _time_update(card, what, lengths, recompute)
    card.free()


def _repeat(card: Card) -> None:
    """Learn twice from the same samples, and compare the bits of all weights."""
    digests = []
    for _ in range(2):
        card.deterministic()
        learner = Learner(decoder(card, "0.5B"), Optimizer(), 10, "keep_attention")
        for step in range(2):
            samples = random_samples(card, card.size([700, 900, 1100], [20, 30, 40]), step)
            learner.update(pack(samples, 1 << 15, card.device), PolicyGradient(Policy(), 1100))
        digests.append(digest(learner))
        del learner
        card.free()
    promise("learner", "two updates give the same bits twice", digests[0] == digests[1])


def _time_update(card: Card, what: str, lengths: list[int], recompute: bool | str) -> None:
    """Time updates by one batch, from a new learner."""
    model = decoder(card, "0.6B", 16640)
    learner = Learner(model, Optimizer(), 10, recompute)
    loss = CrossEntropy() if what == "sft" else PolicyGradient(Policy(), max(lengths))
    samples = random_samples(card, lengths)
    name = f"{len(lengths)} x {lengths[0]:,}"

    def batches() -> list[Batch]:
        return pack(samples, 1 << 15, card.device)

    try:
        seconds = min(card.once(lambda: learner.update(batches(), loss)) for _ in range(3))
    except torch.OutOfMemoryError:
        note("learner", what=what, recompute=recompute, batch=name, failed="out of memory")
        return
    rate = sum(lengths) / seconds
    share = 6 * sum(p.numel() for p in model.parameters()) * rate / product_rate(card)
    told = {"seconds": seconds, "tokens_s": round(rate), "share_of_products": share, "GiB": card.peak()}
    note("learner", what=what, shape="0.6B", recompute=recompute, batch=name, **told)


def exact_part(card: Card, quick: bool) -> None:
    """Compare whole GRPO steps, exact and fast in turn: 256 completions of 256 tokens, and one update."""
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B"):
        if spare("exact", shape, card.size(8, 0)):
            _compare(card, shape)
        card.free()


def _compare(card: Card, shape: str) -> None:
    """Run the part for one shape; the second pair of turns is left out if the time is short."""
    model = decoder(card, shape)
    learner = Learner(model, Optimizer(), 100, recompute=True)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn, exact in enumerate((True, False, True, False)):
        if turn == 2 and not spare("exact", f"{shape}, second pair", card.size(10, 0)):
            break
        card.place(model, exact)
        engine = Engine(model, Ids(), rows=256)
        each = [grpo_step(card, learner, engine, step) for step in range(card.size(3, 2))]
        sample_s, learn_s, metrics = min(each, key=lambda one: one[0] + one[1])
        times[exact].append(sample_s + learn_s)
        told = {"drift": metrics["max_drift"], "kl": metrics["kl_old"], "GiB": card.peak()}
        note("exact", shape=shape, exact=exact, sample_s=sample_s, learn_s=learn_s, **told)
        if exact:
            drifts = [one[2]["max_drift"] for one in each]
            promise("exact", f"{shape}: no log-probability differs", not any(drifts))
        del engine
    note("exact", shape=shape, cost=min(times[True]) / min(times[False]))


def grpo_step(card: Card, learner: Learner, engine: Engine, step: int) -> tuple[float, float, dict]:
    """Return the seconds of sampling and of learning, and the metrics of the update."""
    groups: list[Group] = []
    metrics: dict = {}
    new = card.size(256, 12)
    few = problems(card.size(32, 2), card.size(120, 20), largest_id(card), step)

    def learn() -> None:
        samples = to_samples(groups, [[0.5, -0.5] * 4] * len(groups), False)
        metrics.update(learner.update(pack(samples, 16384, card.device), PolicyGradient(Policy(), new)))

    sampling = SamplingParams(max_new_tokens=new)
    sample_s = card.once(lambda: groups.extend(engine.rollout(few, 8, sampling, step)))
    return sample_s, card.once(learn), metrics


def resume_part(card: Card, quick: bool) -> None:
    """Six steps of GRPO against three, a saved state, and three: the same digest of all weights."""
    half = 1 if quick or card.rehearsed else 3
    card.deterministic()
    learner, engine = _make(card)
    begin = digest(learner)
    drifts = steps(card, learner, engine, 0, 2 * half)
    whole = digest(learner)
    del learner, engine
    card.free()
    card.deterministic()
    learner, engine = _make(card)
    steps(card, learner, engine, 0, half)
    state = copy.deepcopy(learner.state_dict())
    del learner, engine
    card.free()
    card.deterministic()
    learner, engine = _make(card)
    learner.load_state_dict(state)
    steps(card, learner, engine, half, 2 * half)
    resumed = digest(learner)
    note("resume", steps=2 * half, begin=begin, whole=whole, resumed=resumed, drifts=drifts)
    promise("resume", "resumed = uninterrupted, bit for bit", whole == resumed and begin != whole)
    promise("resume", "no log-probability differs in any step", not any(drifts))


def _make(card: Card) -> tuple[Learner, Engine]:
    """Return a learner and an engine of the same 0.5B model."""
    model = decoder(card, "0.5B")
    return Learner(model, Optimizer(learning_rate=1e-5), 6), Engine(model, Ids(), rows=64)


def steps(card: Card, learner: Learner, engine: Engine, begin: int, end: int) -> list[float]:
    """Run steps of GRPO on an easy reward; return the largest difference of log-probabilities of each."""
    drifts = []
    new = card.size(96, 8)
    for step in range(begin, end):
        few = problems(card.size(8, 2), card.size(60, 20), largest_id(card), step)
        groups = engine.rollout(few, 8, SamplingParams(max_new_tokens=new), step)
        advantages = []
        for group in groups:
            rewards = [c.tokens[0] % 2 + (c.tokens % 3 == 0).mean() for c in group.completions]
            advantages.append(np.array(rewards) - np.mean(rewards))
        batches = pack(to_samples(groups, advantages, False), 8192, card.device)
        drifts.append(learner.update(batches, PolicyGradient(Policy(), new))["max_drift"])
    return drifts
