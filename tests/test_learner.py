"""The learner: packed = padded, gradients = autograd's, steps = torch's, resumed = uninterrupted."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from counted import peak_bytes
from trainers import train_grpo

import limbeck.train.scorer as scorer_module
from limbeck.config.recipe import RL, Optimizer, Policy, Sampling
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.attention import RMSNorm
from limbeck.model.config import Experts, Latent
from limbeck.model.kv_cache import Packed
from limbeck.model.ops import scoring
from limbeck.model.ops.table import Predictions
from limbeck.run_log import read_metrics
from limbeck.tasks.mixture import Mixture
from limbeck.train.batch import pack, to_samples
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy, PolicyGradient
from limbeck.train.masters import Learned
from limbeck.train.muon import Muon, orthogonalize
from limbeck.train.optimizer import Optimizer as Stepper
from limbeck.train.optimizer import schedule
from limbeck.train.scorer import Scorer, token_logprobs
from limbeck.train.selftest import selftest
from limbeck.types import LimbeckError, Resumable, Sample

VOCABULARY = 40


def alone(count: int = 9) -> list[Sample]:
    """Sequences of mixed lengths, each with a prompt of its own; one has none."""
    random = np.random.default_rng(1)
    samples = []
    for i in range(count):
        tokens = random.integers(0, VOCABULARY, 3 + 5 * i % 23 + i)
        samples.append(_scored(random, tokens, start=i % 4))
    return samples


def shared() -> list[Sample]:
    """Groups that share prompts of three lengths; completions of one token and more."""
    random = np.random.default_rng(2)
    samples = []
    for length in (5, 5, 8, 1, 5, 8):
        prompt = random.integers(0, VOCABULARY, length)
        for longest in (1, 4, 9):
            completion = random.integers(0, VOCABULARY, random.integers(1, longest + 1))
            samples.append(_scored(random, np.concatenate([prompt, completion]), start=length))
    return samples


def _scored(random: np.random.Generator, tokens: np.ndarray, start: int) -> Sample:
    predicted = len(tokens) - max(start, 1)
    logprobs, reference = -random.exponential(3.0, (2, predicted)).astype(np.float32)
    return Sample(tokens, start, float(random.normal()), logprobs, reference)


def mixed() -> list[Sample]:
    return alone() + shared()


BATCHES = {"alone": alone, "shared": shared, "mixed": mixed}
POLICIES = {
    "token": Policy(), "sequence": Policy(preset="r1", off_policy_threshold=0.5),
    "constant": Policy(reduction="constant", kl_coef=0.1, kl_unbiased=True),
}  # fmt: skip


def padded_logprobs(model, samples: list[Sample], temperature: float = 1.0) -> list[torch.Tensor]:
    """Each sequence by itself, padded on the right to the longest, through torch's own log_softmax."""
    longest = max(len(s.tokens) for s in samples)
    scored = []
    for sample in samples:
        tokens = np.concatenate([sample.tokens, np.zeros(longest - len(sample.tokens), dtype=np.int64)])
        logits = model(torch.from_numpy(tokens), Packed([longest])) @ model.head.weight.T
        logp = torch.log_softmax(logits / temperature, -1)
        first, last = max(sample.start, 1), len(sample.tokens)
        scored.append(logp[torch.arange(first - 1, last - 1), torch.from_numpy(sample.tokens[first:])])
    return scored


def gradient(model) -> torch.Tensor:
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad(set_to_none=True)
    return flat


def packed_gradient(
    model, samples, budget: int, loss, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient, summed over micro-batches as `update` sums them."""
    learner, total = Learner(model, Optimizer(), 1), torch.zeros(())
    for batch in pack(samples, budget):
        value, _ = loss(learner.forward(batch, temperature)[0], batch)
        value.backward()
        total = total + value.detach()
    return total, gradient(model)


# ------------------------------------------------------------------------- packing


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_loss_and_gradient_equal_padded(decoder, batch, temperature):
    model, samples = decoder(torch.float64, vocab_size=VOCABULARY), BATCHES[batch]()
    plain = torch.cat(padded_logprobs(model, samples, temperature))
    wanted = -plain.sum() / len(plain)
    wanted.backward()
    wanted_gradient = gradient(model)
    loss, packed = packed_gradient(model, samples, 1 << 20, CrossEntropy(), temperature)
    torch.testing.assert_close(loss, wanted.detach(), atol=1e-12, rtol=0, check_dtype=False)
    torch.testing.assert_close(packed, wanted_gradient, atol=1e-11, rtol=0)


def test_long_completions_read_their_prompt_each_for_itself(decoder, monkeypatch):
    model, samples = decoder(torch.float64, vocab_size=VOCABULARY), shared()
    wanted = packed_gradient(model, samples, 1 << 20, CrossEntropy())
    monkeypatch.setattr("limbeck.train.batch.LONG", 8)
    cut = pack(samples, 1 << 20)
    assert any(isinstance(b.context, Packed) for b in cut) and not all(
        isinstance(b.context, Packed) for b in cut
    )
    for found, expected in zip(packed_gradient(model, samples, 1 << 20, CrossEntropy()), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_samples_columns_stay_beside_its_tokens(decoder, batch):
    """However samples are ordered and cut, each token meets its own advantage and log-probabilities."""
    model, samples = decoder(torch.float64, vocab_size=VOCABULARY), BATCHES[batch]()
    with torch.no_grad():
        scored = [row.numpy() for row in padded_logprobs(model, samples)]
    samples = [replace(s, logprobs=row, reference=row - 1) for s, row in zip(samples, scored, strict=True)]
    known = {round(s.advantage, 5): s for s in samples}
    for budget in (1, 40, 1 << 20):
        batches = pack(samples, budget)
        assert sum(len(b.lengths_S) for b in batches) == len(samples) == batches[0].sequences
        for packed, found in zip(batches, Learner(model, Optimizer(), 1).logprobs(batches), strict=True):
            torch.testing.assert_close(found, packed.logprobs_M, atol=1e-5, rtol=0, check_dtype=False)
            torch.testing.assert_close(packed.logprobs_M - 1, packed.reference_M)
            for row, length in enumerate(packed.lengths_S.tolist()):
                mine = packed.rows_M == row
                sample = known[round(float(packed.advantages_M[mine][0]), 5)]
                assert packed.targets_M[mine].tolist() == sample.tokens[max(sample.start, 1) :].tolist()
                assert int(mine.sum()) == length


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("loss", ["cross_entropy", *POLICIES])
def test_gradient_does_not_depend_on_the_cuts(decoder, batch, loss):
    model, samples = decoder(torch.float64, vocab_size=VOCABULARY), BATCHES[batch]()
    function = (
        CrossEntropy() if loss == "cross_entropy" else PolicyGradient(POLICIES[loss], max_new_tokens=30)
    )
    whole, wanted = packed_gradient(model, samples, 1 << 20, function)
    assert len(pack(samples, 1)) > len(pack(samples, 60)) >= len(pack(samples, 1 << 20))
    for budget in (1, 25, 60):
        total, cut = packed_gradient(model, samples, budget, function)
        torch.testing.assert_close(cut, wanted, atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(total, whole, atol=1e-6, rtol=1e-6, check_dtype=False)


def test_metrics_do_not_depend_on_the_cuts(decoder):
    losses = PolicyGradient(Policy(kl_coef=0.1))
    runs = [
        Learner(decoder(vocab_size=VOCABULARY), Optimizer(), 1).update(pack(shared(), n), losses)
        for n in (1, 30, 1 << 20)
    ]
    assert set(runs[0]) == {
        "loss",
        "clipped",
        "kl_old",
        "max_drift",
        "kl_reference",
        "entropy",
        "gradient_norm",
    }
    for run in runs[1:]:
        assert run == pytest.approx(runs[0], rel=1e-4)


def test_end_of_turn_is_learned_and_prompts_are_not(clock, tokenizer):
    problem = clock.problems("train")[0]
    prompt, response = (
        tokenizer.prompt(problem.prompt),
        tokenizer.response("<think>try</think><answer>1 + 2</answer>"),
    )
    for group in ([prompt], [prompt, prompt]):
        samples = [Sample(np.concatenate([p, response]), len(p)) for p in group]
        (batch,) = pack(samples, 1 << 20)
        assert batch.targets_M.tolist() == [*response.tolist()] * len(group)
        assert batch.targets_M[-1] == tokenizer.end_id
        assert batch.tokens == len(group) * len(response) and batch.sequences == len(group)
        assert tokenizer.end_id not in batch.tokens_N


@pytest.mark.parametrize("batch", BATCHES)
def test_only_learned_tokens_count_and_all_are_read(decoder, batch):
    """`learned` masks tokens of the loss, not of the context, and the mean is over those that count."""
    model, random = decoder(torch.float64, vocab_size=VOCABULARY), np.random.default_rng(5)
    samples = [
        replace(s, learned=random.random(len(s.logprobs)) < 0.6, logprobs=None, reference=None)
        for s in BATCHES[batch]()
    ]
    masked = [
        row[torch.from_numpy(s.learned)]
        for row, s in zip(padded_logprobs(model, samples), samples, strict=True)
    ]
    wanted = -torch.cat(masked).mean()
    wanted.backward()
    wanted_gradient = gradient(model)
    for budget in (1, 60, 1 << 20):
        loss, packed = packed_gradient(model, samples, budget, CrossEntropy())
        torch.testing.assert_close(loss, wanted.detach(), atol=1e-12, rtol=0, check_dtype=False)
        torch.testing.assert_close(packed, wanted_gradient, atol=1e-11, rtol=0)


def test_pretraining_learns_all_tokens_but_the_first():
    (batch,) = pack([Sample(np.arange(7), start=0)], 1 << 20)
    assert batch.tokens_N.tolist() == [0, 1, 2, 3, 4, 5] and batch.targets_M.tolist() == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------- gradients of our own functions

KEPT = torch.tensor([[0, 3, -1], [3, 1, 6], [2, -1, -1], [5, 0, -1], [6, 4, 2]])


@pytest.mark.parametrize("chunk", [7, 14, 1 << 22], ids=lambda c: f"chunk-{c}")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "kept"])
@pytest.mark.parametrize("span", [0, 3], ids=["whole", "spans"])
def test_token_logprobs_by_gradcheck(monkeypatch, chunk, temperature, kept, span):
    """Values against torch's log_softmax, gradients against finite differences, in chunks of rows; of whole
    rows and in spans of three ids."""
    monkeypatch.setattr(scorer_module, "CHUNK", chunk)
    if span:
        monkeypatch.setattr(scoring, "WIDE", 0)
        monkeypatch.setattr(scoring, "SPAN", span)
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=random, requires_grad=True)
    head = torch.randn(7, 3, dtype=torch.float64, generator=random, requires_grad=True)
    targets = torch.tensor([3, 1, 2, 0, 4])
    logits = hidden @ head.T / temperature
    if kept is not None:
        inside = torch.zeros(5, 8, dtype=torch.bool).scatter_(1, kept.where(kept >= 0, 7), True)[:, :7]
        logits = logits.masked_fill(~inside, float("-inf"))
    logp = torch.log_softmax(logits, -1)
    found, entropy = token_logprobs(hidden, head, targets, temperature, kept)
    torch.testing.assert_close(found, logp[torch.arange(5), targets])
    torch.testing.assert_close(entropy, torch.special.entr(logp.exp()).sum(1))
    assert not entropy.requires_grad
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, temperature, kept)[0], (hidden, head)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_in_spans_equal_those_of_whole_rows(temperature):
    """In float32, with logits as far apart as a sure model's: within what float32 rounds."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 16, generator=random)
    head = 4 * torch.randn(3 * scoring.SPAN + 5, 16, generator=random)
    targets = torch.randint(0, len(head), (40,), generator=random)
    predictions = Predictions(hidden, head, targets, temperature)
    whole, spans = scoring.score(predictions), scoring.score_in_spans(predictions)
    torch.testing.assert_close(spans[0], whole[0], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(spans[1], whole[1], atol=2e-5, rtol=1e-5)
    grad = torch.randn(40, generator=random)
    by_head, by_head_whole = torch.zeros(2, *head.shape)
    by_hidden = scoring.score_in_spans_backward(predictions, grad, spans[2], by_head)
    torch.testing.assert_close(
        by_hidden, scoring.score_backward(predictions, grad, by_head_whole), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(by_head, by_head_whole, atol=1e-5, rtol=1e-5)


def test_the_logits_of_a_wide_head_are_never_all_in_memory():
    hidden = torch.randn(64, 4, requires_grad=True)
    head = torch.randn(scoring.WIDE + 1, 4, requires_grad=True)
    peak = peak_bytes(lambda: token_logprobs(hidden, head, torch.arange(64))[0].sum().backward())
    assert peak < 64 * len(head) * head.element_size() / 2
    assert head.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 6)])
def test_rms_norm_by_gradcheck(shape):
    norm = RMSNorm(6, 1e-5).double()
    x = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True
    )
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64, requires_grad=True)
    norm.weight = torch.nn.Parameter(weight.detach())
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), weight, 1e-5))

    def normed(x, w):
        return torch.func.functional_call(norm, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(normed, (x, weight))


# ------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 2}, [0.5, 1, 1, 1, 1, 1]),
        ({"schedule": "linear", "warmup_steps": 2, "final_ratio": 0.2}, [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ({"schedule": "linear", "final_ratio": 0.0}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (
            {"schedule": "cosine", "warmup_steps": 2, "final_ratio": 0.0},
            [0.5, 1, 1, 0.8535533906, 0.5, 0.1464466094],
        ),
        ({"schedule": "cosine", "final_ratio": 0.1}, [1, 0.939711432, 0.775, 0.55, 0.325, 0.160288568]),
    ],
)
def test_schedule_by_hand(settings, factors):
    assert [schedule(Optimizer(**settings), step, 6) for step in range(6)] == pytest.approx(factors)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_schedule_ends_at_its_final_ratio_and_stays_there(kind):
    settings = Optimizer(schedule=kind, final_ratio=0.3, warmup_steps=1)
    assert [schedule(settings, step, 6) for step in (6, 7, 60)] == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("shape", [(1, 16, 48), (1, 48, 16), (3, 16, 40)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    """Jordan's coefficients converge to within 0.68 and 1.14, and keep the singular vectors."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.65 < values.min() and values.max() < 1.2
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ orthogonalize(matrices) @ vh.mT
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


def test_muon_updates_a_fused_matrix_like_separate_ones():
    """Also a step by hand: weight decay, then 0.2 sqrt(larger side) x rate x orthogonalised momentum."""
    random = torch.Generator().manual_seed(3)
    whole = torch.nn.Parameter(torch.randn(16, 24, generator=random))
    parts = [torch.nn.Parameter(piece.clone()) for piece in whole.detach().split((8, 4, 4))]
    before = whole.detach().clone()
    names = ["q", "k", "v"]
    fused = Muon([Learned("qkv", whole, whole)], [(8, 4, 4)], lr=0.1, weight_decay=0.01)
    learned = [Learned(name, part, part) for name, part in zip(names, parts, strict=True)]
    separate = Muon(learned, [(8,), (4,), (4,)], lr=0.1, weight_decay=0.01)
    for step in range(3):
        gradient = torch.randn(16, 24, generator=random)
        first = gradient[:8].clone()
        fused.step({"qkv": gradient.clone()}, torch.ones(()), step)
        pieces = [piece.clone() for piece in gradient.split((8, 4, 4))]
        separate.step(dict(zip(names, pieces, strict=True)), torch.ones(()), step)
        if step == 0:  # Newton-Schulz does not see the scale, so the first momentum is the gradient
            by_hand = before[:8] * (1 - 0.1 * 0.01) - 0.2 * 24**0.5 * 0.1 * orthogonalize(first[None])[0]
            torch.testing.assert_close(whole.detach()[:8], by_hand, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), atol=1e-5, rtol=0)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest(decoder):
    model = decoder()
    adamw, muon = Stepper(model, Optimizer(name="muon"), 1).parts
    inner = {n for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2}
    chosen = {id(p) for p in muon.param_groups[0]["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in chosen} == inner
    assert sum(len(g["params"]) for g in adamw.param_groups) + len(inner) == len(list(model.parameters()))
    assert sorted(set(muon.heights)) == [(32,), (32, 16, 16), (48, 48)]


def test_adamw_steps_equal_torchs(decoder):
    """Clipping, warm-up and decay included; norms and biases are not decayed."""
    settings = Optimizer(
        learning_rate=0.01, weight_decay=0.1, warmup_steps=2, schedule="cosine", clip_norm=0.5
    )
    ours, theirs = decoder(), decoder()
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    rest = [{"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        [{"params": matrices}, *rest], betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    stepper, random = Stepper(ours, settings, 5), torch.Generator().manual_seed(0)
    for step, factor in enumerate([0.5, 1.0, 1.0, 0.775, 0.325]):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=random)
            b.grad = a.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01 * factor
        reference.step()
        assert stepper.step(step) == pytest.approx(float(norm))
        assert all(p.grad is None for p in ours.parameters())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_and_loaded_continues_bit_for_bit(decoder, name):
    settings = Optimizer(name=name, learning_rate=0.01, weight_decay=0.1, warmup_steps=2, schedule="linear")
    whole, first = (Learner(decoder(vocab_size=VOCABULARY), settings, 6) for _ in range(2))
    second = Learner(decoder(vocab_size=VOCABULARY, seed=5), settings, 6)
    uninterrupted = [whole.update(pack(alone(4 + i), 60), CrossEntropy()) for i in range(6)]
    resumed = [first.update(pack(alone(4 + i), 60), CrossEntropy()) for i in range(3)]
    state = io.BytesIO()
    torch.save(first.state_dict(), state)
    state.seek(0)
    second.load_state_dict(torch.load(state, weights_only=True))
    resumed += [second.update(pack(alone(4 + i), 60), CrossEntropy()) for i in range(3, 6)]
    assert resumed == uninterrupted
    assert second.step == 6
    for key, weight in whole.weights().items():
        assert torch.equal(weight, second.weights()[key])


# ------------------------------------------------------------------------- the self-test, and the loop


@pytest.fixture
def rollouts(decoder, tokenizer, clock) -> tuple[Learner, list[Sample]]:
    model = decoder()
    groups = Engine(model, tokenizer).rollout(
        clock.problems("train")[:6], 4, SamplingParams(max_new_tokens=24), 0
    )
    advantages = [np.array([1.0, -1.0, 0.5, -0.5])] * len(groups)
    return Learner(model, Optimizer(), 1), to_samples(groups, advantages, keep_mask=False)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_audit_passes_what_is_right_and_leaves_no_gradient(rollouts, tokenizer, policy):
    learner, samples = rollouts
    selftest(learner, samples, PolicyGradient(policy, 24), tokenizer.end_id, 1.0)
    assert all(p.grad is None for p in learner.model.parameters())


def test_audit_stops_a_run_whose_sampler_is_not_the_learner(rollouts, tokenizer):
    learner, samples = rollouts
    with pytest.raises(LimbeckError, match="sampler and learner disagree by"):
        selftest(learner, samples, PolicyGradient(Policy()), tokenizer.end_id, temperature=0.6)


def test_audit_stops_a_run_whose_gradient_depends_on_the_cuts(rollouts, tokenizer):
    learner, samples = rollouts

    def forgetful(logprobs_M, batch):
        return -logprobs_M.mean(), {}

    with pytest.raises(LimbeckError, match="gradient changes"):
        selftest(learner, samples, forgetful, tokenizer.end_id, 1.0)


@pytest.mark.parametrize("preset", ["default", "r1"])
def test_reinforce_runs_with_every_preset(decoder, tokenizer, clock, tmp_path, preset):
    """Two steps on the real task: the reference is there where the KL wants one, and the gap is rounding."""
    policy = Policy(
        preset=preset, group_size=4, prompts_per_step=8, updates_per_rollout=2, mask_truncated=False
    )
    settings = RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        rewards={"language": 1.0},
        steps=2,
        policy=policy,
        sampling=Sampling(max_new_tokens=16),
        batch_tokens=128,
    )
    learner = Learner(decoder(), settings.optimizer, 4)
    reference = Scorer(decoder()) if policy.kl_coef else None
    engine, tasks = (
        Engine(learner.model, tokenizer),
        Mixture({"clock": clock}, {"clock": 1}, settings.rewards),
    )
    rewards = LearnedRewards(settings, {}, tasks, SamplingParams(max_new_tokens=16), "0/zero")
    train_grpo(tmp_path, learner, engine, rewards, reference=reference)
    first, second = read_metrics(tmp_path)
    assert learner.step == 4 and 0 <= max(first["gap"], second["gap"]) < 1e-4
    assert ("kl_reference" in first) == (preset == "r1")
    assert second["max_drift"] > 1e-3  # the second update of a step is off policy


def test_reinforce_ends_when_its_flops_are_spent(decoder, tokenizer, clock, tmp_path):
    """Never before, and not a step later; also where a checkpoint lies between."""
    policy = Policy(group_size=4, prompts_per_step=4, zero_variance="keep", mask_truncated=False)
    settings = RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        rewards={"language": 1.0},
        steps=9,
        policy=policy,
        sampling=Sampling(max_new_tokens=16),
    )

    def spend(folder: Path, budget: float, stop: Callable[[], bool] = lambda: False) -> list[float]:
        folder.mkdir(exist_ok=True)
        learner, tasks = (
            Learner(decoder(), settings.optimizer, 9),
            Mixture({"clock": clock}, {"clock": 1}, settings.rewards),
        )
        rewards = LearnedRewards(settings, {}, tasks, SamplingParams(max_new_tokens=16), "0/zero")
        engine = Engine(learner.model, tokenizer)
        train_grpo(folder, learner, engine, rewards, Checkpoint(folder, 60, stop), budget)
        return [row["flops"] for row in read_metrics(folder)]

    first, second, *_ = spend(tmp_path / "whole", math.inf)
    just = 0.9999 * (first + second)  # a record has six digits
    assert len(spend(tmp_path / "exact", just)) == 2
    assert len(spend(tmp_path / "more", 1.01 * just)) == 3
    with pytest.raises(Resumable):
        spend(tmp_path / "stopped", just, stop=lambda: True)
    assert len(read_metrics(tmp_path / "stopped")) == 1
    assert spend(tmp_path / "stopped", just) == [first, second]


RECOMPUTED = {
    "dense": {},
    "experts": {"layers": 3, "experts": Experts(4, 2, 16, dense=(0,), balanced=True)},
    "recycled": {"experts": Experts(4, 1, 16, capacity=1.0)},
    "shared keys": {"layers": 4, "share_kv": 2, "qk_norm": "after"},
    "latent": {"latent": Latent(8, 6, 4, 5), "kv_heads": 4},
}


@pytest.mark.parametrize("family", RECOMPUTED)
@pytest.mark.parametrize("batch", BATCHES)
def test_recomputing_changes_no_bit_and_keeps_less(decoder, batch, family):
    """The gradient of a whole batch; and how many numbers autograd holds on to."""

    def learn(recompute: bool) -> tuple[torch.Tensor, int]:
        model, held = decoder(vocab_size=VOCABULARY, **RECOMPUTED[family]), 0
        learner = Learner(model, Optimizer(), 1, recompute)

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        packed = pack(BATCHES[batch](), 1 << 20)[0]
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = learner._loss(packed, CrossEntropy(), 1.0)[0]
        before = held
        loss.backward()
        return gradient(model), before

    (plain, whole), (again, less) = learn(False), learn(True)
    assert torch.equal(plain, again)
    assert less < whole / 2
