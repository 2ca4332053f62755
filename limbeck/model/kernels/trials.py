"""The operations of the kernels in classes of size, and a piece of work of each class to time them at.

The work calls the decoder's own modules, so that the timed code is the code that will run, with kernels or
with torch. N tokens · C inputs · O outputs.
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
    """One operation of the kernels, in classes of size.

    `size` names the quantity that is compared with `largest`, the largest size of each class; `trials` has,
    for each class, a shape in words and a function that makes its work.
    """

    size: str
    largest: tuple[float, ...]
    trials: tuple[tuple[str, Callable[[], Work]], ...]


def _backward(module: Callable[..., Tensor], *inputs: Tensor) -> Work:
    """Forward and backward through a module, as in learning; inputs of any shape [...]."""
    leaves = [tensor.requires_grad_() for tensor in inputs]
    grad = torch.ones_like(module(*leaves))
    return lambda: torch.autograd.backward(module(*leaves), grad)


def norm(rows: int, width: int) -> Work:
    """RMSNorm of `rows` vectors of `width`."""
    from ..attention import RMSNorm

    return _backward(RMSNorm(width, 1e-5), torch.randn(rows, width))


def swiglu(rows: int, width: int) -> Work:
    """SwiGLU of `rows` vectors of twice `width`."""
    from ..ops import CPU

    return _backward(CPU.swiglu, torch.randn(rows, 2 * width))


def rotate(rows: int, heads: int, width: int) -> Work:
    """Rotary positions of `rows` tokens."""
    from ..ops import CPU

    angle = torch.randn(rows, 1, width // 2)
    cos = torch.cat([angle.cos(), angle.cos()], -1)
    sin = torch.cat([-angle.sin(), angle.sin()], -1)
    return _backward(lambda x: CPU.rotate(x, (cos, sin)), torch.randn(rows, heads, width))


def attention(sequences: int, length: int, heads: int, width: int) -> Work:
    """Attention within packed sequences."""
    from ..context import Layer
    from ..packed import Packed

    context = Packed([length] * sequences)
    layer = Layer(0, width**-0.5, 0)
    inputs = [torch.randn(sequences * length, heads, width) for _ in range(3)]
    return _backward(lambda q, k, v: context.attend(layer, q, k, v), *inputs)


def branches(prompts: int, prompt: int, each: int, length: int, heads: int, width: int) -> Work:
    """Attention of `each` completions of every prompt, which they share."""
    from ..context import Layer
    from ..packed import SharedPrefix

    completions = prompts * each
    owners = [i // each for i in range(completions)]
    context = SharedPrefix(prompts, prompt, owners, [length] * completions)
    layer = Layer(0, width**-0.5, 0)
    tokens = prompts * prompt + completions * length
    inputs = [torch.randn(tokens, heads, width) for _ in range(3)]
    return _backward(lambda q, k, v: context.attend(layer, q, k, v), *inputs)


def mixture(tokens: int, experts: int, top_k: int, hidden: int, width: int) -> Work:
    """A mixture of experts without shared ones."""
    from ..ops import CPU

    chosen = torch.rand(tokens, experts).topk(top_k).indices
    inputs = (
        torch.randn(tokens, hidden),
        torch.randn(experts, 2 * width, hidden),
        torch.randn(experts, hidden, width),
        torch.rand(tokens, top_k),
    )

    def module(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        """x [N, C] through the experts, [N, C]."""
        return CPU.mix_experts(x, gate_up, down, chosen, weights)

    return _backward(module, *inputs)


def draw(rows: int, vocabulary: int) -> Work:
    """The draw of one token a row."""
    from .choice import serves

    logits = 4 * torch.randn(rows, vocabulary)
    uniform = torch.rand(rows, dtype=torch.float64)

    def draw_plainly() -> Tensor:
        """The log-probabilities of the drawn tokens [N, 1], by torch."""
        logprobs = torch.log_softmax(logits, -1)
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)
        return logprobs.gather(1, tokens.clamp_(max=vocabulary - 1))

    return lambda: sample(logits, uniform, 1.0) if serves("draw", vocabulary, logits) else draw_plainly()


def decode(rows: int, hidden: int, layers: int, heads: int, width: int, intermediate: int) -> Work:
    """One decode step of each row, behind a shared prompt of 64 tokens."""
    from ..config import ModelConfig
    from ..decoder import Decoder
    from ..kv_cache import KVCache
    from ..packed import Packed
    from .choice import serves
    from .decode_step import DecodeStep

    config = ModelConfig("llama", 256, hidden, layers, heads, heads, width, intermediate)
    model = Decoder(config).initialize(0)
    tokens = torch.randint(0, 256, (64,))
    step = DecodeStep(model)

    def prefilled(compiled: bool) -> KVCache:
        """A cache with the prompt in every row."""
        prefill = Packed([64]).keep()
        cache = KVCache(config, compiled=compiled, ahead=1 << 10)
        model(tokens, prefill)
        cache.fork(prefill, [rows])
        return cache

    with torch.no_grad():
        caches = {compiled: prefilled(compiled) for compiled in (True, False)}

    @torch.no_grad()
    def work() -> Tensor:
        """The states after one more token, [N, C]."""
        compiled = serves("decode", hidden, model.embed.weight)
        cache = caches[compiled]
        cache.advance()
        return (step if compiled else model)(tokens[:rows], cache)

    return work


OPERATIONS = {
    "norm": Operation(
        "numbers",
        (1 << 14, math.inf),
        (("32 x 128", lambda: norm(32, 128)), ("2,048 x 256", lambda: norm(2048, 256))),
    ),
    "rotate": Operation(
        "numbers",
        (1 << 14, math.inf),
        (
            ("32 tokens, 4 heads of 32", lambda: rotate(32, 4, 32)),
            ("2,048 tokens, 4 heads of 64", lambda: rotate(2048, 4, 64)),
        ),
    ),
    "swiglu": Operation(
        "numbers",
        (1 << 15, math.inf),
        (("32 x 344", lambda: swiglu(32, 344)), ("2,048 x 688", lambda: swiglu(2048, 688))),
    ),
    "attention": Operation(
        "tokens of the longest sequence",
        (64, 512, 2048, math.inf),
        (
            ("32 sequences of 48", lambda: attention(32, 48, 4, 32)),
            ("4 of 256", lambda: attention(4, 256, 4, 64)),
            ("1 of 1,024", lambda: attention(1, 1024, 2, 64)),
            ("1 of 3,072", lambda: attention(1, 3072, 2, 32)),
        ),
    ),
    "branches": Operation(
        "tokens of a prompt and its longest completion",
        (512, math.inf),
        (
            ("4 prompts of 64, 8 completions of 64", lambda: branches(4, 64, 8, 64, 4, 32)),
            ("1 prompt of 512, 4 completions of 256", lambda: branches(1, 512, 4, 256, 2, 32)),
        ),
    ),
    "mixture": Operation(
        "tokens an expert",
        (16, math.inf),
        (
            ("64 tokens, 4 of 16 experts", lambda: mixture(64, 16, 4, 128, 64)),
            ("1,024 tokens, 4 of 16 experts", lambda: mixture(1024, 16, 4, 128, 64)),
        ),
    ),
    "draw": Operation(
        "vocabulary",
        (4096, math.inf),
        (("8 rows of 512", lambda: draw(8, 512)), ("8 rows of 49,152", lambda: draw(8, 49152))),
    ),
    "decode": Operation(
        "hidden size",
        (256, math.inf),
        (
            ("8 rows, hidden 128", lambda: decode(8, 128, 2, 4, 32, 352)),
            ("8 rows, hidden 576", lambda: decode(8, 576, 1, 9, 64, 1536)),
        ),
    ),
}

# Classes of products, as products.hpp has them: the most rows of each, and the most values of a weight.
MOST = (1, 2, 4, 8, 16, 32, 64, 128)
WIDEST = (1 << 14, 1 << 17, 1 << 20, math.inf)
POOL = 1 << 25  # values of all weights that take turns: 128 MiB
WEIGHTS = ((128, 128), (384, 256), (960, 576), (1536, 1536))  # outputs and inputs of a weight of each class


def products(rows: int, columns: int, inner: int, ways: list[int]) -> list[Work]:
    """One product of `rows` x `inner` by `inner` x `columns` in each of these ways."""
    x = torch.randn(rows, inner)
    weights = cycle(_weights(columns, inner))
    return [lambda way=way: linear(x, next(weights), way) for way in ways]


def layer(rows: int, columns: int, inner: int) -> Work:
    """A linear layer without bias, ours or torch's own; to be called without gradients, as in sampling."""
    from ..linear import Linear
    from .choice import serves_product

    x = torch.randn(rows, inner)
    weights = _weights(columns, inner)
    plain = _layers(torch.nn.Linear, weights)
    ours = _layers(Linear, weights)
    turns = cycle(zip(plain, ours, strict=True))
    weight = plain[0].weight
    return lambda: next(turns)[serves_product(x, weight)](x)


def _layers(kind: type[torch.nn.Linear], weights: list[Tensor]) -> list[torch.nn.Linear]:
    """One linear layer without bias for each weight [O, C]."""
    layers = []
    for weight_OC in weights:
        columns, inner = weight_OC.shape
        module = kind(inner, columns, bias=False, device="meta")
        module.weight = torch.nn.Parameter(weight_OC)
        layers.append(module)
    return layers


def _weights(columns: int, inner: int) -> list[Tensor]:
    """Weights [O, C] that take turns, so that large ones come from memory as in a model; 64 at most."""
    size = columns * inner
    whole = _pool()[: POOL // size * size]
    return list(whole.view(-1, columns, inner)[:64])


@cache
def _pool() -> Tensor:
    """The memory of all weights, [POOL]."""
    return torch.empty(POOL).uniform_(-0.1, 0.1)


def release() -> None:
    """Free the memory of the weights."""
    _pool.cache_clear()
