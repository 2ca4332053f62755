"""Continuous batching: all requests to a model decode as one batch, and new ones join between two decode steps. One thread
runs every model of a server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..model.decoder import Decoder
from ..model.prefill_cache import SequenceKV
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .prefill import PrefillQueue, PrefixCache
from .request import Answer, Choice, Full, Request
from .serving_batch import SequenceState, ServingBatch

# Seconds that reading newcomers' prompts may hold up those who speak, or as long as two steps of theirs if that is more; and
# longer where more wait than speak, for many prompts at once are read faster.
STALL = 0.2
FIRST = 0.8  # where nobody speaks yet: somebody else may come meanwhile
CHUNKS = 16, 4096  # the fewest and the most tokens that are read at once
MOST_TOKENS = 1 << 17  # of one batch, where nobody says what memory allows


class Scheduler:
    """Answers requests by `round`s, which an `EngineThread` runs; at most `rows` rows at once and `waiting` requests in line.

    `tell` is called on the carrier's thread, once or twice a round, with the answers that have grown. `tokens` bounds what the rows'
    caches hold, `prefix_bytes` what is remembered of texts that were read. What a request is answered depends on it
    and its seed alone, as far as rounding allows (sums over more rows may be taken in another order).
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        rows: int = 64,
        waiting: int = 256,
        tokens: int = MOST_TOKENS,
        prefix_bytes: int = 1 << 28,
        ends: tuple[int, ...] = (),
        tell: Callable[[Sequence[Answer]], None] = lambda answers: None,
    ):
        self.model, self.tokenizer, self.ends, self.tell = model, tokenizer, ends, tell
        self.rows, self.most_waiting, self.tokens = rows, waiting, max(tokens, 1)
        self.line: deque[Answer] = deque()
        self.prefixes = PrefixCache(prefix_bytes)
        self.pace = 1000.0  # tokens of prompts a second, as measured
        self.steps = self.failures = 0
        self.seconds = self.lasted = 0.0  # of all steps, and of the last one
        self.lock, self.closing, self.leaving = threading.Condition(), False, False
        self._begin()

    def _begin(self) -> None:
        self.serving_batch = ServingBatch(self.model, self.tokenizer, self.ends, self.rows, self.tokens)
        self.serving_batch.told, self.serving_batch.said = self._left, self._said
        self.prefill_queue = PrefillQueue(self.model, self.prefixes)
        self.grown: dict[Answer, None] = {}

    # ------------------------------------------------------------ for those who ask, on any thread

    def submit(self, request: Request) -> Answer:
        """Stand in line. Raises LimbeckError for what cannot be answered, `Full` when too many wait."""
        self.check(request)
        with self.lock:
            if self.closing:
                raise LimbeckError("the server is closing")
            if len(self.line) >= self.most_waiting:
                raise Full(len(self.line), retry_after=self._patience())
            answer = Answer(request)
            self.line.append(answer)
            self.lock.notify()
        return answer

    def check(self, request: Request) -> None:
        """Whether there is room for it at all."""
        asked, room = len(request.prompt), self.model.config.max_positions
        if not asked:
            raise LimbeckError("the prompt is empty; ask something")
        if asked + request.max_new_tokens > room:
            raise LimbeckError(
                f"{asked} prompt tokens and {request.max_new_tokens} to be said exceed the model's {room} positions"
            )
        if request.prompt.min() < 0 or request.prompt.max() >= self.model.config.vocab_size:
            raise LimbeckError(f"the prompt has token ids outside 0 to {self.model.config.vocab_size - 1}")
        if request.copies > self.rows:
            raise LimbeckError(f"n = {request.copies}: this server has {self.rows} rows")

    def cancel(self, answer: Answer) -> None:
        """Nobody wants the rest: its rows leave before the next step."""
        with self.lock:
            answer.cancelled = self.leaving = True
            self.lock.notify()

    def enough(self, choice: Choice) -> None:
        """Nobody wants the rest of this row."""
        choice.enough = self.leaving = True

    @property
    def busy(self) -> int:
        """Rows that speak or are about to."""
        return self.serving_batch.busy + self.prefill_queue.rows

    def _patience(self) -> int:
        """Seconds until somebody in line may have a place, roughly."""
        return max(1, min(60, round(len(self.line) / max(1, self.rows) * 5)))

    # ------------------------------------------------------------ for the thread that computes

    @property
    def wanted(self) -> bool:
        return bool(self.line or self.busy)

    def attempt(self) -> None:
        """A round; if it fails, whoever is waiting for an answer is told, and the next one is served."""
        try:
            self.round()
        except Exception as error:  # noqa: BLE001
            self._fail(error)

    def close(self) -> None:
        """Whoever is still waiting is told, and nobody is let in any more."""
        with self.lock:
            self.closing = True
        self._fail(LimbeckError("the server is closing"))

    def _fail(self, error: Exception) -> None:
        self.failures += not self.closing
        with self.lock:
            answers = {sequence_state.answer: None for sequence_state in self.serving_batch.owners} | {
                prefilling.answer: None for prefilling in self.prefill_queue.prefillings
            }
            answers |= dict.fromkeys(self.line) if self.closing else {}
            self.line = deque() if self.closing else self.line
            self._begin()
        for answer in answers:
            answer.error, answer.ended = error, time.monotonic()
        self.tell(list(answers))

    def round(self) -> None:
        """Let go who has gone, let in who fits, read one chunk of their prompts, and say one token a row."""
        self._admit()
        if self.prefill_queue.prefillings:
            self._board()
        if self.serving_batch.busy:
            begin = time.monotonic()
            self.serving_batch.step()
            self.lasted = time.monotonic() - begin
            self.steps, self.seconds = self.steps + 1, self.seconds + self.lasted
        self._settle()

    def _admit(self) -> None:
        with self.lock:
            if self.leaving:
                self.line = deque(answer for answer in self.line if not answer.cancelled)
                self.prefill_queue.drop()
                self.leaving = False
                self.serving_batch.drop()
            while self.line and self._fits(self.line[0]):
                self.prefill_queue.add(self.line.popleft())

    def _fits(self, answer: Answer) -> bool:
        """Whether rows and memory are left: every row takes as much as the longest may."""
        with_it = (
            [sequence_state.answer for sequence_state in self.serving_batch.owners]
            + [prefilling.answer for prefilling in self.prefill_queue.prefillings]
            + [answer]
        )
        rows = self.busy + answer.request.copies
        longest = max(len(one.request.prompt) + one.request.max_new_tokens for one in with_it)
        return rows <= self.rows and (not self.busy or rows * longest <= self.tokens)

    def _board(self) -> None:
        speaking, waiting = self.serving_batch.busy, self.prefill_queue.rows
        fewest, most = CHUNKS
        seconds = max(STALL, 2 * self.lasted) * max(1.0, 2 * waiting / speaking) if speaking else FIRST
        chunk = int(min(max(self.pace * seconds, fewest), most))
        begin, before = (
            time.monotonic(),
            sum(prefilling.left for prefilling in self.prefill_queue.prefillings),
        )
        for prefilling, hidden_C in self.prefill_queue.read(chunk):
            if prefilling.answer.request.max_new_tokens:
                self.serving_batch.board(prefilling.past, hidden_C, prefilling.answer)
            else:
                prefilling.answer.choices[0].finish = "length"
            self.grown[prefilling.answer] = None
        read = before - sum(prefilling.left for prefilling in self.prefill_queue.prefillings)
        if read >= fewest:
            self.pace += 0.5 * (read / (time.monotonic() - begin) - self.pace)

    def _left(self, sequence_state: SequenceState, row: int) -> None:
        """A row is over: what it read and said may be how the next prompt begins."""
        self.grown[sequence_state.answer] = None
        request, length = sequence_state.answer.request, int(self.serving_batch.cache.lengths[row])
        if self.prefixes.room and not sequence_state.answer.cancelled and not request.endless:
            text = np.concatenate([request.prompt, np.array(sequence_state.choice.tokens, dtype=np.int64)])[
                :length
            ]
            self.prefixes.keep(text, SequenceKV.of(self.serving_batch.cache, row, length))

    def _said(self) -> None:
        """Called when a token is sampled for every row, before the next forward pass: publish it now."""
        self.grown |= {sequence_state.answer: None for sequence_state in self.serving_batch.owners}
        self._settle()

    def _settle(self) -> None:
        """Tell of what has grown, and of what is over."""
        if not self.grown:
            return
        now, answers = time.monotonic(), list(self.grown)
        for answer in answers:
            said = any(choice.tokens for choice in answer.choices)
            answer.first = answer.first or (now if said else 0.0)
            if all(choice.finish for choice in answer.choices):
                answer.ended = now
        self.grown = {}
        self.tell(answers)


class EngineThread:
    """The one thread that computes, a round of each model in turn.

    torch keeps a team of helpers for every thread that computes. Two models on two threads would fight for the same cores, and
    so would a thread that has merely loaded one: where helpers outnumber cores they sleep after every loop instead of
    waiting for the next, which makes a step of decoding take up to twice as long.
    """

    def __init__(self, schedulers: Sequence[Scheduler]):
        self.schedulers, self.closing, self.lock = list(schedulers), False, threading.Condition()
        for one in self.schedulers:
            one.lock = self.lock
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Stop after this round; whoever is still waiting is told."""
        with self.lock:
            self.closing = True
            self.lock.notify()
        self.thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while not self.closing:
                with self.lock:
                    self.lock.wait_for(lambda: self.closing or any(one.wanted for one in self.schedulers))
                for one in self.schedulers:
                    if one.wanted:
                        one.attempt()
            for one in self.schedulers:
                one.close()
