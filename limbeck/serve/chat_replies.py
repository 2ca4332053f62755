"""Answers being given: each is a task of the server's that needs no page to look at it.

What has been said is on disk at least every `SAVE_SECONDS`. A page that follows is told what it does not know yet, however
much that is and however late it comes: nothing is queued for those who read slowly.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ..types import LimbeckError
from .conversations import Conversations, Meter
from .markdown_stream import Prose

SAVE_SECONDS = 1.0
TICK = 0.08  # seconds between two looks at what has grown
PARTS = ("thought", "answer")


class Reply:
    """One answer while it is given."""

    def __init__(self, number: int, conversation: str):
        self.number, self.conversation = number, conversation
        self.prose = {part: Prose() for part in PARTS}
        self.meter = Meter()
        self.state, self.why = "running", ""
        self.begun = time.monotonic()
        self._unsaved = dict.fromkeys(PARTS, "")
        self._saving = asyncio.Lock()

    @property
    def unsaved(self) -> bool:
        return any(self._unsaved.values())

    @property
    def now(self) -> Meter:
        """The figures of this moment: time passes also while the model is silent."""
        gone = time.monotonic() - self.begun
        return replace(
            self.meter, seconds=gone, thought_seconds=gone if self.thinking else self.meter.thought_seconds
        )

    @property
    def thinking(self) -> bool:
        """Whether the answer itself has not begun."""
        return not (self.prose["answer"].blocks or self.prose["answer"].tail)

    def end(self, state: str, why: str = "") -> None:
        """Say how it ended; whoever says so first is right."""
        if self.state == "running":
            self.state, self.why = state, why

    def take(self, piece: Any) -> None:
        """One piece that a model said."""
        now, thinks = time.monotonic() - self.begun, piece.kind == "thought"
        if piece.kind in PARTS:
            self.prose[piece.kind].add(piece.text)
            self._unsaved[piece.kind] += piece.text
        if piece.kind == "end":
            self.end("length" if piece.finish == "length" else "done")
        self.meter = replace(
            self.meter,
            tokens=self.meter.tokens + piece.tokens,
            seconds=now,
            thought_tokens=self.meter.thought_tokens + (piece.tokens if thinks else 0),
            thought_seconds=now if thinks else self.meter.thought_seconds,
        )
        if piece.usage is not None:  # what the engine has counted is better than what we have
            used = piece.usage
            self.meter = replace(
                self.meter,
                thought_tokens=used.reasoning_tokens,
                tokens=used.completion_tokens,
                cost=used.cost,
            )

    async def settle(self) -> None:
        """Render what is finished, in a thread: a block of hostile Markdown takes its time."""
        for prose in self.prose.values():
            if prose.ready():
                prose.settle(await asyncio.to_thread(prose.settled))

    async def save(self, shelf: Conversations) -> None:
        """Put on disk what has been said since, each save after the one before."""
        async with self._saving:
            said = [self._unsaved[part] for part in PARTS]
            self._unsaved = dict.fromkeys(PARTS, "")
            await asyncio.to_thread(shelf.save, self.number, *said, self.meter, self.state, self.why)


@dataclass
class Seen:
    """How far one page has read one part: blocks, and characters of the tail behind them."""

    blocks: int = -1
    tail: int = 0

    def growth(self, prose: Prose) -> dict[str, Any] | None:
        """What the page lacks, and from now on has: blocks to append, the tail from its `at`-th character on;
        `fresh` where it replaces all that is there."""
        fresh = self.blocks < 0
        first = prose.last() if fresh else self.blocks
        nothing = self.tail == len(prose.tail) if not fresh else not prose.tail
        if nothing and first == len(prose.blocks):
            return None
        at = self.tail if first == len(prose.blocks) and not fresh else 0
        self.blocks, self.tail = len(prose.blocks), len(prose.tail)
        return {
            "fresh": fresh,
            "folded": fresh and first > 0,
            "html": "".join(prose.blocks[first:]),
            "at": at,
            "tail": prose.tail[at:],
        }


class Replies:
    """All answers being given, and those who listen."""

    def __init__(self, shelf: Conversations, service: Any):
        self.shelf, self.service = shelf, service
        self._running: dict[int, tuple[Reply, asyncio.Task[None]]] = {}

    def begin(
        self, conversation: str, number: int, model: str, temperature: float, budget: int | None
    ) -> None:
        """Answer; whoever asked need not wait."""
        reply = Reply(number, conversation)
        task = asyncio.create_task(self._give(reply, model, temperature, budget), name=f"answer {number}")
        self._running[number] = (reply, task)
        task.add_done_callback(lambda _: self._running.pop(number, None))

    def running(self, conversation: str) -> list[Reply]:
        return [reply for reply, _ in self._running.values() if reply.conversation == conversation]

    async def stop(self, conversation: str | None = None, state: str = "stopped") -> None:
        """End the answers of a conversation, or of all; what they said stays."""
        tasks = []
        for reply, task in self._running.values():
            if conversation in (None, reply.conversation):
                reply.end(state)
                task.cancel()
                tasks.append(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self, conversation: str) -> AsyncIterator[dict[str, Any]]:
        """What grows in a conversation, from all there is now until nothing runs any more; at least the time, each second."""
        seen: dict[int, dict[str, Seen]] = {}
        told: dict[int, float] = {}
        while replies := self.running(conversation):
            for reply in replies:
                known = seen.setdefault(reply.number, {part: Seen() for part in PARTS})
                parts = {part: growth for part in PARTS if (growth := known[part].growth(reply.prose[part]))}
                if parts or time.monotonic() - told.get(reply.number, 0.0) > SAVE_SECONDS:
                    told[reply.number] = time.monotonic()
                    yield {
                        "answer": reply.number,
                        "parts": parts,
                        "meter": reply.now,
                        "thinking": reply.thinking,
                    }
            await asyncio.sleep(TICK)
            for number in seen.keys() - {reply.number for reply in self.running(conversation)}:
                del seen[number]
                yield {"answer": number, "ended": True}

    async def _give(self, reply: Reply, model: str, temperature: float, budget: int | None) -> None:
        """From the first piece to the last; however it ends, what was said is saved."""
        keeper = asyncio.create_task(self._keep(reply))
        try:
            messages = await asyncio.to_thread(self.shelf.messages, reply.number)
            async with aclosing(
                self.service.chat(model, messages, temperature=temperature, thought_budget=budget)
            ) as pieces:
                async for piece in pieces:
                    reply.take(piece)
        except LimbeckError as error:
            reply.end("failed", str(error))
        except asyncio.CancelledError:
            reply.end("interrupted")
            raise
        except BaseException:
            reply.end("failed")
            raise
        finally:
            reply.end("done")
            keeper.cancel()
            await asyncio.shield(reply.save(self.shelf))

    async def _keep(self, reply: Reply) -> None:
        """Render and save as the answer grows, also while the model is silent."""
        saved = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            await reply.settle()
            if reply.unsaved and time.monotonic() - saved > SAVE_SECONDS:
                await asyncio.shield(reply.save(self.shelf))
                saved = time.monotonic()
