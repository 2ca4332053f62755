"""Learning in bf16: float32 masters and sums of gradients, an exact resume, and memory that is given back."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_learner import BATCHES, mixed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.config.parts import Optimizer, Policy
from limbeck.model.decoder import Decoder
from limbeck.model.ops import PlainOps, place, use
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import PolicyGradient
from limbeck.train.scorer import token_logprobs
from limbeck.types import LimbeckError

SETTINGS = Optimizer(learning_rate=1e-3)
LOSS = PolicyGradient(Policy(), 23)


def learner(model: Decoder, recompute: bool | str = False, **changes) -> Learner:
    return Learner(model, SETTINGS.model_copy(update=changes), 10, recompute)


def halved(decoder) -> Decoder:
    return place(decoder(), "cpu", torch.bfloat16)


def digest(learner: Learner) -> str:
    """Of the weights and of everything that the optimizers keep."""
    sha = hashlib.sha256()
    saved = io.BytesIO()
    torch.save(learner.state_dict(), saved)
    state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)

    def feed(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                sha.update(str(name).encode())
                feed(value[name])
        elif isinstance(value, list | tuple):
            for entry in value:
                feed(entry)
        else:
            sha.update(repr(value).encode())

    feed(state)
    return sha.hexdigest()


def gone(references: list[weakref.ref]) -> bool:
    """Whether nothing of it is in memory; half of it is an error."""
    left = sum(reference() is not None for reference in references)
    assert left in (0, len(references))
    return not left


@contextmanager
def no_collector() -> Iterator[None]:
    """Only what no cycle holds is freed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_of_many_micro_batches_are_summed_in_float32(decoder, name):
    """Equal to the sum of each micro-batch's own, and near the gradient in float64."""
    model = halved(decoder)
    samples = BATCHES[name]()
    batches = pack(samples, 60)
    assert len(batches) > 2
    one = learner(model)
    one.accumulate(batches, LOSS)
    summed = dict(one.optimizer.gradients())
    assert all(p.grad is None for p in model.parameters())
    wanted: dict[str, torch.Tensor] = {}
    for batch in batches:
        each = learner(copy.deepcopy(model))
        each.accumulate([batch], LOSS)
        for name_, p in each.model.named_parameters():
            assert p.grad.dtype == torch.bfloat16
            wanted[name_] = wanted.get(name_, 0) + p.grad.float()
    precise = copy.deepcopy(model).double()
    reference = learner(precise)
    reference.accumulate(batches, LOSS)
    for name_, gradient in summed.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, wanted[name_])
        right = dict(precise.named_parameters())[name_].grad
        assert (gradient - right).norm() < 0.05 * right.norm() + 1e-4, name_


def test_one_micro_batch_says_the_same_as_many(decoder):
    model = halved(decoder)
    whole = learner(copy.deepcopy(model))
    parts = learner(model)
    whole.accumulate(pack(mixed(), 1 << 20), LOSS)
    for batch in pack(mixed(), 60):  # as several calls, too
        parts.accumulate([batch], LOSS)
    others = dict(parts.optimizer.gradients())
    for name, gradient in whole.optimizer.gradients():
        assert (gradient - others[name]).norm() < 0.02 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_three_steps_a_saved_state_and_three_are_six(decoder, kind):
    def steps(one: Learner, begin: int, end: int) -> None:
        for step in range(begin, end):
            one.update(pack(mixed(), 60 + 100 * (step % 2)), LOSS)

    whole = learner(halved(decoder), name=kind)
    steps(whole, 0, 6)
    half = learner(halved(decoder), name=kind)
    steps(half, 0, 3)
    saved = io.BytesIO()
    torch.save(half.state_dict(), saved)
    other = learner(place(decoder(seed=7), "cpu", torch.bfloat16), name=kind)
    places = [p.data_ptr() for p in other.model.parameters()]
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    steps(other, 3, 6)
    assert digest(other) == digest(whole) != digest(half)
    assert places == [p.data_ptr() for p in other.model.parameters()]  # a captured step may go on with them
    masters = other.optimizer.masters
    assert all(torch.equal(p, masters[name].bfloat16()) for name, p in other.model.named_parameters())
    assert any(not torch.equal(p.float(), masters[name]) for name, p in other.model.named_parameters())
    assert list(half.state_dict()["optimizer"][-1]) == ["masters"]


def test_masters_learn_what_bf16_would_round_away(decoder):
    """Updates far below a weight's rounding add up."""
    one = learner(halved(decoder), learning_rate=2e-5, warmup_steps=0)
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    for _ in range(30):
        one.update(pack(mixed(), 1 << 20), LOSS)
    moved = [float((p != before[name]).float().mean()) for name, p in one.model.named_parameters()]
    assert np.mean(moved) > 0.1


def test_a_loss_that_is_not_finite_leaves_no_gradient(decoder):
    one = learner(halved(decoder))
    batches = pack(mixed(), 60)
    before = digest(one)
    batches[-1].advantages_M.fill_(float("nan"))
    with pytest.raises(LimbeckError, match="the advantages are not finite"):
        one.update(batches, LOSS)
    assert not list(one.optimizer.gradients()) and digest(one) == before
    assert all(p.grad is None for p in one.model.parameters())
    one.update(pack(mixed(), 60), LOSS)


def test_a_learner_that_is_dropped_frees_its_memory(decoder):
    """Without the collector of cycles, which runs when it likes: a second model may not fit before."""
    for recompute in (False, True, "keep_attention"):
        with no_collector():
            one = learner(halved(decoder), recompute)
            one.update(pack(mixed(), 60), LOSS)
            model = one.model
            moment = next(iter(one.optimizer.parts[0].state.values()))["exp_avg"]
            kept = [*one.optimizer.masters.values(), moment]
            places = [weakref.ref(tensor) for tensor in kept]
            weights = [weakref.ref(p) for p in model.parameters()]
            del one, kept, moment
            assert gone(places) and not gone(weights)
            next_ = learner(model)  # of the same model, whose weights still have the first one's hooks
            next_.update(pack(mixed(), 60), LOSS)
            del next_, model
            assert gone(weights)


@pytest.mark.parametrize("kept", [False, True])
def test_logprobs_of_weights_in_bf16_come_from_float32_logits(kept):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(30, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 10, (7,))
    ids = torch.arange(12).expand(7, -1) if kept else None
    logprobs, entropies = token_logprobs(hidden, head, targets, 0.7, ids)
    assert logprobs.dtype == entropies.dtype == torch.float32
    (logprobs * torch.arange(7)).sum().backward()
    right_hidden, right_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    logits = right_hidden @ right_head.T / 0.7
    logits = logits[:, :12] if kept else logits
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (wanted * torch.arange(7)).sum().backward()
    assert torch.allclose(logprobs.double(), wanted, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), right_hidden.grad, rtol=0.01, atol=0.01)
    assert torch.allclose(head.grad.double(), right_head.grad, rtol=0.01, atol=0.01)


# ------------------------------------------------------------------------- selective recomputation


class Keeping(PlainOps):
    """Operations that keep the results of attention, as a card's do, and count how often they compute."""

    def __init__(self) -> None:
        self.calls = 0
        self.results: list[weakref.ref] = []

    def attend(self, layer, q, k, v, sequences, latents=None):
        return Kept.apply(q, k, v, layer, sequences, self)


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layer, sequences, ops):
        ctx.save_for_backward(q, k, v)
        ctx.settings = layer, sequences
        kept = sequences.kept
        if kept:
            return kept.pop()[0]
        ops.calls += 1
        out = sequences.attend_padded(layer, q, k, v)
        if kept is not None:
            result = out.detach()
            ops.results.append(weakref.ref(result))
            kept.append((result, result))
        return out

    @staticmethod
    def backward(ctx, grad):
        layer, sequences = ctx.settings
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = sequences.attend_padded(layer, *leaves)
        return *torch.autograd.grad(out, leaves, grad), None, None, None


def test_attention_is_kept_while_the_rest_is_computed_again(decoder):
    """Once a layer and micro-batch in place of twice, with the same gradients."""
    gradients = {}
    calls = {}
    batches = pack(mixed(), 60)
    for recompute in (False, True, "keep_attention"):
        ops = Keeping()
        one = learner(use(decoder(), ops), recompute)
        one.accumulate(batches, LOSS)
        gradients[recompute] = dict(one.optimizer.gradients())
        calls[recompute] = ops.calls
        assert gone(ops.results)
        assert all(batch.context.kept is None for batch in batches)
    once = len(batches) * 2
    assert calls == {False: once, True: 2 * once, "keep_attention": once}
    for name, gradient in gradients[False].items():
        assert torch.equal(gradient, gradients[True][name])
        assert torch.equal(gradient, gradients["keep_attention"][name])


def test_what_is_kept_goes_with_the_graph_if_no_backward_pass_comes(decoder):
    """Even while the batch stays; and the batch can be learned from afterwards."""
    (batch,) = pack(mixed()[:9], 1 << 20)
    ops = Keeping()
    one = learner(use(decoder(), ops), "keep_attention")
    with no_collector():
        hidden = one.forward(batch)[0]
        assert len(ops.results) == 2 and not gone(ops.results)
        del hidden
        assert gone(ops.results)
    one.update([batch], LOSS)
    assert ops.calls == 4


class States(TorchDispatchMode):
    """The memory of tensors in the shape of hidden states, as long as it is in use."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.places: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.shape:
                storage = tensor.untyped_storage()
                self.places[storage.data_ptr()] = weakref.ref(storage)
        return result

    def alive(self) -> int:
        return sum(place() is not None for place in self.places.values())


def test_a_block_that_is_computed_again_keeps_one_tensor_of_its_input(decoder):
    (batch,) = pack(mixed()[:9], 1 << 20)
    kept = []
    for layers in (2, 5):
        one = learner(decoder(layers=layers), True)
        with no_collector(), States((len(batch.tokens_N), 32)) as states:
            hidden = one.forward(batch)[0]
            kept.append(states.alive())
            del hidden
    assert kept[1] - kept[0] == 3
