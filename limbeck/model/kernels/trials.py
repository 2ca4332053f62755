"""The operations that kernels do, in classes of size, and a piece of work of each class to time them at.

The work calls the decoder's own modules, so that what is timed is what will run, our way and torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import torch
from torch import Tensor

from .operations import linear, sample

Work = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """`size` says what is compared with `largest`, the largest size of each class; `trials` has a shape in words, and its
    work, for each."""

    size: str
    largest: tuple[float, ...]
    trials: tuple[tuple[str, Callable[[], Work]], ...]


def _backward(module: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward, as in learning."""
    given = [x.requires_grad_() for x in inputs]
    grad = torch.ones_like(module(*given))
    return lambda: torch.autograd.backward(module(*given), grad)


def norm(rows: int, width: int) -> Work:
    from ..attention import RMSNorm

    return _backward(RMSNorm(width, 1e-5), torch.randn(rows, width))


def swiglu(rows: int, width: int) -> Work:
    from ..ffn import swiglu

    return _backward(swiglu, torch.randn(rows, 2 * width))


def rotate(rows: int, heads: int, width: int) -> Work:
    from ..attention import rotate

    angle = torch.randn(rows, 1, width // 2)
    rope = torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)
    return _backward(lambda x: rotate(x, rope), torch.randn(rows, heads, width))


def attention(sequences: int, length: int, heads: int, width: int) -> Work:
    from ..attention import Layer
    from ..kv_cache import Packed

    context, layer = Packed([length] * sequences), Layer(0, width**-0.5, 0)
    return _backward(
        lambda q, k, v: context.attend(layer, q, k, v),
        *(torch.randn(sequences * length, heads, width) for _ in range(3)),
    )


def branches(prompts: int, prompt: int, each: int, length: int, heads: int, width: int) -> Work:
    from ..attention import Layer
    from ..kv_cache import SharedPrefix

    completions = prompts * each
    context = SharedPrefix(prompts, prompt, [i // each for i in range(completions)], [length] * completions)
    layer, tokens = Layer(0, width**-0.5, 0), prompts * prompt + completions * length
    return _backward(
        lambda q, k, v: context.attend(layer, q, k, v), *(torch.randn(tokens, heads, width) for _ in range(3))
    )


def mixture(tokens: int, experts: int, top_k: int, hidden: int, width: int) -> Work:
    from ..ffn import experts_mixed

    chosen = torch.rand(tokens, experts).topk(top_k).indices
    given = (
        torch.randn(tokens, hidden),
        torch.randn(experts, 2 * width, hidden),
        torch.randn(experts, hidden, width),
        torch.rand(tokens, top_k),
    )
    return _backward(
        lambda x, gate_up, down, weights: experts_mixed(x, gate_up, down, chosen, weights), *given
    )


def draw(rows: int, vocabulary: int) -> Work:
    from .choice import serves

    logits, uniform = 4 * torch.randn(rows, vocabulary), torch.rand(rows, dtype=torch.float64)

    def plain() -> Tensor:
        logprobs = torch.log_softmax(logits, -1)
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
        return logprobs.gather(1, tokens.clamp_(max=vocabulary - 1))

    return lambda: sample(logits, uniform, 1.0) if serves("draw", vocabulary, logits) else plain()


def decode(rows: int, hidden: int, layers: int, heads: int, width: int, intermediate: int) -> Work:
    """One token more for each row, behind a prompt of 64 that all share."""
    from ..config import ModelConfig
    from ..decoder import Decoder
    from ..kv_cache import KVCache, Packed
    from .choice import serves
    from .decoding import Decoding

    config = ModelConfig("llama", 256, hidden, layers, heads, heads, width, intermediate)
    model = Decoder(config).initialize(0)
    tokens, step = torch.randint(0, 256, (64,)), Decoding(model)

    def begun(compiled: bool) -> KVCache:
        prefill, cache = Packed([64]).keep(), KVCache(config, compiled=compiled, ahead=1 << 10)
        model(tokens, prefill)
        cache.fork(prefill, [rows])
        return cache

    with torch.no_grad():
        caches = {compiled: begun(compiled) for compiled in (True, False)}

    @torch.no_grad()
    def work() -> Tensor:
        compiled = serves("decode", hidden, model.embed.weight)
        cache = caches[compiled]
        cache.advance()
        return (step if compiled else model)(tokens[:rows], cache)

    return work


OPERATIONS = {
    "norm": Operation("numbers", (1 << 14, math.inf), (("32 x 128", lambda: norm(32, 128)), ("2,048 x 256", lambda: norm(2048, 256)))),
    "rotate": Operation("numbers", (1 << 14, math.inf), (
        ("32 tokens, 4 heads of 32", lambda: rotate(32, 4, 32)), ("2,048 tokens, 4 heads of 64", lambda: rotate(2048, 4, 64)),
    )),
    "swiglu": Operation("numbers", (1 << 15, math.inf), (("32 x 344", lambda: swiglu(32, 344)), ("2,048 x 688", lambda: swiglu(2048, 688)))),
    "attention": Operation("tokens of the longest sequence", (64, 512, 2048, math.inf), (
        ("32 sequences of 48", lambda: attention(32, 48, 4, 32)), ("4 of 256", lambda: attention(4, 256, 4, 64)),
        ("1 of 1,024", lambda: attention(1, 1024, 2, 64)), ("1 of 3,072", lambda: attention(1, 3072, 2, 32)),
    )),
    "branches": Operation("tokens of a prompt and its longest completion", (512, math.inf), (
        ("4 prompts of 64, 8 completions of 64", lambda: branches(4, 64, 8, 64, 4, 32)),
        ("1 prompt of 512, 4 completions of 256", lambda: branches(1, 512, 4, 256, 2, 32)),
    )),
    "mixture": Operation("tokens an expert", (16, math.inf), (
        ("64 tokens, 4 of 16 experts", lambda: mixture(64, 16, 4, 128, 64)), ("1,024 tokens, 4 of 16 experts", lambda: mixture(1024, 16, 4, 128, 64)),
    )),
    "draw": Operation("vocabulary", (4096, math.inf), (("8 rows of 512", lambda: draw(8, 512)), ("8 rows of 49,152", lambda: draw(8, 49152)))),
    "decode": Operation("hidden size", (256, math.inf), (
        ("8 rows, hidden 128", lambda: decode(8, 128, 2, 4, 32, 352)), ("8 rows, hidden 576", lambda: decode(8, 576, 1, 9, 64, 1536)),
    )),
}  # fmt: skip

# Classes of products.hpp: rows, and numbers of a weight; columns and inputs of a weight of each.
MOST, WIDEST = (1, 2, 4, 8, 16, 32, 64, 128), (1 << 14, 1 << 17, 1 << 20, math.inf)
POOL = 1 << 25  # numbers of all weights that take turns: 128 MiB
WEIGHTS = ((128, 128), (384, 256), (960, 576), (1536, 1536))


def products(rows: int, columns: int, inner: int, ways: list[int]) -> list[Work]:
    """A product each of these ways."""
    x, weights = torch.randn(rows, inner), cycle(_weights(columns, inner))
    return [lambda way=way: linear(x, next(weights), way) for way in ways]


def layer(rows: int, columns: int, inner: int) -> Work:
    """A layer without bias: ours, or torch's own. It is to be called without gradients, as in sampling."""
    from ..linear import Linear
    from .choice import serves_product

    def layers(kind: type) -> list[torch.nn.Module]:
        found = []
        for weight in _weights(columns, inner):
            found.append(kind(inner, columns, bias=False, device="meta"))
            found[-1].weight = torch.nn.Parameter(weight)
        return found

    x, both = torch.randn(rows, inner), list(zip(layers(torch.nn.Linear), layers(Linear), strict=True))
    weight, turns = both[0][0].weight, cycle(both)
    return lambda: next(turns)[serves_product(x, weight)](x)


def _weights(columns: int, inner: int) -> list[Tensor]:
    """Weights that take turns, so that large ones come from memory as in a model."""
    return list(_pool()[: POOL // (columns * inner) * columns * inner].view(-1, columns, inner)[:64])


@cache
def _pool() -> Tensor:
    return torch.empty(POOL).uniform_(-0.1, 0.1)


def release() -> None:
    """Give the memory of the weights back."""
    _pool.cache_clear()
