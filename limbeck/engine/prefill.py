"""Chunked prefill with a prefix cache. Prompts are prefilled in chunks between decode steps, so that running requests stall
little; each prompt starts from the longest prefix that is cached.

N tokens of a chunk · C hidden · T tokens of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.decoder import Decoder
from ..model.prefill_cache import ChunkedPrefill, SequenceKV
from .request import Answer
from .serving_batch import likeliest

MOST_PASTS = 256  # looked through one by one
ROWS = 512  # positions of an echoed prompt whose logits are made at once


class PrefixCache:
    """What was read lately, in so many bytes; the longest unused goes first."""

    def __init__(self, room: int):
        self.room, self.held = room, 0
        self.pasts: OrderedDict[bytes, tuple[np.ndarray, SequenceKV]] = OrderedDict()

    def longest(self, prompt: np.ndarray) -> tuple[SequenceKV | None, int]:
        """The cached keys and values with the longest common prefix, and its length in tokens. Never the whole prompt: the last
        token must be run, to have logits."""
        best, length = None, 0
        for key, (tokens, _) in self.pasts.items():
            shared = alike(tokens, prompt[:-1])
            if shared > length:
                best, length = key, shared
        if best is None:
            return None, 0
        self.pasts.move_to_end(best)
        return self.pasts[best][1], length

    def keep(self, tokens: np.ndarray, past: SequenceKV) -> None:
        """Remember it in place of what it begins with."""
        if past.bytes > self.room or any(
            alike(known, tokens) == len(tokens) for known, _ in self.pasts.values()
        ):
            return
        for key in [key for key, (known, _) in self.pasts.items() if alike(known, tokens) == len(known)]:
            self.held -= self.pasts.pop(key)[1].bytes
        self.pasts[tokens.tobytes()] = tokens, past
        self.held += past.bytes
        while self.held > self.room or len(self.pasts) > MOST_PASTS:
            self.held -= self.pasts.popitem(last=False)[1][1].bytes


def alike(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two texts have in common at their beginning."""
    shorter = min(len(a), len(b))
    differ = (a[:shorter] != b[:shorter]).nonzero()[0]
    return int(differ[0]) if len(differ) else shorter


@dataclass(eq=False)
class PrefillingRequest:
    """A prompt that is being read: `past` has what was, `left` tokens are still to be."""

    answer: Answer
    past: SequenceKV

    @property
    def left(self) -> int:
        return len(self.answer.request.prompt) - self.past.length


class PrefillQueue:
    """Prompts that are being read; the oldest gets half of each chunk, the shortest the rest."""

    def __init__(self, model: Decoder, prefixes: PrefixCache):
        self.model, self.prefixes = model, prefixes
        self.prefillings: deque[PrefillingRequest] = deque()

    @property
    def rows(self) -> int:
        return sum(prefilling.answer.request.copies for prefilling in self.prefillings)

    def add(self, answer: Answer) -> None:
        """Queue a request, from its cached prefix on. With `echo` the whole prompt is prefilled, as its log-probabilities are
        returned."""
        request, weight = answer.request, self.model.embed.weight
        past = SequenceKV(self.model.config, len(request.prompt), weight.dtype)
        if not request.echo:
            known, answer.cached = self.prefixes.longest(request.prompt)
            if known is not None:
                past.begin_as(known, answer.cached)
        self.prefillings.append(PrefillingRequest(answer, past))

    def drop(self) -> None:
        self.prefillings = deque(
            prefilling for prefilling in self.prefillings if not prefilling.answer.cancelled
        )

    def read(self, most: int) -> list[tuple[PrefillingRequest, Tensor]]:
        """Read at most so many tokens; the prompts that are through, each with the state [C] after its last token."""
        chosen = self._share(most)
        spans = [g.answer.request.prompt[g.past.length : g.past.length + n] for g, n in chosen]
        context = ChunkedPrefill([prefilling.past for prefilling, _ in chosen], [n for _, n in chosen])
        hidden_NC = self.model(torch.from_numpy(np.concatenate(spans)), context)
        begins = np.cumsum([0, *(n for _, n in chosen)])
        for (prefilling, n), begin in zip(chosen, begins[:-1], strict=True):
            if prefilling.answer.request.echo:
                self._echo(prefilling, hidden_NC[begin : begin + n])
        context.settle()
        through = [
            (prefilling, hidden_NC[end - 1])
            for (prefilling, _), end in zip(chosen, begins[1:], strict=True)
            if not prefilling.left
        ]
        for prefilling, _ in through:
            self.prefillings.remove(prefilling)
            self.prefixes.keep(prefilling.answer.request.prompt, prefilling.past)
        return through

    def _share(self, most: int) -> list[tuple[PrefillingRequest, int]]:
        oldest, shares, room = self.prefillings[0], {}, most
        for prefilling, cap in (
            (oldest, -(-most // 2)),
            *(
                (prefilling, most)
                for prefilling in sorted(self.prefillings, key=lambda prefilling: prefilling.left)
            ),
        ):
            taken = min(prefilling.left - shares.get(prefilling, 0), cap, room)
            if taken > 0:
                shares[prefilling] = shares.get(prefilling, 0) + taken
                room -= taken
        return list(shares.items())

    def _echo(self, prefilling: PrefillingRequest, hidden_NC: Tensor) -> None:
        """Log-probabilities of the tokens that follow these."""
        answer, begin = prefilling.answer, prefilling.past.length
        following = torch.from_numpy(answer.request.prompt[begin + 1 : begin + 1 + len(hidden_NC)])
        for i in range(0, len(following), ROWS):
            logits_NV = torch.nn.functional.linear(
                hidden_NC[: len(following)][i : i + ROWS], self.model.head.weight
            )
            said, tops = likeliest(logits_NV, following[i : i + ROWS], answer.request.top or 0)
            answer.prompt_logprobs += said
            answer.prompt_tops += tops
