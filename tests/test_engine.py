"""The engine against a loop that knows no cache, no batch and no top-p trick; and against the learner."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import limbeck.engine.sampling as sampling_module
from limbeck.cli import ask
from limbeck.config import recipe
from limbeck.config.load import load
from limbeck.config.parts import Optimizer, Sampling
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams, draw, likely, to_sampling_params
from limbeck.model import weights
from limbeck.model.kv_cache import Packed
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.types import Group, LimbeckError, Problem, generator

BUDGET = 20
PROMPTS = (
    "use 6 1 5 make 3 ?", "say 4 ?", "用 2 2 凑 6 ?", "use 1 make 1 ?", "say 1 2 3 4 5 6 5 4 3 2 1 1 2 ?",
    "用 6 5 4 凑 0 ? use 6 5 4 make 0 ?", "?",
)  # fmt: skip
PROBLEMS = [Problem(f"clock/{i}", prompt) for i, prompt in enumerate(PROMPTS)]
MODES = {
    "t1": SamplingParams(max_new_tokens=BUDGET),
    "t06-top-p": SamplingParams(0.6, 0.9, BUDGET),
    "t06-top-p-kept": SamplingParams(0.6, 0.9, BUDGET, keep_mask=True),
    "greedy": SamplingParams(0.0, 1.0, BUDGET),
    "top-k": SamplingParams(0.8, 1.0, BUDGET, top_k=4),
    "min-p-kept": SamplingParams(1.0, 1.0, BUDGET, keep_mask=True, min_p=0.1),
    "all-kept": SamplingParams(1.3, 0.8, BUDGET, keep_mask=True, top_k=9, min_p=0.02),
}
PENALISED = {
    "presence": SamplingParams(max_new_tokens=BUDGET, presence_penalty=1.5),
    "frequency": SamplingParams(0.7, 0.9, BUDGET, frequency_penalty=-0.8),
    "repetition": SamplingParams(0.0, 1.0, BUDGET, repetition_penalty=1.4),
    "penalties": SamplingParams(0.9, 0.95, BUDGET, False, {}, (), 12, 0.01, -0.5, 0.7, 0.8),
}


def choose(
    logits: np.ndarray, uniform: float, sampling: SamplingParams
) -> tuple[int, float, list[int] | None]:
    """One token by the definitions: its id, its log-probability, and what min-p, top-k and top-p left."""
    logits = logits / (sampling.temperature or 1.0)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = [int(token) for token in np.argsort(-p, kind="stable") if p[token] >= sampling.min_p * p.max()]
    order = order[: sampling.top_k or None]
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p * p[order].sum() and sampling.top_p < 1:
            break
        kept.append(token)
        mass += p[token]
    if sampling.temperature == 0:
        token = int(p.argmax())
    else:
        inside = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
        passed, token = inside[0], 0
        while passed <= uniform * inside.sum():
            token += 1
            passed += inside[token]
    if sampling.keep_mask and sampling.excludes:
        return token, float(np.log(p[token] / p[kept].sum())), sorted(kept)
    return token, float(np.log(p[token])), None


def penalised(
    logits: np.ndarray, prompt: np.ndarray, tokens: list[int], sampling: SamplingParams
) -> np.ndarray:
    """The logits with the penalties, one token of the vocabulary after the other."""
    logits = logits.copy()
    for token in {*prompt.tolist(), *tokens}:
        rate = sampling.repetition_penalty
        logits[token] = logits[token] / rate if logits[token] > 0 else logits[token] * rate
    for token in set(tokens):
        logits[token] -= sampling.frequency_penalty * tokens.count(token) + sampling.presence_penalty
    return logits


@torch.no_grad()
def naive(model, end: int, prompt: np.ndarray, uniforms: np.ndarray, sampling: SamplingParams):
    """One row, the whole text anew for each token."""
    text, tokens, logprobs, masks = list(prompt), [], [], []
    for uniform in uniforms:
        hidden = model(torch.tensor(text), Packed([len(text)]))[-1]
        logits = penalised((hidden @ model.head.weight.T).double().numpy(), prompt, tokens, sampling)
        token, logprob, kept = choose(logits, uniform, sampling)
        if tokens and tokens[-1] in sampling.force:
            token = sampling.force[tokens[-1]]
            logprob = float(
                F.log_softmax(torch.from_numpy(logits) / (sampling.temperature or 1.0), -1)[token]
            )
        text.append(token)
        tokens.append(token)
        logprobs.append(logprob)
        masks.append(kept)
        if token == end:
            break
    return tokens, logprobs, masks


def naive_groups(model, tokenizer, problems, group_size: int, sampling: SamplingParams, seed: object):
    return [
        [
            naive(
                model,
                tokenizer.end_id,
                tokenizer.prompt(p.prompt),
                generator(seed, p.id, sample).random(sampling.max_new_tokens),
                sampling,
            )
            for sample in range(group_size)
        ]
        for p in problems
    ]


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[c.tokens.tolist() for c in g.completions] for g in groups]


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("mode", [*MODES, *PENALISED])
def test_engine_equals_naive_loop_whatever_runs_side_by_side(decoder, tokenizer, mode, group_size):
    """Token for token in float64, for any bound on rows: admission and compaction change nothing."""
    model, sampling = decoder(torch.float64), (MODES | PENALISED)[mode]
    wanted = naive_groups(model, tokenizer, PROBLEMS, group_size, sampling, ("seed", 3))
    for rows in (256, 9, 1):
        groups = Engine(model, tokenizer, rows).rollout(PROBLEMS, group_size, sampling, ("seed", 3))
        assert tokens_of(groups) == [[tokens for tokens, _, _ in row] for row in wanted]
        for group, row in zip(groups, wanted, strict=True):
            for completion, (_, logprobs, masks) in zip(group.completions, row, strict=True):
                np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-6)
                if sampling.keep_mask:
                    assert [ids.tolist() for ids in completion.kept] == masks
                else:
                    assert completion.kept is None


def test_groups_come_in_the_problems_order_and_the_rest_of_the_batch_does_not_matter(decoder, tokenizer):
    model, sampling = decoder(torch.float64), MODES["t1"]
    whole = Engine(model, tokenizer).rollout(PROBLEMS, 3, sampling, 7)
    assert [g.problem for g in whole] == PROBLEMS
    assert [[c.sample for c in g.completions] for g in whole] == [[0, 1, 2]] * len(PROBLEMS)
    part = Engine(model, tokenizer).rollout([PROBLEMS[4], PROBLEMS[1]], 2, sampling, 7)
    assert tokens_of(part) == [rows[:2] for rows in (tokens_of(whole)[4], tokens_of(whole)[1])]
    assert tokens_of(Engine(model, tokenizer).rollout(PROBLEMS, 3, sampling, 8)) != tokens_of(whole)


def test_rows_that_ended_need_no_more_positions_than_the_model_has(decoder, tokenizer, clock):
    """Prompt and budget fill the model to its last position; rows end, and others are let in, at all ages."""
    problems = clock.problems("train")[:64]
    (length,) = {len(tokenizer.prompt(p.prompt)) for p in problems}
    model = decoder(seed=3, max_positions=length + BUDGET)
    wanted = tokens_of(Engine(model, tokenizer, 1).rollout(problems, 1, MODES["t1"], 0))
    assert 5 < sum(len(tokens) < BUDGET for (tokens,) in wanted) < 60
    for rows in (5, 8):
        assert tokens_of(Engine(model, tokenizer, rows).rollout(problems, 1, MODES["t1"], 0)) == wanted


@pytest.mark.parametrize("mode", ["t1", "t06-top-p-kept", "t06", "min-p-kept", "all-kept"])
def test_engine_logprobs_equal_learner_logprobs(decoder, tokenizer, mode):
    """Within 1e-5 in float32; where tokens are left out, its softmax runs over those the engine kept."""
    model, sampling = decoder(), {**MODES, "t06": SamplingParams(0.6, 1.0, BUDGET)}[mode]
    groups = Engine(model, tokenizer, rows=10).rollout(PROBLEMS, 4, sampling, 5)
    samples = to_samples(groups, [np.zeros(4)] * len(groups), keep_mask=sampling.keep_mask)
    learner = Learner(model, Optimizer(), 1)
    for budget in (1, 120, 1 << 20):
        batches = pack(samples, budget)
        assert sum(len(b.targets_M) for b in batches) == sum(
            len(c.tokens) for g in groups for c in g.completions
        )
        for batch, scored in zip(batches, learner.logprobs(batches, sampling.temperature), strict=True):
            assert (batch.kept_MK is not None) == sampling.keep_mask
            torch.testing.assert_close(scored, batch.logprobs_M, atol=1e-5, rtol=0)


def test_force_puts_one_token_after_another(decoder, tokenizer):
    """What follows a forced token is sampled as ever, and its log-probability is the model's."""
    model = decoder(torch.float64)
    five, wait, use = tokenizer.encode("5 wait use")
    sampling = SamplingParams(max_new_tokens=BUDGET, force={five: wait, use: five})
    wanted = naive_groups(model, tokenizer, PROBLEMS, 4, sampling, 1)
    groups = Engine(model, tokenizer, rows=6).rollout(PROBLEMS, 4, sampling, 1)
    assert tokens_of(groups) == [[tokens for tokens, _, _ in row] for row in wanted]
    after = [b for g in tokens_of(groups) for t in g for a, b in pairwise(t) if a == five]
    assert len(after) > 3 and set(after) == {wait}
    for group, row in zip(groups, wanted, strict=True):
        for completion, (_, logprobs, _) in zip(group.completions, row, strict=True):
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-6)


def test_a_completion_ends_at_its_first_end_of_turn_or_at_the_budget(decoder, tokenizer):
    groups = Engine(decoder(), tokenizer, rows=16).rollout(PROBLEMS, 16, MODES["t1"], 2)
    completions = [c for g in groups for c in g.completions]
    assert {c.stopped for c in completions} == {True, False}
    for completion in completions:
        ends = np.flatnonzero(completion.tokens == tokenizer.end_id).tolist()
        assert ends == ([len(completion.tokens) - 1] if completion.stopped else [])
        assert completion.stopped or len(completion.tokens) == BUDGET
        assert len(completion.logprobs) == len(completion.tokens) <= BUDGET
        assert "<eos>" not in completion.text
        assert tokenizer.encode(completion.text) == [t for t in completion.tokens if t != tokenizer.end_id]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(1.0, 1.0, 1), SamplingParams(2.0, 0.8, 1)], ids=["t1", "top-p"]
)
def test_first_tokens_have_the_models_distribution(decoder, tokenizer, sampling):
    """Chi-square over 6,000 draws; rare tokens share a bin, and nothing outside top-p is drawn."""
    model, draws = decoder(torch.float64), 6000
    prompt = tokenizer.prompt(PROMPTS[0])
    with torch.no_grad():
        logits = model(torch.tensor(prompt), Packed([len(prompt)]))[-1] @ model.head.weight.T
    p = (logits / sampling.temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(p[order].cumsum(), sampling.top_p)) + 1]
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    groups = Engine(model, tokenizer).rollout(PROBLEMS[:1], draws, sampling, 11)
    counts = np.bincount([c.tokens[0] for c in groups[0].completions], minlength=len(p))
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    assert freedom >= 5
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64))
    uniform, previous = torch.tensor([0.999999, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    drawn = draw(logits, uniform, previous, SamplingParams(1.0, 0.79, keep_mask=True))
    assert drawn.kept_BV.tolist()[0] == [False, True, False, True]
    assert drawn.kept_BV[1].sum() == 4  # three quarters do not reach 0.79
    assert drawn.tokens_B.tolist() == [3, 0]
    np.testing.assert_allclose(drawn.logprobs_B.exp(), [0.3 / 0.8, 0.25])


@pytest.mark.parametrize("mode", MODES)
def test_many_logits_are_drawn_from_in_parts(monkeypatch, mode):
    random = torch.Generator().manual_seed(0)
    logits, previous = 3 * torch.randn(7, 50, generator=random), torch.zeros(7, dtype=torch.long)
    uniform = torch.rand(7, dtype=torch.float64, generator=random)
    whole = draw(logits, uniform, previous, MODES[mode])
    monkeypatch.setattr(sampling_module, "AT_ONCE", 101)  # two rows
    parts = draw(logits, uniform, previous, MODES[mode])
    for part, wanted in zip(parts, whole, strict=True):
        assert (part is None and wanted is None) or torch.equal(part, wanted)


def test_a_recipe_sets_what_it_names_and_nothing_else_enters_the_key():
    sampling = Sampling(temperature=0.6, top_k=20, frequency_penalty=0.5)
    assert to_sampling_params(sampling) == SamplingParams(
        temperature=0.6, max_new_tokens=160, top_k=20, frequency_penalty=0.5
    )
    assert Sampling().model_dump().keys() == {"temperature", "top_p", "speculate", "max_new_tokens"}
    assert sampling.model_dump()["top_k"] == 20


def test_an_rl_stage_refuses_penalties_in_one_sentence():
    smoke = Path(recipe.__file__).parent.parent / "recipes" / "smoke.yaml"
    key = "stages.zero.sampling.repetition_penalty"
    with pytest.raises(LimbeckError, match=f"{key} = 1.2 is not for rl, .*; leave it out$"):
        load(smoke, [f"{key}=1.2"])
    load(smoke, [f"{key}=1", "stages.zero.sampling.top_k=20"])


def test_as_likely_as_the_last_of_top_k_is_left_too():
    logits = torch.log(torch.tensor([[0.1, 0.3, 0.3, 0.3]], dtype=torch.float64))
    kept = likely(logits, SamplingParams(top_k=2))
    assert kept.tolist() == [[False, True, True, True]] and likely(logits, SamplingParams(top_k=4)) is None


def test_a_prompt_without_room_is_refused_by_name(decoder, tokenizer):
    engine = Engine(decoder(max_positions=24), tokenizer)
    with pytest.raises(LimbeckError, match=r"clock/5.*max_new_tokens=20.*24 positions"):
        engine.rollout(PROBLEMS[5:6], 1, MODES["t1"], 0)
    with pytest.raises(LimbeckError, match=r"max_new_tokens=20.*24 positions"):
        list(engine.stream(tokenizer.prompt(PROMPTS[5]), MODES["t1"], 0))


@pytest.mark.parametrize("mode", ["t1", "t06-top-p", "greedy"])
def test_stream_equals_naive_loop(decoder, tokenizer, mode):
    model, sampling = decoder(torch.float64), MODES[mode]
    stopped = 0
    for seed in range(12):
        prompt = tokenizer.prompt(PROMPTS[seed % len(PROMPTS)])
        uniforms = generator(seed, "stream").random(BUDGET)
        wanted, _, _ = naive(model, tokenizer.end_id, prompt, uniforms, sampling)
        streamed = list(Engine(model, tokenizer).stream(prompt, sampling, seed))
        assert streamed == [t for t in wanted if t != tokenizer.end_id]
        stopped += len(streamed) < BUDGET
    assert mode != "t1" or 0 < stopped < 12


def test_new_weights_are_sampled_from(decoder, tokenizer):
    """Weights in their own memory are copied; after an update and a load, engine and learner agree again."""
    engine = Engine(decoder(), tokenizer)
    learner = Learner(decoder(), Optimizer(learning_rate=0.02), 1)
    before = engine.rollout(PROBLEMS, 2, MODES["t1"], 0)
    learner.update(batches_of(before), CrossEntropy())
    assert gap(learner, before) > 1e-3
    engine.load_weights(learner.weights())
    assert gap(learner, engine.rollout(PROBLEMS, 2, MODES["t1"], 0)) < 1e-5


def batches_of(groups: list[Group]) -> list:
    return pack(to_samples(groups, [np.ones(len(g.completions)) for g in groups], keep_mask=False), 1 << 20)


def gap(learner: Learner, groups: list[Group]) -> float:
    batches = batches_of(groups)
    pairs = zip(batches, learner.logprobs(batches), strict=True)
    return max(float((found - batch.logprobs_M).abs().max()) for batch, found in pairs)


def test_stop_ids_end_a_completion_like_the_end_of_turn(decoder, tokenizer):
    """The same tokens as without them, up to the first one."""
    engine = Engine(decoder().double(), tokenizer)
    free = engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=BUDGET), 0)
    stop = int(free[0].completions[0].tokens[2])
    cut = engine.rollout(PROBLEMS, 4, SamplingParams(max_new_tokens=BUDGET, stop_ids=(stop,)), 0)
    for plain, stopped in (
        (a, b)
        for before, after in zip(free, cut, strict=True)
        for a, b in zip(before.completions, after.completions, strict=True)
    ):
        met = (plain.tokens == stop).nonzero()[0]
        assert stopped.tokens.tolist() == (plain.tokens[: met[0] + 1] if len(met) else plain.tokens).tolist()
        assert stopped.stopped == (plain.stopped or len(met) > 0)


def test_the_command_asks_with_every_sampling_parameter(decoder, tokenizer, tmp_path):
    weights.save(decoder(), tmp_path / "model", tokenizer)

    def answer(*options: str) -> str:
        more = ["--max-new-tokens", "20", "--temperature", "1.5", "--top-p", "1", *options]
        done = CliRunner().invoke(ask.app, [str(tmp_path / "model"), "use 6 1 5 make 3 ?", *more])
        assert done.exit_code == 0, done.output
        return done.stdout

    plain = answer()
    assert answer("--top-k", "1") == answer("--min-p", "1") == answer("--temperature", "0") != plain
    for penalty, value in (("presence", "2"), ("frequency", "-2"), ("repetition", "4")):
        assert answer(f"--{penalty}-penalty", value) != plain
