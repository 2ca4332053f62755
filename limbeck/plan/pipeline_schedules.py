"""Pipeline schedules as events, for stages that may be uneven.

A pipeline cuts a model into stages and places them on chips; the rank of a chip is its position. Each chip
has an order of passes, and a pass starts when the chip is free and its inputs have arrived. F is the forward
pass of one micro-batch through one stage, B its backward pass without weight gradients, and W the computation
of its weight gradients. The bubble is the time in which a chip waits. Ideal bubbles of P chips (arXiv
2412.19437, Table 2, where B includes W), which the tests compare with the events:

    1F1B (P-1)(F+B)    ZB1P (P-1)(F+B-2W)    DualPipe (P/2-1)(F&B + B - 3W)    interleaved (P-1)(F+B)/chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..types import LimbeckError

LATE = ("zb1p", "dualpipe", "dualpipev")  # schedules that end with weight gradients
ENOUGH = 2  # pipelines full of micro-batches are simulated; beyond that a schedule repeats itself
PAIR = 3  # pieces of an overlapped slot: F, and B with its W


class Piece(NamedTuple):
    """One pass of one micro-batch through one stage.

    `kind` is "F", "B" or "W"; `direction` is 0 or 1, as DualPipe feeds micro-batches into both ends of the
    pipeline; `stage` counts from the end at which the micro-batch enters; `micro` is the micro-batch's
    number.
    """

    kind: str
    direction: int
    stage: int
    micro: int


Pieces = tuple[Piece, ...]  # run without a pause between them


class Slot(NamedTuple):
    """Passes that run on a chip without a pause, with the seconds at which they start and end.

    They are one pass, a B with its W, or a forward pass overlapped with a B and its W.
    """

    pieces: Pieces
    start: float
    end: float


@dataclass(frozen=True)
class Times:
    """Seconds of each stage's passes, and of sending a micro-batch to the next stage.

    `forward`, `backward` and `weight` are the seconds of F, B and W, one entry for each stage. `paired` has,
    for each stage, the seconds of F overlapped with B and W of the same stage; if it is empty, nothing
    overlaps.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    send: float = 0.0
    paired: tuple[float, ...] = ()

    def pair(self, ahead: int, back: int) -> float:
        """Return the seconds of F of stage `ahead` overlapped with B and W of stage `back`.

        Without times of overlapped passes, it is the sum of the three.
        """
        if self.paired:
            return (self.paired[ahead] + self.paired[back]) / 2
        return self.forward[ahead] + self.backward[back] + self.weight[back]

    def whole(self, stage: int) -> float:
        """Return the seconds of F, B and W of one micro-batch in a stage, without overlap."""
        return self.forward[stage] + self.backward[stage] + self.weight[stage]


@dataclass(frozen=True)
class Timeline:
    """The result of a simulated step.

    `seconds` is the time of the whole step, `chips` has the slots of each chip in order, and `busy` the
    seconds in which each chip computes.
    """

    seconds: float
    chips: tuple[tuple[Slot, ...], ...]
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Seconds in which the busiest chip waits."""
        return self.seconds - max(self.busy)


def simulate(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> Timeline:
    """Simulate one step of `micro` micro-batches over a pipeline of `chips` chips.

    `times` has chips x `chunks` stages (DualPipeV: two for each chip; DualPipe: as many as chips, and each
    chip holds one stage in each direction). Raises LimbeckError for an unknown schedule, a wrong number of
    stages, or too few micro-batches.
    """
    if schedule not in ORDERS:
        raise LimbeckError(f"schedule {schedule} is not known; known are {', '.join(ORDERS)}")
    stages = chips * (2 if schedule == "dualpipev" else chunks)
    if len(times.forward) != stages:
        raise LimbeckError(f"{schedule} over {chips} chips has {stages} stages, not {len(times.forward)}")
    least = _least_micro(schedule, chips)
    if micro < least:
        raise LimbeckError(f"{schedule} over {chips} chips takes at least {least} micro-batches, not {micro}")
    order_of = ORDERS[schedule]
    orders = [order_of(rank, chips, micro, chunks) for rank in range(chips)]
    return _Player(orders, times, stages).run()


def _least_micro(schedule: str, chips: int) -> int:
    """Return the fewest micro-batches for which the schedule is defined.

    Only DualPipe and DualPipeV have such a minimum; for other schedules the result is 0.
    """
    if schedule == "dualpipe":
        return 2 * chips
    if schedule == "dualpipev":
        return 4 * chips
    return 0


def seconds(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> tuple[float, float]:
    """Return the seconds of a step and of its bubble, by simulation.

    A step of many micro-batches is extrapolated from two shorter steps. See `simulate` for the parameters.
    """
    per_round = chips * (2 if schedule == "dualpipev" else 1)
    few = ENOUGH * per_round
    if micro <= few + per_round:
        line = simulate(schedule, times, chips, micro, chunks)
        return line.seconds, line.bubble
    few += (micro - few) % per_round
    short = simulate(schedule, times, chips, few, chunks)
    long = simulate(schedule, times, chips, few + per_round, chunks)
    rounds = (micro - few) / per_round
    whole = short.seconds + rounds * (long.seconds - short.seconds)
    busy = max(a + rounds * (b - a) for a, b in zip(short.busy, long.busy, strict=True))
    return whole, whole - busy


def quick(schedule: str, times: Times, chips: int, micro: int, chunks: int = 1) -> tuple[float, float]:
    """Return the seconds of a step and of its bubble by the formulas at the top of this file.

    The step's time takes the work of the busiest chip, the bubble's the mean over all chips. The results are
    within a few per cent of `seconds`, and a thousand times as fast to compute.
    """
    dual = schedule.startswith("dualpipe")
    work = []
    for stages in _placement(schedule, len(times.forward), chips):
        work.append(sum(times.pair(stage, stage) if dual else times.whole(stage) for stage in stages))
    busiest = max(work)
    if schedule == "dualpipe":  # half of the micro-batches come from each end
        busiest *= 0.5
    bubble = _bubble(schedule, times, chips, chunks)
    bubble += 2 * (chips - 1) * times.send
    return micro * busiest + bubble, bubble


def _placement(schedule: str, stages: int, chips: int) -> list[list[int]]:
    """Return, for each chip, the stages that it holds."""
    if schedule == "dualpipev":
        return [[chip, 2 * chips - 1 - chip] for chip in range(chips)]
    if schedule == "dualpipe":
        return [[chip, chips - 1 - chip] for chip in range(chips)]
    return [list(range(chip, stages, chips)) for chip in range(chips)]


def _bubble(schedule: str, times: Times, chips: int, chunks: int) -> float:
    """Return the seconds of the schedule's ideal bubble, without the time of sending.

    It is computed from the mean times of a chip.
    """
    forward = sum(times.forward) / chips
    backward = sum(times.backward) / chips
    weight = sum(times.weight) / chips
    if schedule == "zb1p":
        return (chips - 1) * max(0.0, forward + backward - weight)
    if schedule.startswith("dualpipe"):
        pair = sum(times.pair(stage, stage) for stage in range(len(times.forward))) / chips
        waits = chips / 2 - 1 if schedule == "dualpipe" else (chips - 1) / 2
        return waits * max(0.0, pair + backward - 2 * weight)
    whole = (chips - 1) * (forward + backward + weight)
    return whole / chunks if schedule == "interleaved" else whole


class _Player:
    """Runs the orders of passes, one list for each chip, and records when each pass starts and ends."""

    def __init__(self, orders: list[list[Pieces]], times: Times, stages: int):
        """Start at second 0 with all chips free and no pass done.

        `orders` has the slots of each chip in order; `stages` is the number of stages.
        """
        chips = len(orders)
        self.orders = orders
        self.times = times
        self.stages = stages
        self.done: dict[Piece, float] = {}
        self.free = [0.0] * chips
        self.busy = [0.0] * chips
        self.slots: list[list[Slot]] = [[] for _ in orders]

    def run(self) -> Timeline:
        """Run all passes of all chips and return the timeline.

        Raises LimbeckError if the chips wait for each other in a circle.
        """
        unfinished = list(range(len(self.orders)))
        while unfinished:
            moved = [self._advance(chip) for chip in unfinished]
            if not any(moved):
                raise LimbeckError("this schedule waits for itself: too few micro-batches for its stages")
            unfinished = [chip for chip in unfinished if len(self.slots[chip]) < len(self.orders[chip])]
        slots = tuple(tuple(own) for own in self.slots)
        return Timeline(max(self.free), slots, tuple(self.busy))

    def _advance(self, chip: int) -> bool:
        """Run passes of one chip until one has to wait for its input; return True if any pass ran."""
        order = self.orders[chip]
        slots = self.slots[chip]
        begun = len(slots)
        while len(slots) < len(order):
            pieces = order[len(slots)]
            ready = self._ready(pieces)
            if ready is None:
                break
            start = max(self.free[chip], ready)
            duration = self._duration(pieces)
            end = start + duration
            for piece in pieces:
                self.done[piece] = end
            self.free[chip] = end
            self.busy[chip] += duration
            slots.append(Slot(pieces, start, end))
        return len(slots) > begun

    def _ready(self, pieces: Pieces) -> float | None:
        """Return the second at which all inputs of the pieces have arrived.

        The result is None if an input has not been computed yet.
        """
        latest = 0.0
        for piece in pieces:
            need = self._input(piece)
            if need is None or need in pieces:
                continue
            arrival = self.done.get(need)
            if arrival is None:
                return None
            if need.stage != piece.stage:
                arrival += self.times.send
            latest = max(latest, arrival)
        return latest

    def _input(self, piece: Piece) -> Piece | None:
        """Return the pass whose output `piece` needs; None for the forward pass of the first stage."""
        kind, direction, stage, micro = piece
        if kind == "W":
            return Piece("B", direction, stage, micro)
        if kind == "F":
            return Piece("F", direction, stage - 1, micro) if stage else None
        if stage == self.stages - 1:
            return Piece("F", direction, stage, micro)
        return Piece("B", direction, stage + 1, micro)

    def _duration(self, pieces: Pieces) -> float:
        """Return the seconds that the pieces of one slot take together."""
        times = self.times
        if len(pieces) == PAIR:
            return times.pair(pieces[0].stage, pieces[1].stage)
        kinds = {"F": times.forward, "B": times.backward, "W": times.weight}
        return sum(kinds[piece.kind][piece.stage] for piece in pieces)


# ------------------------------------------------------------ orders of passes: one list a chip


def _with_weight(piece: Piece) -> Pieces:
    """Return a backward pass B followed by its weight gradients W."""
    return piece, piece._replace(kind="W")


def _gpipe(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by GPipe: all forward passes, then all backward passes (arXiv 1811.06965)."""
    order: list[Pieces] = [(Piece("F", 0, rank, m),) for m in range(micro)]
    for m in reversed(range(micro)):
        order.append(_with_weight(Piece("B", 0, rank, m)))
    return order


def _one_forward_one_backward(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by 1F1B (arXiv 1806.03377).

    After a warm-up of forward passes, one forward pass and one backward pass alternate.
    """
    return _interleaved(rank, chips, micro, 1)


def _interleaved(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by interleaved 1F1B (arXiv 2104.04473).

    Each chip has `chunks` stages, and micro-batches are processed in groups of `chips`.
    """
    ahead: list[Pieces] = []
    back: list[Pieces] = []
    for first in range(0, micro, chips):
        group = range(first, min(first + chips, micro))
        for chunk in range(chunks):
            ahead += [(Piece("F", 0, chunk * chips + rank, m),) for m in group]
        for chunk in reversed(range(chunks)):
            back += [_with_weight(Piece("B", 0, chunk * chips + rank, m)) for m in group]
    warm_up = (chips - rank - 1) * (2 if chunks > 1 else 1) + (chunks - 1) * chips
    warm_up = min(len(ahead), warm_up)
    order = ahead[:warm_up]
    steady = len(ahead) - warm_up
    for forward, backward in zip(ahead[warm_up:], back[:steady], strict=True):
        order += [forward, backward]
    return order + back[steady:]


def _zero_bubble(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by ZB-H1 (arXiv 2401.10241).

    It is 1F1B, but the weight gradients are computed `rank` micro-batches later.
    """
    order: list[Pieces] = []
    late: list[Piece] = []
    for pieces in _one_forward_one_backward(rank, chips, micro, 1):
        order.append(pieces[:1])
        if pieces[0].kind == "F":
            continue
        late.append(pieces[1])
        if len(late) > rank:
            order.append((late.pop(0),))
    return order + [(piece,) for piece in late]


class _Both:
    """Builds the order of passes of one chip for DualPipe and DualPipeV, in their eight steps.

    Micro-batches come in two phases, of `micro` micro-batches each: phase 0 enters at the end of the pipeline
    nearer to the chip, and phase 1 comes from the other end (DualPipe) or returns (DualPipeV). The chip is
    `near` places from its end, in a half of `half` chips. `place` gives the direction and the stage of each
    phase on this chip.
    """

    def __init__(self, near: int, half: int, micro: int, place: Sequence[tuple[int, int]]) -> None:
        """Build the order of passes, `self.order`."""
        self.order: list[Pieces] = []
        self.place = place
        self.counts = {(kind, phase): 0 for kind in "FB" for phase in (0, 1)}
        self.late: list[Piece] = []
        far = half - near - 1
        for _ in range(2 * far):
            self.forward(0)
        for _ in range(near + 1):
            self.forward(0)
            self.forward(1)
        for _ in range(far):
            self.backward(1, late=True)
            self.weight()
            self.forward(1)
        for _ in range(micro - 2 * half + near + 1):
            self.overlap(0, 1)
            self.overlap(1, 0)
        for _ in range(far):
            self.backward(1)
            self.overlap(1, 0)
        self.finish(near, far)

    def finish(self, near: int, far: int) -> None:
        """Append the last backward passes; from their middle on, weight gradients are computed later.

        `near` and `far` are the places between the chip and both ends of its half.
        """
        middle = (near + 1) // 2
        for i in range(near + 1):
            self.backward(1, late=i > middle or (i == middle and near % 2 == 1))
            self.backward(0, late=i >= middle)
        for _ in range(far):
            self.weight()
            self.backward(0, late=True)
        while self.late:
            self.weight()

    def next_piece(self, kind: str, phase: int) -> Piece:
        """Return the pass of kind `kind` of the next micro-batch of `phase`."""
        micro = self.counts[kind, phase]
        self.counts[kind, phase] += 1
        direction, stage = self.place[phase]
        return Piece(kind, direction, stage, micro)

    def forward(self, phase: int) -> None:
        """Append a forward pass that overlaps with nothing."""
        self.order.append((self.next_piece("F", phase),))

    def backward(self, phase: int, late: bool = False) -> None:
        """Append a backward pass that overlaps with nothing.

        Its weight gradients follow directly or, if `late`, in a later call of `weight`.
        """
        piece = self.next_piece("B", phase)
        if not late:
            self.order.append(_with_weight(piece))
            return
        self.late.append(piece)
        self.order.append((piece,))

    def weight(self) -> None:
        """Append the earliest weight gradients that are not computed yet, if there are any."""
        if self.late:
            piece = self.late.pop(0)
            self.order.append((piece._replace(kind="W"),))

    def overlap(self, ahead: int, back: int) -> None:
        """Append a forward pass of phase `ahead` overlapped with a backward pass of phase `back`."""
        forward = self.next_piece("F", ahead)
        backward = self.next_piece("B", back)
        self.order.append((forward, *_with_weight(backward)))


def _dualpipe(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by DualPipe (arXiv 2412.19437, section 3.2.1).

    Half of the micro-batches enter at each end of the pipeline. Of P chips, chip r is stage r for one half
    and stage P-1-r for the other.
    """
    second = rank >= chips // 2
    near = chips - 1 - rank if second else rank
    own = (int(second), near)
    other = (int(not second), chips - 1 - near)
    return _Both(near, chips // 2, micro // 2, (own, other)).order


def _dualpipev(rank: int, chips: int, micro: int, chunks: int) -> list[Pieces]:
    """Return a chip's order by DualPipeV.

    All micro-batches enter at one end, and the pipeline is folded in the middle: of P chips, chip r is stage
    r and stage 2P-1-r.
    """
    down = (0, rank)
    up = (0, 2 * chips - 1 - rank)
    return _Both(rank, chips, micro, (down, up)).order


ORDERS = {
    "1f1b": _one_forward_one_backward,
    "interleaved": _interleaved,
    "zb1p": _zero_bubble,
    "dualpipe": _dualpipe,
    "dualpipev": _dualpipev,
    "gpipe": _gpipe,
}
