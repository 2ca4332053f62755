"""Reinforcement learning with verifiable rewards: GRPO and its kin.

What this is not: there is no critic, no asynchrony. One step draws problems, samples a group of
completions for each, scores them, and takes one or a few clipped policy-gradient updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..config.recipe import RL
from ..model.config import ModelConfig
from ..run_log import Record
from ..types import Group, Sample, Sampler, generator
from .batch import pack, to_samples
from .checkpoint import Checkpoint
from .learned_rewards import Panel, Tasks
from .learner import Learner
from .losses import group_advantages, policy_gradient
from .selftest import Watch, audit

REDRAWS = 3  # how often a step looks for groups that differ before it takes what there is


def train_grpo(
    learner: Learner, reference: Learner | None, engine: Sampler, tasks: Tasks, sampling: object, settings: RL,
    seed: object, record: Record, checkpoint: Checkpoint, budget: float = math.inf, panel: Panel | None = None,
) -> None:  # fmt: skip
    """`settings.steps` steps of GRPO, or fewer if `budget` FLOPs are spent before; `reference` is a frozen copy of
    the policy where a KL term wants one; `panel` has opinions that count beside the tasks' scores."""
    policy, temperature = settings.policy, settings.sampling.temperature
    loss, watch = policy_gradient(policy, settings.sampling.max_new_tokens), Watch(settings)
    panel = panel or Panel(settings, {}, tasks, sampling, seed)
    first, spent = _resume(learner, reference, watch, panel, checkpoint)
    for step in range(first, settings.steps):
        if spent >= budget or panel.over:
            break
        if (
            reference
            and policy.reference_every
            and step % max(1, policy.reference_every // policy.updates_per_rollout) == 0
        ):
            reference.model.load_state_dict(learner.weights())
        groups = _collect(engine, panel.at(step), sampling, settings, (seed, step))
        informative = [g for g in groups if len(set(g.rewards)) > 1 or policy.zero_variance == "keep"]
        samples = to_samples(
            informative, group_advantages(informative, policy.advantage_scale), policy.keep_sampling_mask
        )
        samples = [
            s for s, ok in zip(samples, _finished(informative, policy.mask_truncated), strict=True) if ok
        ]
        if step == 0 and samples:
            audit(learner, samples, loss, engine.tokenizer.end_id, temperature)
        updates = [
            learner.update(_referenced(part, reference, settings), loss, temperature)
            for part in minibatches(samples, policy.updates_per_rollout, (seed, step))
        ]
        engine.load(learner.weights())
        metrics = {**summarize(groups), **_volume(groups, samples, learner.model.config), **_merge(updates)}
        heard = panel.watch(step, groups, engine)
        metrics["flops"] += _heard_flops(heard, len(panel.held), learner.model.config)
        spent += metrics["flops"]
        metrics["informative"] = len(informative) / len(groups)
        shown = [groups[0]] if step % settings.log_every == 0 or step == settings.steps - 1 else []
        alarms = [*heard.pop("alarms", ()), *watch.check(metrics).get("alarms", ())]
        said = {**metrics, **heard, **({"alarms": alarms} if alarms else {})}
        record.step(step, said, shown, [group.problem.id for group in informative])
        checkpoint.offer(lambda: _state(learner, reference, watch, panel, step + 1, spent), record)  # noqa: B023


def _collect(engine: Sampler, tasks: Tasks, sampling: object, settings: RL, seed: tuple) -> list[Group]:
    """Scored groups of one step; with `zero_variance: replace`, groups without a difference are drawn anew."""
    policy, kept, spent = settings.policy, [], []
    for redraw in range(REDRAWS if policy.zero_variance == "replace" else 1):
        missing = policy.prompts_per_step - len(kept)
        problems = tasks.draw(missing, (*seed, redraw))
        scored = [
            tasks.score(g) for g in engine.rollout(problems, policy.group_size, sampling, (*seed, redraw))
        ]
        for group in scored:
            (kept if len(set(group.rewards)) > 1 or policy.zero_variance != "replace" else spent).append(
                group
            )
        if len(kept) >= policy.prompts_per_step:
            break
    return kept + spent


def _finished(groups: Sequence[Group], mask_truncated: bool) -> list[bool]:
    """Which samples are learned from: a response cut off by the budget was not judged fairly."""
    return [c.stopped or not mask_truncated for g in groups for c in g.completions]


def minibatches(samples: list[Sample], count: int, seed: object) -> list[list[Sample]]:
    order = generator(seed, "minibatches").permutation(len(samples))
    parts = [[samples[i] for i in part] for part in np.array_split(order, count)]
    return [part for part in parts if part]


def _referenced(samples: list[Sample], reference: Learner | None, settings: RL):
    """Packed micro-batches, with the reference's log-probabilities where the KL term needs them."""
    batches = pack(samples, settings.batch_tokens)
    if reference is None:
        return batches
    scored = reference.logprobs(batches, settings.sampling.temperature)
    return [replace(b, reference_M=logprobs) for b, logprobs in zip(batches, scored, strict=True)]


def summarize(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all completions: reward, its parts, length, truncation, and what the task measured."""
    completions = [c for g in groups for c in g.completions]
    scores = [s for g in groups for s in g.scores]
    means = {
        "reward": float(np.mean([r for g in groups for r in g.rewards])),
        "length": float(np.mean([len(c.tokens) for c in completions])),
        "truncated": float(np.mean([not c.stopped for c in completions])),
    }
    for kind in ("parts", "stats"):
        names = sorted({name for s in scores for name in getattr(s, kind)})
        for name in names:
            values = [getattr(s, kind)[name] for s in scores if name in getattr(s, kind)]
            means[name] = float(np.mean(values))
    return means


def _volume(groups: Sequence[Group], samples: Sequence[Sample], config: ModelConfig) -> dict[str, float]:
    """Tokens that were sampled (their prompts prefilled once a group) and tokens that were learned from; the FLOPs
    of both, each token seeing half of its sequence on average."""
    sampled = sum(len(g.prompt_tokens) + sum(len(c.tokens) for c in g.completions) for g in groups)
    learned = sum(len(s.tokens) for s in samples)
    seen = float(np.mean([len(g.prompt_tokens) + len(c.tokens) / 2 for g in groups for c in g.completions]))
    flops = sampled * config.flops_per_token(seen) + learned * config.flops_per_token(seen, backward=True)
    return {"sampled_tokens": sampled, "learned_tokens": learned, "flops": flops}


def _heard_flops(heard: dict[str, float], held: int, config: ModelConfig) -> float:
    """What the panel has cost: its own models, and the policy's answers to the held-out problems."""
    tokens = heard.get("held_out_tokens", 0)
    return sum(v for k, v in heard.items() if k.endswith("_flops")) + tokens * config.flops_per_token(
        tokens / max(1, held) / 2
    )


def _merge(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over a step's updates, number by number. The first update sees the very weights that sampled, so its drift is the
    sampler/learner gap: zero but for rounding."""
    if not updates:
        return {}
    merged = {name: np.mean([u[name] for u in updates], axis=0).tolist() for name in updates[0]}
    return {**merged, "gap": updates[0]["max_drift"]}


def _resume(
    learner: Learner, reference: Learner | None, watch: Watch, panel: Panel, checkpoint: Checkpoint
) -> tuple[int, float]:
    """The step to go on with, and the FLOPs spent before it."""
    state = checkpoint.restore()
    if state is None:
        return 0, 0.0
    learner.load_state_dict(state["learner"])
    watch.history.extend(state["watched"])
    panel.load_state_dict(state["panel"])
    if reference is not None:
        reference.model.load_state_dict(state["reference"])
    return state["step"], state["flops"]


def _state(
    learner: Learner, reference: Learner | None, watch: Watch, panel: Panel, step: int, flops: float
) -> dict:
    state = {
        "learner": learner.state_dict(),
        "watched": list(watch.history),
        "panel": panel.state_dict(),
        "step": step,
        "flops": flops,
    }
    return state if reference is None else {**state, "reference": reference.weights()}
