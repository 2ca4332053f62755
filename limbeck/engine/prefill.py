"""Chunked prefill: prompts are prefilled in chunks between decode steps, so that running requests are delayed
little. Each prompt starts from its longest prefix whose KV is cached.

Dimensions: N tokens of a chunk · C hidden · V vocabulary.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.prefill_cache import ChunkedPrefill, SequenceKV
from .prefix_cache import PrefixCache
from .request import Answer
from .serving_batch import top_logprobs

if TYPE_CHECKING:
    from .device_serving import PagedSequences

LOGIT_ROWS = 512  # positions of an echoed prompt whose logits are computed at once,
LOGITS = 1 << 25  # and the most logits of them: 128 MiB in float32


@dataclass(eq=False)
class PrefillingRequest:
    """A request whose prompt is being prefilled. `output` is the request's output, which also holds the
    request; `past` is the KV of the prompt's tokens that have been run so far."""

    output: Answer
    past: SequenceKV | PagedSequences

    @property
    def remaining(self) -> int:
        """The number of prompt tokens that have not been run yet."""
        return len(self.output.request.prompt) - self.past.length

    def next_tokens(self, count: int) -> np.ndarray:
        """Return the ids [N] of the next tokens of the prompt that have not been run, at most `count` of
        them."""
        begin = self.past.length
        return self.output.request.prompt[begin : begin + count]


Shares = list[tuple[PrefillingRequest, int]]  # requests with their numbers of tokens in a chunk


class PrefillQueue:
    """The requests whose prompts are being prefilled. Half of each chunk is for the oldest request, the rest
    for the requests with the fewest remaining tokens."""

    def __init__(self, model: Decoder, prefix_cache: PrefixCache):
        self.model = model
        self.prefix_cache = prefix_cache
        self.requests: deque[PrefillingRequest] = deque()

    @property
    def rows(self) -> int:
        """The number of rows that these requests will take in the decode batch: one per sequence to
        sample."""
        return sum(request.output.request.copies for request in self.requests)

    @property
    def remaining(self) -> int:
        """The number of prompt tokens, over all requests, that have not been run yet."""
        return sum(request.remaining for request in self.requests)

    def add(self, output: Answer) -> None:
        """Add a request to the queue, with the KV of its longest cached prefix. If the request sets `echo`,
        no cached prefix is used: the log-probabilities of all prompt tokens are returned, so all must be
        run."""
        request = output.request
        past = SequenceKV(self.model.config, len(request.prompt), self.model.embed.weight.dtype)
        if not request.echo:
            prefix, output.cached = self.prefix_cache.longest(request.prompt)
            if prefix is not None:
                past.copy_prefix(prefix, output.cached)
        self.requests.append(PrefillingRequest(output, past))

    def remove_aborted(self) -> None:
        """Remove the requests that their clients have cancelled."""
        self.requests = deque(request for request in self.requests if not request.output.cancelled)

    def run(self, max_tokens: int) -> list[tuple[PrefillingRequest, Tensor]]:
        """Prefill one chunk of at most `max_tokens` tokens. Returns the requests whose prompts are now
        complete, each with the hidden state [C] of its last prompt token."""
        shares = self._share(max_tokens)
        hidden = self._forward(shares).split([count for _, count in shares])
        completed = []
        for (request, count), request_NC in zip(shares, hidden, strict=True):
            if request.output.request.echo:
                self._echo(request, request_NC)
            request.past.length += count
            if not request.remaining:
                completed.append((request, request_NC[-1]))
                self.requests.remove(request)
                self._remember(request)
        return completed

    def _forward(self, shares: Shares) -> Tensor:
        """Run the next tokens of some prompts through the model; return their hidden states [N, C]."""
        tokens = [request.next_tokens(count) for request, count in shares]
        context = ChunkedPrefill([request.past for request, _ in shares], [count for _, count in shares])
        return self.model(torch.from_numpy(np.concatenate(tokens)), context)

    def _remember(self, request: PrefillingRequest) -> None:
        """Keep the KV of a whole prompt for later ones that begin with the same tokens."""
        self.prefix_cache.add(request.output.request.prompt, request.past)

    def _share(self, max_tokens: int) -> Shares:
        """Divide a chunk of `max_tokens` tokens among the requests: return each request that takes part in it
        with its number of tokens."""
        shares: dict[PrefillingRequest, int] = {}
        oldest = self.requests[0]
        half = -(-max_tokens // 2)
        shares[oldest] = min(oldest.remaining, half, max_tokens)
        room = max_tokens - shares[oldest]
        for request in sorted(self.requests, key=lambda request: request.remaining):
            count = min(request.remaining - shares.get(request, 0), room)
            if count > 0:
                shares[request] = shares.get(request, 0) + count
                room -= count
        return list(shares.items())

    def _echo(self, request: PrefillingRequest, hidden_NC: Tensor) -> None:
        """Compute the log-probabilities of prompt tokens and append them to the request's output: `hidden_NC`
        are the hidden states of the chunk just run, and each predicts the token after it."""
        output = request.output
        begin = request.past.length + 1
        targets_N = torch.from_numpy(output.request.prompt[begin : begin + len(hidden_NC)])
        targets_N = targets_N.to(hidden_NC.device)
        hidden_NC = hidden_NC[: len(targets_N)]
        count = min(LOGIT_ROWS, max(1, LOGITS // self.model.config.vocab_size))
        for i in range(0, len(targets_N), count):
            rows = slice(i, i + count)
            logits_NV = self.model.ops.logits(hidden_NC[rows], self.model.head.weight)
            logprobs, tops = top_logprobs(logits_NV, targets_N[rows], output.request.top or 0)
            output.prompt_logprobs += logprobs
            output.prompt_tops += tops
