"""Continuous batching: all requests to a model decode as one batch, and new ones join between two decode
steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..model.decoder import Decoder
from ..model.prefill_cache import SequenceKV
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .prefill import PrefillQueue
from .prefix_cache import PrefixCache
from .request import Answer, Choice, QueueFull, Request
from .serving_batch import SequenceState, ServingBatch

# A prefill may stall the decoding rows for so long, or for two decode steps if that is more; longer still
# where more rows are in prefill than in decode, for many prompts at once are prefilled faster.
STALL_SECONDS = 0.2  # seconds
IDLE_PREFILL_SECONDS = 0.8  # seconds of a chunk where no row decodes: more requests may arrive meanwhile
MIN_CHUNK = 16  # tokens prefilled at once
MAX_CHUNK = 4096  # tokens prefilled at once
MAX_TOKENS = 1 << 17  # tokens in the KV cache of one batch, where the caller sets no bound
INITIAL_PREFILL_RATE = 1000.0  # tokens a second, until measured
SECONDS_PER_QUEUED_BATCH = 5  # seconds that a full batch takes, roughly
MAX_RETRY_AFTER = 60  # seconds


class Scheduler:
    """Serves requests in `round`s, which an `EngineThread` runs: at most `rows` rows at once, and
    `max_waiting` requests in the queue.

    `tell` is called on the engine's thread, once or twice a round, with the outputs that have changed.
    `max_tokens` bounds the KV cache of the rows, `prefix_bytes` the prefix cache. A request's output depends
    on the request and its seed alone, as far as rounding allows (sums over more rows may be taken in another
    order).
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        rows: int = 64,
        max_waiting: int = 256,
        max_tokens: int = MAX_TOKENS,
        prefix_bytes: int = 1 << 28,
        stop_token_ids: tuple[int, ...] = (),
        tell: Callable[[Sequence[Answer]], None] = lambda outputs: None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.max_waiting = max_waiting
        self.max_tokens = max(max_tokens, 1)
        self.stop_token_ids = stop_token_ids
        self.tell = tell
        self.line: deque[Answer] = deque()
        self.prefix_cache = PrefixCache(prefix_bytes)
        self.prefill_rate = INITIAL_PREFILL_RATE
        self.steps = 0
        self.failures = 0
        self.seconds = 0.0  # of all decode steps
        self.last_step_seconds = 0.0
        self.lock = threading.Condition()
        self.closing = False
        self._aborts_pending = False
        self._reset()

    def _reset(self) -> None:
        """Create an empty batch and an empty prefill queue."""
        self.serving_batch = ServingBatch(
            self.model, self.tokenizer, self.stop_token_ids, self.rows, self.max_tokens
        )
        self.serving_batch.on_leave = self._on_leave
        self.serving_batch.on_sampled = self._on_sampled
        self.prefill_queue = PrefillQueue(self.model, self.prefix_cache)
        self._changed: dict[Answer, None] = {}  # outputs to publish, in order

    # ------------------------------------------------------------ for clients, on any thread

    def submit(self, request: Request) -> Answer:
        """Queue a request. Raises LimbeckError if it can never be served, `QueueFull` if the queue is full."""
        self.check(request)
        with self.lock:
            if self.closing:
                raise LimbeckError("the server is closing")
            if len(self.line) >= self.max_waiting:
                raise QueueFull(len(self.line), retry_after=self._retry_after())
            output = Answer(request)
            self.line.append(output)
            self.lock.notify()
        return output

    def check(self, request: Request) -> None:
        """Raise LimbeckError if the request exceeds the model's positions, its vocabulary, or the batch."""
        length = len(request.prompt)
        positions = self.model.config.max_positions
        vocabulary = self.model.config.vocab_size
        if not length:
            raise LimbeckError("the prompt is empty; ask something")
        if length + request.max_new_tokens > positions:
            raise LimbeckError(
                f"{length} prompt tokens and {request.max_new_tokens} to be said "
                f"exceed the model's {positions} positions"
            )
        if request.prompt.min() < 0 or request.prompt.max() >= vocabulary:
            raise LimbeckError(f"the prompt has token ids outside 0 to {vocabulary - 1}")
        if request.copies > self.rows:
            raise LimbeckError(f"n = {request.copies}: this server has {self.rows} rows")

    def cancel(self, output: Answer) -> None:
        """Abort a request: its rows leave before the next step."""
        with self.lock:
            output.cancelled = True
            self._aborts_pending = True
            self.lock.notify()

    def enough(self, sequence: Choice) -> None:
        """Stop one sequence of a request: its row leaves before the next step."""
        sequence.enough = True
        self._aborts_pending = True

    @property
    def busy(self) -> int:
        """Number of rows in decode or in prefill."""
        return self.serving_batch.busy + self.prefill_queue.rows

    def _retry_after(self) -> int:
        """Seconds until a place in the queue may be free, roughly."""
        batches = len(self.line) / max(1, self.rows)
        return max(1, min(MAX_RETRY_AFTER, round(batches * SECONDS_PER_QUEUED_BATCH)))

    # ------------------------------------------------------------ for the engine's thread

    @property
    def has_work(self) -> bool:
        """True if a request is waiting or running."""
        return bool(self.line or self.busy)

    def try_round(self) -> None:
        """Run a round; if it fails, all running requests fail with it, and the next ones are served."""
        try:
            self.round()
        except Exception as error:  # noqa: BLE001
            self.failures += 1
            self._fail(error)

    def close(self) -> None:
        """Fail all requests, waiting or running, and refuse new ones."""
        with self.lock:
            self.closing = True
        self._fail(LimbeckError("the server is closing"))

    def _fail(self, error: Exception) -> None:
        """End all running requests with `error`, and when closing the waiting ones too."""
        with self.lock:
            outputs = dict.fromkeys(self._running())
            if self.closing:
                outputs |= dict.fromkeys(self.line)
                self.line = deque()
            self._reset()
        for output in outputs:
            output.error = error
            output.ended = time.monotonic()
        self.tell(list(outputs))

    def _running(self) -> Iterable[Answer]:
        """The outputs in decode (one per row), then those in prefill."""
        for state in self.serving_batch.owners:
            yield state.output
        for prefilling in self.prefill_queue.requests:
            yield prefilling.output

    def round(self) -> None:
        """Remove aborted requests, admit those that fit, prefill one chunk, and decode one token per row."""
        self._admit()
        if self.prefill_queue.requests:
            self._prefill()
        if self.serving_batch.busy:
            begin = time.monotonic()
            self.serving_batch.step()
            self.last_step_seconds = time.monotonic() - begin
            self.steps += 1
            self.seconds += self.last_step_seconds
        self._publish()

    def _admit(self) -> None:
        """Remove aborted requests; move requests from the queue into prefill, in order, while they fit."""
        with self.lock:
            if self._aborts_pending:
                self.line = deque(output for output in self.line if not output.cancelled)
                self.prefill_queue.remove_aborted()
                self._aborts_pending = False
                self.serving_batch.remove_aborted()
            while self.line and self._fits(self.line[0]):
                self.prefill_queue.add(self.line.popleft())

    def _fits(self, output: Answer) -> bool:
        """True if rows and memory are left for a request: every row takes as much as the longest may."""
        rows = self.busy + output.request.copies
        if rows > self.rows:
            return False
        if not self.busy:
            return True
        longest = max(_max_length(other.request) for other in (*self._running(), output))
        return rows * longest <= self.max_tokens

    def _prefill(self) -> None:
        """Prefill one chunk; completed prompts join the decode batch."""
        begin = time.monotonic()
        before = self.prefill_queue.remaining
        for prefilling, hidden_C in self.prefill_queue.run(self._chunk()):
            output = prefilling.output
            if output.request.max_new_tokens:
                self.serving_batch.add(prefilling.past, hidden_C, output)
            else:
                output.choices[0].finish = "length"
            self._changed[output] = None
        tokens = before - self.prefill_queue.remaining
        if tokens >= MIN_CHUNK:
            rate = tokens / (time.monotonic() - begin)
            self.prefill_rate += 0.5 * (rate - self.prefill_rate)

    def _chunk(self) -> int:
        """Tokens of the next chunk: as many as fit into the time for which decoding may stall."""
        decoding = self.serving_batch.busy
        seconds = IDLE_PREFILL_SECONDS
        if decoding:
            share = max(1.0, 2 * self.prefill_queue.rows / decoding)
            seconds = max(STALL_SECONDS, 2 * self.last_step_seconds) * share
        return int(min(max(self.prefill_rate * seconds, MIN_CHUNK), MAX_CHUNK))

    def _on_leave(self, state: SequenceState, row: int) -> None:
        """Put the KV of a sequence that leaves into the prefix cache: a next prompt may continue it."""
        self._changed[state.output] = None
        request = state.request
        if not self.prefix_cache.max_bytes or state.output.cancelled or request.ignore_eos:
            return
        cache = self.serving_batch.cache
        length = int(cache.lengths[row])
        completion = np.array(state.sequence.tokens, dtype=np.int64)
        tokens = np.concatenate([request.prompt, completion])[:length]
        self.prefix_cache.add(tokens, SequenceKV.of(cache, row, length))

    def _on_sampled(self) -> None:
        """Publish the new tokens once all rows have one, before the next forward pass."""
        self._changed |= {state.output: None for state in self.serving_batch.owners}
        self._publish()

    def _publish(self) -> None:
        """Set the times of the outputs that have changed, and announce them."""
        if not self._changed:
            return
        now = time.monotonic()
        outputs = list(self._changed)
        for output in outputs:
            if not output.first and any(sequence.tokens for sequence in output.choices):
                output.first = now
            if all(sequence.finish for sequence in output.choices):
                output.ended = now
        self._changed = {}
        self.tell(outputs)


def _max_length(request: Request) -> int:
    """Tokens of a request's prompt and longest possible completion."""
    return len(request.prompt) + request.max_new_tokens
