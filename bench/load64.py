"""A minute of 64 streams at once, each begun anew when it ends: errors, and how equal the shares are.

    python -m bench.load64 --model runs/quickstart --seconds 60
    python -m bench.load64 --model models/smollm2-135m --seconds 60

Streams differ in length and prompt; one in eight leaves in the middle. Jain's index of the tokens a stream
got is 1 where all got the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from dataclasses import dataclass

from limbeck.types import generator

from .serving import WORDS, free_port, limbeck, running
from .workers.stream import listen


@dataclass
class Share:
    """What one of the streams got: `Share(answers=12, events=900)`."""

    answers: int = 0
    left: int = 0
    events: int = 0
    worst_first: float = 0.0
    error: str = ""


async def keep_asking(port: int, stream: int, until: float, share: Share) -> None:
    """Send one request after another until `until`; one in eight disconnects halfway."""
    random = generator("bench.load64", stream)
    while time.monotonic() < until and not share.error:
        body = {
            "model": "model",
            "prompt": " ".join(random.choice(WORDS, 8)),
            "max_tokens": int(random.integers(16, 128)),
            "ignore_eos": True,
            "seed": int(random.integers(1 << 30)),
        }
        if random.random() < 1 / 8:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.random()):
                    await listen("127.0.0.1", port, body)
            share.left += 1
            continue
        heard = await listen("127.0.0.1", port, body)
        share.error = heard.error
        share.answers, share.events = share.answers + 1, share.events + len(heard.events)
        share.worst_first = max(share.worst_first, heard.events[0] - heard.asked if heard.events else 0.0)


async def load(port: int, streams: int, seconds: float) -> list[Share]:
    """All of them for so long."""
    shares, until = [Share() for _ in range(streams)], time.monotonic() + seconds
    await asyncio.gather(*(keep_asking(port, i, until, share) for i, share in enumerate(shares)))
    return shares


def fairness(numbers: list[int]) -> float:
    """Jain, Chiu and Hawe 1984: (sum x)^2 / (n sum x^2)."""
    return sum(numbers) ** 2 / (len(numbers) * sum(x * x for x in numbers))


def main() -> None:
    """Serve a model, load it with all streams, and print throughput and fairness."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    port = free_port()
    with running(
        limbeck(options.model, port, options.threads), port, {"OMP_NUM_THREADS": str(options.threads)}
    ):
        begin = time.monotonic()
        shares = asyncio.run(load(port, options.streams, options.seconds))
        took = time.monotonic() - begin  # what had begun was heard to its end
    errors, events = [share.error for share in shares if share.error], [share.events for share in shares]
    print(
        f"{options.streams} streams for {options.seconds:.0f} s: {sum(s.answers for s in shares)} answers, "
        f"{sum(s.left for s in shares)} left in the middle, {len(errors)} errors; "
        f"{sum(events) / took:.0f} events/s over {took:.0f} s; "
        f"a stream got {min(events)} to {max(events)}, Jain's index {fairness(events):.3f}; "
        f"worst wait for a first token {max(s.worst_first for s in shares):.2f} s"
    )
    raise SystemExit(errors[0] if errors else 0)


if __name__ == "__main__":
    main()
