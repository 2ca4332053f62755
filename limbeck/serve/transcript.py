"""A conversation as a file of its own: Markdown to read, JSON to go on with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .conversations import Answer, Conversation


def as_markdown(talk: Conversation, say: Callable[..., str]) -> str:
    """The branch on view. Thoughts are fenced, so that nothing in them ends up as the answer's Markdown."""
    parts = [f"# {talk.title}"]
    for turn in talk.turns:
        parts += [f"## {say('chat.you')}", _fenced(turn.content)]
        for answer in turn.answers:
            parts.append(f"## {answer.model}")
            if answer.thought:
                parts += [
                    f"*{say('chat.thought')}, {say('chat.tokens', count=answer.meter.thought_tokens)}*",
                    _fenced(answer.thought),
                ]
            parts.append(answer.content)
            if answer.state not in ("done", "running"):
                parts.append(f"*{say('chat.' + answer.state)}*")
    return "\n\n".join(filter(None, parts)) + "\n"


def as_json(talk: Conversation) -> dict[str, Any]:
    """The branch on view, one conversation a side, as `/v1/chat/completions` takes it; `answers` tells how each came about."""
    sides = range(max((len(turn.answers) for turn in talk.turns), default=0))
    return {"id": talk.id, "title": talk.title, "sides": [_side(talk, side) for side in sides]}


def _side(talk: Conversation, side: int) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    answers = []
    for turn in talk.turns:
        answer = turn.answers[side if side < len(turn.answers) else 0]
        thought = {"reasoning_content": answer.thought} if answer.thought else {}
        messages += [
            {"role": "user", "content": turn.content},
            {"role": "assistant", "content": answer.content, **thought},
        ]
        answers.append(_told(answer))
    return {"messages": messages, "answers": answers}


def _told(answer: Answer) -> dict[str, Any]:
    settings = {"temperature": answer.settings.temperature, "thought_budget": answer.settings.budget}
    return {"model": answer.model, "state": answer.state, **settings, **vars(answer.meter)}


def _fenced(text: str) -> str:
    """Text as it was written, in a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"
