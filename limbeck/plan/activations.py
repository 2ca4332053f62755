"""The bytes that an update has on a card, layer by layer: what the forward pass saves for the backward pass,
and what the backward pass has in addition.

It follows the code of the learner: model/ops/cuda.py says what each operation saves, model/decoder.py what
is computed again. A number has `width` bytes. N tokens of a micro-batch, M predictions, C hidden size, I
intermediate size, H heads, K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .micro_batch import MicroBatch

LOGITS = 1 << 26  # logits in memory at once on a card (model/ops/cuda.py)
HEAD_NUMBERS = 1 << 24  # numbers of the head's gradient that are computed at once (model/ops/cuda.py)
DISTILLED_LOGITS = 1 << 21  # the same of a teacher and a student (train/divergence.py)
DISTILLED_TENSORS = 8  # tensors of these logits in float32 that exist at once
PADDED = 128  # rows that flash attention pads each sequence's gradients to
STREAMS = 4  # tensors [N, C] of a forward pass: a block's two inputs, their sum, and its norm
INTEGERS = 6  # integers of a token in a batch: ids, next ids, positions, places, targets, rows


def position_bytes(config: ModelConfig) -> int:
    """Return the bytes of cos and sin of one position, of both bases where layers with a window have one."""
    return 8 * config.rope_dim * (2 if config.local_theta else 1)


@dataclass(frozen=True)
class Activations:
    """The activations of a model for one micro-batch, in bytes.

    `units` is the number of multiprocessors of the card, `frozen` is True if the weights do not learn, as
    under adapters, and `recompute` is the stage's setting.
    """

    config: ModelConfig
    width: int
    batch: MicroBatch
    units: int
    frozen: bool = False
    recompute: bool | str | None = False

    @property
    def half(self) -> bool:
        """True if numbers have 16 bits."""
        return self.width == 2

    @property
    def stream(self) -> float:
        """Bytes of one tensor [N, C]."""
        return self.width * self.batch.tokens * self.config.hidden_size

    @property
    def base(self) -> float:
        """Bytes that all layers share: the batch, and cos and sin of each token."""
        return self.batch.tokens * (8 * INTEGERS + 12 + position_bytes(self.config))

    # ------------------------------------------------------------ between forward and backward pass

    def kept(self, layer: int) -> float:
        """Return the bytes that a layer keeps until its backward pass begins."""
        if not self.recompute:
            return self.saved(layer)
        return self.stream + (self._results if self.recompute == "keep_attention" else 0.0)

    def computed_again(self, layer: int) -> float:
        """Return the bytes that a layer's backward pass computes again before it begins."""
        if not self.recompute:
            return 0.0
        kept = self.stream + (self._results if self.recompute == "keep_attention" else 0.0)
        return self.saved(layer) - kept  # the layer's input is that of its first norm

    @property
    def _results(self) -> float:
        """Bytes of the results of attention [N, H, D], and of the logs of its sums [N, H]."""
        return self.batch.tokens * (self.width * self._mixed + 4 * self.config.heads)

    @property
    def _mixed(self) -> int:
        """The values of a token that attention returns."""
        latent = self.config.latent
        return self.config.heads * (latent.value_dim if latent else self.config.head_dim)

    def saved(self, layer: int) -> float:
        """Return the bytes that one layer saves in its forward pass: inputs of norms, products and others."""
        norms = self.stream * (2 if self.config.parallel else 6 if self.config.post_norms else 4)
        attention = self._latent_saved() if self.config.latent else self._grouped_saved(layer)
        return norms + attention + self._ffn_saved(layer)

    def _grouped_saved(self, layer: int) -> float:
        """Return the bytes that grouped-query attention saves, its projections included."""
        config = self.config
        queries = config.heads * config.head_dim
        keys = config.kv_heads * config.head_dim
        normed = (queries + keys) * bool(config.qk_norm)
        per_token = 2 * queries + normed
        if self.half:
            pairs = self.width * self.batch.keys * 2 * keys
            return self.batch.tokens * (self.width * per_token + 4 * config.heads) + pairs
        own = keys * config.keeps(layer)
        rotated = own if config.qk_norm == "after" else queries + own
        return self.batch.tokens * self.width * (per_token + rotated + queries + 2 * own)

    def _latent_saved(self) -> float:
        """Return the bytes that latent attention saves, its projections included."""
        latent = self.config.latent
        heads = self.config.heads
        values = heads * (latent.value_dim if self.half else latent.nope_dim + latent.value_dim)
        per_token = 2 * latent.q_rank + 2 * latent.kv_rank + heads * latent.key_dim + self._mixed
        pairs = self.width * self.batch.keys * (heads * latent.key_dim + values)
        return self.batch.tokens * (self.width * per_token + 4 * heads * self.half) + pairs

    def _ffn_saved(self, layer: int) -> float:
        """Return the bytes that the feed-forward of a layer saves."""
        config = self.config
        if not config.sparse(layer):
            inner = (2 + config.gated + config.gelu) * config.intermediate_size
            return self.batch.tokens * self.width * inner
        experts = config.experts
        inner = 3 * (experts.top_k * experts.intermediate_size + experts.shared_size)
        scores = 4 * (2 * experts.count + 2 * experts.top_k) + 16 * experts.top_k
        per_token = self.width * inner + scores
        return self.batch.tokens * per_token

    # ------------------------------------------------------------ during the backward pass

    def transient(self, layer: int) -> float:
        """Return the most bytes that the backward pass of a layer has beside what the layer saved."""
        feed_forward = self.stream + self._ffn_transient(layer)
        freed = self._ffn_saved(layer) + self.stream * (4 if self.config.post_norms else 2)
        attention = self.stream + self._attention_transient()
        absorbed = self._absorbed() if self.config.latent else 0.0
        return max(feed_forward, attention - freed, absorbed - freed)

    def _ffn_transient(self, layer: int) -> float:
        """Return the bytes of gradients inside a feed-forward at their most."""
        config = self.config
        if not config.sparse(layer):
            inner = (2 if config.gated else 1) * config.intermediate_size
            return self.batch.tokens * self.width * inner
        experts = config.experts
        inner = experts.top_k * (4 * config.hidden_size + 4 * experts.intermediate_size)
        return self.batch.tokens * self.width * inner

    def _attention_transient(self) -> float:
        """Return the bytes of the gradients by attention's inputs and results, and of its work space."""
        config = self.config
        key = config.latent.key_dim if config.latent else config.head_dim
        pairs = config.kv_heads * key + (self._mixed if config.latent else config.kv_heads * key)
        batch = self.batch
        inner = config.heads * key + self._mixed
        gradients = self.width * (batch.tokens * inner + batch.keys * pairs)
        if self.half:
            return gradients + self._flash(key)
        shared = config.kv_heads < config.heads
        scores = 12 * batch.tokens * batch.longest * config.heads if shared or config.latent else 0
        return gradients + self.width * batch.tokens * (inner + pairs) + scores  # of the padded sequences

    def _flash(self, key: int) -> float:
        """Return the bytes of the work space of flash attention's backward pass, in 16 bits.

        In its deterministic form it sums the gradient by the queries in as many parts as fill the card.
        Shared keys have gradients for every query head; values and results narrower than keys are widened.
        """
        batch = self.batch
        heads = self.config.heads
        parts = -(-self.units // (batch.sequences * heads))
        rows = batch.tokens + PADDED * batch.sequences
        sums = 4 * parts * rows * heads * (-(-key // 32) * 32)
        queries = heads * key
        missing = queries - self._mixed
        if missing:  # the result and its gradient, values and theirs
            return sums + self.width * (2 * batch.tokens * queries + batch.keys * (queries + missing))
        return sums + self.width * batch.keys * 2 * queries * (self.config.kv_heads < heads)

    def _absorbed(self) -> float:
        """Return the bytes that the forward pass of latent attention has beside what it saves.

        The absorbed queries and the mixed latents, the outputs of the projections, and where prompts are
        shared each token's own keys.
        """
        latent = self.config.latent
        batch = self.batch
        per_head = 2 * latent.kv_rank + latent.rope_dim + latent.key_dim + latent.rope_dim
        per_head += (latent.nope_dim + latent.value_dim) * self.half
        per_head += latent.key_dim * (batch.keys > batch.tokens)
        return self.width * batch.tokens * self.config.heads * per_head

    def forward(self, layer: int) -> float:
        """Return the most bytes of a layer's forward pass without gradients, beside the weights."""
        config = self.config
        if config.latent:
            attention = self._absorbed() + self._latent_saved()
        else:
            heads = 2 * (config.heads + 2 * config.kv_heads)
            attention = self.batch.tokens * self.width * heads * config.head_dim
        feed_forward = self.stream + self._ffn_saved(layer)
        if config.sparse(layer):  # the outputs of a token's experts
            feed_forward += config.experts.top_k * self.stream
        return self.base + STREAMS * self.stream + max(attention, feed_forward)

    # ------------------------------------------------------------ the head

    @property
    def states(self) -> float:
        """Bytes of the final hidden states at the predictions, and of the sum before the last norm."""
        return self.stream + self.width * self.batch.predicted * self.config.hidden_size

    @property
    def logits(self) -> float:
        """Bytes that the log-probabilities have in their backward pass: gradients, and logits in chunks."""
        vocabulary = self.config.vocab_size
        head = 0 if self.frozen else vocabulary * self.config.hidden_size
        states = self.width * self.batch.predicted * self.config.hidden_size
        if self.batch.taught:
            rows = max(1, min(self.batch.predicted, DISTILLED_LOGITS // vocabulary))
            return states + 4 * head + 4 * DISTILLED_TENSORS * rows * vocabulary + 4 * head * self.half
        rows = max(1, min(self.batch.predicted, LOGITS // vocabulary))
        chunk = rows * vocabulary * (4 + self.width) + 4 * min(head, HEAD_NUMBERS) * self.half
        return states + 4 * head + max(chunk, self.width * head * self.half)
