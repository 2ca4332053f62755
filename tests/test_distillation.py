"""Distillation and preferences: divergences by their properties, by finite differences, and against TRL."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import limbeck.train.divergence as divergence_module
from limbeck.config.recipe import Optimizer
from limbeck.train.batch import pack
from limbeck.train.divergence import Logits, States, divergence, forward_kl, jensen_shannon, reverse_kl, top_k
from limbeck.train.dpo import DPO
from limbeck.train.learner import Learner
from limbeck.train.losses import Distillation
from limbeck.types import Labels, Sample

MEASURES = {"forward": (forward_kl, 0.0), "reverse": (reverse_kl, 1.0), "jsd": (jensen_shannon(0.3), 0.3)}
VOCABULARY, STUDENT, TEACHER, TOKENS = 13, 4, 5, 9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four rows at a time: what is true of one chunk is true of many."""
    monkeypatch.setattr(divergence_module, "CHUNK", 4 * VOCABULARY)
    monkeypatch.setattr(divergence_module, "LEAST", 1)


def numbers(*shape: int, seed: int = 0, learned: bool = False) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=random).requires_grad_(learned)


def sides(temperature: float = 1.0) -> tuple[Logits, States]:
    """A student and a teacher of different widths over one vocabulary, neither sure nor at a loss."""
    student = Logits(
        numbers(TOKENS, STUDENT, seed=1, learned=True),
        numbers(VOCABULARY, STUDENT, seed=2, learned=True),
        temperature,
    )
    return student, States(numbers(TOKENS, TEACHER, seed=3), numbers(VOCABULARY, TEACHER, seed=4))


def labels_of(teacher: States, count: int, temperature: float = 1.0):
    return top_k(teacher.hidden_MC, teacher.head_VC, count, temperature)


# ---------------------------------------------------------------- what a divergence is


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("labels", [None, 3, VOCABULARY])
def test_no_divergence_is_negative_and_none_is_there_between_equals(measure, labels):
    student, teacher = sides()
    shown = labels_of(teacher, labels) if labels else teacher
    total, value_M, _ = divergence(student, shown, MEASURES[measure][0])
    assert (value_M > 0.01).all() and float(total.detach()) == pytest.approx(float(value_M.sum()))
    same = Logits(teacher.hidden_MC.clone().requires_grad_(), teacher.head_VC)
    total, value_M, _ = divergence(same, shown, MEASURES[measure][0])
    assert value_M.abs().max() < 1e-12
    total.backward()
    assert same.hidden_MC.grad.abs().max() < 1e-12


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("labels", [None, 1, 5, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradients_equal_finite_differences(measure, labels, temperature):
    student, teacher = sides()
    shown = labels_of(teacher, labels, temperature) if labels else teacher

    def loss(hidden_MC, head_VC):
        return 0.7 * divergence(Logits(hidden_MC, head_VC, temperature), shown, MEASURES[measure][0])[0]

    assert torch.autograd.gradcheck(loss, (student.hidden_MC, student.head_VC), atol=1e-7)


@pytest.mark.parametrize("measure", MEASURES)
def test_all_labels_are_full_logits_and_fewer_never_tell_more(measure):
    """Merging events can only lower a divergence (the data-processing inequality)."""
    student, teacher = sides()
    full = divergence(student, teacher, MEASURES[measure][0])[1]
    values = [
        divergence(student, labels_of(teacher, k), MEASURES[measure][0])[1] for k in range(1, VOCABULARY + 1)
    ]
    torch.testing.assert_close(values[-1], full, atol=1e-12, rtol=0)
    assert all((few <= more + 1e-12).all() for few, more in itertools.pairwise(values))
    assert values[0].sum() < 0.9 * full.sum()


def test_labels_keep_all_mass():
    _, teacher = sides()
    labels = labels_of(teacher, 4)
    mass = labels.logprobs_MK.exp().sum(1) + labels.tail_M.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))


@pytest.mark.parametrize("measure", MEASURES)
def test_a_sure_teacher_and_a_sure_student_give_finite_gradients(measure):
    """Logits hundreds apart, in float32: probabilities of 0 on either side."""
    student = Logits(torch.eye(4, requires_grad=True), 300 * torch.eye(4), 1.0)
    for shown in (
        States(torch.eye(4).roll(1, 0), 300 * torch.eye(4)),
        top_k(torch.eye(4), 300 * torch.eye(4), 2, 1.0),
    ):
        total, value_M, _ = divergence(student, shown, MEASURES[measure][0])
        total.backward()
        assert torch.isfinite(value_M).all() and torch.isfinite(student.hidden_MC.grad).all()


def test_heads_padded_to_different_sizes_are_compared_on_what_both_have():
    student, teacher = sides()
    padded = replace(teacher, head_VC=torch.cat([teacher.head_VC, numbers(3, TEACHER, seed=9)]))
    assert torch.equal(
        divergence(student, padded, reverse_kl)[1], divergence(student, teacher, reverse_kl)[1]
    )
    wide = replace(
        student, head_VC=torch.cat([student.head_VC, numbers(3, STUDENT, seed=9)]).detach().requires_grad_()
    )
    total, value_M, _ = divergence(wide, teacher, reverse_kl)
    total.backward()
    assert torch.equal(value_M, divergence(student, teacher, reverse_kl)[1])
    assert wide.head_VC.grad.shape == wide.head_VC.shape and not wide.head_VC.grad[VOCABULARY:].any()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_value_and_gradient_equal_trls(measure, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = sides(temperature)
    compare, beta = MEASURES[measure]
    total, _, _ = divergence(student, teacher, compare)
    (total / TOKENS).backward()
    hidden, head = (x.detach().clone().requires_grad_() for x in (student.hidden_MC, student.head_VC))
    wanted = gkd.GKDTrainer.generalized_jsd_loss(
        (hidden @ head.T)[None],
        (teacher.hidden_MC @ teacher.head_VC.T)[None],
        labels=torch.zeros(1, TOKENS, dtype=torch.long),
        beta=beta,
        temperature=temperature,
    )
    wanted.backward()
    torch.testing.assert_close(total / TOKENS, wanted)
    torch.testing.assert_close(student.hidden_MC.grad, hidden.grad)
    torch.testing.assert_close(student.head_VC.grad, head.grad)


def test_memory_is_a_chunks_and_not_the_batchs(monkeypatch):
    """2,000 predictions over 20,000 ids: 160 MB of logits a side, of which 4 MB may stand at once."""
    monkeypatch.setattr(divergence_module, "CHUNK", 1 << 20)
    tokens, vocabulary = 2000, 20_000
    largest = [0]

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor):
                    largest[0] = max(largest[0], tensor.untyped_storage().nbytes())
            return made

    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    with Watched():
        total, _, _ = divergence(
            Logits(hidden, head), States(torch.randn(tokens, 4), torch.randn(vocabulary, 4)), reverse_kl
        )
        total.backward()
    assert 1e6 < largest[0] <= 4 * (1 << 20)
    assert head.grad.abs().sum() > 0


# ---------------------------------------------------------------- through the learner


def samples_of(seed: int = 0) -> list[Sample]:
    """Groups of three that share a prompt."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, 40, n) for n in (3, 5, 5, 4)]
    return [
        Sample(np.concatenate([prompt, random.integers(0, 40, random.integers(2, 9))]), len(prompt))
        for prompt in prompts
        for _ in range(3)
    ]


def gradient_of(
    learner: Learner, batches: list, loss, temperature: float = 1.0
) -> tuple[float, torch.Tensor]:
    total = 0.0
    for batch in batches:
        value, _ = learner._loss(batch, loss, temperature)
        value.backward()
        total += float(value.detach())
    flat = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
    learner.model.zero_grad(set_to_none=True)
    return total, flat


@pytest.mark.parametrize("kind", MEASURES)
def test_micro_batches_add_up(decoder, kind):
    student = Learner(decoder(torch.float64, vocab_size=40), Optimizer(), 1)
    teacher = Learner(decoder(torch.float64, seed=1, vocab_size=40, hidden_size=48), Optimizer(), 1)
    shown = [
        [replace(b, teacher=teacher.states(b)) for b in pack(samples_of(), size)] for size in (1 << 20, 12)
    ]
    assert len(shown[1]) > len(shown[0])
    (one, whole), (many, cut) = (
        gradient_of(student, batches, Distillation(kind, 0.3), 0.8) for batches in shown
    )
    assert one == pytest.approx(many, rel=1e-12)
    torch.testing.assert_close(whole, cut, atol=1e-12, rtol=1e-9)


def test_labels_of_samples_reach_their_own_predictions(decoder):
    """As many labels as ids, cut and sorted by packing, teach what the teacher itself teaches, up to
    float32."""
    student = Learner(decoder(vocab_size=40), Optimizer(), 1)
    teacher = Learner(decoder(seed=1, vocab_size=40), Optimizer(), 1)
    labelled = []
    for sample in samples_of():
        states = teacher.states(pack([sample], 1 << 20)[0])
        top = top_k(states.hidden_MC, states.head_VC, 40, 1.0)
        labelled.append(
            replace(sample, labels=Labels(top.ids_MK.numpy(), top.logprobs_MK.numpy(), top.tail_M.numpy()))
        )
    full = [replace(b, teacher=teacher.states(b)) for b in pack(samples_of(), 30)]
    one, by_labels = gradient_of(student, pack(labelled, 30), Distillation("forward"))
    other, by_states = gradient_of(student, full, Distillation("forward"))
    assert one == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(by_labels, by_states, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", MEASURES)
def test_a_student_comes_close_to_its_teacher(decoder, kind):
    student, teacher = (
        Learner(decoder(seed=2), Optimizer(learning_rate=1e-2), 60),
        Learner(decoder(seed=1), Optimizer(), 1),
    )
    batches = [replace(b, teacher=teacher.states(b)) for b in pack(samples_of(), 1 << 20)]
    losses = [student.update(batches, Distillation(kind, 0.3))["loss"] for _ in range(60)]
    assert losses[-1] < losses[0] / 4


# ---------------------------------------------------------------- preferences


def pairs_of(widths: tuple[int, ...] = (3, 5, 5), reference: bool = True) -> list[Sample]:
    """Five pairs over three prompts, their halves far apart in the list."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 40, n) for n in widths]
    halves: list[list[Sample]] = [[], []]
    for pair in range(5):
        prompt = prompts[pair % 3]
        for side, sign in enumerate((1, -1)):
            response = random.integers(0, 40, random.integers(2, 9))
            scored = -random.exponential(3.0, len(response)).astype(np.float32) if reference else None
            halves[side].append(
                Sample(
                    np.concatenate([prompt, response]), len(prompt), pair=sign * (pair + 1), reference=scored
                )
            )
    return [*halves[0], *halves[1]]


@pytest.mark.parametrize("normalized", [False, True])
def test_preference_loss_and_gradient_equal_trls(normalized):
    """TRL's own `_compute_loss`, told the log-probabilities."""
    pytest.importorskip("trl")
    (batch,) = pack(pairs_of((4, 4, 4)), 1 << 20)
    random = torch.Generator().manual_seed(1)
    logprobs_M = (-3 * torch.rand(batch.targets_M.shape, generator=random)).requires_grad_()
    loss, metrics = DPO(0.3, normalized)(logprobs_M, batch)
    loss.backward()

    pairs = batch.pairs_S.tolist()
    order = sorted(
        range(len(pairs)), key=lambda s: (pairs[s] < 0, abs(pairs[s]))
    )  # TRL's: the better ones, then the worse
    mask = torch.zeros(len(order), 9)
    for row, s in enumerate(order):
        mask[row, : int(batch.lengths_S[s])] = 1

    def padded(values_M: torch.Tensor) -> torch.Tensor:
        rows = [values_M.detach()[batch.rows_M == s] for s in order]
        return torch.zeros(mask.shape).masked_scatter_(mask.bool(), torch.cat(rows))

    theirs = padded(logprobs_M).requires_grad_()
    wanted = trl_preference(
        theirs, padded(batch.reference_M), mask, 0.3, "sigmoid_norm" if normalized else "sigmoid"
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        padded(logprobs_M.grad), theirs.grad * mask
    )  # it sums what its head left at zero too
    assert float(metrics["margin"]) == pytest.approx(float(metrics["chosen"] - metrics["rejected"]), abs=1e-4)


def trl_preference(logprobs_BT, reference_BT, mask_BT, beta: float, kind: str) -> torch.Tensor:
    """DPOTrainer's loss with a model that says these log-probabilities, the first column a prompt of one
    token."""
    from trl.trainer.dpo_trainer import DPOTrainer

    said = SimpleNamespace(
        log_probs=logprobs_BT,
        entropy=logprobs_BT.detach() * 0,
        mean_logits=logprobs_BT.detach() * 0,
        is_top1=mask_BT > 1,
    )

    def model(**_):
        return said

    model.training = True
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        beta=beta,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        label_smoothing=0.0,
        _metrics={"train": Lists(), "eval": Lists()},
        _total_train_tokens=0,
        _tp_size=1,
    )
    better, worse = reference_BT.sum(1).chunk(2)
    ones = torch.ones(len(mask_BT), 1)
    completion_mask = torch.cat([0 * ones, mask_BT], 1).long()
    inputs = {
        "input_ids": completion_mask,
        "attention_mask": completion_mask,
        "completion_mask": completion_mask,
        "ref_chosen_logps": better,
        "ref_rejected_logps": worse,
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


class Lists(dict):
    def __missing__(self, key: str) -> list:
        return self.setdefault(key, [])


@pytest.mark.parametrize("normalized", [False, True])
def test_pairs_stay_together_and_micro_batches_add_up(decoder, normalized):
    learner, loss = (
        Learner(decoder(torch.float64, vocab_size=40), Optimizer(), 1),
        DPO(0.5, normalized),
    )
    whole, cut = pack(pairs_of(), 1 << 20), pack(pairs_of(), 1)
    assert len(cut) == 3 and all(
        sorted(b.pairs_S.abs().tolist())[::2] == sorted(b.pairs_S.abs().tolist())[1::2] for b in cut
    )
    (one, first), (many, second) = gradient_of(learner, whole, loss), gradient_of(learner, cut, loss)
    assert one == pytest.approx(many, rel=1e-12)
    torch.testing.assert_close(first, second, atol=1e-12, rtol=1e-9)


def test_a_shared_prompt_is_computed_once():
    alone = sum(len(s.tokens) - 1 for s in pairs_of())
    (batch,) = pack([s for s in pairs_of() if abs(s.pair) == 1], 1 << 20)
    better, worse = (s for s in pairs_of() if abs(s.pair) == 1)
    assert len(batch.tokens_N) == len(better.tokens) + len(worse.tokens) - better.start - 2 < alone


def test_at_the_reference_the_loss_is_log_two_and_pulls_halves_apart(decoder):
    learner, samples = (
        Learner(decoder(vocab_size=40), Optimizer(learning_rate=3e-3), 30),
        pairs_of(reference=False),
    )
    batches = [
        replace(b, reference_M=score) for b in pack(samples, 1 << 20) for score in learner.logprobs([b])
    ]
    history = [learner.update(batches, DPO(0.5)) for _ in range(30)]
    assert history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4) and history[0]["margin"] == pytest.approx(
        0, abs=1e-4
    )
    assert history[-1]["loss"] < 0.2 and history[-1]["preferred"] == 1


def test_half_a_pair_is_refused():
    (batch,) = pack([s for s in pairs_of((4, 4, 4)) if s.pair != -2], 1 << 20)
    with pytest.raises(ValueError, match="a pair is not whole"):
        DPO(0.1)(torch.zeros(batch.targets_M.shape), batch)
