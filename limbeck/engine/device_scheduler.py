"""Continuous batching on a device: prompts are run into blocks that the decode batch reads, and a full memory
ends the newest request alone.

N tokens of a chunk · C hidden.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from ..model.decoder import Decoder
from ..model.ops import devices
from ..model.paged import PagedCache
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .device_serving import DeviceServingBatch
from .prefill import PrefillingRequest, PrefillQueue, Shares
from .request import Answer, DeviceFull, Request
from .scheduler import Scheduler
from .serving_batch import SequenceState


class DevicePrefillQueue(PrefillQueue):
    """The requests whose prompts are being run into the blocks of a batch."""

    def __init__(self, batch: DeviceServingBatch):
        self.model = batch.model
        self.batch = batch
        self.requests: deque[PrefillingRequest] = deque()

    def add(self, output: Answer) -> None:
        """Add a request, whose blocks are taken from the batch's pool; it must have room."""
        past = self.batch.open(output.request)
        output.cached = past.length
        self.requests.append(PrefillingRequest(output, past))

    def remove(self, request: PrefillingRequest) -> None:
        """Remove a request and give back its blocks."""
        self.requests.remove(request)
        self.batch.close(request.past)

    def remove_aborted(self) -> None:
        """Remove the requests that their clients have cancelled."""
        for request in [request for request in self.requests if request.output.cancelled]:
            self.remove(request)

    def _forward(self, shares: Shares) -> Tensor:
        """Run the next tokens of some prompts through the model; return their hidden states [N, C]."""
        parts = [request.next_tokens(count) for request, count in shares]
        return self.batch.prefill([request.past for request, _ in shares], parts)

    def _remember(self, request: PrefillingRequest) -> None:
        """Keep in mind what the blocks of a whole prompt hold; give them back if nothing is to be sampled."""
        asked = request.output.request
        self.batch.pool.remember(asked.prompt, request.past.blocks[0])
        if not asked.max_new_tokens:
            self.batch.close(request.past)


class DeviceScheduler(Scheduler):
    """Serves the requests to one model on a device, as `Scheduler` does on the CPU.

    `blocks` is the number of blocks of keys and values, of 64 tokens each; prompts that begin with the same
    tokens share them. If the device's memory is full, the newest request fails and the others go on.
    """

    serving_batch: DeviceServingBatch
    prefill_queue: DevicePrefillQueue

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        rows: int,
        max_waiting: int,
        blocks: int,
        stop_token_ids: tuple[int, ...] = (),
        tell: Callable[[Sequence[Answer]], None] = lambda outputs: None,
    ):
        self.serving_batch = DeviceServingBatch(model, tokenizer, stop_token_ids, rows, blocks)
        self.serving_batch.on_leave = self._on_leave
        self.serving_batch.on_sampled = self._on_sampled
        super().__init__(model, tokenizer, rows, max_waiting, stop_token_ids=stop_token_ids, tell=tell)

    def _reset(self) -> None:
        """Empty the batch, whose memory and captured steps stay, the prefill queue, and the list of changed
        outputs."""
        self.serving_batch.clear()
        self.prefill_queue = DevicePrefillQueue(self.serving_batch)
        self._changed: dict[Answer, None] = {}

    def check(self, request: Request) -> None:
        """Raise LimbeckError if the request can never be served: see `Scheduler.check`; or if it needs more
        keys and values than there is memory for."""
        super().check(request)
        needed = self.serving_batch.needed_blocks(request)
        room = self.serving_batch.pool.count
        if needed > room:
            each = PagedCache.block_bytes(self.model.config, self.model.embed.weight.dtype) / 2**30
            raise LimbeckError(
                f"max_tokens: a prompt of {len(request.prompt)} tokens and n = {request.copies} answers of "
                f"{request.max_new_tokens} need {needed * each:.3f} GiB for keys and values, and there is "
                f"room for {room * each:.3f} GiB; lower max_tokens or n"
            )

    def _fits(self, output: Answer) -> bool:
        """Return True if there are rows and blocks left for a request."""
        request = output.request
        return self.busy + request.copies <= self.rows and self.serving_batch.has_room(request)

    def _prefill(self) -> None:
        with self._newest_fails(self._end_prefilling):
            super()._prefill()

    def _step(self) -> None:
        with self._newest_fails(self._end_decoding):
            super()._step()

    @contextmanager
    def _newest_fails(self, end: Callable[[], Answer | None]) -> Iterator[None]:
        """If the device's memory is full, end one request with `end` and let the others go on; if there is
        none, raise the error."""
        try:
            yield
        except Exception as error:
            output = end() if devices.out_of_memory(error) else None
            if output is None:
                raise
            full = DeviceFull(devices.shortage(error))  # torch's error would keep the tensors of its frames
        else:
            return
        self.failures += 1
        output.error = full
        output.ended = time.monotonic()
        self._changed.pop(output, None)
        self.tell([output])
        devices.release()

    def _fail(self, error: Exception) -> None:
        """End all running requests with an error; if the memory is full, with `DeviceFull`."""
        super()._fail(DeviceFull(devices.shortage(error)) if devices.out_of_memory(error) else error)

    def _end_prefilling(self) -> Answer | None:
        """Remove the newest request that is being prefilled, and return its output."""
        if not self.prefill_queue.requests:
            return None
        newest = self.prefill_queue.requests[-1]
        self.prefill_queue.remove(newest)
        return newest.output

    def _end_decoding(self) -> Answer | None:
        """Remove the rows of the newest request, and return its output; None within a step, which has changed
        the rows."""
        if self.serving_batch.stepping:
            return None
        newest = max((state.output for state in self.serving_batch.owners), key=lambda output: output.asked)
        newest.cancelled = True
        self.serving_batch.remove_aborted()
        return newest

    def _on_leave(self, state: SequenceState, row: int) -> None:
        """Publish the output of a sequence that leaves the batch."""
        self._changed[state.output] = None
