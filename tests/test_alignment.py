"""Distillation across tokenizers: spans that both close, what a teacher thinks of them, and whither it
pulls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, models, pre_tokenizers

from limbeck.config.parts import Optimizer
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack
from limbeck.train.distill import Assigned, DistillBatch, Teacher, attach_teachers
from limbeck.train.learner import Learner
from limbeck.train.losses import SpanDistance
from limbeck.train.scorer import Scorer
from limbeck.train.tokenizer_alignment import aligned, encode_with_ends, spans_of, token_ends
from limbeck.types import Sample

SAID = ["<answer> 1 -6 *5 </answer>", "try 6 -5 gives 1", "试 6 得 1"]


def spelling() -> Tokenizer:
    """Every character is a token; `|` ends a turn."""
    letters = sorted(set("".join(SAID) + "abcdefghijklmnopqrstuvwxyzUA:?"))
    backend = tokenizers.Tokenizer(
        models.WordLevel({c: i for i, c in enumerate([*letters, "|", "#"])}, unk_token="#")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, "{{ messages[0].content }}:", "|", "#")


def bytewise() -> Tokenizer:
    """Every byte is a token: of a Chinese character three, of which the last one alone ends where a character
    does."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "<end>"])}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, "{{ messages[0].content }}", "<end>", "<end>")


def test_ends_of_words_and_of_letters_meet(tokenizer):
    ids = tokenizer.response("try 6 -5")
    mine, (_, theirs) = token_ends(tokenizer, ids), encode_with_ends(spelling(), "try 6 -5", stopped=True)
    assert mine.tolist() == [3, 5, 8, 9] and theirs.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    common = np.intersect1d(mine, theirs)
    assert spans_of(mine, common).tolist() == [0, 1, 2, 3]
    assert spans_of(theirs, common).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3]


def test_no_span_ends_within_a_character(tokenizer):
    other, text = bytewise(), "试 6"
    said = other.response(text)
    assert token_ends(other, said).tolist() == [-1, -1, 1, 2, 3, 4]
    _, ends = encode_with_ends(tokenizer, text, stopped=True)
    assert ends.tolist() == [1, 3, 4]
    assert spans_of(token_ends(other, said), ends).tolist() == [0, 0, 0, 1, 1, 2]


def test_what_is_cut_off_within_a_word_is_of_no_span():
    assert spans_of(np.array([2, 4, 5]), np.array([2])).tolist() == [0, -1, -1]


def samples_of(tokenizer: Tokenizer) -> list[Sample]:
    """One response of each kind, the second one cut off."""
    prompts, responses = (
        [tokenizer.prompt(q) for q in ("say 1 ?", "use 6 1 ?", "say 6 ?")],
        [tokenizer.response(text) for text in SAID],
    )
    responses[1] = responses[1][:-1]
    return [Sample(np.concatenate([p, r]), len(p)) for p, r in zip(prompts, responses, strict=True)]


def test_the_teachers_verdicts_add_up_to_its_own_log_probability(decoder, tokenizer):
    other = spelling()
    teacher, samples = Scorer(decoder(vocab_size=other.size)), samples_of(tokenizer)
    marked, read = aligned(samples, ["a", "b", "c"], tokenizer, teacher, other, 1 << 20)
    for sample, question, text, stopped in zip(marked, "abc", SAID, (True, False, True), strict=True):
        prompt, (ids, _) = other.prompt(question), encode_with_ends(other, text, stopped)
        (alone,) = teacher.logprobs(pack([Sample(np.concatenate([prompt, ids]), len(prompt))], 1 << 20))
        assert sample.reference.sum() == pytest.approx(float(alone.sum()), abs=1e-3)
        assert (sample.reference != 0).sum() == sample.spans.max() + 1 == len(sample.tokens) - sample.start
    assert read == sum(len(other.prompt(q)) + len(t) for q, t in zip("abc", SAID, strict=True)) + 2


def test_with_one_tokenizer_every_token_is_a_span(decoder, tokenizer):
    student, teacher = (Learner(decoder(seed=seed), Optimizer(), 1) for seed in (0, 1))
    samples, questions = samples_of(tokenizer), ["say 1 ?", "use 6 1 ?", "say 6 ?"]
    marked, _ = aligned(samples, questions, tokenizer, teacher, tokenizer, 1 << 20)
    batches, plain = pack(marked, 1 << 20), pack(samples, 1 << 20)
    gaps = torch.cat(student.logprobs(plain)) - torch.cat(teacher.logprobs(plain))
    value, _ = (
        sum(parts)
        for parts in zip(*((SpanDistance()(student.logprobs([b])[0], b)[0], 0) for b in batches), strict=True)
    )
    assert float(value) == pytest.approx(float(gaps.square().mean() / 2), rel=1e-4)


def test_its_expected_gradient_is_that_of_the_reverse_kl():
    """One token, all that it may be, each as often as the student says it."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, generator=random, requires_grad=True)
    logp = torch.randn(7, dtype=torch.float64, generator=random).log_softmax(0)
    logq = logits.log_softmax(0)
    (batch,) = pack(
        [Sample(np.array([1, 2, i]), 2, spans=np.array([0]), reference=np.zeros(1)) for i in range(7)],
        1 << 20,
    )
    order = batch.targets_M
    expected = torch.zeros(7, dtype=torch.float64)
    for place in range(7):
        one = replace(
            batch,
            tokens=1,
            spans_M=torch.zeros(1, dtype=torch.long),
            reference_M=logp[order[place]].unsqueeze(0),
        )
        value, _ = SpanDistance()(logq[order[place]].unsqueeze(0), one)
        (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
        expected += logq[order[place]].detach().exp() * gradient
    (wanted,) = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), logits)
    torch.testing.assert_close(expected, wanted)


def test_micro_batches_add_up_and_a_student_learns(decoder, tokenizer):
    other = spelling()
    student = Learner(decoder(torch.float64), Optimizer(learning_rate=1e-2), 40)
    teacher = Teacher(Scorer(decoder(vocab_size=other.size)), (tokenizer, other))
    lesson = DistillBatch(
        [
            Assigned("big", sample, question)
            for sample, question in zip(samples_of(tokenizer), "abc", strict=True)
        ]
    )
    gradients = []
    for size in (1 << 20, 1):
        batches, _ = attach_teachers(lesson, {"big": teacher}, size)
        for batch in batches:
            SpanDistance()(student.forward(batch)[0], batch)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.model.parameters()]))
        student.model.zero_grad(set_to_none=True)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)  # what the teacher thinks is in float32
    losses = [
        student.update(attach_teachers(lesson, {"big": teacher}, 1 << 20)[0], SpanDistance())["loss"]
        for _ in range(40)
    ]
    assert losses[-1] < losses[0] / 4
