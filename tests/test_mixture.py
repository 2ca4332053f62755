"""Mixtures of experts, latent caches and modules that look ahead: by the papers' equations, and against
loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from limbeck.config.parts import Optimizer as Settings
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import fp8
from limbeck.model.config import Experts, Latent, ModelConfig
from limbeck.model.context import RouterTrace, sequence_balance
from limbeck.model.decoder import Decoder
from limbeck.model.ffn import MixtureOfExperts, balance_experts, recycle
from limbeck.model.kv_cache import KVCache, Packed
from limbeck.train.batch import pack, to_samples
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.train.optimizer import Optimizer
from limbeck.types import LimbeckError, Problem, Sample

EXPERTS = Experts(
    count=8, top_k=2, intermediate_size=12, shared_size=12, sigmoid=True, balanced=True, normalize=True,
    scale=2.5,
    groups=4, top_groups=2, dense=(0,),
)  # fmt: skip
LATENT = Latent(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=8, q_rank=16)
V3 = ModelConfig("deepseek_v3", 48, 32, 3, 4, 4, 4, 48, latent=LATENT, experts=EXPERTS, max_positions=256)
PROBLEMS = [
    Problem(f"p/{i}", text) for i, text in enumerate(["use 6 1 5 make 3 ?", "say 4 ?", "用 2 2 凑 6 ?"])
]


def decoder(config: ModelConfig = V3, dtype: torch.dtype = torch.float64, seed: int = 0) -> Decoder:
    model = Decoder(config).initialize(seed).to(dtype)
    with torch.no_grad():  # fresh biases are zero, which would hide what they do
        for layer in mixtures(model):
            if layer.experts.balanced:
                layer.correction.copy_(
                    0.3 * torch.randn(config.experts.count, generator=torch.Generator().manual_seed(seed))
                )
        model.embed.weight.mul_(20)
    return model


def mixtures(model: Decoder) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def inputs(tokens: int = 40, size: int = 32) -> torch.Tensor:
    return torch.randn(tokens, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def looped(
    layer: MixtureOfExperts, x: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """The layer token by token and expert by expert."""
    rows = []
    for token, weights, picks in zip(x, scores, chosen, strict=True):
        gates = weights[picks]
        if layer.experts.normalize:
            gates = gates / gates.sum()
        out = layer.shared(token) if layer.shared is not None else torch.zeros_like(token)
        for gate, pick in zip(gates * layer.experts.scale, picks, strict=True):
            first, second = (layer.experts_gate_up[pick] @ token).chunk(2)
            out = out + gate * (layer.experts_down[pick] @ (F.silu(first) * second))
        rows.append(out)
    return torch.stack(rows)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize(
    "experts",
    [
        EXPERTS,
        replace(EXPERTS, sigmoid=False, balanced=False, normalize=False, scale=1.0, shared_size=0),
        replace(EXPERTS, top_k=1, groups=1, top_groups=1),
        replace(EXPERTS, count=3, top_k=3, groups=1, top_groups=1, intermediate_size=7),
    ],
    ids=["v3", "softmax-groups", "top-1", "all-odd"],
)
def test_grouped_products_equal_a_loop_forward_and_backward(experts):
    model = decoder(replace(V3, experts=experts))
    layer, x = mixtures(model)[0], inputs().requires_grad_()
    context = Packed([len(x)])
    context.routes = RouterTrace()
    out = layer(x, context)
    scores, _ = layer.route(x, None)
    expected = looped(layer, x, scores, context.routes.chosen[0])
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    weights = [x, *(p for p in layer.parameters() if p.requires_grad)]
    direction = torch.randn_like(out)
    for one, other in zip(
        torch.autograd.grad((out * direction).sum(), weights),
        torch.autograd.grad((expected * direction).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [12, 10], ids=["aligned", "unaligned"])
def test_single_precision_takes_the_same_way(size):
    layer = mixtures(decoder(replace(V3, experts=replace(EXPERTS, intermediate_size=size)), torch.float32))[0]
    x = inputs().float()
    scores, chosen = layer.route(x, None)
    torch.testing.assert_close(
        layer(x, Packed([len(x)])), looped(layer, x, scores, chosen), atol=1e-5, rtol=0
    )


def test_the_bias_selects_and_never_weighs():
    layer, x = mixtures(decoder())[0], inputs()
    context = Packed([len(x)])
    scores, before = layer.route(x, None)
    layer.correction.data[3] = 100.0
    again, after = layer.route(x, None)
    assert torch.equal(scores, again) and (after == 3).any(1).all() and not (before == 3).any(1).all()
    torch.testing.assert_close(layer(x, context), looped(layer, x, scores, after), atol=1e-12, rtol=0)


def test_a_token_stays_within_its_best_groups():
    layer, x = mixtures(decoder())[0], inputs(200)
    scores, chosen = layer.route(x, None)
    biased = (scores + layer.correction).view(-1, 4, 2)
    best = biased.sum(-1).topk(2).indices  # the two best of two are both
    for groups, picks in zip(best, chosen // 2, strict=True):
        assert set(picks.tolist()) <= set(groups.tolist())


def test_biases_move_against_the_load_and_even_it_out():
    layer = mixtures(decoder(replace(V3, experts=replace(EXPERTS, groups=1, top_groups=1))))[0]
    layer.correction.data.copy_(torch.tensor([2.0, 1.5, 1, 0, 0, 0, 0, 0]))
    x, spread = inputs(2000), []
    for _ in range(300):
        _, chosen = layer.route(x, None)
        load = torch.bincount(chosen.flatten(), minlength=8)
        before = layer.correction.clone()
        balance_experts([layer], [load], 0.01)
        moved = layer.correction - before
        assert (moved[load > load.float().mean()] < 0).all() and (moved[load < load.float().mean()] > 0).all()
        spread.append(float(load.max() / load.float().mean()))
    assert spread[0] > 2.5 and spread[-1] < 1.2


def test_sequence_balance_is_the_papers_sum():
    share = torch.rand(9, 4, dtype=torch.float64)
    share /= share.sum(1, keepdim=True)
    chosen, sequences = share.topk(2).indices, torch.tensor([0] * 4 + [1] * 5)
    expected = 0.0
    for sequence in (0, 1):
        mine = sequences == sequence
        for expert in range(4):
            frequency = 4 / (2 * int(mine.sum())) * float((chosen[mine] == expert).sum())
            expected += frequency * float(share[mine, expert].mean())
    assert float(sequence_balance(share, chosen, sequences)) == pytest.approx(expected, abs=1e-12)
    even = torch.full((4, 4), 0.25, dtype=torch.float64)
    once = torch.tensor([[0], [1], [2], [3]])
    assert float(sequence_balance(even, once, torch.zeros(4, dtype=torch.long))) == pytest.approx(1.0)


@pytest.mark.parametrize("tokens", [64, 61])
def test_recycling_fills_the_room_there_is_and_touches_nobody_else(tokens):
    experts = replace(EXPERTS, count=4, top_k=1, groups=1, top_groups=1, capacity=1.0)
    scores = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(2)) + torch.tensor([2.0, 0, 0, 0])
    before = scores.topk(1).indices
    after = recycle(scores, before.clone(), experts)
    room = -(-tokens // 4)
    load = torch.bincount(after.flatten(), minlength=4)
    assert load.max() <= room and load.sum() == tokens  # nobody is dropped
    assert int((before == after).sum()) >= room  # those within the capacity stayed
    assert torch.equal(after, recycle(scores, before.clone(), experts))  # a resumed run repeats it
    loose = recycle(scores, before.clone(), replace(experts, capacity=4.0))
    assert torch.equal(loose, before)


def test_capacity_binds_in_training_alone():
    config = replace(
        V3,
        family="hunyuan",
        latent=None,
        experts=replace(EXPERTS, top_k=1, groups=1, top_groups=1, capacity=1.0),
    )
    layer, x = mixtures(decoder(config))[0], inputs(80)
    layer.correction.data[2] = 100.0
    assert (layer.route(x, None)[1] == 2).all()
    chosen = layer.route(x.requires_grad_(), None)[1]
    assert torch.bincount(chosen.flatten(), minlength=8).max() <= 10


# ---------------------------------------------------------------- learning


def samples(model: Decoder, count: int = 6, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    return [
        Sample(random.integers(1, model.config.vocab_size, int(n)), start=1)
        for n in random.integers(5, 20, count)
    ]


def test_an_update_tells_load_entropy_and_losses_and_moves_the_biases():
    model = decoder(replace(V3, predicted=1), torch.float32)
    biases = [layer.correction.clone() for layer in mixtures(model)]
    learner = Learner(model, Settings(balance_rate=0.01), 10)
    metrics = learner.update(pack(samples(model), 40), CrossEntropy())
    assert metrics["expert_load"] >= 1 and 0 < metrics["router_entropy"] <= np.log(8) + 1e-5
    shares = np.array(metrics["expert_loads"])  # layer by layer, an expert's share of its tokens
    assert shares.sum(1) == pytest.approx(1, abs=1e-2) and (8 * shares.max(1)).mean() == pytest.approx(
        metrics["expert_load"], abs=1e-2
    )
    assert metrics["loss_balance"] > 0 and metrics["loss_ahead"] > 0
    for layer, before in zip(mixtures(model), biases, strict=True):
        moved = (layer.correction - before).abs()
        assert 0 < float(moved.max()) <= 0.0101


def test_cuts_change_neither_the_gradient_nor_the_balance():
    gradients = []
    for cut in (10**6, 1):
        model = decoder(replace(V3, predicted=2))
        learner = Learner(model, Settings(balance_loss=0.5, clip_norm=1e9), 10)
        caught = {}
        learner.optimizer.step = lambda _, m=model, c=caught: (
            c.update({n: p.grad for n, p in m.named_parameters()}) or 0.0
        )
        learner.update(pack(samples(model), cut), CrossEntropy())
        gradients.append(caught)
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4, msg=name)


def test_what_looks_ahead_is_scored_on_the_token_after_the_next():
    model = decoder(replace(V3, predicted=1))
    learner = Learner(model, Settings(mtp_loss_weight=1.0), 10)
    (sample,) = samples(model, 1)
    (batch,) = pack([sample], 10**6)
    tokens = torch.from_numpy(sample.tokens)
    context = Packed([len(tokens) - 1])
    hidden = model(tokens[:-1], context)
    ahead = model.predict_next(hidden, tokens[1:], context)
    logprobs = F.log_softmax(ahead[:-1] @ model.head.weight.T, -1)
    expected = -logprobs.gather(1, tokens[2:].unsqueeze(1)).sum() / batch.tokens
    assert learner.update([batch], CrossEntropy())["loss_ahead"] == pytest.approx(expected.item(), abs=1e-9)


def test_without_what_looks_ahead_the_model_is_the_same():
    tall, flat = decoder(replace(V3, predicted=1)), decoder()
    flat.load_state_dict(tall.state_dict(), strict=False)
    tokens = torch.arange(1, 20)
    assert torch.equal(tall(tokens, Packed([19])), flat(tokens, Packed([19])))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_experts_may_learn_at_a_rate_of_their_own(name):
    moved = []
    for ratio in (1.0, 0.25):
        model = decoder(dtype=torch.float32)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        random = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = (
                torch.randn(parameter.shape, generator=random) if parameter.requires_grad else None
            )
        Optimizer(model, Settings(name=name, expert_ratio=ratio, clip_norm=1e9), 10).step(0)
        moved.append({n: float((p.detach() - before[n]).norm()) for n, p in model.named_parameters()})
    for parameter, distance in moved[0].items():
        share = 0.25 if "experts_" in parameter else 1.0
        assert moved[1][parameter] == pytest.approx(share * distance, rel=1e-3), parameter
        assert (distance == 0) == parameter.endswith("correction")


# ---------------------------------------------------------------- the engine


def test_the_latent_cache_is_as_small_as_published():
    cache = KVCache(V3, torch.float64)
    cache._reserve(2, 10, 0)
    assert cache.bytes == 2 * cache.v_LBKTD.shape[3] * V3.kv_bytes_per_token(8)
    assert V3.kv_bytes_per_token(8) == 3 * (12 + 4) * 8


def test_shared_keys_halve_the_cache_and_equal_uncached():
    config = ModelConfig(
        "hunyuan",
        48,
        32,
        4,
        4,
        2,
        8,
        24,
        qk_norm="after",
        share_kv=2,
        experts=replace(EXPERTS, balanced=False, dense=()),
    )
    assert config.kv_bytes_per_token() * 2 == replace(config, share_kv=1).kv_bytes_per_token()
    model = decoder(config)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.k_norm.weight.normal_(1, 0.3)
    tokens = torch.arange(1, 25)
    whole = model(tokens, Packed([24]))
    prefill = Packed([10]).keep()
    model(tokens[:10], prefill)
    cache = KVCache(config, torch.float64)
    cache.fork(prefill, [1])
    for position in range(10, 24):
        cache.advance()
        torch.testing.assert_close(
            model(tokens[position : position + 1], cache)[0], whole[position], atol=1e-10, rtol=0
        )


def test_shared_keys_are_each_layers_own_normalised(tmp_path):
    """As Hunyuan-Large does it: a layer that shares takes the rotated keys and puts its own norm on them."""
    config = ModelConfig("hunyuan", 48, 32, 2, 4, 2, 8, 24, qk_norm="after", share_kv=2)
    model = decoder(config)
    first, second = (block.attention for block in model.blocks)
    with torch.no_grad():
        for norm in (first.q_norm, first.k_norm, second.q_norm, second.k_norm):
            norm.weight.normal_(1, 0.3)
    seen = {}

    class Spy(Packed):
        def attend(self, layer, q, k, v, kept=None):
            seen.setdefault("calls", []).append((q, k))
            return super().attend(layer, q, k, v, kept)

    model(torch.arange(1, 12), Spy([11]))
    (_, unit), (asked, nothing) = seen["calls"]
    assert nothing is None
    torch.testing.assert_close(unit.square().mean(-1), torch.ones_like(unit[..., 0]), atol=1e-4, rtol=0)
    plain = second.q_norm.weight * asked / (second.q_norm.weight * second.k_norm.weight)
    scores = torch.einsum("nhd,mhd->hnm", asked, unit.repeat_interleave(2, 1))
    own = torch.einsum("nhd,mhd->hnm", plain, (unit * second.k_norm.weight).repeat_interleave(2, 1))
    torch.testing.assert_close(scores, own, atol=1e-10, rtol=0)


@pytest.fixture
def talker(tokenizer):
    return decoder(replace(V3, vocab_size=tokenizer.size, predicted=1))


MODES = {
    "greedy": SamplingParams(0.0, 1.0, 24),
    "t1": SamplingParams(1.0, 1.0, 24),
    "t06": SamplingParams(0.6, 0.9, 24),
    "penalties": SamplingParams(max_new_tokens=24, top_k=9, frequency_penalty=1.0, repetition_penalty=1.3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [64, 3])
def test_speculation_changes_no_token(talker, tokenizer, mode, rows):
    plain, bold = Engine(talker, tokenizer, rows), Engine(talker, tokenizer, rows, speculate=True)
    wanted, found = (engine.rollout(PROBLEMS, 4, MODES[mode], 5) for engine in (plain, bold))
    for one, other in zip(wanted, found, strict=True):
        for completion, again in zip(one.completions, other.completions, strict=True):
            assert completion.tokens.tolist() == again.tokens.tolist()
            np.testing.assert_allclose(completion.logprobs, again.logprobs, atol=1e-9)
            assert np.array_equal(completion.routes, again.routes)
    assert bold.drafted > 50 and 0 <= bold.acceptance <= 1
    streamed = list(bold.stream(tokenizer.prompt("say 4 ?"), MODES[mode], 1))
    assert streamed == list(plain.stream(tokenizer.prompt("say 4 ?"), MODES[mode], 1))


def test_good_drafts_are_taken(talker, tokenizer):
    """A model whose next token hardly depends on anything is easy to foresee."""
    with torch.no_grad():
        talker.norm.weight.zero_()
        talker.ahead[0].head_norm.weight.zero_()
    engine = Engine(talker, tokenizer, speculate=True)
    engine.rollout(PROBLEMS, 4, SamplingParams(1.0, 1.0, 24), 5)
    assert engine.acceptance == 1.0


def test_speculation_needs_a_module_that_looks_ahead(tokenizer):
    with pytest.raises(LimbeckError, match="no module that looks ahead"):
        Engine(decoder(replace(V3, vocab_size=tokenizer.size)), tokenizer, speculate=True)


def test_the_learner_meets_the_experts_that_the_sampler_met(talker, tokenizer):
    groups = Engine(talker, tokenizer).rollout(PROBLEMS, 4, MODES["t1"], 3)
    for group in groups:
        for completion in group.completions:
            assert completion.routes.shape == (len(group.prompt_tokens) + len(completion.tokens) - 1, 2, 2)
    drawn = to_samples(groups, [[1.0] * 4] * 3, keep_mask=False)
    learner = Learner(talker, Settings(), 1)
    batches = pack(drawn, 10**6)
    sampled = torch.cat([b.logprobs_M for b in batches])
    torch.testing.assert_close(torch.cat(learner.logprobs(batches)).float(), sampled, atol=1e-5, rtol=0)
    with torch.no_grad():
        for layer in mixtures(talker):
            layer.correction.neg_().sub_(torch.arange(8) / 3)  # routers that would now choose otherwise
    replayed = torch.cat(learner.logprobs(batches)).float()
    torch.testing.assert_close(replayed, sampled, atol=1e-5, rtol=0)
    free = torch.cat(learner.logprobs(pack([replace(s, routes=None) for s in drawn], 10**6))).float()
    assert float((free - sampled).abs().max()) > 0.01
    before = [layer.correction.clone() for layer in mixtures(talker)]
    learner.update(batches, CrossEntropy())
    assert all(torch.equal(a, layer.correction) for a, layer in zip(before, mixtures(talker), strict=True))


# ---------------------------------------------------------------- FP8


def test_rounding_keeps_an_outlier_to_its_tile():
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 1e4
    near = fp8.tiles(x)
    assert float(((near - x).abs() / x.abs())[1:].median()) < 0.04  # E4M3 has three bits after the point
    quiet, loud = (near - x).abs()[0, 128:], (near - x).abs()[0, :128]
    assert float(quiet.max()) < 0.15 and float(loud.max()) > float(quiet.max())
    whole = fp8._rounded(x, 4, 300)
    assert float((whole - x).abs().mean()) > float((near - x).abs().mean())  # tiles beat one scale for all


@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (3, 5, 200)])
def test_rounded_is_on_the_grid_and_within_a_sixteenth(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for rounded in (fp8.tiles, fp8.blocks):
        near = rounded(x)
        assert near.shape == x.shape and torch.equal(rounded(near), near)
        big = x.abs() > 0.1
        assert float(((near - x).abs() / x.abs())[big].max()) <= 1 / 16 + 1e-6


def test_fp8_learning_is_close_sampling_exact_and_the_router_left_alone():
    exact, rounded = decoder(dtype=torch.float32), fp8.simulate(decoder(dtype=torch.float32))
    tokens, context = torch.arange(1, 40), Packed([39])
    with torch.no_grad():
        assert torch.equal(exact(tokens, context), rounded(tokens, context))
    assert type(mixtures(rounded)[0].router) is torch.nn.Linear
    gradients = []
    for model in (exact, rounded):
        model(tokens, context).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    gap = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert 0.001 < gap < 0.2
    assert list(exact.state_dict()) == list(rounded.state_dict())
