"""Continuous batching: all requests to a model are decoded as one batch, and new requests join it between two
decode steps. A row is one sequence in that batch; a request has one row per sequence that it asks for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..model.decoder import Decoder
from ..model.ops import devices
from ..model.prefill_cache import SequenceKV
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .prefill import PrefillQueue
from .prefix_cache import PrefixCache
from .request import Answer, Choice, QueueFull, Request
from .serving_batch import SequenceState, ServingBatch

# The time for which one prefill chunk may delay the rows in decode, or two decode steps if these take longer.
# It is extended if more than half as many rows are in prefill as in decode: large chunks are more efficient.
STALL_SECONDS = 0.2
IDLE_PREFILL_SECONDS = 0.8  # duration of a chunk if no row is in decode: more requests may arrive
MIN_CHUNK = 16  # tokens prefilled at once
MAX_CHUNK = 4096  # tokens prefilled at once
MAX_TOKENS = 1 << 17  # default limit on the tokens in the KV cache of one batch
INITIAL_PREFILL_RATE = 1000.0  # tokens a second, until measured
SECONDS_PER_QUEUED_BATCH = 5  # rough time that a full batch takes
MAX_RETRY_AFTER = 60  # seconds


class Scheduler:
    """Serves the requests to one model: at most `rows` sequences at once, and at most `max_waiting` requests
    in the queue. An `EngineThread` calls `try_round`, which computes; clients call `submit`, `cancel` and
    `enough` from any thread.

    `tell(outputs)` is called on the engine's thread, once or twice a round, with the outputs that have
    changed. `max_tokens` limits the tokens in the KV cache of all rows, `prefix_bytes` the bytes of the
    prefix cache. A request's output depends on the request and its seed alone, except for rounding (in a
    larger batch sums may be taken in another order).
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
        self.seconds = 0.0  # total time of all decode steps
        self.last_step_seconds = 0.0
        self.lock = threading.Condition()
        self.closing = False
        self._aborts_pending = False
        self._reset()

    def _reset(self) -> None:
        """Create an empty decode batch, an empty prefill queue, and an empty list of changed outputs."""
        self.serving_batch = ServingBatch(
            self.model, self.tokenizer, self.stop_token_ids, self.rows, self.max_tokens
        )
        self.serving_batch.on_leave = self._on_leave
        self.serving_batch.on_sampled = self._on_sampled
        self.prefill_queue = PrefillQueue(self.model, self.prefix_cache)
        self._changed: dict[Answer, None] = {}  # outputs to publish, in order

    # ------------------------------------------------------------ for clients, on any thread

    def submit(self, request: Request) -> Answer:
        """Add a request to the queue and return its output, which grows as tokens are sampled. Raises
        LimbeckError if the request can never be served or the server is closing, `QueueFull` if the queue is
        full."""
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
        """Raise LimbeckError if the prompt is empty or has ids outside the vocabulary, if its length plus
        `max_new_tokens` exceeds the model's positions, or if the request has more copies than there are
        rows."""
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
        """Cancel the request with this output: its rows are removed before the next decode step."""
        with self.lock:
            output.cancelled = True
            self._aborts_pending = True
            self.lock.notify()

    def enough(self, sequence: Choice) -> None:
        """End one sequence of a request: its row is removed before the next decode step."""
        sequence.enough = True
        self._aborts_pending = True

    @property
    def busy(self) -> int:
        """The number of rows that all running requests take, whether they are in decode or still in
        prefill."""
        return self.serving_batch.busy + self.prefill_queue.rows

    def _retry_after(self) -> int:
        """Return an estimate of the seconds until a place in the queue is free."""
        batches = len(self.line) / max(1, self.rows)
        return max(1, min(MAX_RETRY_AFTER, round(batches * SECONDS_PER_QUEUED_BATCH)))

    # ------------------------------------------------------------ for the engine's thread

    @property
    def has_work(self) -> bool:
        """True if a request is waiting or running."""
        return bool(self.line or self.busy)

    def try_round(self) -> None:
        """Run one round. If it raises, all running requests fail with that error; waiting and later requests
        are still served. An error that leaves the process unable to use its device is raised again."""
        try:
            self.round()
        except Exception as error:
            self.failures += 1
            self._fail(error)
            if devices.poisoned(error):
                raise

    def close(self) -> None:
        """Fail all waiting and running requests, and refuse new ones from now on."""
        with self.lock:
            self.closing = True
        self._fail(LimbeckError("the server is closing"))

    def _fail(self, error: Exception) -> None:
        """End all running requests with `error`; if the scheduler is closing, the waiting ones as well."""
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
        """Yield the output of each row in the decode batch (a request with several rows is yielded several
        times), then the outputs of the requests in prefill."""
        for state in self.serving_batch.owners:
            yield state.output
        for prefilling in self.prefill_queue.requests:
            yield prefilling.output

    def round(self) -> None:
        """Run one round: remove cancelled requests, admit waiting ones that fit, prefill one chunk, and
        sample one token for each row in decode."""
        self._admit()
        if self.prefill_queue.requests:
            self._prefill()
        if self.serving_batch.busy:
            self._step()
        self._publish()

    def _step(self) -> None:
        """Sample one token for each row in decode, and measure the time."""
        begin = time.monotonic()
        self.serving_batch.step()
        self.last_step_seconds = time.monotonic() - begin
        self.steps += 1
        self.seconds += self.last_step_seconds

    def _admit(self) -> None:
        """Remove cancelled requests, then move waiting requests into prefill, oldest first, until one does
        not fit."""
        with self.lock:
            if self._aborts_pending:
                self.line = deque(output for output in self.line if not output.cancelled)
                self.prefill_queue.remove_aborted()
                self._aborts_pending = False
                self.serving_batch.remove_aborted()
            while self.line and self._fits(self.line[0]):
                self.prefill_queue.add(self.line.popleft())

    def _fits(self, output: Answer) -> bool:
        """Return True if there are rows and KV cache left for a request. Each row is counted with the maximal
        length of the longest request. A request always fits if nothing is running."""
        rows = self.busy + output.request.copies
        if rows > self.rows:
            return False
        if not self.busy:
            return True
        longest = max(_max_length(other.request) for other in (*self._running(), output))
        return rows * longest <= self.max_tokens

    def _prefill(self) -> None:
        """Prefill one chunk of prompt tokens, add the requests whose prompts are complete to the decode
        batch, and update the measured prefill rate."""
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
        """Return the number of tokens in the next prefill chunk: as many as can be run, at the measured rate,
        in the time for which decoding may be delayed."""
        decoding = self.serving_batch.busy
        seconds = IDLE_PREFILL_SECONDS
        if decoding:
            share = max(1.0, 2 * self.prefill_queue.rows / decoding)
            seconds = max(STALL_SECONDS, 2 * self.last_step_seconds) * share
        return int(min(max(self.prefill_rate * seconds, MIN_CHUNK), MAX_CHUNK))

    def _on_leave(self, state: SequenceState, row: int) -> None:
        """Add the KV of a sequence that leaves the decode batch to the prefix cache, since a later prompt may
        continue it."""
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
        """Publish the new tokens after all rows have sampled one and before the next forward pass, so that
        clients need not wait for that pass."""
        self._changed |= {state.output: None for state in self.serving_batch.owners}
        self._publish()

    def _publish(self) -> None:
        """Set the times `first` and `ended` of the outputs that have changed, and pass these outputs to
        `tell`."""
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
    """Return the length of a request's prompt plus `max_new_tokens`, in tokens."""
    return len(request.prompt) + request.max_new_tokens
