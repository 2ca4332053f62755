"""The kernels of a card, meaning by meaning, in Triton's interpreter: `test_triton.py` runs this file in a
process of its own, since TRITON_INTERPRET=1 must be set before the kernels are decorated. The interpreter
proves what a kernel computes, not its bits: those are compared on a card (`python -m bench.gpu`)."""

from __future__ import annotations

import dataclasses
import os

assert os.environ.get("TRITON_INTERPRET") == "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_batching import asks, carry
from test_engine import PROBLEMS, tokens_of
from triton.runtime import interpreter

from limbeck.engine.device_scheduler import DeviceScheduler
from limbeck.engine.request import Request
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.engine.scheduler import Scheduler
from limbeck.model.config import Experts, Latent
from limbeck.model.context import Layer
from limbeck.model.cuda import attention, experts, products, rowwise, sampling
from limbeck.model.ops import PlainOps, use
from limbeck.model.ops.cuda import CUDAOps, FastCUDAOps
from limbeck.model.ops.experts import sort_choices
from limbeck.model.ops.table import BLOCK, Latents, Rows
from limbeck.model.packed import Packed, SharedPrefix
from limbeck.train.batch import pack, to_samples
from limbeck.train.scorer import Scorer

PLAIN = PlainOps()
FAMILIES = {
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "before", "windows": (5, 0)},
    "deepseek": {
        "latent": Latent(8, 12, 4, 5, q_rank=6),
        "experts": Experts(
            6,
            2,
            12,
            10,
            sigmoid=True,
            balanced=True,
            normalize=True,
            scale=1.5,
            groups=3,
            top_groups=2,
            dense=(0,),
        ),
    },
}


class Interpreted(CUDAOps):
    """A card's operations, but for what is the card itself."""

    capture = PlainOps.capture
    send = PlainOps.send
    fetch = PlainOps.fetch
    free_bytes = PlainOps.free_bytes


patch_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope) -> None:
    """numpy 2.4 takes no array of one number for a number, which the interpreter relies on."""
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


interpreter._patch_lang_tensor = _patch_lang_tensor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def near(found: torch.Tensor, wanted: torch.Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_spans_side_by_side_and_one_after_the_other(monkeypatch, rows, bias):
    monkeypatch.setattr(products, "SPAN", 128)
    assert products.span(470) == 192
    x, w = torch.randn(rows, 470), torch.randn(50, 470)
    b = torch.randn(50) if bias else None
    wanted = F.linear(x.double(), w.double(), None if b is None else b.double())
    for tile in (products.Tile(16, 16, 2, 5), products.Tile(64, 32, 4, 3), None):
        for beside in (False, True, None):
            near(products.linear(x, w, b, tile=tile, beside=beside), wanted, 1e-4)


def test_sums_up_to_each_value():
    values = torch.rand(3, 700)
    near(products.cumulate(values), values.double().cumsum(-1), 1e-3)


def test_norms_forward_and_backward(monkeypatch):
    monkeypatch.setattr(rowwise, "PARTS", 8)
    x, delta, more, upstream = torch.randn(4, 37, 70)
    weight = torch.randn(70, requires_grad=True)
    total, y = rowwise.add_norm(delta, x, weight.detach(), 1e-6)
    near(total, x + delta)
    near(y, PLAIN.norm(total, weight, 1e-6).detach())
    near(rowwise.norm(total, weight.detach(), 1e-6), y)
    leaf = total.clone().requires_grad_()
    PLAIN.norm(leaf, weight, 1e-6).backward(upstream)
    by_x, by_weight = rowwise.norm_backward(upstream, total, weight.detach(), 1e-6, more)
    near(by_x - more, leaf.grad)
    near(by_weight, weight.grad, 1e-4)


@pytest.mark.parametrize("rows", [1, 40])
def test_products_of_heads(monkeypatch, rows):
    """In one span and in three; the weight may lie across."""
    x, w = torch.randn(rows, 3, 2 * 70)[..., ::2], torch.randn(3, 70, 50)
    wanted = torch.einsum("nhd,hdo->nho", x.double(), w.double())
    for span in (1024, 30):
        monkeypatch.setattr(products, "SPAN", span)
        for tile in (products.Tile(16, 16, 2, 5), None):
            near(products.per_head(x, w.mT, tile), wanted)
            near(products.per_head(x[:, 1:], w.mT.contiguous()[1:], tile), wanted[:, 1:])


@pytest.mark.parametrize(("tokens", "count"), [(1, 5), (1, 100), (50, 5), (50, 3)])
def test_mixtures_of_experts(tokens, count):
    """Experts that nobody chose, and one that everybody did; tiles of all sizes; gradients too."""
    top_k, width, inner = 3, 70, 40
    x = torch.randn(tokens, width)
    gate_up, down = torch.randn(count, 2 * inner, width) / 8, torch.randn(count, width, inner) / 6
    chosen = torch.rand(tokens, count).argsort(1)[:, :top_k]
    chosen[:, 0] = torch.where((chosen[:, 1:] == 1).any(1), chosen[:, 0], 1)
    weights = torch.rand(tokens, top_k)
    order, ends = sort_choices(chosen, count)
    sorting = (order, ends.int())
    rows = x[order // top_k]
    for tile in (products.Tile(16, 16, 2, 2), products.Tile(64, 32, 4, 2), None):
        both = experts.spread(x, gate_up, sorting, top_k, tile)
        near(both, torch.einsum("mc,mic->mi", rows, gate_up[chosen.flatten()[order]]), 1e-4)
        wanted = torch.einsum("nk,nkic,nc->ni", weights, gate_up[chosen], x)
        near(experts.gather(rows, gate_up, sorting, weights, tile), wanted, 1e-4)
    upstream = torch.randn(tokens, width)
    found = []
    for ops in (CUDAOps(), PLAIN):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, gate_up, down, weights)]
        y = ops.mix_experts(*leaves[:3], chosen, leaves[3])
        y.backward(upstream)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        near(mine, theirs, 1e-4)


def test_no_choice_needs_more_tiles_than_there_are():
    for tokens, count, rows in ((1, 8, 16), (7, 2, 16), (100, 8, 16), (100, 8, 64), (40, 3, 32)):
        worst = max(
            (torch.bincount(chosen, minlength=count) + rows - 1).div(rows, rounding_mode="floor").sum()
            for chosen in torch.randint(count, (200, tokens))
        )
        assert worst <= experts.most_tiles(tokens, count, rows) <= tokens


def test_of_equal_experts_the_first_come_first():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.9, 0.1], [0.2] * 5])
    assert CUDAOps().top_k(scores, 3).tolist() == [[1, 3, 0], [0, 1, 2]]
    near(CUDAOps().row_sums(scores), scores.sum(1, keepdim=True))
    x, weight = torch.randn(9, 70), torch.randn(5, 70)
    near(CUDAOps().router(x.half(), weight.half()), x.half().float() @ weight.half().float().T)


def test_swiglu_rotation_and_store():
    both = torch.randn(5, 2 * 40, requires_grad=True)
    upstream = torch.randn(5, 40)
    y = PLAIN.swiglu(both)
    y.backward(upstream)
    near(rowwise.swiglu(both.detach()), y.detach())
    near(rowwise.swiglu_backward(upstream, both.detach()), both.grad)
    heads = torch.randn(5, 6, 24)
    angle = torch.randn(5, 1, 12)
    rope = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    near(rowwise.rotate(heads, *rope), PLAIN.rotate(heads, rope))
    near(rowwise.rotate(heads[:, 1:4], *rope), PLAIN.rotate(heads[:, 1:4], rope))
    pools = [(torch.zeros(32, 2, 24), torch.zeros(32, 2, 24)) for _ in range(2)]
    slots = torch.tensor([0, 17, 3, 31, 8])
    for ops, pool in zip((PLAIN, CUDAOps()), pools, strict=True):
        ops.store(heads[:, :2], heads[:, 3:5], slots, pool)
        ops.store(heads[:, 2:4], None, slots - 1 + (slots == 0), pool)
    assert all(torch.equal(*both) for both in zip(*pools, strict=True))


@pytest.mark.parametrize("window", [0, 7, 40])
def test_attention_of_many_queries_and_of_one(monkeypatch, window):
    """Rows of 5 and of 69 tokens in shuffled blocks; the second has 60 new ones."""
    monkeypatch.setattr(attention, "BLOCK", 16)
    monkeypatch.setattr(attention, "SEGMENT", 2)
    heads, kv_heads, width, scale = 6, 2, 24, 24**-0.5
    lengths, new = (5, 69), (5, 60)
    table = torch.tensor([[48, 0, 0, 0, 0], [16, 80, 32, 0, 64]], dtype=torch.int32)
    pool = (torch.randn(96, kv_heads, width), torch.randn(96, kv_heads, width))
    q = torch.randn(sum(new), heads, width)
    starts = torch.tensor([0, 5, 65], dtype=torch.int32)
    rows = Rows(table, starts, torch.tensor(lengths, dtype=torch.int32), 60)
    wanted, sums = [], []
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        places = (table[row].long()[:, None] + torch.arange(16)).flatten()[:length]
        k, v = (x[places].double().repeat_interleave(heads // kv_heads, 1) for x in pool)
        mine = q[starts[row] : starts[row + 1]].double()
        scores = torch.einsum("shd,thd->sht", mine, k) * scale
        position = torch.arange(length - count, length)[:, None, None]
        hidden = torch.arange(length) > position
        if window:
            hidden |= torch.arange(length) <= position - window
        scores = scores.masked_fill(hidden, float("-inf"))
        wanted.append(torch.einsum("sht,thd->shd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))
    for tile in (16, 64):
        out, lse = attention.attend(q, pool, rows, scale, window, tile)
        near(out, torch.cat(wanted))
        near(lse, torch.cat(sums))
    ones = attention.attend_one(q[[4, 64]], pool, table, rows.lengths, scale, window)
    near(ones, torch.cat(wanted)[[4, 64]])


def test_paged_attention_is_that_of_plain_operations():
    """Blocks of 64, grouped heads, a window."""
    pool = (torch.randn(256, 2, 16), torch.randn(256, 2, 16))
    rows = Rows(
        torch.tensor([[64, 192], [0, 128]], dtype=torch.int32),
        torch.tensor([0, 3, 10], dtype=torch.int32),
        torch.tensor([70, 9], dtype=torch.int32),
        7,
    )
    q = torch.randn(10, 4, 16)
    for window in (0, 20):
        layer = Layer(0, 0.25, window)
        near(CUDAOps().attend_rows(layer, q, pool, rows), PLAIN.attend_rows(layer, q, pool, rows))
        ones = [ops.attend_one(layer, q[:2], pool, rows.table, rows.lengths) for ops in (CUDAOps(), PLAIN)]
        near(*ones)


@pytest.mark.parametrize(("rank", "tail", "heads"), [(24, 5, 3), (64, 16, 20)])
def test_attention_to_latents(monkeypatch, rank, tail, heads):
    """In steps of a block and of a part of it; more query heads than a program takes at once."""
    keys = torch.randn(256, 1, rank + tail)
    pool = (keys, keys[..., :rank])
    rows = Rows(
        torch.tensor([[64, 192], [0, 128]], dtype=torch.int32),
        torch.tensor([0, 3, 10], dtype=torch.int32),
        torch.tensor([70, 9], dtype=torch.int32),
        7,
    )
    q = torch.randn(10, heads, rank + tail)
    for part in (attention.PART_BYTES, 64 * rank):
        monkeypatch.setattr(attention, "PART_BYTES", part)
        assert attention.Sizes.of(q, pool).step == (64 if part > 64 * rank else 16)
        for window in (0, 20):
            layer = Layer(0, 0.2, window)
            near(CUDAOps().attend_rows(layer, q, pool, rows), PLAIN.attend_rows(layer, q, pool, rows))
            ones = [
                ops.attend_one(layer, q[:2], pool, rows.table, rows.lengths) for ops in (CUDAOps(), PLAIN)
            ]
            near(*ones)


@pytest.mark.parametrize("sequences", [Packed([3, 8]), SharedPrefix(1, 4, [0, 0], [2, 5])])
def test_latents_of_whole_sequences(sequences):
    """Absorbed, and written out by the libraries' order: both say what plain operations say."""
    tokens, heads, rank, nope, rope, value = 11, 3, 20, 6, 4, 5
    cached = torch.randn(tokens, 1, rank + rope)
    up_key, up_value = torch.randn(heads, nope + value, rank).split([nope, value], 1)
    written = [torch.einsum("nr,hdr->nhd", cached[:, 0, :rank], up) for up in (up_key, up_value)]
    k = torch.cat([written[0], cached[..., rank:].expand(-1, heads, -1)], -1)
    q = torch.randn(tokens, heads, nope + rope)
    given = (Layer(0, 0.3, 0), q, k, written[1], sequences, Latents(cached, up_key, up_value))
    wanted = PLAIN.attend(*given)
    for ops in (CUDAOps(), FastCUDAOps()):
        near(ops.attend(*given), wanted)


def test_draws_and_their_log_probabilities():
    """Over three blocks of logits, the last of them excluded, and for random numbers near both ends."""
    logits = torch.randn(6, 5000) * 3
    logits[3:, 4096:] = float("-inf")
    logits[4, :4090] = float("-inf")
    uniform = torch.tensor([0.3, 0.0, 0.9, 1 - 2**-24, 0.5, 0.999])
    tokens, logprobs = sampling.draw(logits, uniform, 0.7)
    p = (logits.double() / 0.7).softmax(-1)
    wanted = torch.searchsorted(p.cumsum(-1), uniform.double()[:, None], right=True)[:, 0]
    sure = torch.tensor([0, 1, 2, 4, 5])
    assert tokens[sure].tolist() == wanted[sure].tolist()
    assert (p.gather(1, tokens[:, None]) > 0).all()
    near(logprobs, p.log().gather(1, tokens[:, None])[:, 0])
    assert torch.equal(sampling.logprob(logits, tokens, 0.7), logprobs)
    assert torch.equal(sampling.draw(logits, uniform, 0.0)[0], logits.argmax(-1))


@pytest.mark.parametrize("excluded", [False, True])
def test_scores_have_the_bits_of_draws_and_the_gradients_of_torch(excluded):
    logits = (torch.randn(5, 5000) * 3).requires_grad_()
    open_ = logits.masked_fill(torch.rand(5, 5000) < 0.9, float("-inf")) if excluded else logits
    targets = open_.argmax(-1)
    upstream = torch.randn(5)
    found, entropy, needed = sampling.score(open_.detach(), targets, 0.7)
    assert torch.equal(found, sampling.logprob(open_.detach(), targets, 0.7))
    logp = (open_ / 0.7).log_softmax(-1)
    wanted = logp.gather(1, targets[:, None])[:, 0]
    (wanted * upstream).sum().backward()
    near(found, wanted.detach())
    near(entropy, -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(1).detach())
    by = sampling.score_backward(open_.detach(), targets, upstream, needed, 0.7, torch.float32)
    near(by, logits.grad)


@pytest.mark.parametrize(("family", "top_p"), [("qwen2", 0.8), ("qwen3", 1.0), ("deepseek", 1.0)])
def test_the_engine_and_the_learner_of_a_card(decoder, tokenizer, family, top_p):
    """Completions of the CPU's engine, token for token; the learner finds the sampler's log-probabilities."""
    model = decoder(**FAMILIES[family], head_dim=16)
    sampling = SamplingParams(0.7, top_p, 3, keep_mask=top_p < 1)
    few = PROBLEMS[:2]
    wanted = Engine(model, tokenizer).rollout(few, 2, sampling, 1)
    use(model, Interpreted())
    groups = Engine(model, tokenizer, 4).rollout(few, 2, sampling, 1)
    assert tokens_of(groups) == tokens_of(wanted)
    pairs = [
        (c, d) for g, h in zip(groups, wanted, strict=True) for c, d in zip(g.completions, h.completions)
    ]
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
    batches = pack(to_samples(groups, [[1.0, -1.0]] * 2, top_p < 1), 4096)
    for batch, found in zip(batches, Scorer(model).logprobs(batches, 0.7), strict=True):
        near(found, batch.logprobs_M, 1e-4)


@pytest.mark.parametrize("family", ["qwen2", "deepseek"])
def test_drafts_on_a_card(decoder, tokenizer, family):
    """The tokens and the accepted drafts of the CPU's engine."""
    model = decoder(**FAMILIES[family], head_dim=16, predicted=1)
    with torch.no_grad():
        model.norm.weight.mul_(0.15)
        model.ahead[0].head_norm.weight.mul_(0.15)
    sampling = SamplingParams(0.7, 1.0, 6)
    host = Engine(model, tokenizer, speculate=True)
    wanted = host.rollout(PROBLEMS[:1], 2, sampling, 1)
    use(model, Interpreted())
    engine = Engine(model, tokenizer, 4, speculate=True)
    assert tokens_of(engine.rollout(PROBLEMS[:1], 2, sampling, 1)) == tokens_of(wanted)
    assert (engine.drafted, engine.accepted) == (host.drafted, host.accepted)
    assert engine.accepted > 0


def test_the_server_s_batch_of_a_card(decoder, tokenizer):
    """The answers of the CPU's server: rows of every kind beside one another, one prompt known in part."""
    model = decoder(head_dim=16, max_positions=256)
    long = tokenizer.prompt(" ".join(["say", *"123456" * 12, "?"]))
    requests = [dataclasses.replace(request, max_new_tokens=3, copies=1) for request in asks(tokenizer)[1::2]]
    requests.append(Request(long, 0.7, max_new_tokens=3, seed=7, top=2, copies=2))
    host = Scheduler(model, tokenizer, rows=16)
    wanted = [host.submit(request) for request in [*requests, requests[-1]]]
    carry(host)
    card = DeviceScheduler(use(model, Interpreted()), tokenizer, 8, 99, 24)
    found = [card.submit(request) for request in requests]
    carry(card)
    found.append(card.submit(requests[-1]))
    carry(card)
    assert found[-1].cached == BLOCK and not card.busy
    for one, two in zip(found, wanted, strict=True):
        assert [choice.tokens for choice in one.choices] == [choice.tokens for choice in two.choices]
        np.testing.assert_allclose(one.choices[0].logprobs, two.choices[0].logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "recompute"),
    [("qwen2", False), ("qwen3", "keep_attention"), ("deepseek", "keep_attention")],
)
def test_the_learner_s_gradients_in_float32(decoder, tokenizer, family, recompute):
    """Attention's backward pass in 16 bits is torch's flash attention, which a CPU does not have.

    The gradient of a plain sum is one number that stands for all predictions (stride 0)."""
    weighted = family != "qwen2"
    model = decoder(**FAMILIES[family], head_dim=16)
    model.recompute = recompute
    groups = Engine(model, tokenizer).rollout(PROBLEMS[:1], 2, SamplingParams(max_new_tokens=6), 1)
    batches = pack(to_samples(groups, [[1.0, -1.0]], False), 4096)

    def gradients(ops: PlainOps) -> dict[str, torch.Tensor]:
        use(model, ops)
        model.zero_grad()
        for batch in batches:
            logprobs = Scorer(model).forward(batch, 0.7)[0]
            loss = logprobs * torch.linspace(-1, 1, len(logprobs)) if weighted else logprobs
            loss.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    found = gradients(Interpreted())
    for name, gradient in gradients(PlainOps()).items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name
