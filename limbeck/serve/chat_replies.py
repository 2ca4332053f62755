"""Replies under generation: each is an asyncio task of the server and goes on without an open page.

New text of a reply is stored about every `SAVE_SECONDS`. A page that follows a reply receives only what it
lacks at that moment, so no queue of events grows for a slow page.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ..types import LimbeckError, Message
from .conversations import Conversations, Meter, Settings
from .markdown_stream import MarkdownStream
from .service import Service
from .types import Delta

SAVE_SECONDS = 1.0  # seconds between two saves, and the longest time between two events of a follower
POLL_SECONDS = 0.08  # seconds between two checks for new text of a reply
PARTS = ("thought", "answer")


class Reply:
    """One answer that a model is generating for a conversation.

    `number` is the answer's id in the database. `streams` holds the text of its two parts, "thought" and
    "answer"; `meter` its tokens and seconds; `state` is "running" until the reply ends, and `why` is the
    reason of a failure.
    """

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
        """The seconds since the start of the reply."""
        return time.monotonic() - self.started

    @property
    def thinking(self) -> bool:
        """True as long as the part "answer" has no text."""
        answer = self.streams["answer"]
        return not (answer.blocks or answer.tail)

    def current_meter(self) -> Meter:
        """Return the meter with its seconds counted up to now, even if no token has arrived lately."""
        seconds = self.seconds
        thought_seconds = seconds if self.thinking else self.meter.thought_seconds
        return replace(self.meter, seconds=seconds, thought_seconds=thought_seconds)

    def end(self, state: str, why: str = "") -> None:
        """Set the final state and its reason `why`; only the first call has an effect."""
        if self.state == "running":
            self.state = state
            self.why = why

    def add(self, delta: Delta) -> None:
        """Append a delta's text to its part and count its tokens.

        A delta of kind "end" also ends the reply.
        """
        if delta.kind in PARTS:
            self.streams[delta.kind].add(delta.text)
            self._unsaved[delta.kind] += delta.text
        if delta.kind == "end":
            self.end("length" if delta.finish == "length" else "done")
        self._count(delta)

    def _count(self, delta: Delta) -> None:
        """Add a delta's tokens and the time to the meter.

        If the delta carries the engine's usage, as the last one does, that replaces the token counts.
        """
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
        """Render the finished Markdown blocks of both parts to HTML.

        Runs in a thread, because hostile Markdown can take long to render.
        """
        for stream in self.streams.values():
            if stream.ready():
                stream.commit(await asyncio.to_thread(stream.render))

    async def save(self, store: Conversations) -> None:
        """Store the text since the last save, the meter and the state.

        Concurrent saves run one after another.
        """
        async with self._saving:
            thought, answer = (self._unsaved[part] for part in PARTS)
            self._unsaved = dict.fromkeys(PARTS, "")
            await asyncio.to_thread(
                store.save, self.number, thought, answer, self.meter, self.state, self.why
            )


@dataclass
class PageCursor:
    """How much of one part ("thought" or "answer") of a reply one page has received.

    `blocks` is the number of HTML blocks, -1 before the first event; `tail` the number of characters of the
    plain text after the blocks.
    """

    blocks: int = -1
    tail: int = 0

    def advance(self, stream: MarkdownStream) -> dict[str, Any] | None:
        """Return the event that brings the page up to date and move the cursor; None if nothing is new.

        In the event, `html` has the blocks to append, and `tail` replaces the page's plain-text tail from
        character `at` on. `fresh` is True if the event replaces the whole part; `folded` is True if earlier
        blocks are left out of it.
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
    """How much of a reply one page has received, and the time of the last event that it was sent."""

    def __init__(self) -> None:
        self.parts = {part: PageCursor() for part in PARTS}
        self.last_event = 0.0

    def advance(self, reply: Reply) -> dict[str, Any] | None:
        """Return the event that brings the page up to date, or None if nothing is new.

        After `SAVE_SECONDS` without an event, returns one without changes, so that the page's clock moves on.
        """
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
    """All replies under generation, and the streams of events for the pages that follow them."""

    def __init__(self, store: Conversations, service: Service):
        self.store = store
        self.service = service
        self._running: dict[int, tuple[Reply, asyncio.Task[None]]] = {}

    def begin(self, conversation: str, number: int, model: str, settings: Settings) -> None:
        """Start a task that generates the answer with the id `number` in a conversation.

        Must be called on the event loop.
        """
        reply = Reply(number, conversation)
        task = asyncio.create_task(self._generate(reply, model, settings), name=f"answer {number}")
        self._running[number] = (reply, task)
        task.add_done_callback(lambda _: self._running.pop(number, None))

    def running(self, conversation: str) -> list[Reply]:
        """Return the replies of a conversation that are still being generated."""
        return [reply for reply, _ in self._running.values() if reply.conversation == conversation]

    async def stop(self, conversation: str | None = None, state: str = "stopped") -> None:
        """End the replies of one conversation, or of all conversations if `conversation` is None.

        Their text so far is kept; `state` becomes their final state. Returns once the tasks have ended.
        """
        tasks = []
        for reply, task in self._running.values():
            if conversation in (None, reply.conversation):
                reply.end(state)
                task.cancel()
                tasks.append(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def follow(self, conversation: str) -> AsyncIterator[dict[str, Any]]:
        """Yield events of a conversation's replies until none is running.

        The first event of a reply holds its text up to now, each later one the change. The last event of a
        reply has `ended`.
        """
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
        """Stream a reply from the service. Its text is saved however the generation ends."""
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
        if settings.system:
            messages.insert(0, Message(role="system", content=settings.system))
        stream = self.service.chat(
            model,
            messages,
            temperature=settings.temperature,
            thought_budget=settings.budget,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
        )
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                reply.add(delta)

    async def _save_regularly(self, reply: Reply) -> None:
        """Render and save a growing reply until the task is cancelled."""
        last_save = time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await reply.render()
            if reply.unsaved and time.monotonic() - last_save > SAVE_SECONDS:
                await asyncio.shield(reply.save(self.store))
                last_save = time.monotonic()
