"""The sampler of a stage on several seats.

A rollout is cut into shards of at most `shard` completions, whole groups, by their order alone. Every random
draw is a function of (seed, problem, sample), but how a completion is rounded may depend on those beside it.
So the shard is what is repeatable: its completions are the same to the bit whatever the number of seats, the
order in which they answer, and which of them die. An `Engine` that samples all problems at once may round
differently; a stage that was sampled by a fleet says so in its manifest, with the size of the shards and the
threads of a seat. Which of the two sampled is not part of a stage's key.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch

from ..activity import Phase, phase
from ..engine.rollout import Engine
from ..engine.sampling import SamplingParams
from ..model import kernels
from ..model.checksum import checksum
from ..model.decoder import Decoder
from ..text.tokenizer import Tokenizer
from ..types import Group, Problem
from .hosts import Hosts
from .messages import read_groups, write_problem, write_prompts
from .pool import Answer, Ask, Progress, SeatPool, SeatState

SHOWN = 8  # seats whose progress is told one by one

_names = itertools.count()


class Version(NamedTuple):
    """Weights that seats can load: the folder that they are in, and their checksum."""

    folder: str
    checksum: str


class Fleet(Engine):
    """An `Engine` whose rollouts are sampled on the seats of `pool`, with the weights of `model`, and graded
    there.

    `shard` is the number of completions that a seat samples at once. `sources` are the settings of the
    sources of problems as JSON, by name: a group of one of them has its scores already, and `Mixture.score`
    keeps those. Weights are handed over when they have changed since the last rollout. Streams are sampled in
    this process.
    """

    def __init__(
        self,
        pool: SeatPool,
        model: Decoder,
        tokenizer: Tokenizer,
        shard: int,
        speculate: bool = False,
        sources: Mapping[str, Any] | None = None,
    ):
        super().__init__(model, tokenizer, shard, speculate)
        self.pool = pool
        self.sources = dict(sources or {})
        self.name = f"sampler {next(_names)}"
        self.version: Version | None = None
        self.original: Fleet | None = None
        self._folders: list[str] = []  # of the weights that are handed over
        pool.samplers.add(self)
        weakref.finalize(self, _withdraw, pool.hosts, self._folders)

    def with_tokenizer(self, tokenizer: Tokenizer) -> Fleet:
        """Return a sampler with the same weights at the same seats and another tokenizer, by which prompts
        are rendered."""
        other = copy.copy(self)
        other.tokenizer = tokenizer
        other.original = self  # the weights at the seats are there as long as it is
        return other

    @torch.no_grad()
    def rollout(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        seed: object,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem, in the order of the problems; see
        `Engine.rollout`.

        Raises LimbeckError if a seat sampled with other weights, or two seats answered differently; Resumable
        if seats died too often.
        """
        asked = [(problem, self._prompt(problem, sampling)) for problem in problems]
        if not asked:
            return []
        count = max(1, self.rows // group_size)
        shards = [asked[i : i + count] for i in range(0, len(asked), count)]
        version = self._publish()
        request = self._request(version, group_size, sampling, seed)
        asks = [self._ask(request, version, shard, group_size) for shard in shards]
        with phase("sampling", "problems", len(asked)) as finished:
            answers = self._map(asks, finished, group_size, progress)
        groups = []
        for shard, answer in zip(shards, answers, strict=True):
            self.drafted += answer.header["drafted"]
            self.accepted += answer.header["accepted"]
            groups += read_groups(answer.header, answer.arrays, shard, group_size)
        return groups

    def _map(
        self, asks: Sequence[Ask], finished: Phase, size: int, progress: Callable[[int], None] | None
    ) -> list[Answer]:
        """Return the answers to all shards. The phase `finished` counts problems, of `size` completions each,
        and inner phases show the completions and what each seat does."""
        with ExitStack() as stack:
            sampled = stack.enter_context(phase("", "rows", finished.total * size))
            seats = stack.enter_context(phase("on seats"))

            def advance(count: int) -> None:
                sampled.advance(count)
                finished.advance(sampled.done // size - finished.done)
                for _ in range(count if progress else 0):
                    progress(1)

            def show(states: Sequence[SeatState]) -> None:
                seats.name = _in_words(states)

            return self.pool.map(asks, Progress(advance, sampled.add_tokens, show))

    def _publish(self) -> Version:
        """Return the version of the present weights, handed over if they are new."""
        present = checksum(self.model)
        if self.version is None or self.version.checksum != present:
            _withdraw(self.pool.hosts, self._folders)
            with phase("handing over the weights"):
                self._folders.append(self.pool.hosts.publish(self.model, self.tokenizer))
            self.version = Version(self._folders[-1], present)
        return self.version

    def _request(
        self, version: Version, group_size: int, sampling: SamplingParams, seed: object
    ) -> dict[str, Any]:
        """Return what the requests for all shards of a rollout have in common."""
        return {
            "sampler": self.name,
            "samplers": sorted(sampler.name for sampler in self.pool.samplers),
            "model": {
                "folder": version.folder,
                "dtype": str(self.model.embed.weight.dtype).removeprefix("torch."),
                "speculate": self.speculate,
                "kernels": kernels.record(),
            },
            "sources": self.sources,
            "rows": self.rows,
            "size": group_size,
            "sampling": asdict(sampling),
            "seed": repr(seed),
        }

    def _ask(
        self,
        request: Mapping[str, Any],
        version: Version,
        shard: Sequence[tuple[Problem, np.ndarray]],
        size: int,
    ) -> Ask:
        """Return the request for one shard, of `size` completions for each problem."""
        problems = [write_problem(problem) for problem, _ in shard]
        whole = {**request, "problems": problems}
        prompts = write_prompts([prompt for _, prompt in shard])
        return Ask(self.pool.number(), whole, prompts, version.checksum, len(shard) * size)


def _withdraw(hosts: Hosts, folders: list[str]) -> None:
    """Delete the weights in these folders, and empty the list."""
    while folders:
        hosts.withdraw(folders.pop())


def _in_words(states: Sequence[SeatState]) -> str:
    """Return the progress of the seats in words: `on 2 seats (12 of 64; idle)`."""
    more = "; ..." if len(states) > SHOWN else ""
    return f"on {len(states)} seats ({'; '.join(map(str, states[:SHOWN]))}{more})"
