"""The decoder: takes the tokens of all sequences, concatenated, and returns their hidden states.

Training, prefill and decoding call the same `forward`. They differ only in the `Context`, which says which
tokens belong to one sequence and what each token attends to. `forward` does not compute logits: callers apply
`head` at the positions that they need. N tokens · C hidden size · D dimensions of a head that are rotated · T
positions · V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import GroupedQueryAttention, LatentAttention, RMSNorm, RMSNormFromOne, Rope, yarn_mscale
from .config import ModelConfig
from .context import Context
from .ffn import GELU, GeGLU, MixtureOfExperts, SwiGLU
from .linear import Linear
from .ops import CPU, Ops

# Weights whose output is added to the residual stream, by the end of their names.
RESIDUAL = ("out.weight", "down.weight", "experts_down")


class Block(nn.Module):
    """One layer: attention, then feed-forward, each applied to a normalised copy and added to the residual.

    In Falcon's parallel blocks attention and feed-forward take the same normalised copy. In Gemma 3's the
    outputs of both are normalised too, before they are added.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        attention = LatentAttention if config.latent else GroupedQueryAttention
        self.attention_norm = _norm(config)
        self.attention = attention(config, layer)
        self.ffn_norm = None if config.parallel else _norm(config)
        self.ffn = _ffn(config, layer)
        self.attention_post_norm = _norm(config) if config.post_norms else None
        self.ffn_post_norm = _norm(config) if config.post_norms else None

    def forward(
        self, x_NC: Tensor, delta_NC: Tensor | None, rope: Rope, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Return two tensors [N, C] whose sum is the hidden states after the block.

        The states before it are x + delta, or x if `delta_NC` is None. The sums are left to the next norm,
        which makes them in the same pass over memory.
        """
        x_NC, normed_NC = add_norm(self.attention_norm, x_NC, delta_NC)
        mixed_NC = self.attention(normed_NC, rope, context)
        if self.attention_post_norm is not None:
            mixed_NC = self.attention_post_norm(mixed_NC)
        if self.ffn_norm is None:
            x_NC = x_NC + mixed_NC
        else:
            x_NC, normed_NC = add_norm(self.ffn_norm, x_NC, mixed_NC)
        mixed_NC = self.ffn(normed_NC, context)
        if self.ffn_post_norm is not None:
            mixed_NC = self.ffn_post_norm(mixed_NC)
        return x_NC, mixed_NC


def add_norm(norm: nn.Module, x_NC: Tensor, delta_NC: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x + delta and its norm, both [N, C]; without `delta_NC`, x and its norm."""
    if isinstance(norm, RMSNorm):
        return norm.add(x_NC, delta_NC)
    if delta_NC is not None:
        x_NC = x_NC + delta_NC
    return x_NC, norm(x_NC)


class MTPModule(nn.Module):
    """One module of multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    It takes the hidden state at a position and the embedding of the token that follows, and returns the state
    that predicts the token after that one. Embedding and head are those of the model. The input of `join` is
    the embedding followed by the state, in the order of DeepSeek-V3's checkpoints.
    """

    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        self.embed_norm = _norm(config)
        self.hidden_norm = _norm(config)
        self.head_norm = _norm(config)
        self.join = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.layers + depth)

    def forward(self, hidden_NC: Tensor, next_NC: Tensor, rope: Rope, context: Context) -> Tensor:
        """Return the states [N, C] that predict one token further than `hidden_NC` do.

        `next_NC` are the embeddings of the token that follows each position.
        """
        normed = [self.embed_norm(next_NC), self.hidden_norm(hidden_NC)]
        joined_NC = self.join(torch.cat(normed, dim=-1))
        return add_norm(self.head_norm, *self.block(joined_NC, None, rope, context))[1]


def _norm(config: ModelConfig) -> nn.Module:
    """Return a normalisation of hidden states: LayerNorm or RMSNorm, as `config` says."""
    rms_norm = RMSNormFromOne if config.norms_from_one else RMSNorm
    norm = nn.LayerNorm if config.layer_norm else rms_norm
    return norm(config.hidden_size, config.norm_eps)


def _ffn(config: ModelConfig, layer: int) -> nn.Module:
    """Return the feed-forward of one layer: a mixture of experts, or a dense one."""
    if config.sparse(layer):
        return MixtureOfExperts(config)
    dense = (GeGLU if config.gelu else SwiGLU) if config.gated else GELU
    return dense(config.hidden_size, config.intermediate_size)


class Decoder(nn.Module):
    """A language model without its sampling: `decoder(tokens_N, context)` returns hidden states [N, C].

    With `recompute`, training stores only the input of each block and computes the block again in the
    backward pass (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174): the same results in about a
    third more time and with a fraction of the memory for activations. With "keep_attention" the results of
    attention are stored too, where the operations of the device can use them again.
    """

    recompute: bool | str = False
    ops: Ops = CPU

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.ahead = nn.ModuleList(MTPModule(config, depth) for depth in range(config.predicted))
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if config.local_theta:
            cos, sin = rope_table(replace(config, rope_theta=config.local_theta, rope_scaling={}))
            self.register_buffer("local_cos", cos, persistent=False)
            self.register_buffer("local_sin", sin, persistent=False)

    def forward(self, tokens_N: Tensor, context: Context) -> Tensor:
        """Return the hidden states [N, C]; `head` makes of each state the logits of the next token."""
        rope = self._rope(context)
        local_rope = self._local_rope(context)
        x_NC = self._embed(tokens_N)
        context.ops = self.ops
        recompute = self.recompute and torch.is_grad_enabled()
        delta_NC = None
        for layer, block in enumerate(self.blocks):
            run = partial(self._recomputed, block) if recompute else block
            positions = local_rope if self.config.is_local(layer) else rope
            x_NC, delta_NC = run(x_NC, delta_NC, positions, context)
        return add_norm(self.norm, x_NC, delta_NC)[1]

    def _recomputed(
        self, block: Block, x_NC: Tensor, delta_NC: Tensor | None, rope: Rope, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Run a block as `Block.forward` does, [N, C] both; it is run again in the backward pass.

        x and delta are added before, so that one tensor is kept in place of two. What is kept of its
        attention belongs to the graph and is freed with it, used or not. The second time, routers repeat
        their choices, and keys and values that an earlier layer lent are the same.
        """
        if delta_NC is not None:
            x_NC = x_NC + delta_NC
        kept = [] if self.recompute == "keep_attention" else None
        routes = context.routes
        layer = len(routes.chosen) if routes else 0
        lent = context.lent

        def run(x_NC: Tensor) -> tuple[Tensor, Tensor]:
            context.kept = kept
            context.lent = lent
            if routes and len(routes.chosen) > layer:
                context.routes = routes.replay(layer)
            try:
                return block(x_NC, None, rope, context)
            finally:
                context.kept = None
                context.routes = routes

        return checkpoint(run, x_NC, use_reentrant=False, preserve_rng_state=False)

    def predict_next(self, hidden_NC: Tensor, next_N: Tensor, context: Context, depth: int = 0) -> Tensor:
        """Return states [N, C] that predict one token further than `hidden_NC`, by MTP module `depth`.

        `context` is the one in which `hidden_NC` were computed. `next_N` is the token one place after each
        position; at depth 1, two places after it, and so on.
        """
        return self.ahead[depth](hidden_NC, self._embed(next_N), self._rope(context), context)

    def _embed(self, tokens_N: Tensor) -> Tensor:
        """Return the embeddings of tokens [N, C], with Gemma's factor in the precision of the weights."""
        x_NC = self.embed(tokens_N)
        return x_NC * self.embed_scale if self.config.scaled_embeddings else x_NC

    @property
    def embed_scale(self) -> float:
        """The factor of the embeddings, as the precision of the weights has it; 1 where they have none."""
        if not self.config.scaled_embeddings:
            return 1.0
        return torch.tensor(self.config.hidden_size**0.5, dtype=self.embed.weight.dtype).item()

    def rotations(self, layer: int) -> Rope:
        """Return the tables of cos and sin for one layer, each [T, D] (see `rope_table`)."""
        if self.config.is_local(layer):
            return self.local_cos, self.local_sin
        return self.cos, self.sin

    def _rope(self, context: Context) -> Rope:
        """Return cos and sin of the rotary angles of all tokens, each [N, 1, D] (see `rope_table`)."""
        return self.cos[context.positions].unsqueeze(1), self.sin[context.positions].unsqueeze(1)

    def _local_rope(self, context: Context) -> Rope | None:
        """Return cos and sin of all tokens for layers with a window; None if no layer has its own base."""
        if not self.config.local_theta:
            return None
        positions = context.positions
        return self.local_cos[positions].unsqueeze(1), self.local_sin[positions].unsqueeze(1)

    @torch.no_grad()
    def initialize(self, seed: int) -> Decoder:
        """Draw all weight matrices from normal distributions, in place, and return the decoder.

        The standard deviation is 0.02 for embedding and head and 1 / sqrt(inputs) for all other matrices;
        matrices that write into the residual stream divide it by sqrt(2 layers). Small models learn faster
        this way than with GPT-2's 0.02 for all matrices. Vectors keep their values.
        """
        random = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            deviation = 0.02 if name.startswith(("embed", "head")) else weight.shape[-1] ** -0.5
            if name.endswith(RESIDUAL):
                deviation = deviation / math.sqrt(2 * self.config.layers)
            weight.normal_(0.0, deviation, generator=random)
        return self


# ---------------------------------------------------------------- rotary positions: a wave for two dimensions


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary angles, each [T, D] (Su et al. 2021, arXiv 2104.09864).

    The second half of the dimensions repeats the first, and the first half of sin is negated, so that
    rotating a head is `x * cos + x.roll(D / 2) * sin`. Computed in float64 and rounded to float32 at the end.
    """
    scaling = config.rope_scaling
    kind = scaling.get("rope_type")
    half = config.rope_dim // 2
    theta = config.rope_theta
    if kind == "dynamic":  # Hunyuan's fixed alpha
        theta *= scaling["alpha"] ** (config.rope_dim / (config.rope_dim - 2))
    frequency_D = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    if kind == "linear":
        frequency_D = frequency_D / scaling["factor"]  # position interpolation (arXiv 2306.15595)
    elif kind == "llama3":
        frequency_D = _stretch_by_turns(frequency_D, scaling)
    elif kind == "yarn":
        frequency_D = _stretch_by_dimension(frequency_D, scaling, theta)
    angle_TD = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), frequency_D)
    magnitude = _yarn_magnitude(scaling) if kind == "yarn" else 1.0
    cos_TD = magnitude * angle_TD.cos()
    sin_TD = magnitude * angle_TD.sin()
    return torch.cat([cos_TD, cos_TD], -1).float(), torch.cat([-sin_TD, sin_TD], -1).float()


def _stretch_by_turns(frequency_D: Tensor, scaling: dict) -> Tensor:
    """Return the rotary frequencies [D / 2] after Llama 3.1's scaling.

    Low frequencies are divided by the scaling's factor, high ones stay the same, and those between are
    blended.
    """
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    turns_D = scaling["original_max_position_embeddings"] * frequency_D / (2 * math.pi)
    blend_D = ((turns_D - low) / (high - low)).clamp(0, 1)
    return blend_D * frequency_D + (1 - blend_D) * frequency_D / scaling["factor"]


def _stretch_by_dimension(frequency_D: Tensor, scaling: dict, theta: float) -> Tensor:
    """Return the rotary frequencies [D / 2] after YaRN's scaling (arXiv 2309.00071, section 3.2).

    Along the dimensions, a linear ramp leads from the original frequencies to those divided by the factor.
    """
    half = len(frequency_D)
    trained = scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """Return the index of the frequency that makes `turns` full turns within the trained positions."""
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * half - 1)
    places_D = torch.arange(half, dtype=torch.float64)
    ramp_D = ((places_D - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (1 - ramp_D) * frequency_D + ramp_D * frequency_D / scaling["factor"]


def _yarn_magnitude(scaling: dict) -> float:
    """Return the factor by which YaRN multiplies cos and sin.

    DeepSeek's usual settings (`mscale` equal to `mscale_all_dim`) make it 1 and scale the attention scores
    instead (`yarn_attention_scale`).
    """
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    mscale = scaling.get("mscale")
    all_dims = scaling.get("mscale_all_dim")
    factor = scaling["factor"]
    if mscale and all_dims:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dims)
    return yarn_mscale(factor)
