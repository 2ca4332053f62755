"""A decode batch whose state lies on the model's device: no step of it waits for the host.

The host starts steps and looks at the rows only now and then; on an NVIDIA card a step is one CUDA graph,
captured once for each number of rows in `BUCKETS`. A completion does not depend on which other rows are in
the batch, on the size of the pool of keys and values, or on how often the host looks. B rows · N tokens · T
tokens of a completion · C hidden size · V vocabulary · L layers with experts · K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.context import RouterTrace
from ..model.decoder import Decoder
from ..model.ops.table import BLOCK, Rows
from ..model.paged import PagedCache
from ..types import LimbeckError
from . import device_sampling
from .block_pool import BlockPool
from .decode_batch import FinishedSequence
from .sampling import SamplingParams

POLL = 16  # steps between two looks at the rows
POOL_SHARE = 0.5  # of the memory that is free when the first batch is made: the rest is the learner's
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # rows of a captured step
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))  # the largest random number


@dataclass(frozen=True)
class RowState:
    """The tensors that a step reads and changes, with one entry for each row.

    `sampled_B` are the tokens sampled so far, of at most `limits_B`; `lengths_B` the tokens in the cache, in
    the blocks that `table` names. `hidden_BC` are the hidden states that the next tokens are sampled from.
    """

    tokens_BT: Tensor
    logprobs_BT: Tensor
    uniforms_BT: Tensor
    routes_BTLK: Tensor
    hidden_BC: Tensor
    previous_B: Tensor
    sampled_B: Tensor
    limits_B: Tensor
    alive_B: Tensor
    lengths_B: Tensor
    table: Tensor

    @classmethod
    def new(cls, model: Decoder, rows: int, tokens: int, blocks: int) -> RowState:
        """Return the state of `rows` rows that have ended: at most so many `tokens` and `blocks` each."""
        config = model.config
        weight = model.embed.weight

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=weight.device)

        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        sparse, top_k = _choices(config)
        return cls(
            tokens_BT=zeros(rows, tokens),
            logprobs_BT=zeros(rows, tokens, dtype=wide),
            uniforms_BT=zeros(rows, tokens, dtype=torch.float32),
            routes_BTLK=zeros(rows, tokens if sparse else 0, sparse, top_k, dtype=torch.int16),
            hidden_BC=zeros(rows, config.hidden_size, dtype=weight.dtype),
            previous_B=zeros(rows),
            sampled_B=zeros(rows),
            limits_B=zeros(rows),
            alive_B=zeros(rows, dtype=torch.bool),
            lengths_B=zeros(rows, dtype=torch.int32),
            table=zeros(rows, blocks, dtype=torch.int32),
        )

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state."""
        return [getattr(self, field.name) for field in fields(self)]

    def first(self, rows: int) -> RowState:
        """Return the state of the first rows, in the same memory."""
        return RowState(*(tensor[:rows] for tensor in self.tensors()))

    def select(self, rows: Tensor) -> None:
        """Move the rows with these indices [B], in this order, to the front."""
        for tensor in self.tensors():
            tensor[: len(rows)] = tensor[rows]


@dataclass
class Row:
    """What the host knows of a row: its sequence, its blocks, its tokens at the last look, and at most.

    `kept_ids` has for each token the ids that sampling left, `prompt_routes` [N, L, K] the experts that the
    prompt's tokens chose.
    """

    problem: int
    sample: int
    blocks: list[int]
    limit: int
    sampled: int = 0
    kept_ids: list[np.ndarray] = field(default_factory=list)
    prompt_routes: np.ndarray | None = None


class DeviceBatch:
    """A batch of at most `rows` sequences, of which each step samples one token per row.

    `longest` is the number of tokens of the longest prompt. The pool of keys and values has the blocks that
    the rows can need, at most `blocks` (None: what the device has room for). The first blocks of the
    pool take what rows that have ended still write.
    """

    drafted = 0
    accepted = 0

    def __init__(
        self,
        model: Decoder,
        end_id: int,
        sampling: SamplingParams,
        rows: int,
        longest: int,
        blocks: int | None = None,
        poll: int | None = None,
    ):
        weight = model.embed.weight
        device_sampling.check(sampling)
        self.model = model
        self.sampling = sampling
        self.device = weight.device
        self.capacity = rows
        self.longest = longest
        self.poll = 1 if sampling.keep_mask else poll or POLL
        self.stop_token_ids = {end_id, *sampling.stop_ids}
        self.sparse_layers = _choices(model.config)[0]
        width = -(-(longest + sampling.max_new_tokens) // BLOCK)  # blocks of the longest row
        spare = -(-rows // BLOCK)
        blocks = min(rows * width, room(model) if blocks is None else blocks)
        self.pool = BlockPool(spare, blocks)
        self.cache = PagedCache(model.config, weight.dtype, self.device, spare + blocks)
        self.state = self._new_state(rows, width)
        self.rows: list[Row] = []
        self.sampled_tokens = 0  # of all rows, at the last look
        self._make_constants(rows)
        self._steps: dict[int, Callable[[], None]] = {}

    def _new_state(self, rows: int, blocks: int) -> RowState:
        """Return the state of `rows` rows that have ended, of at most so many blocks each."""
        return RowState.new(self.model, rows, self.sampling.max_new_tokens, blocks)

    def _make_constants(self, rows: int) -> None:
        """Make the tensors of a step that stay the same, and room for the ids that are left."""
        sampling = self.sampling
        vocabulary = self.model.config.vocab_size
        stops_V = torch.zeros(max(vocabulary, *self.stop_token_ids) + 1, dtype=torch.bool)
        stops_V[list(self.stop_token_ids)] = True
        self.is_stop_V = stops_V.to(self.device)
        self._trash_B = torch.arange(rows, device=self.device)
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        mask = (rows if sampling.keep_mask and sampling.excludes else 0, vocabulary)
        self._mask_BV = torch.zeros(mask, dtype=torch.bool, device=self.device)

    @property
    def busy(self) -> int:
        """The number of rows in the batch, including rows that have ended since the last look."""
        return len(self.rows)

    @property
    def tokens_BT(self) -> np.ndarray:
        """The sampled tokens of all rows, [B, T], copied to the host."""
        return self.state.tokens_BT[: self.busy].cpu().numpy()

    @property
    def sampled_B(self) -> np.ndarray:
        """The number of tokens that each row has sampled, [B], copied to the host."""
        return self.state.sampled_B[: self.busy].cpu().numpy()

    # ------------------------------------------------------------ admission

    def fits(self, lengths: Sequence[int], n: int) -> int:
        """Return how many of the first prompts, of so many tokens, can be admitted now with `n` rows each."""
        rows = self.capacity - self.busy
        blocks = self.pool.free
        for count, length in enumerate(lengths):
            rows -= n
            blocks -= blocks_needed(length, n, self.sampling.max_new_tokens)
            if rows < 0 or blocks < 0:
                return count
        return len(lengths)

    def refused(self, prompt: int, n: int) -> LimbeckError:
        """Return the error of a group that does not fit into the empty batch."""
        needed = blocks_needed(prompt, n, self.sampling.max_new_tokens)
        each = PagedCache.block_bytes(self.model.config, self.model.embed.weight.dtype)
        return LimbeckError(
            f"max_new_tokens: {n} completions of a prompt of {prompt} tokens need "
            f"{needed * each / 2**30:.2f} GiB for keys and values, and there is room for "
            f"{self.pool.count * each / 2**30:.2f} GiB; lower max_new_tokens or the size of the group"
        )

    def admit(
        self,
        prompts: Sequence[tuple[int, np.ndarray]],
        uniforms_BT: np.ndarray,
        n: int,
        limits: Sequence[int] | None = None,
    ) -> None:
        """Prefill prompts and fork each into `n` rows; arguments as in `DecodeBatch.admit`.

        `limits` are the numbers of tokens after which each prompt's rows end (None: `max_new_tokens`).
        """
        limits = np.array(limits or [self.sampling.max_new_tokens] * len(prompts))
        lengths = np.array([len(tokens) for _, tokens in prompts])
        first = self.busy
        for (problem, tokens), limit in zip(prompts, limits.tolist(), strict=True):
            held = self._take(len(tokens), n, limit)
            self.rows += [Row(problem, sample, blocks, limit) for sample, blocks in enumerate(held)]
        table = self._table([row.blocks for row in self.rows[first:]])
        last_BC = self._prefill_all([tokens for _, tokens in prompts], table[::n], self.rows[first::n])
        self._copy_prompts(lengths, first, n)
        self._start(slice(first, self.busy), table, lengths.repeat(n), limits.repeat(n))
        self.state.hidden_BC[first : self.busy] = last_BC.repeat_interleave(n, 0)
        uniforms = np.minimum(uniforms_BT.astype(np.float32), BELOW_ONE)
        self.state.uniforms_BT[first : self.busy] = self._to_device(uniforms, torch.float32)

    def _table(self, blocks: list[list[int]]) -> np.ndarray:
        """Return the index of the first token of each block of some rows, [B, blocks]."""
        table = np.zeros((len(blocks), self.state.table.shape[1]), dtype=np.int32)
        for entries, numbers in zip(table, blocks, strict=True):
            entries[: len(numbers)] = BLOCK * np.array(numbers)
        return table

    def _start(self, new: slice, table: np.ndarray, lengths: np.ndarray, limits: np.ndarray) -> None:
        """Set the state of new rows that have sampled nothing: their blocks, lengths and limits, [B, ...]."""
        state = self.state
        state.table[new] = self._to_device(table, torch.int32)
        state.lengths_B[new] = self._to_device(lengths, torch.int32)
        state.limits_B[new] = self._to_device(limits, torch.long)
        state.sampled_B[new] = 0
        state.previous_B[new] = 0
        state.alive_B[new] = True

    def _take(self, prompt: int, n: int, limit: int, known: Sequence[int] = ()) -> list[list[int]]:
        """Return the blocks of each of `n` rows: those that the prompt fills are the same in all of them, and
        the first of these are `known`, which have the rows as readers already."""
        whole = prompt // BLOCK
        shared = [*known, *self.pool.take(whole - len(known), n)]
        each = -(-(prompt + limit) // BLOCK) - whole
        return [shared + self.pool.take(each) for _ in range(n)]

    def _prefill_all(self, prompts: list[np.ndarray], table: np.ndarray, rows: list[Row]) -> Tensor:
        """Run prompts through the model, not too many tokens at once; return their last hidden states [B, C].

        `rows` are the first ones of each prompt, and `table` [B, blocks] has their blocks.
        """
        hidden = []
        begin = 0
        while begin < len(prompts):
            end = begin + 1
            tokens = len(prompts[begin])
            while end < len(prompts) and tokens + len(prompts[end]) <= self.model.ops.prefill_tokens:
                tokens += len(prompts[end])
                end += 1
            hidden.append(self._prefill(prompts[begin:end], table[begin:end]))
            self._keep_prompt_routes(rows[begin:end], prompts[begin:end])
            begin = end
        return torch.cat(hidden)

    def _prefill(self, prompts: list[np.ndarray], table: np.ndarray) -> Tensor:
        """Run prompts through the model, into the blocks of `table`; return their last states [B, C]."""
        ends = np.cumsum([len(tokens) for tokens in prompts])
        return self._run(prompts, table, np.zeros_like(ends))[self._to_device(ends - 1, torch.long)]

    def _run(self, parts: list[np.ndarray], table: np.ndarray, past: np.ndarray) -> Tensor:
        """Run the next tokens of some rows through the model; return their hidden states [N, C].

        `parts` are the tokens of each row, `past` [B] the numbers of tokens that it has in the blocks of
        `table` [B, blocks] already.
        """
        counts = np.array([len(tokens) for tokens in parts])
        starts = np.concatenate([[0], counts.cumsum()])
        row_N = np.repeat(np.arange(len(parts)), counts)
        position_N = np.arange(starts[-1]) - starts[row_N] + past[row_N]
        slot_N = table[row_N, position_N // BLOCK] + position_N % BLOCK
        rows = Rows(
            self._to_device(table, torch.int32),
            self._to_device(starts, torch.int32),
            self._to_device(past + counts, torch.int32),
            max(2, int(counts.max())),  # one means decoding
        )
        positions_N = self._to_device(position_N, torch.long)
        tokens_N = self._to_device(np.concatenate(parts), torch.long)
        self.cache.lay(positions_N, self._to_device(slot_N, torch.long), rows)
        return self._forward(tokens_N)

    def _forward(self, tokens_N: Tensor) -> Tensor:
        """Run tokens through the model; return their hidden states [N, C]."""
        self.cache.routes = RouterTrace(choices_only=True) if self.sparse_layers else None
        return self.model(tokens_N, self.cache)

    def _keep_prompt_routes(self, rows: list[Row], prompts: list[np.ndarray]) -> None:
        """Keep the experts that the prompts' tokens chose, each with the prompt's first row."""
        if not self.sparse_layers:
            return
        chosen_NLK = torch.stack(self.cache.routes.chosen, 1).short().cpu()
        parts = chosen_NLK.split([len(tokens) for tokens in prompts])
        for row, routes_NLK in zip(rows, parts, strict=True):
            row.prompt_routes = routes_NLK.numpy()

    def _copy_prompts(self, lengths: np.ndarray, first: int, n: int) -> None:
        """Give all rows from number `first` on what the first of their prompt has, of lengths [B]: the
        prompt's routes, and a copy of its last block, if the prompt does not fill it."""
        copies = []
        for place, length in enumerate(lengths.tolist()):
            source, *others = self.rows[first + place * n : first + (place + 1) * n]
            for row in others:
                row.prompt_routes = source.prompt_routes
                if length % BLOCK:
                    copies.append((source.blocks[length // BLOCK], row.blocks[length // BLOCK]))
        if not copies:
            return
        pairs = torch.tensor(copies, device=self.device)
        places = torch.arange(BLOCK, device=self.device)
        source, target = ((BLOCK * pairs[:, i, None] + places).flatten() for i in (0, 1))
        for pool in (self.cache.keys, self.cache.values):
            pool[:, target] = pool[:, source]

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Return an array as a tensor of the same shape [B, ...] on the device."""
        x = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        return self.model.ops.send(x, self.device)

    # ------------------------------------------------------------ steps

    def step(self) -> list[FinishedSequence]:
        """Run `poll` steps, or fewer if all rows must end before; remove and return the ended rows."""
        rows = next((bucket for bucket in BUCKETS if bucket >= self.busy), self.capacity)
        rows = min(rows, self.capacity)
        self.state.alive_B[self.busy :] = False
        step = self._steps.get(rows)
        if step is None:
            step = self._steps[rows] = self.capture(rows)
        count = min(self.poll, max(row.limit - row.sampled for row in self.rows))
        for _ in range(count):
            step()
        if len(self._mask_BV):
            for row, kept_V in zip(self.rows, self._mask_BV.cpu().numpy(), strict=False):
                row.kept_ids.append(kept_V.nonzero()[0])
        finished = self._remove_finished()
        for row in self.rows:  # those that go on have sampled in every step
            row.sampled += count
        self.sampled_tokens += count * self.busy
        return finished

    def capture(self, *kind: Any) -> Callable[[], None]:
        """Return a function that runs a step of this kind, as cheaply as the device can: the arguments of
        `_step`, here the number of rows."""
        alive_B = self.state.alive_B.clone()
        hidden_BC = self.state.hidden_BC.clone()
        self.state.alive_B.zero_()  # rows that have ended keep their state
        try:
            return self.model.ops.capture(lambda: self._step(*kind))
        finally:
            self.state.alive_B.copy_(alive_B)
            self.state.hidden_BC.copy_(hidden_BC)

    def _step(self, rows: int) -> None:
        """Sample one token for each of the first `rows` rows, and run it through the model, in place."""
        state = self.state.first(rows)
        place_B1 = state.sampled_B.clamp(max=state.tokens_BT.shape[1] - 1).unsqueeze(1)
        tokens_B = self._sample(state, place_B1)
        state.sampled_B.add_(state.alive_B)
        ended_B = self.is_stop_V[tokens_B] | (state.sampled_B >= state.limits_B)
        state.alive_B.logical_and_(~ended_B)
        self._advance(state, tokens_B)
        if self.sparse_layers:
            chosen_B1LK = torch.stack(self.cache.routes.chosen, 1).short().unsqueeze(1)
            state.routes_BTLK.scatter_(1, place_B1[..., None, None].expand_as(chosen_B1LK), chosen_B1LK)

    def _advance(self, state: RowState, tokens_B: Tensor) -> None:
        """Run one new token of each row through the model, in place; rows that have ended keep their keys."""
        rows = len(tokens_B)
        position_B = state.lengths_B.long()
        block_B1 = (position_B // BLOCK).clamp(max=state.table.shape[1] - 1).unsqueeze(1)
        slot_B = state.table.gather(1, block_B1).squeeze(1) + position_B % BLOCK
        slot_B = torch.where(state.alive_B, slot_B, self._trash_B[:rows])
        state.lengths_B.add_(state.alive_B)
        now_B = state.lengths_B.clamp(min=1)
        self.cache.lay(position_B, slot_B, Rows(state.table, self._starts[: rows + 1], now_B, 1))
        state.hidden_BC.copy_(self._forward(tokens_B))

    def _sample(self, state: RowState, place_B1: Tensor) -> Tensor:
        """Sample a token for each row and return them [B]; they are written at `place_B1` of rows alive."""
        ops = self.model.ops
        logits_BV = ops.logits(state.hidden_BC, self.model.head.weight)
        uniform_B = state.uniforms_BT.gather(1, place_B1).squeeze(1)
        drawn = device_sampling.draw_on_device(logits_BV, uniform_B, state.previous_B, self.sampling, ops)
        tokens_B, logprobs_B, kept_BV = drawn
        _write(state.tokens_BT, place_B1, tokens_B, state.alive_B)
        _write(state.logprobs_BT, place_B1, logprobs_B, state.alive_B)
        if self.sampling.force:
            state.previous_B.copy_(torch.where(state.alive_B, tokens_B, state.previous_B))
        if kept_BV is not None:
            self._mask_BV[: len(kept_BV)] = kept_BV
        return tokens_B

    # ------------------------------------------------------------ rows that have ended

    def _remove_finished(self) -> list[FinishedSequence]:
        """Remove the rows that have ended and return their sequences; the other rows move up."""
        alive_B = self.state.alive_B[: self.busy].cpu().numpy()
        ended = (~alive_B).nonzero()[0]
        if not len(ended):
            return []
        state = self.state
        index = self._to_device(ended, torch.long)
        wanted = (state.sampled_B, state.tokens_BT, state.logprobs_BT, state.routes_BTLK)
        columns = [tensor[index].cpu().numpy() for tensor in wanted]
        finished = [
            self._finished(self.rows[row], int(sampled), *arrays)
            for row, sampled, *arrays in zip(ended.tolist(), *columns, strict=True)
        ]
        self._select_rows(alive_B.nonzero()[0])
        return finished

    def _finished(
        self, row: Row, length: int, tokens: np.ndarray, logprobs: np.ndarray, routes: np.ndarray
    ) -> FinishedSequence:
        """Release a row's blocks and return its sequence, of arrays [T], [T] and [T, L, K]."""
        self.pool.release(row.blocks)
        self.sampled_tokens += length - row.sampled
        chosen = None
        if row.prompt_routes is not None:
            chosen = np.concatenate([row.prompt_routes, routes[: length - 1]])
        return FinishedSequence(
            row.problem,
            row.sample,
            tokens[:length].copy(),
            logprobs[:length].astype(np.float32),
            tuple(row.kept_ids) or None,
            chosen,
        )

    def _select_rows(self, rows: np.ndarray) -> None:
        """Keep only the rows with these indices [B], in this order."""
        self.state.select(self._to_device(rows, torch.long))
        self.rows = [self.rows[row] for row in rows]


def _choices(config: ModelConfig) -> tuple[int, int]:
    """Return the number of layers with experts, and of the experts that each token chooses in them."""
    sparse = sum(config.sparse(layer) for layer in range(config.layers))
    return sparse, config.experts.top_k if config.experts else 0


def blocks_needed(prompt: int, n: int, limit: int) -> int:
    """Return the blocks of `n` rows of at most `limit` new tokens that share the whole blocks of a prompt."""
    whole = prompt // BLOCK
    return whole + n * (-(-(prompt + limit) // BLOCK) - whole)


def room(model: Decoder, reserved: int = 0) -> int:
    """Return the blocks of keys and values that the device of a model has room for, beside as many bytes as
    are reserved for others."""
    weight = model.embed.weight
    free = model.ops.free_bytes(weight.device)
    if free is None:
        return 1 << 31
    return int(POOL_SHARE * max(0, free - reserved)) // PagedCache.block_bytes(model.config, weight.dtype)


def _write(kept_BT: Tensor, place_B1: Tensor, values_B: Tensor, alive_B: Tensor) -> None:
    """Write a value for each row that is alive to its place in `kept_BT`."""
    old_B1 = kept_BT.gather(1, place_B1)
    new_B1 = torch.where(alive_B.unsqueeze(1), values_B.unsqueeze(1).to(kept_BT.dtype), old_B1)
    kept_BT.scatter_(1, place_B1, new_B1)
