"""The decode batch of a server on a device: rows join and leave between steps, each with its own sampling
parameters, and the host reads the tokens of a step while the next one runs.

The parameters of the rows lie in tensors that never move, so a captured step stays valid whoever is served.
B rows · N tokens · C hidden size · V vocabulary · K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.ops.table import BLOCK
from ..text.tokenizer import Tokenizer
from .decode_batch import FinishedSequence
from .device_batch import BELOW_ONE, BUCKETS, DeviceBatch, blocks_needed
from .device_sampling import RowSampling, draw_rows
from .penalties import penalise, penalises
from .prefix_pool import PrefixPool
from .request import Answer, Request
from .sampling import SamplingParams
from .serving_batch import SequenceState, fill_gaps

MIN_WIDTH = 16  # blocks of a row that a captured step reads at least; wider steps have powers of two of them
MAX_STEPS = 32  # captured steps, each of which holds memory for what it computes
TOPS = 20  # most likely tokens that a step finds for each row: as many as the API gives


class RowPenalties(NamedTuple):
    """The penalties of each row, and which tokens its completion and its prompt have; see `penalise`."""

    counts_BV: Tensor
    in_prompt_BV: Tensor
    presence_B1: Tensor
    frequency_B1: Tensor
    repetition_B1: Tensor


class RowScores(NamedTuple):
    """The log-probability at temperature 1 of each row's last token, and the most likely tokens with
    theirs."""

    logprob_B: Tensor
    top_BK: Tensor
    top_logprobs_BK: Tensor


@dataclass(frozen=True)
class ServingState:
    """The tensors that a step reads and changes, with one entry for each row.

    `tokens_B` are the last sampled tokens, `uniform_B` the random numbers of the next ones, and `forced_B`
    the tokens to take in their place (-1: none). `sampled_B` counts the tokens so far, of at most `limits_B`;
    `lengths_B` those in the cache, in the blocks that `table` names.
    """

    hidden_BC: Tensor
    tokens_B: Tensor
    uniform_B: Tensor
    forced_B: Tensor
    sampled_B: Tensor
    limits_B: Tensor
    ignore_eos_B: Tensor
    alive_B: Tensor
    lengths_B: Tensor
    table: Tensor
    sampling: RowSampling
    penalties: RowPenalties
    scores: RowScores

    @classmethod
    def new(cls, model: Decoder, rows: int, blocks: int) -> Self:
        """Return the state of `rows` rows that have ended, with at most so many blocks each."""
        weight = model.embed.weight
        vocabulary = model.config.vocab_size
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=weight.device)

        counts_BV = zeros(rows, vocabulary, dtype=torch.int32)
        in_prompt_BV = zeros(rows, vocabulary, dtype=torch.bool)
        tops = min(TOPS, vocabulary)
        return cls(
            hidden_BC=zeros(rows, model.config.hidden_size, dtype=weight.dtype),
            tokens_B=zeros(rows),
            uniform_B=zeros(rows, dtype=torch.float32),
            forced_B=zeros(rows),
            sampled_B=zeros(rows),
            limits_B=zeros(rows),
            ignore_eos_B=zeros(rows, dtype=torch.bool),
            alive_B=zeros(rows, dtype=torch.bool),
            lengths_B=zeros(rows, dtype=torch.int32),
            table=zeros(rows, blocks, dtype=torch.int32),
            sampling=RowSampling(*(zeros(rows, 1, dtype=d) for d in (wide, wide, torch.long, wide))),
            penalties=RowPenalties(counts_BV, in_prompt_BV, *(zeros(rows, 1, dtype=wide) for _ in range(3))),
            scores=RowScores(zeros(rows, dtype=wide), zeros(rows, tops), zeros(rows, tops, dtype=wide)),
        )

    def first(self, rows: int, blocks: int) -> Self:
        """Return the state of the first rows, with so many blocks each, in the same memory."""
        parts = {field.name: _first(getattr(self, field.name), rows) for field in fields(self)}
        return replace(type(self)(**parts), table=self.table[:rows, :blocks])

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the rows with the indices `sources` [B] to the places `targets` [B]."""
        for field in fields(self):
            value = getattr(self, field.name)
            for tensor in [value] if isinstance(value, Tensor) else value:
                tensor[targets] = tensor[sources]


class StepKind(NamedTuple):
    """What a step is captured for: the number of rows and of blocks of each that it reads, and whether any of
    the rows excludes tokens, has penalties, or asks for log-probabilities."""

    rows: int
    blocks: int
    excludes: bool
    penalises: bool
    scores: bool


@dataclass(eq=False)
class PagedSequences:
    """The blocks of all sequences of one request, and the number of prompt tokens in those of the first."""

    blocks: list[list[int]]
    length: int


@dataclass(eq=False)
class ServingRow:
    """What the host knows of a row: its sequence, its blocks, and the number of steps that were started."""

    state: SequenceState
    blocks: list[int]
    sampling: SamplingParams
    started: int = 0
    prompt_routes: np.ndarray | None = None  # a server records none

    @property
    def goes_on(self) -> bool:
        """True if one more token may be sampled."""
        return not self.state.sequence.finish and self.started < self.state.request.max_new_tokens


@dataclass(frozen=True)
class StartedStep:
    """A step that was started: its rows, and functions that wait for its tokens [B] and `RowScores`."""

    rows: list[ServingRow]
    tokens: Callable[[], Tensor]
    scores: list[Callable[[], Tensor]]


class DeviceServingBatch(DeviceBatch):
    """A batch of at most `max_rows` rows, whose keys and values lie in a pool of `blocks` blocks.

    A request is admitted when the pool has all blocks that its rows can need. `on_leave(state, row)` is
    called for each row that leaves, and `on_sampled()` when the outputs have the tokens of a step.
    """

    state: ServingState
    rows: list[ServingRow]
    pool: PrefixPool

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        stop_token_ids: tuple[int, ...],
        max_rows: int,
        blocks: int,
    ):
        sampling = SamplingParams(max_new_tokens=1, stop_ids=stop_token_ids)
        longest = model.config.max_positions - 1
        super().__init__(model, tokenizer.end_id, sampling, max_rows, longest, blocks)
        self.tokenizer = tokenizer
        self.sparse_layers = 0  # the experts that tokens choose are not recorded
        self._steps: dict[StepKind, Callable[[], None]] = {}
        self.on_leave: Callable[[SequenceState, int], None] = lambda state, row: None
        self.on_sampled: Callable[[], None] = lambda: None
        self.clear()

    def _new_state(self, rows: int, blocks: int) -> ServingState:
        return ServingState.new(self.model, rows, blocks)

    def clear(self) -> None:
        """Drop all rows, and forget what the blocks hold. Nothing is asked of the device, which may have
        failed."""
        self.rows = []
        self.pool = PrefixPool(-(-self.capacity // BLOCK), self.pool.count)
        self.stepping = False  # True if a step that was begun has failed
        self._started: StartedStep | None = None

    @property
    def owners(self) -> list[SequenceState]:
        """The state of each row's sequence."""
        return [row.state for row in self.rows]

    # ------------------------------------------------------------ admission

    def needed_blocks(self, request: Request) -> int:
        """Return the blocks that all sequences of a request can need."""
        return blocks_needed(len(request.prompt), request.copies, request.max_new_tokens)

    def has_room(self, request: Request) -> bool:
        """Return True if the pool has all blocks that a request can need."""
        known = self._known(request)
        return self.needed_blocks(request) - len(known) <= self.pool.free - self.pool.unread(known)

    def open(self, request: Request) -> PagedSequences:
        """Take the blocks of a request, those included that hold the beginning of its prompt already."""
        known = self._known(request)
        self.pool.share(known, request.copies)
        blocks = self._take(len(request.prompt), request.copies, request.max_new_tokens, known)
        return PagedSequences(blocks, BLOCK * len(known))

    def _known(self, request: Request) -> list[int]:
        """Return the blocks that hold the beginning of a prompt; none if all its tokens have to be run."""
        return [] if request.echo else self.pool.find(request.prompt)

    def prefill(self, sequences: Sequence[PagedSequences], parts: list[np.ndarray]) -> Tensor:
        """Run the next tokens of the prompts of some requests; return their hidden states [N, C]."""
        past = np.array([sequence.length for sequence in sequences])
        return self._run(parts, self._table([sequence.blocks[0] for sequence in sequences]), past)

    def close(self, sequences: PagedSequences) -> None:
        """Give back the blocks of a request that samples nothing."""
        for blocks in sequences.blocks:
            self.pool.release(blocks)

    def add(self, past: PagedSequences, hidden_C: Tensor, output: Answer) -> None:
        """Add the rows of a request whose prompt has been run; `hidden_C` is the hidden state of its last
        token."""
        request = output.request
        first = self.busy
        sampling = _sampling_of(request)
        for sample, blocks in enumerate(past.blocks):
            self.rows.append(ServingRow(SequenceState(output, sample, self.tokenizer), blocks, sampling))
        self._copy_prompts(np.array([len(request.prompt)]), first, request.copies)
        new = slice(first, self.busy)
        state = self.state
        state.hidden_BC[new] = hidden_C
        state.sampled_B[new] = 0
        state.limits_B[new] = request.max_new_tokens
        state.ignore_eos_B[new] = request.ignore_eos
        state.alive_B[new] = True
        state.lengths_B[new] = len(request.prompt)
        state.table[new] = self._to_device(self._table(past.blocks), torch.int32)
        state.sampling.fill(new, sampling)
        self._set_penalties(new, request, sampling)

    def _set_penalties(self, new: slice, request: Request, sampling: SamplingParams) -> None:
        """Set the penalties of new rows, and which tokens their prompt has."""
        penalties = self.state.penalties
        penalties.presence_B1[new] = sampling.presence_penalty
        penalties.frequency_B1[new] = sampling.frequency_penalty
        penalties.repetition_B1[new] = sampling.repetition_penalty
        if penalises(sampling):
            penalties.counts_BV[new] = 0
            penalties.in_prompt_BV[new] = False
            penalties.in_prompt_BV[new, self._to_device(request.prompt, torch.long)] = True

    # ------------------------------------------------------------ steps

    def step(self) -> list[FinishedSequence]:
        """Start a step, then append the tokens of the one before to the outputs. The list returned is always
        empty: finished sequences are marked in their outputs.

        Where a thought may have to be closed, the step before is read first.
        """
        if self._started and any(row.state.checks_next for row in self._started.rows):
            self._read(self._started)
        before = self._started
        self._started = self._start_step() if any(row.goes_on for row in self.rows) else None
        if before:
            self._read(before)
        return []

    def _start_step(self) -> StartedStep:
        """Start a step of all rows."""
        kind = self._kind()
        self.state.alive_B[self.busy :] = False
        step = self._steps.get(kind)
        if step is None:
            if len(self._steps) == MAX_STEPS:
                del self._steps[next(iter(self._steps))]  # the one that was captured first
            step = self._steps[kind] = self.capture(*kind)
        uniform = np.array([row.state.random.random() for row in self.rows], dtype=np.float32)
        forced = [row.state.forced.pop(0) if row.state.forced else -1 for row in self.rows]
        busy = slice(0, self.busy)
        self.state.uniform_B[busy] = self._to_device(np.minimum(uniform, BELOW_ONE), torch.float32)
        self.state.forced_B[busy] = self._to_device(np.array(forced), torch.long)
        self.stepping = True
        step()
        self.stepping = False
        for row in self.rows:
            row.started += 1
        fetch = self.model.ops.fetch
        scores = [fetch(scores[busy]) for scores in self.state.scores] if kind.scores else []
        return StartedStep(list(self.rows), fetch(self.state.tokens_B[busy]), scores)

    def _kind(self) -> StepKind:
        """Return the kind of the next step."""
        rows = next((bucket for bucket in BUCKETS if bucket >= self.busy), self.capacity)
        longest = max(len(row.blocks) for row in self.rows)
        blocks = max(MIN_WIDTH, 1 << (longest - 1).bit_length())
        return StepKind(
            min(rows, self.capacity),
            min(blocks, self.state.table.shape[1]),
            any(row.sampling.excludes for row in self.rows),
            any(penalises(row.sampling) for row in self.rows),
            any(row.state.request.top is not None for row in self.rows),
        )

    def _step(self, *kind: int) -> None:
        """Sample one token for each of the first rows, and run it through the model, in place. The arguments
        are those of `StepKind`."""
        kind = StepKind(*kind)
        ops = self.model.ops
        state = self.state.first(kind.rows, kind.blocks)
        logits_BV = ops.logits(state.hidden_BC, self.model.head.weight)
        open_BV = penalise(logits_BV, *state.penalties) if kind.penalises else logits_BV
        tokens_B = draw_rows(open_BV, state.uniform_B, state.sampling, kind.excludes, ops)
        tokens_B = torch.where(state.forced_B >= 0, state.forced_B, tokens_B)
        state.tokens_B.copy_(tokens_B)
        if kind.penalises:
            _count(state.penalties.counts_BV, tokens_B, state.alive_B)
        if kind.scores:
            _score(state.scores, logits_BV, tokens_B)
        state.sampled_B.add_(state.alive_B)
        stopped_B = self.is_stop_V[tokens_B] & ~state.ignore_eos_B
        state.alive_B.logical_and_(~(stopped_B | (state.sampled_B >= state.limits_B)))
        self._advance(state, tokens_B)

    def _read(self, step: StartedStep) -> None:
        """Wait for the tokens of a step and append them to the outputs; remove the rows that have ended."""
        if step is self._started:
            self._started = None
        columns = [fetched().tolist() for fetched in (step.tokens, *step.scores)]
        for row, token, *scores in zip(step.rows, *columns, strict=True):
            if not row.state.sequence.finish:
                self._append(row.state, token, scores)
        self._remove_ended()
        self.on_sampled()

    def _append(self, state: SequenceState, token: int, scores: list) -> None:
        """Append a token to a sequence's output. `scores` are its log-probability, the most likely tokens and
        their log-probabilities, or empty."""
        sequence = state.sequence
        request = state.request
        if request.top is not None:
            logprob, ids, logprobs = scores
            sequence.logprobs.append(logprob)
            sequence.tops.append(tuple(zip(ids, logprobs, strict=True))[: request.top])
        sequence.tokens.append(token)
        state.check_thought()
        if token in self.stop_token_ids and not request.ignore_eos:
            sequence.finish = "stop"
        elif len(sequence.tokens) >= request.max_new_tokens:
            sequence.finish = "length"

    # ------------------------------------------------------------ rows that leave

    def remove_aborted(self) -> None:
        """Remove the rows whose client has ended them, with "stop" as the finish reason."""
        for row in self.rows:
            if row.state.aborted:
                row.state.sequence.finish = "stop"
        self._remove_ended()

    def _remove_ended(self) -> None:
        """Remove the rows that have ended, and give back their blocks."""
        ended_B = np.array([bool(row.state.sequence.finish) for row in self.rows], dtype=bool)
        if not ended_B.any():
            return
        for place in ended_B.nonzero()[0].tolist():
            self._leave(self.rows[place])
            self.on_leave(self.rows[place].state, place)
        rows = fill_gaps(ended_B)
        moved = (rows != np.arange(len(rows))).nonzero()[0]
        if len(moved):
            self.state.move(self._to_device(rows[moved], torch.long), self._to_device(moved, torch.long))
        self.rows = [self.rows[row] for row in rows]
        if not self.rows:
            self._started = None

    def _leave(self, row: ServingRow) -> None:
        """Give back a row's blocks, and keep in mind what they hold: a later prompt may continue it."""
        state = row.state
        request = state.request
        if not state.output.cancelled and not request.ignore_eos:
            tokens = np.concatenate([request.prompt, np.array(state.sequence.tokens[:-1], dtype=np.int64)])
            self.pool.remember(tokens, row.blocks)
        self.pool.release(row.blocks)


def _first(value: Tensor | NamedTuple, rows: int) -> Tensor | NamedTuple:
    """Return the first rows of a tensor [B, ...], or of each tensor of a tuple."""
    return value[:rows] if isinstance(value, Tensor) else type(value)(*(x[:rows] for x in value))


def _sampling_of(request: Request) -> SamplingParams:
    """Return the sampling parameters of a request."""
    return SamplingParams(
        request.temperature,
        request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
    )


def _count(counts_BV: Tensor, tokens_B: Tensor, alive_B: Tensor) -> None:
    """Count one more token of each row that is alive, in place."""
    tokens_B1 = tokens_B.unsqueeze(1)
    counts_BV.scatter_(1, tokens_B1, counts_BV.gather(1, tokens_B1) + alive_B.unsqueeze(1))


def _score(scores: RowScores, logits_BV: Tensor, tokens_B: Tensor) -> None:
    """Write the log-probabilities of the tokens and the most likely tokens to `scores`."""
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    scores.logprob_B.copy_(logprobs_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1))
    top_logprobs_BK, top_BK = logprobs_BV.topk(scores.top_BK.shape[1])
    scores.top_BK.copy_(top_BK)
    scores.top_logprobs_BK.copy_(top_logprobs_BK)
