"""The learner on a card: updates and their memory, exact and fast steps, an exact resume."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import torch

from limbeck.config.parts import Optimizer, Policy
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.ops import place
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.types import Group, Sample

from .models import Ids, decoder, problems
from .report import free_memory, note, once, peak, promise

BATCHES = {"2 x 8,192": [8192] * 2, "1 x 16,384": [16384]}
DENSE_FLOPS = 989e12  # bf16 operations a second of an H100, by its data sheet


def deterministic() -> None:
    """Let torch take only operations that give the same bits each time."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False


def _samples(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Return sequences of random tokens to learn from."""
    ids = np.random.default_rng(seed)
    return [
        Sample(
            tokens=ids.integers(1, 10000, length + 1),
            start=1,
            advantage=1.0,
            logprobs=np.full(length, -9.0, np.float32),
        )
        for length in lengths
    ]


def _digest(learner: Learner) -> str:
    """Return the SHA-256 of all weights, shortened."""
    sha = hashlib.sha256()
    for weight in learner.model.state_dict().values():
        sha.update(weight.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def learner_part(quick: bool) -> None:
    """Time updates of 16,384 tokens in a 0.6B shape and their peak memory; repeat one, bit for bit."""
    deterministic()
    digests = []
    for _ in range(2):
        learner = Learner(decoder("0.5B"), Optimizer(), 10, "keep_attention")
        for step in range(2):
            batches = pack(_samples([700, 900, 1100], step), 1 << 15, "cuda")
            learner.update(batches, PolicyGradient(Policy(), 1100))
        digests.append(_digest(learner))
        del learner
        free_memory()
        deterministic()
    promise("learner", "two updates give the same bits twice", digests[0] == digests[1])
    for recompute in ("keep_attention",) if quick else (False, "keep_attention", True):
        for name, lengths in BATCHES.items():
            _time_update(name, lengths, recompute)
            free_memory()
            deterministic()


def _time_update(name: str, lengths: list[int], recompute: bool | str) -> None:
    """Time updates by one batch, from a new learner."""
    model = decoder("0.6B", 16640)
    learner = Learner(model, Optimizer(), 10, recompute)
    loss = PolicyGradient(Policy(), max(lengths))
    samples = _samples(lengths)
    try:
        times = [once(lambda: learner.update(pack(samples, 1 << 15, "cuda"), loss)) for _ in range(3)]
    except torch.OutOfMemoryError:
        note("learner", recompute=recompute, batch=name, failed="out of memory")
        return
    rate = sum(lengths) / min(times)
    utilisation = 6 * sum(p.numel() for p in model.parameters()) * rate / DENSE_FLOPS
    note(
        "learner",
        shape="0.6B",
        recompute=recompute,
        batch=name,
        seconds=min(times),
        tokens_s=round(rate),
        MFU=utilisation,
        GiB=peak(),
    )


def exact_part(quick: bool) -> None:
    """Compare whole GRPO steps, exact and fast in turn: 256 completions of 256 tokens, and one update."""
    for shape in ("0.5B",) if quick else ("0.5B", "1.5B"):
        model = decoder(shape)
        learner = Learner(model, Optimizer(), 100, recompute=True)
        times: dict[bool, list[float]] = {True: [], False: []}
        for exact in (True, False, True, False):
            place(model, "cuda", exact=exact)
            engine = Engine(model, Ids(), rows=256)
            each = [_grpo_step(learner, engine, step) for step in range(3)]
            sample_s, learn_s, metrics = min(each, key=lambda one: one[0] + one[1])
            times[exact].append(sample_s + learn_s)
            note(
                "exact",
                shape=shape,
                exact=exact,
                sample_s=sample_s,
                learn_s=learn_s,
                drift=metrics["max_drift"],
                kl=metrics["kl_old"],
                GiB=peak(),
            )
            if exact:
                drifts = [one[2]["max_drift"] for one in each]
                promise("exact", f"{shape}: no log-probability differs", not any(drifts))
            del engine
        note("exact", shape=shape, cost=min(times[True]) / min(times[False]))
        del model, learner
        free_memory()


def _grpo_step(learner: Learner, engine: Engine, step: int) -> tuple[float, float, dict]:
    """Return the seconds of sampling and of learning, and the metrics of the update."""
    groups: list[Group] = []
    metrics: dict = {}
    sampling = SamplingParams(max_new_tokens=256)

    def learn() -> None:
        samples = to_samples(groups, [[0.5, -0.5] * 4] * 32, False)
        metrics.update(learner.update(pack(samples, 16384, "cuda"), PolicyGradient(Policy(), 256)))

    sample_s = once(lambda: groups.extend(engine.rollout(problems(32, 120, step), 8, sampling, step)))
    return sample_s, once(learn), metrics


def resume_part(quick: bool) -> None:
    """Six steps of GRPO against three, a saved state, and three: the same digest of all weights."""
    deterministic()
    half = 1 if quick else 3
    learner, engine = _make()
    begin = _digest(learner)
    drifts = steps(learner, engine, 0, 2 * half)
    whole = _digest(learner)
    del learner, engine
    free_memory()
    deterministic()
    learner, engine = _make()
    steps(learner, engine, 0, half)
    state = copy.deepcopy(learner.state_dict())
    del learner, engine
    free_memory()
    deterministic()
    learner, engine = _make()
    learner.load_state_dict(state)
    steps(learner, engine, half, 2 * half)
    resumed = _digest(learner)
    note("resume", steps=2 * half, begin=begin, whole=whole, resumed=resumed, drifts=drifts)
    promise("resume", "resumed = uninterrupted, bit for bit", whole == resumed and begin != whole)
    promise("resume", "no log-probability differs in any step", not any(drifts))


def _make() -> tuple[Learner, Engine]:
    """Return a learner and an engine of the same 0.5B model."""
    model = decoder("0.5B")
    return Learner(model, Optimizer(learning_rate=1e-5), 6), Engine(model, Ids(), rows=64)


def steps(learner: Learner, engine: Engine, begin: int, end: int) -> list[float]:
    """Run steps of GRPO on an easy reward; return the largest difference of log-probabilities of each."""
    drifts = []
    for step in range(begin, end):
        groups = engine.rollout(problems(8, 60, step), 8, SamplingParams(max_new_tokens=96), step)
        advantages = []
        for group in groups:
            rewards = [c.tokens[0] % 2 + (c.tokens % 3 == 0).mean() for c in group.completions]
            advantages.append(np.array(rewards) - np.mean(rewards))
        batches = pack(to_samples(groups, advantages, False), 8192, "cuda")
        metrics = learner.update(batches, PolicyGradient(Policy(), 96))
        drifts.append(metrics["max_drift"])
    return drifts
