"""Replies under generation: each is a task of the server and needs no open page.

A reply is stored at least every `SAVE_SECONDS`. A page that follows it receives the difference from its own
state, so no queue grows for a slow page.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ..types import LimbeckError
from .conversations import Conversations, Meter, Settings
from .markdown_stream import MarkdownStream
from .service import Service
from .types import Delta

SAVE_SECONDS = 1.0  # seconds between two saves, and the longest time between two events of a follower
POLL_SECONDS = 0.08  # seconds between two looks at a growing reply
PARTS = ("thought", "answer")


class Reply:
    """One answer under generation: its text, its meter and its state, "running" until it ends."""

    def __init__(self, number: int, conversation: str):
        self.number = number
        self.conversation = conversation
        self.streams = {part: MarkdownStream() for part in PARTS}
        self.meter = Meter()
        self.state = "running"
        self.why = ""
        self.started = time.monotonic()
        self._unsaved = dict.fromkeys(PARTS, "")
        self._saving = asyncio.Lock()

    @property
    def unsaved(self) -> bool:
        """True if text has been added since the last save."""
        return any(self._unsaved.values())

    @property
    def seconds(self) -> float:
        """Seconds since the reply has started."""
        return time.monotonic() - self.started

    @property
    def thinking(self) -> bool:
        """True until the answer's first text."""
        answer = self.streams["answer"]
        return not (answer.blocks or answer.tail)

    def current_meter(self) -> Meter:
        """The meter with the time up to now, also while no token arrives."""
        seconds = self.seconds
        thought_seconds = seconds if self.thinking else self.meter.thought_seconds
        return replace(self.meter, seconds=seconds, thought_seconds=thought_seconds)

    def end(self, state: str, why: str = "") -> None:
        """Set the final state; only the first call counts."""
        if self.state == "running":
            self.state = state
            self.why = why

    def add(self, delta: Delta) -> None:
        """Add a delta's text and tokens."""
        if delta.kind in PARTS:
            self.streams[delta.kind].add(delta.text)
            self._unsaved[delta.kind] += delta.text
        if delta.kind == "end":
            self.end("length" if delta.finish == "length" else "done")
        self._count(delta)

    def _count(self, delta: Delta) -> None:
        """Update the meter; the engine's usage, once it is known, replaces the counted tokens."""
        seconds = self.seconds
        meter = self.meter
        thought_tokens = meter.thought_tokens
        thought_seconds = meter.thought_seconds
        if delta.kind == "thought":
            thought_tokens += delta.tokens
            thought_seconds = seconds
        tokens = meter.tokens + delta.tokens
        meter = Meter(thought_tokens, tokens, thought_seconds, seconds, meter.cost)
        if delta.usage is not None:
            usage = delta.usage
            meter = replace(
                meter,
                thought_tokens=usage.reasoning_tokens,
                tokens=usage.completion_tokens,
                cost=usage.cost,
            )
        self.meter = meter

    async def render(self) -> None:
        """Render finished blocks, in a thread because hostile Markdown can take long."""
        for stream in self.streams.values():
            if stream.ready():
                stream.commit(await asyncio.to_thread(stream.render))

    async def save(self, store: Conversations) -> None:
        """Store the text since the last save, and the state. Saves follow one another."""
        async with self._saving:
            thought, answer = (self._unsaved[part] for part in PARTS)
            self._unsaved = dict.fromkeys(PARTS, "")
            await asyncio.to_thread(
                store.save, self.number, thought, answer, self.meter, self.state, self.why
            )


@dataclass
class PageCursor:
    """The position of one page in one part: received blocks, and received characters of the tail."""

    blocks: int = -1
    tail: int = 0

    def advance(self, stream: MarkdownStream) -> dict[str, Any] | None:
        """The event that brings the page up to date, None if it is; the cursor moves with it.

        `html` are the blocks to append, `tail` replaces the page's tail from character `at` on. With `fresh`,
        the event replaces the whole part; `folded` means that earlier blocks are left out.
        """
        fresh = self.blocks < 0
        blocks = len(stream.blocks)
        first = stream.first_recent_block() if fresh else self.blocks
        known_tail = 0 if fresh else self.tail
        if first == blocks and known_tail == len(stream.tail):
            return None
        at = known_tail if first == blocks else 0
        self.blocks = blocks
        self.tail = len(stream.tail)
        return {
            "fresh": fresh,
            "folded": fresh and first > 0,
            "html": "".join(stream.blocks[first:]),
            "at": at,
            "tail": stream.tail[at:],
        }


class ReplyCursor:
    """The position of one page in a reply, and the time of its last event."""

    def __init__(self) -> None:
        self.parts = {part: PageCursor() for part in PARTS}
        self.last_event = 0.0

    def advance(self, reply: Reply) -> dict[str, Any] | None:
        """The event that brings the page up to date, None if it is; at least one each `SAVE_SECONDS`."""
        changes = {}
        for part, cursor in self.parts.items():
            change = cursor.advance(reply.streams[part])
            if change:
                changes[part] = change
        now = time.monotonic()
        if not changes and now - self.last_event <= SAVE_SECONDS:
            return None
        self.last_event = now
        return {
            "answer": reply.number,
            "parts": changes,
            "meter": reply.current_meter(),
            "thinking": reply.thinking,
        }


class Replies:
    """All replies under generation, and the streams of events for pages that follow them."""

    def __init__(self, store: Conversations, service: Service):
        self.store = store
        self.service = service
        self._running: dict[int, tuple[Reply, asyncio.Task[None]]] = {}

    def begin(self, conversation: str, number: int, model: str, settings: Settings) -> None:
        """Start the generation of an answer as a task. Call it on the event loop."""
        reply = Reply(number, conversation)
        task = asyncio.create_task(self._generate(reply, model, settings), name=f"answer {number}")
        self._running[number] = (reply, task)
        task.add_done_callback(lambda _: self._running.pop(number, None))

    def running(self, conversation: str) -> list[Reply]:
        """The running replies of a conversation."""
        return [reply for reply, _ in self._running.values() if reply.conversation == conversation]

    async def stop(self, conversation: str | None = None, state: str = "stopped") -> None:
        """End the replies of a conversation, or all of them; their text is kept."""
        tasks = []
        for reply, task in self._running.values():
            if conversation in (None, reply.conversation):
                reply.end(state)
                task.cancel()
                tasks.append(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self, conversation: str) -> AsyncIterator[dict[str, Any]]:
        """Events of a conversation's replies: all text up to now, then each change, until no reply runs."""
        cursors: dict[int, ReplyCursor] = {}
        while True:
            replies = self.running(conversation)
            if not replies:
                return
            for reply in replies:
                cursor = cursors.setdefault(reply.number, ReplyCursor())
                event = cursor.advance(reply)
                if event:
                    yield event
            await asyncio.sleep(POLL_SECONDS)
            running = {reply.number for reply in self.running(conversation)}
            for number in cursors.keys() - running:
                del cursors[number]
                yield {"answer": number, "ended": True}

    async def _generate(self, reply: Reply, model: str, settings: Settings) -> None:
        """Stream a reply from the service; however it ends, its text is saved."""
        saver = asyncio.create_task(self._save_regularly(reply))
        try:
            await self._stream(reply, model, settings)
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
            saver.cancel()
            await asyncio.shield(reply.save(self.store))

    async def _stream(self, reply: Reply, model: str, settings: Settings) -> None:
        messages = await asyncio.to_thread(self.store.messages, reply.number)
        stream = self.service.chat(
            model, messages, temperature=settings.temperature, thought_budget=settings.budget
        )
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                reply.add(delta)

    async def _save_regularly(self, reply: Reply) -> None:
        """Render and save a growing reply until cancelled."""
        last_save = time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await reply.render()
            if reply.unsaved and time.monotonic() - last_save > SAVE_SECONDS:
                await asyncio.shield(reply.save(self.store))
                last_save = time.monotonic()
