"""Pipeline schedules as events: every chip has its order of work, and each piece starts when the chip is free and what
it needs has arrived. Stages may be uneven.

F is a forward pass of one micro-batch through one stage, B its backward pass without weight gradients, W the weight
gradients. Ideal bubbles (arXiv 2412.19437, Table 2, where B includes W), which tests hold the events to:

    1F1B (P-1)(F+B)    ZB1P (P-1)(F+B-2W)    DualPipe (P/2-1)(F&B + B - 3W)    interleaved (P-1)(F+B)/chunks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..types import LimbeckError

LATE = ("zb1p", "dualpipe", "dualpipev")  # schedules that end with weight gradients
ENOUGH = 2  # pipelines full of micro-batches are simulated; beyond that a schedule repeats itself


class Piece(NamedTuple):
    """One pass: kind "F", "B" or "W", direction 0 or 1 (DualPipe sends from both ends), stage, micro-batch."""

    kind: str
    direction: int
    stage: int
    micro: int


class Slot(NamedTuple):
    """Something a chip does in one go: one piece, or a forward and a backward that overlap."""

    pieces: tuple[Piece, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Times:
    """Seconds of each stage, and of handing a micro-batch on. `pair(f, b)` is a forward of stage f beside a whole
    backward of stage b: their sum, unless `paired` says what overlapping leaves, stage by stage."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    send: float = 0.0
    paired: tuple[float, ...] = ()

    def pair(self, ahead: int, back: int) -> float:
        if self.paired:
            return (self.paired[ahead] + self.paired[back]) / 2
        return self.forward[ahead] + self.backward[back] + self.weight[back]


@dataclass(frozen=True)
class Timeline:
    """What every chip did when. `bubble` is the time that the busiest chip waited."""

    seconds: float
    chips: tuple[tuple[Slot, ...], ...]
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        return self.seconds - max(self.busy)


def simulate(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> Timeline:
    """The schedule of `micro` micro-batches over `chips` in a pipeline; `times` has chips x chunks stages (DualPipeV
    has two a chip, DualPipe one a chip in each direction)."""
    if schedule not in ORDERS:
        raise LimbeckError(f"schedule {schedule} is not known; known are {', '.join(ORDERS)}")
    stages = chips * (2 if schedule == "dualpipev" else chunks)
    if len(times.forward) != stages:
        raise LimbeckError(f"{schedule} over {chips} chips has {stages} stages, not {len(times.forward)}")
    if schedule.startswith("dualpipe") and micro < 2 * chips * (1 + (schedule == "dualpipev")):
        raise LimbeckError(
            f"{schedule} over {chips} chips takes at least {2 * chips * (1 + (schedule == 'dualpipev'))} micro-batches, not {micro}"
        )
    return _play(
        [ORDERS[schedule](rank, chips, micro, chunks) for rank in range(chips)], times, stages, chips
    )


def seconds(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> tuple[float, float]:
    """Whole time and bubble. A long step is simulated for a few rounds; each further round costs what it adds."""
    step = chips * (2 if schedule == "dualpipev" else 1)
    few = ENOUGH * step
    if micro <= few + step:
        line = simulate(schedule, times, chips, micro, chunks)
        return line.seconds, line.bubble
    few += (micro - few) % step
    short, long = (simulate(schedule, times, chips, n, chunks) for n in (few, few + step))
    rounds = (micro - few) / step
    whole = short.seconds + rounds * (long.seconds - short.seconds)
    busy = max(a + rounds * (b - a) for a, b in zip(short.busy, long.busy, strict=True))
    return whole, whole - busy


def quick(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> tuple[float, float]:
    """Whole time and bubble by the formulas above, with the busiest chip's work and the mean of all: within a few
    per cent of the events, and a thousand times as fast."""
    forward, backward, weight = (sum(row) / chips for row in (times.forward, times.backward, times.weight))
    stages = range(len(times.forward))
    places = [[s for s in stages if s % chips == chip] for chip in range(chips)]
    if schedule == "dualpipev":
        places = [[chip, 2 * chips - 1 - chip] for chip in range(chips)]
    if schedule == "dualpipe":
        places = [[chip, chips - 1 - chip] for chip in range(chips)]
    share = 0.5 if schedule == "dualpipe" else 1.0
    both = schedule.startswith("dualpipe")
    work = [
        share
        * sum(
            times.pair(s, s) if both else times.forward[s] + times.backward[s] + times.weight[s] for s in own
        )
        for own in places
    ]
    rest = chips - 1
    if schedule == "zb1p":
        bubble = rest * max(0.0, forward + backward - weight)
    elif both:
        pair = sum(times.pair(s, s) for s in stages) / chips
        bubble = (chips / 2 - 1 if schedule == "dualpipe" else (chips - 1) / 2) * max(
            0.0, pair + backward - 2 * weight
        )
    else:
        bubble = rest * (forward + backward + weight) / (chunks if schedule == "interleaved" else 1)
    bubble += 2 * rest * times.send
    return micro * max(work) + bubble, bubble


def _play(orders: list[list[tuple[Piece, ...]]], times: Times, stages: int, chips: int) -> Timeline:
    done: dict[Piece, float] = {}
    free, busy = [0.0] * chips, [0.0] * chips
    slots: list[list[Slot]] = [[] for _ in orders]
    ahead, waiting = [0] * chips, set(range(chips))
    while waiting:
        moved = False
        for chip in sorted(waiting):
            order = orders[chip]
            while ahead[chip] < len(order):
                pieces = order[ahead[chip]]
                ready = _ready(pieces, done, times, stages)
                if ready is None:
                    break
                start = max(free[chip], ready)
                took = _took(pieces, times)
                for piece in pieces:
                    done[piece] = start + took
                free[chip], busy[chip] = start + took, busy[chip] + took
                slots[chip].append(Slot(pieces, start, start + took))
                ahead[chip] += 1
                moved = True
            if ahead[chip] == len(order):
                waiting.discard(chip)
        if not moved:
            raise LimbeckError("this schedule waits for itself: too few micro-batches for its stages")
    return Timeline(max(free), tuple(map(tuple, slots)), tuple(busy))


def _ready(pieces: tuple[Piece, ...], done: dict[Piece, float], times: Times, stages: int) -> float | None:
    """When all that the pieces need has arrived; None while something is not even begun."""
    latest = 0.0
    for kind, direction, stage, micro in pieces:
        if kind == "F":
            need = Piece("F", direction, stage - 1, micro) if stage else None
        elif kind == "W":
            need = Piece("B", direction, stage, micro)
        else:
            need = (
                Piece("B", direction, stage + 1, micro)
                if stage < stages - 1
                else Piece("F", direction, stage, micro)
            )
        if need is None or need in pieces:
            continue
        at = done.get(need)
        if at is None:
            return None
        latest = max(latest, at + times.send * (need.stage != stage))
    return latest


def _took(pieces: tuple[Piece, ...], times: Times) -> float:
    if len(pieces) == 3:  # a forward beside a whole backward: F, B, W
        return times.pair(pieces[0].stage, pieces[1].stage)
    row = {"F": times.forward, "B": times.backward, "W": times.weight}
    return sum(row[piece.kind][piece.stage] for piece in pieces)


# ------------------------------------------------------------ orders of work: one list a chip


def _whole(stage: int, micro: int, direction: int = 0) -> tuple[Piece, ...]:
    return Piece("B", direction, stage, micro), Piece("W", direction, stage, micro)


def _gpipe(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    return [(Piece("F", 0, rank, m),) for m in range(micro)] + [
        _whole(rank, m) for m in reversed(range(micro))
    ]


def _one_forward_one_backward(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    return _interleaved(rank, chips, micro, 1)


def _interleaved(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    """Each chip has `chunks` stages; micro-batches go through in groups of as many as there are chips (arXiv 2104.04473)."""
    groups = [range(first, min(first + chips, micro)) for first in range(0, micro, chips)]
    forward = [(chunk, m) for group in groups for chunk in range(chunks) for m in group]
    backward = [(chunk, m) for group in groups for chunk in reversed(range(chunks)) for m in group]
    early = min(len(forward), (chips - rank - 1) * (2 if chunks > 1 else 1) + (chunks - 1) * chips)
    ahead = [(Piece("F", 0, chunk * chips + rank, m),) for chunk, m in forward]
    back = [_whole(chunk * chips + rank, m) for chunk, m in backward]
    order = ahead[:early]
    for i in range(len(forward) - early):
        order += [ahead[early + i], back[i]]
    return order + back[len(forward) - early :]


def _zero_bubble(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    """ZB-H1 (arXiv 2401.10241): 1F1B, with weight gradients later by as many micro-batches as the rank is deep."""
    order, back = [], 0
    for pieces in _one_forward_one_backward(rank, chips, micro, 1):
        if pieces[0].kind == "F":
            order.append(pieces)
            continue
        order.append(pieces[:1])
        back += 1
        if back > rank:
            order.append((Piece("W", 0, rank, back - rank - 1),))
    return order + [(Piece("W", 0, rank, m),) for m in range(max(0, back - rank), back)]


class _Both:
    """The eight steps that DualPipe and DualPipeV share, of a chip `near` places from its end of `half` chips.

    Phase 0 is what comes from that end, phase 1 what comes back (V) or from the other end. `micro` is of each phase.
    """

    def __init__(
        self, near: int, half: int, micro: int, place: tuple[tuple[int, int], tuple[int, int]]
    ) -> None:
        self.order: list[tuple[Piece, ...]] = []
        self.place, self.counts = place, {(kind, phase): 0 for kind in "FB" for phase in (0, 1)}
        self.late: list[Piece] = []
        for _ in range(2 * (half - near - 1)):
            self.forward(0)
        for _ in range(near + 1):
            self.forward(0)
            self.forward(1)
        for _ in range(half - near - 1):
            self.backward(1, late=True)
            self.weight()
            self.forward(1)
        for _ in range(micro - 2 * half + near + 1):
            self.both(0, 1)
            self.both(1, 0)
        for _ in range(half - near - 1):
            self.backward(1)
            self.both(1, 0)
        self.finish(near, half)

    def finish(self, near: int, half: int) -> None:
        for i in range(near + 1):  # from the middle on weight gradients wait
            self.backward(1, late=i > (near + 1) // 2 or (i == (near + 1) // 2 and near % 2 == 1))
            self.backward(0, late=i >= (near + 1) // 2)
        for _ in range(half - near - 1):
            self.weight()
            self.backward(0, late=True)
        while self.late:
            self.weight()

    def piece(self, kind: str, phase: int) -> Piece:
        micro = self.counts[kind, phase]
        self.counts[kind, phase] += 1
        direction, stage = self.place[phase]
        return Piece(kind, direction, stage, micro)

    def forward(self, phase: int) -> None:
        self.order.append((self.piece("F", phase),))

    def backward(self, phase: int, late: bool = False) -> None:
        piece = self.piece("B", phase)
        if late:
            self.late.append(piece)
        self.order.append((piece,) if late else (piece, piece._replace(kind="W")))

    def weight(self) -> None:
        if self.late:
            self.order.append((self.late.pop(0)._replace(kind="W"),))

    def both(self, ahead: int, back: int) -> None:
        forward, backward = self.piece("F", ahead), self.piece("B", back)
        self.order.append((forward, backward, backward._replace(kind="W")))


def _dualpipe(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    """Half of the micro-batches enter at each end (arXiv 2412.19437, section 3.2.1): chip r is stage r of the one
    direction and stage P-1-r of the other."""
    second = rank >= chips // 2
    near = chips - 1 - rank if second else rank
    own, other = (int(second), near), (int(not second), chips - 1 - near)
    return _Both(near, chips // 2, micro // 2, (own, other)).order


def _dualpipev(rank: int, chips: int, micro: int, chunks: int) -> list[tuple[Piece, ...]]:
    """One direction, folded: chip r is stage r and stage 2P-1-r."""
    return _Both(rank, chips, micro, ((0, rank), (0, 2 * chips - 1 - rank))).order


ORDERS = {
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb1p": _zero_bubble,
    "dualpipe": _dualpipe,
    "dualpipev": _dualpipev,
    "gpipe": _gpipe,
}
