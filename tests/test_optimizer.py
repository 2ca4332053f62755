"""AdamW that saves memory: in chunks, with moments in 8 bits, without masters, on the host."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from fake_device import NAME, fake_device
from test_learner import mixed
from test_masters import LOSS, digest, halved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limbeck.config.parts import LoRA as LoRASettings
from limbeck.config.parts import Optimizer
from limbeck.model.decoder import Decoder
from limbeck.model.lora import LoRA
from limbeck.model.ops import place
from limbeck.train import adamw
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.optimizer import Optimizer as Stepper
from limbeck.types import LimbeckError

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # so that matrices have 8-bit moments
SAVINGS = {
    "int8": {"moments": "int8"},
    "no-masters": {"masters": False},
    "offload": {"offload": True},
    "int8-no-masters": {"moments": "int8", "masters": False},
    "all": {"moments": "int8", "masters": False, "offload": True},
}
saving = pytest.mark.parametrize("changes", SAVINGS.values(), ids=list(SAVINGS))


def learner(model: Decoder, seed: object = 0, lora: LoRA | None = None, **changes) -> Learner:
    settings = Optimizer(**{"learning_rate": 0.01, "weight_decay": 0.1, "warmup_steps": 2, **changes})
    return Learner(model, settings, 10, lora=lora, seed=seed)


def steps(one: Learner, begin: int, end: int) -> list[float]:
    """Updates of many and of few micro-batches in turn."""
    batches = [pack(mixed(), 60 if step % 2 else 1 << 20) for step in range(begin, end)]
    return [one.update(batch, LOSS)["gradient_norm"] for batch in batches]


def adapters(model: Decoder, rank: int = 16) -> LoRA:
    return LoRA(model, LoRASettings(rank=rank), 0)


# ------------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("size", [256, 1024, 1 << 22])
def test_a_chunk_at_a_time_is_torchs_adamw_bit_for_bit(monkeypatch, size):
    monkeypatch.setattr(adamw, "CHUNK", size)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.Linear(70, 30))
    theirs = copy.deepcopy(model)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2]},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, 0.01, (0.9, 0.95), weight_decay=0.1, fused=True)
    stepper = Stepper(model, Optimizer(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0), 9)
    for step in range(3):
        for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
        assert stepper.step(step) == float(norm)
        assert all(map(torch.equal, model.parameters(), theirs.parameters()))


@saving
def test_bits_do_not_depend_on_chunks(decoder, monkeypatch, changes):
    found = []
    for size in (512, 1 << 22):
        monkeypatch.setattr(adamw, "CHUNK", size)
        one = learner(halved(lambda: decoder(**WIDE)), **changes)
        steps(one, 0, 2)
        found.append(digest(one))
    assert found[0] == found[1]


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operation made in float32 or wider."""

    def __init__(self):
        super().__init__()
        self.numbers = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        taken = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in taken:
                self.numbers = max(self.numbers, tensor.numel() * (tensor.itemsize >= 4))
        return result


@saving
def test_nothing_is_in_float32_as_a_whole_but_what_is_kept_so(decoder, monkeypatch, changes):
    """Besides an update's first: it makes the moments."""
    monkeypatch.setattr(adamw, "CHUNK", 256)
    one = learner(halved(lambda: decoder(**WIDE)), **changes)
    (batch,) = pack(mixed()[:9], 1 << 20)
    one.update([batch], LOSS)
    one.accumulate([batch], LOSS)
    with Largest() as largest:
        one.apply()
    assert 0 < largest.numbers <= 256


# ------------------------------------------------------------------------- what is kept


def kept_bytes(one: Learner) -> int:
    """Of moments, scales and counts."""
    states = [state for part in one.optimizer.parts for state in part.state.values()]
    return sum(tensor.nbytes for state in states for tensor in state.values())


def checkpoint_bytes(one: Learner) -> int:
    saved = io.BytesIO()
    torch.save(one.state_dict(), saved)
    return len(saved.getvalue())


def test_what_a_weight_takes(decoder):
    """Moments of 8 bytes or little more than 2, masters of 4, weights of 2, in memory and in a checkpoint."""
    shape = {"hidden_size": 256, "intermediate_size": 1024}
    taken = {}
    for name, changes in {"default": {}, **SAVINGS}.items():
        one = learner(halved(lambda: decoder(**shape)), **changes)
        one.update(pack(mixed()[:2], 1 << 20), LOSS)
        count = sum(p.numel() for p in one.model.parameters())
        taken[name] = [round(x / count, 2) for x in (kept_bytes(one), checkpoint_bytes(one))]
        masters = sum(p.nbytes for p in one.optimizer.masters.values())
        assert masters == (0 if "masters" in changes else 4 * count)
    print("bytes a weight, moments and checkpoint:", taken)
    assert taken["default"][0] == 8 and taken["int8"][0] < 0.3 * 8
    for name, wanted in {"default": 14, "int8": 8, "no-masters": 10, "offload": 14, "all": 4}.items():
        assert taken[name][1] == pytest.approx(wanted, rel=0.05), name


def test_gradients_without_masters_are_summed_in_float32_from_the_second_micro_batch_on(decoder):
    one = learner(halved(decoder), masters=False)
    other = learner(halved(decoder))
    (first, *more) = pack(mixed(), 60)
    one.accumulate([first], LOSS)
    assert {gradient.dtype for _, gradient in one.optimizer.gradients()} == {torch.bfloat16}
    one.accumulate(more, LOSS)
    other.accumulate([first, *more], LOSS)
    sums = dict(other.optimizer.gradients())
    for name, gradient in one.optimizer.gradients():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, sums[name])
    one.apply()
    assert not list(one.optimizer.gradients())


# ------------------------------------------------------------------------- the host's memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"moments": "int8"}], ids=str)
def test_offload_changes_no_bit_on_a_cpu(decoder, dtype, changes):
    found = []
    for offload in (False, True):
        one = learner(place(decoder(**WIDE), "cpu", dtype), offload=offload, **changes)
        found.append((steps(one, 0, 4), digest(one)))
    assert found[0] == found[1]


def test_a_weight_in_float32_on_the_host_is_its_own_master(decoder):
    one = learner(decoder(), offload=True)
    for name, weight in one.model.named_parameters():
        assert one.optimizer.masters[name].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"moments": "int8"}, {"masters": False}], ids=str)
def test_offload_from_a_device_keeps_all_on_the_host_and_changes_no_bit(decoder, dtype, changes):
    """Weights on a device that takes no tensor of the CPU; updates of one and of many micro-batches."""
    if dtype == torch.float32 and "masters" in changes:
        pytest.skip("needs bfloat16")
    with fake_device():
        found = []
        for offload in (False, True):
            one = learner(place(decoder(**WIDE), NAME, dtype), offload=offload, **changes)
            batches = [one.pack(mixed()[:9], 1 << 20), one.pack(mixed(), 60)]
            norms = [one.update(batch, LOSS)["gradient_norm"] for batch in batches]
            assert {p.device.type for p in one.model.parameters()} == {NAME}
            found.append((norms, [p.detach().cpu() for p in one.model.parameters()]))
            kept = [
                t for part in one.optimizer.parts for state in part.state.values() for t in state.values()
            ]
            kept += one.optimizer.masters.values()
            assert {tensor.device.type for tensor in kept} == {"cpu" if offload else NAME}
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))


# ------------------------------------------------------------------------- resume


@saving
@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "lora"])
def test_three_steps_a_saved_state_and_three_are_six(decoder, changes, adapted):
    """The bytes of the weights and of all that the optimizer keeps; another seed rounds otherwise."""
    if adapted and "masters" in changes:
        pytest.skip("refused")

    def begin(seed: object = 0) -> Learner:
        model = halved(lambda: decoder(**{**WIDE, "hidden_size": 128}))
        return learner(model, seed, adapters(model) if adapted else None, **changes)

    whole, half, resumed = begin(), begin(), begin()
    steps(whole, 0, 6)
    steps(half, 0, 3)
    saved = io.BytesIO()
    torch.save(half.state_dict(), saved)
    places = [p.data_ptr() for p in resumed.model.parameters()]
    resumed.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    steps(resumed, 3, 6)
    assert digest(resumed) == digest(whole) != digest(half)
    assert places == [p.data_ptr() for p in resumed.model.parameters()]
    if changes != {"offload": True}:
        other = begin(seed=1)
        steps(other, 0, 6)
        assert digest(other) != digest(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_may_go_on_with_offload_and_without(decoder, dtype):
    """`offload` is in no key, so it may be set after a card was full."""
    whole, half = (learner(place(decoder(**WIDE), "cpu", dtype)) for _ in range(2))
    other = learner(place(decoder(**WIDE, seed=3), "cpu", dtype), offload=True)
    again = learner(place(decoder(**WIDE, seed=4), "cpu", dtype))
    steps(whole, 0, 6)
    steps(half, 0, 2)
    other.load_state_dict(copy.deepcopy(half.state_dict()))
    steps(other, 2, 4)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    steps(again, 4, 6)
    assert digest(again) == digest(whole)


# ------------------------------------------------------------------------- learning


TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.1}  # nats a token


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_all_learn_like_adamw_with_moments_and_masters_in_float32(decoder, dtype):
    """Thirty updates on a few texts, from the same beginning: the losses of all updates are near."""
    curves = {}
    for name, changes in {"default": {}, **SAVINGS}.items():
        if dtype == torch.float32 and "masters" in changes:
            continue
        one = learner(place(decoder(**WIDE), "cpu", dtype), **{**changes, "learning_rate": 1e-3})
        batches = pack(mixed()[:6], 1 << 20)
        curves[name] = torch.tensor([one.update(batches, CrossEntropy())["loss"] for _ in range(30)])
    print("losses:", {name: [round(float(x), 3) for x in curve[9::10]] for name, curve in curves.items()})
    wanted = curves["default"]
    assert wanted[-1] < 0.7 * wanted[0]
    for name, curve in curves.items():
        assert float((curve - wanted).abs().max()) < TOLERANCE[dtype], name


def test_small_updates_add_up_without_masters(decoder):
    """Far below the rounding of most weights: as far as with masters, in the mean of the same gradients."""
    moved = {}
    for name, changes in {"masters": {}, "none": {"masters": False}}.items():
        model = halved(lambda: decoder(**WIDE))
        before = model.embed.weight.detach().float().clone()
        one = learner(model, learning_rate=2e-5, weight_decay=0.0, warmup_steps=0, **changes)
        for _ in range(30):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            one.optimizer.step(one.step)
            one.step += 1
        after = one.optimizer.masters.get("embed.weight", model.embed.weight)
        moved[name] = float((after.detach().float() - before).mean())
    assert moved["masters"] == pytest.approx(-30 * 2e-5, rel=0.01)
    assert moved["none"] == pytest.approx(moved["masters"], rel=0.1)


# ------------------------------------------------------------------------- refused


def test_no_masters_needs_weights_in_bfloat16_that_learn(decoder):
    with pytest.raises(
        LimbeckError, match="optimizer.masters: false .* is in float32; set precision: bfloat16"
    ):
        learner(decoder(), masters=False)
    model = halved(decoder)
    with pytest.raises(LimbeckError, match="lora_A is in float32; .* without adapters, or leave masters out"):
        learner(model, lora=adapters(model, 4), masters=False)
