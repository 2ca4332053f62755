"""The seats of a stage: which shard is asked of which seat, and what happens when one dies or is silent.

A shard is a function of what is asked: weights, problems, sampling parameters, seed. So it may be asked
again, and twice at once: the first answer counts, and a second one must be equal to it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from ..types import LimbeckError, Resumable
from .hosts import Event, Hosts
from .messages import Arrays, digest, pack, unpack

TICK = 0.2  # seconds between two looks at silent seats
SLOW = 4.0  # times the median time of a shard, after which it is asked of a second seat too
TIMED = 64  # shards whose times are remembered


@dataclass(frozen=True, eq=False)
class Ask:
    """A shard to sample: its number, the request as a header and arrays, the checksum of the weights, and its
    completions (rows)."""

    number: int
    request: dict[str, Any]
    prompts: Arrays
    weights: str
    rows: int


@dataclass(frozen=True)
class Answer:
    """The answer to an `Ask`, as a header and arrays."""

    header: dict[str, Any]
    arrays: Arrays


@dataclass
class SeatState:
    """What is known of a seat: when it was heard, and the shard it samples, with its finished rows."""

    heard: float
    ready: bool = False
    ask: Ask | None = None
    asked: float = 0.0
    rows: int = 0
    asked_twice: bool = False  # its shard has been asked of another seat too

    def __str__(self) -> str:
        """Return the progress of the seat in words: `12 of 64`."""
        if not self.ready:
            return "starts"
        return f"{self.rows} of {self.ask.rows}" if self.ask else "idle"


@dataclass
class Progress:
    """The callbacks of a rollout: finished rows, sampled tokens, and the state of each seat."""

    rows: Callable[[int], None] = lambda count: None
    tokens: Callable[[int], None] = lambda count: None
    seats: Callable[[Sequence[SeatState]], None] = lambda seats: None


@dataclass
class _Round:
    """The shards of one call of `SeatPool.map`: their numbers, those that wait for a seat, the answers, and
    how far each is (rows, tokens). Seats may still work at shards of an earlier call, which failed or did not
    need them any more."""

    wanted: set[int]
    waiting: deque[Ask]
    progress: Progress
    answers: dict[int, Answer] = field(default_factory=dict)
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)

    def misses(self, ask: Ask) -> bool:
        """Return True if the answer to this shard is still missing."""
        return ask.number in self.wanted and ask.number not in self.answers

    def advance(self, number: int, rows: int, tokens: int) -> None:
        """Tell how far a shard is, unless another seat got farther with it."""
        if number not in self.wanted:
            return
        rows_before, tokens_before = self.seen.get(number, (0, 0))
        now = (max(rows, rows_before), max(tokens, tokens_before))
        self.seen[number] = now
        if now[0] > rows_before:
            self.progress.rows(now[0] - rows_before)
        self.progress.tokens(now[1] - tokens_before)


class SeatPool:
    """`count` seats on `hosts`, started when they are first needed.

    A seat that does not start within `patience` seconds is replaced. The shard of one that works and gives no
    sign of life for so long, or takes `SLOW` times as long as others, is asked of another seat too. More than
    `restarts` deaths since `begin` end the stage with Resumable. `tell` is called with what the user should
    know.
    """

    def __init__(self, hosts: Hosts, count: int, patience: float = 120.0, restarts: int = 3):
        self.hosts = hosts
        self.count = count
        self.patience = patience
        self.restarts = restarts
        self.tell: Callable[[str], None] = lambda text: None
        self.samplers: WeakSet[Any] = WeakSet()  # whose engines the seats keep, by their `name`
        self.seats: dict[int, SeatState] = {}
        self.deaths = 0
        self._number = 0
        self._times: deque[float] = deque(maxlen=TIMED)  # seconds of the last shards
        self._accepted: dict[int, str] = {}  # digests of answers that a second one may follow

    def begin(self, tell: Callable[[str], None]) -> None:
        """Begin a stage: forget the deaths before it, and let the seats drop the engines of other stages."""
        self.deaths = 0
        self.tell = tell
        for seat in self.seats:
            self.hosts.send(seat, pack({"samplers": [sampler.name for sampler in self.samplers]}))

    def number(self) -> int:
        """Return a number that no shard had before."""
        self._number += 1
        return self._number

    def map(self, asks: Sequence[Ask], progress: Progress | None = None) -> list[Answer]:
        """Return the answers to all shards, in their order.

        Raises LimbeckError if a seat refused a shard, sampled with other weights, or if two answers to one
        shard differ; Resumable after too many deaths; RuntimeError, with the traceback, for a defect.
        """
        now = _Round({ask.number for ask in asks}, deque(asks), progress or Progress())
        for seat in range(self.count):
            if seat not in self.seats:
                self._start(seat)
        while len(now.answers) < len(asks):
            self._dispatch(now)
            now.progress.seats([self.seats[seat] for seat in sorted(self.seats)])
            event = self.hosts.wait(TICK)
            while event:
                self._handle(event, now)
                event = self.hosts.wait(0)
            self._look_after(now)
        return [now.answers[ask.number] for ask in asks]

    def close(self) -> None:
        """End all seats."""
        self.hosts.close()
        self.seats.clear()

    def _start(self, seat: int) -> None:
        self.seats[seat] = SeatState(time.monotonic())
        self.hosts.start(seat)

    def _dispatch(self, now: _Round) -> None:
        """Ask idle seats for shards that wait, as long as there are both."""
        for seat, state in self.seats.items():
            while now.waiting and not now.misses(now.waiting[0]):  # another seat was faster
                now.waiting.popleft()
            if now.waiting and state.ready and not state.ask:
                state.ask = now.waiting.popleft()
                state.asked = state.heard = time.monotonic()
                state.rows = 0
                state.asked_twice = False
                self.hosts.send(
                    seat, pack({**state.ask.request, "number": state.ask.number}, state.ask.prompts)
                )

    # ------------------------------------------------------------ events

    def _handle(self, event: Event, now: _Round) -> None:
        """Handle a message of a seat, or its death."""
        state = self.seats[event.seat]
        state.heard = time.monotonic()
        if event.message is None:
            self._bury(event, now)
            return
        header, arrays = unpack(event.message)
        if "ready" in header:
            state.ready = True
        elif "beat" in header:
            state.rows = header["rows"]
            now.advance(header["beat"], header["rows"], header["tokens"])
        else:
            self._answered(event.seat, Answer(header, arrays), now)

    def _bury(self, event: Event, now: _Round) -> None:
        """Put the shard of a dead seat before all others, and start the seat anew."""
        state = self.seats.pop(event.seat)
        self.deaths += 1
        if self.deaths > self.restarts:
            raise Resumable(
                f"hosts.restarts: seat {event.seat} {event.end}, death {self.deaths} of a seat in this "
                "stage; see whether memory is short, or raise restarts; the same command goes on from the "
                "last checkpoint"
            )
        self._start(event.seat)
        lost = state.ask
        again = ""
        if lost and not self._is_asked(lost, now):
            self._accepted.pop(lost.number, None)
            if now.misses(lost):
                now.waiting.appendleft(lost)
                again = "; its shard is asked again"
        self.tell(f"seat {event.seat} {event.end} and is started anew{again}")

    def _is_asked(self, ask: Ask, now: _Round) -> bool:
        """Return True if a shard waits, or a seat works at it."""
        return ask in now.waiting or any(state.ask == ask for state in self.seats.values())

    def _answered(self, seat: int, answer: Answer, now: _Round) -> None:
        """Take the answer of a seat, which is idle from now on."""
        state = self.seats[seat]
        ask, state.ask = state.ask, None
        if ask.number in self._accepted:
            self._compare(seat, ask, answer)
            return
        if not now.misses(ask):
            return
        _refuse(seat, ask, answer)
        now.answers[ask.number] = answer
        now.advance(ask.number, ask.rows, int(answer.arrays["lengths_R"].sum()))
        self._times.append(time.monotonic() - state.asked)
        if any(other.ask == ask for other in self.seats.values()):
            self._accepted[ask.number] = digest(answer.arrays)

    def _compare(self, seat: int, ask: Ask, answer: Answer) -> None:
        """Raise LimbeckError if a second answer differs from the first. A refusal, such as of weights that
        are withdrawn already, is none."""
        expected = self._accepted[ask.number]
        if not any(other.ask == ask for other in self.seats.values()):
            del self._accepted[ask.number]
        if answer.arrays and digest(answer.arrays) != expected:
            raise LimbeckError(
                f"hosts: seat {seat} and another one sampled different completions of one shard from the "
                "same weights and seed; test the memory of this machine, then run again to go on from the "
                "last checkpoint"
            )

    # ------------------------------------------------------------ silent and slow seats

    def _look_after(self, now: _Round) -> None:
        """Let other seats be asked for the shards of silent and slow ones. Replace seats that do not start,
        and silent ones if no other seat is left."""
        clock = time.monotonic()
        silent = [seat for seat, state in self.seats.items() if self._is_silent(state, clock)]
        nobody = bool(now.waiting) and len(silent) == len(self.seats)
        for seat, state in list(self.seats.items()):
            if seat in silent or self._is_slow(state, clock):
                self._ask_twice(seat, now)
            if seat in silent and (nobody or not state.ready):
                self._replace(seat)

    def _is_silent(self, state: SeatState, clock: float) -> bool:
        """Return True if a seat that starts or works has given no sign of life for `patience` seconds."""
        return bool(state.ask or not state.ready) and clock - state.heard > self.patience

    def _is_slow(self, state: SeatState, clock: float) -> bool:
        """Return True if a seat has worked at its shard for much longer than others."""
        if not state.ask or not self._times:
            return False
        return clock - state.asked > max(self.patience, SLOW * statistics.median(self._times))

    def _ask_twice(self, seat: int, now: _Round) -> None:
        """Put the shard of a seat before all others, once, so that another one is asked for it too."""
        state = self.seats[seat]
        if state.asked_twice or not state.ask:
            return
        state.asked_twice = True
        if now.misses(state.ask) and state.ask not in now.waiting:
            now.waiting.appendleft(state.ask)
            seconds = time.monotonic() - state.heard
            self.tell(
                f"seat {seat} was last heard {seconds:.0f} s ago; its shard is asked of another seat too"
            )

    def _replace(self, seat: int) -> None:
        """Kill a seat whose time is over; its death is then handled as any other."""
        self.seats[seat].heard = time.monotonic()
        self.hosts.kill(seat)


def _refuse(seat: int, ask: Ask, answer: Answer) -> None:
    """Raise what a seat reported in place of completions, and LimbeckError if it sampled with other weights
    than it was asked to."""
    header = answer.header
    if "error" in header:
        error = LimbeckError(header["error"])
        error.exit_code = header["code"]
        raise error
    if "fault" in header:
        raise RuntimeError(f"seat {seat} failed: {header['fault']}")
    if header["weights"] != ask.weights:
        raise LimbeckError(
            f"hosts: seat {seat} sampled with the weights {header['weights']} and not with {ask.weights}; "
            "test the memory of this machine, then run again to go on from the last checkpoint"
        )
