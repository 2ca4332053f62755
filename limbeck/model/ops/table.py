"""The table of operations: what a decoder asks of the device on which its weights lie.

N tokens · B rows · C hidden size · O outputs · H heads · K key/value heads · D head size · R predictions · V
vocabulary · E experts. `[N, K]` in `mix_experts` and `top_k` are the K experts of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..context import Layer, Sequences
    from .experts import Rounding

BLOCK = 64  # tokens of a block of keys and values
Rope = tuple[Tensor, Tensor]  # cos and sin of each token, [N, 1, D] both; see `decoder.rope_table`
Pool = tuple[Tensor, Tensor]  # the keys and the values of one layer, [tokens of all blocks, K, D] both


class Rows(NamedTuple):
    """The rows of a paged cache that new tokens belong to.

    `table` [B, blocks] has the index of the first token of each block of a row in the pool. The new tokens of
    row b are `starts[b]:starts[b + 1]`, and the last of its `lengths[b]` tokens. All three are int32.
    `longest` is the highest number of new tokens of a row.
    """

    table: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int


class Latents(NamedTuple):
    """What multi-head latent attention caches of new tokens, and the weights that write it out.

    `cached_N1D` are the latents, of R values, and after them the rotated keys that all heads share. A head's
    keys are `up_key_HDR @ latent` and then the rotated key, its values are `up_value_HDR @ latent`.
    """

    cached_N1D: Tensor
    up_key_HDR: Tensor
    up_value_HDR: Tensor


class Predictions(NamedTuple):
    """Predicted tokens: the hidden states [R, C] before the head [V, C], the tokens [R], the temperature.

    `kept_RK` are the only ids that sampling left to choose from, padded with -1 (None: all ids).
    """

    hidden_RC: Tensor
    head_VC: Tensor
    targets_R: Tensor
    temperature: float
    kept_RK: Tensor | None = None


class Ops(Protocol):
    """The operations of a decoder on one kind of device.

    `on_host`: the weights lie in the host's memory, so that a decode batch may keep its state there.
    `logits_at_once` is the number of logits to have in memory at once (0: as few as the caller likes),
    `prefill_tokens` the number of tokens of prompts that a device batch runs at once.
    """

    on_host: bool
    logits_at_once: int
    prefill_tokens: int

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight over the last dimension of x [..., C]; weight is [C]."""

    def add_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return x + delta and its norm, both [N, C]; without `delta`, x and its norm."""

    def rotate(self, x_NHD: Tensor, rope: Rope) -> Tensor:
        """Return the heads [N, H, D] rotated, in the half-split layout: `x * cos + x.roll(D / 2) * sin`."""

    def swiglu(self, both_NI: Tensor) -> Tensor:
        """Return silu(gate) * up [N, I], where gate and up are the two halves of the last dimension."""

    def geglu(self, both_NI: Tensor) -> Tensor:
        """Return gelu(gate) * up [N, I], with the tanh form of GELU; gate and up as for `swiglu`."""

    def linear(self, x_NC: Tensor, weight_OC: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias [N, O]."""

    def logits(self, x_NC: Tensor, head_VC: Tensor) -> Tensor:
        """Return the logits x @ head.T [N, V] without a gradient, in float32 or better."""

    def router(self, x_NC: Tensor, weight_EC: Tensor) -> Tensor:
        """Return the logits of a router [N, E], in float32 or better."""

    def top_k(self, scores_NE: Tensor, k: int) -> Tensor:
        """Return the indices of the k highest scores of each row [N, K], the highest first."""

    def row_sums(self, x_NK: Tensor) -> Tensor:
        """Return the sum of each row, [N, 1]."""

    def mix_experts(
        self,
        x_NC: Tensor,
        gate_up_EIC: Tensor,
        down_ECI: Tensor,
        chosen_NK: Tensor,
        weights_NK: Tensor,
        rounding: Rounding,
    ) -> Tensor:
        """Return the sum over each token's experts of weight x SwiGLU(x), [N, C].

        `chosen_NK` are the experts of each token and `weights_NK` the weights of their outputs.
        """

    def attend(
        self,
        layer: Layer,
        q_NHD: Tensor,
        k_NKD: Tensor,
        v_NKD: Tensor,
        sequences: Sequences,
        latents: Latents | None = None,
    ) -> Tensor:
        """Return causal attention within whole sequences, [N, H, D].

        `latents` are what multi-head latent attention made the keys and values of.
        """

    def per_head(self, x_NHD: Tensor, weight_HOD: Tensor) -> Tensor:
        """Return each head's product with its own weight, [N, H, O], without a gradient on a card."""

    def absorb(self, q_nope_NHD: Tensor, q_rope_NHD: Tensor, up_key_HDR: Tensor) -> Tensor:
        """Return queries of cached latents and rotated keys [N, H, R + D], from unrotated and rotated ones.

        With them a latent stands for the keys that `up_key_HDR` would make of it (DeepSeek-V2, arXiv
        2405.04434, section 2.1.2).
        """

    def store(self, k_NKD: Tensor, v_NKD: Tensor | None, slots_N: Tensor, pool: Pool) -> None:
        """Write the keys and values of new tokens to the places `slots_N` of a pool."""

    def attend_one(self, layer: Layer, q_BHD: Tensor, pool: Pool, table: Tensor, lengths: Tensor) -> Tensor:
        """Return the attention of one query a row, its last token, to the row's keys, [B, H, D].

        `table` [B, blocks] and `lengths` [B] are as in `Rows`.
        """

    def attend_rows(self, layer: Layer, q_NHD: Tensor, pool: Pool, rows: Rows) -> Tensor:
        """Return the attention of new tokens to the keys of their rows, [N, H, D]."""

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return a token for each row and its log-probability, both [B]; temperature 0 takes the likeliest.

        Logits of minus infinity exclude their tokens.
        """

    def logprob(self, logits_BV: Tensor, tokens_B: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities of given tokens [B], with the bits of `draw`."""

    def cumulate(self, values_BV: Tensor) -> Tensor:
        """Return the sums of each row's values up to and with each of them, [B, V]."""

    def ids_at_once(self, vocabulary: int) -> int:
        """Return for how many ids of a vocabulary `score` has logits in memory at once."""

    def score(self, predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets' log-probabilities, the entropies, and what `score_backward` needs, all [R]."""

    def score_backward(
        self, predictions: Predictions, grad_R: Tensor, needed_R: Tensor, by_head_VC: Tensor | None
    ) -> Tensor:
        """Return the gradient by the hidden states [R, C], and add that by the head to `by_head_VC`.

        `grad_R` is the gradient by the log-probabilities, `needed_R` the last result of `score`. Without
        `by_head_VC` the head is frozen.
        """

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `step` does, with the same tensors, as cheaply as the device can.

        `step` may run a few times meanwhile, so it must leave the state as it is.
        """

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """Return a tensor of any shape of the host on the device, without waiting for the device."""

    def fetch(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to copy a tensor of any shape to the host; return a function that waits for the copy and
        returns it. Work that is given to the device meanwhile is not waited for."""

    def free_bytes(self, device: torch.device) -> int | None:
        """Return the bytes of memory that are free on the device; None if that is not known."""
