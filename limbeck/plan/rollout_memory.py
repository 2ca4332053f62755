"""The memory of a rollout on one card: the pool of keys and values, the captured steps, and the prompts.

It follows engine/rollout.py: the pool takes what the rows can need, or half of what is free when the first
batch is made and not reserved for the learner's moments and gradients, and stays while the learner works.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.config import ModelConfig
from .activations import Activations
from .micro_batch import MicroBatch

BLOCK = 64  # tokens of a block of keys and values (model/ops/table.py)
POOL_SHARE = 0.5  # of the free memory that the pool may take
PROMPT_STEP = 256  # tokens of which the longest prompt of a batch is a multiple (engine/rollout.py)
PREFILL = 1 << 15  # tokens of prompts that a card runs at once (model/ops/cuda.py)
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows of a captured step
LOGITS = 8  # bytes of a logit in a step: in float32, and once more while a token is drawn


@dataclass(frozen=True)
class RolloutMemory:
    """A rollout of groups of `group` completions of at most `limit` tokens, `wanted` rows at once.

    Prompts have about `prompt` tokens; numbers have `width` bytes. `free` are the bytes of the card that are
    free when the first batch is made, `reserved` those of them that the learner will take.
    """

    config: ModelConfig
    width: int
    wanted: int
    group: int
    prompt: int
    limit: int
    free: float
    reserved: float = 0.0

    @property
    def pool(self) -> float:
        """Bytes of the pool of keys and values."""
        longest = -(-self.prompt // PROMPT_STEP) * PROMPT_STEP
        needed = self.wanted * -(-(longest + self.limit) // BLOCK)
        blocks = max(self._room(self.reserved), min(self._room(), self._of_group))
        return self._block * (min(needed, blocks) + -(-self.wanted // BLOCK))

    def _room(self, reserved: float = 0.0) -> float:
        """Return the blocks that the pool may take beside what is reserved."""
        return max(0.0, POOL_SHARE * (self.free - reserved)) // self._block

    @property
    def rows(self) -> int:
        """The rows that are sampled at once: whole groups that fit in the pool, at most as many as wanted.

        The rows of a group share the blocks that their prompt fills.
        """
        blocks = self.pool // self._block - -(-self.wanted // BLOCK)
        return min(self.wanted, int(blocks // self._of_group) * self.group)

    @property
    def _of_group(self) -> int:
        """Blocks of one group."""
        shared = self.prompt // BLOCK
        return shared + self.group * (-(-(self.prompt + self.limit) // BLOCK) - shared)

    @property
    def _block(self) -> float:
        """Bytes of one block of keys and values of all layers."""
        return BLOCK * self.config.kv_bytes_per_token(self.width)

    @property
    def steps(self) -> float:
        """Bytes of the captured steps, one for each number of rows, with memory of its own."""
        rows = sum(bucket for bucket in BUCKETS if bucket <= self.wanted)
        return rows * self.config.vocab_size * LOGITS

    @property
    def prefill(self) -> float:
        """Bytes of the prompts' forward pass at its most."""
        prompts = -(-self.wanted // self.group) * self.prompt
        tokens = max(self.prompt, min(PREFILL, prompts))
        batch = MicroBatch(tokens, 0, self.prompt, 1, tokens)
        passes = Activations(self.config, self.width, batch, 1)
        return max(passes.forward(layer) for layer in range(self.config.layers))
