"""Exports of a conversation's shown branch: Markdown to read, JSON to continue with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .conversations import Answer, Conversation


def as_markdown(conversation: Conversation, say: Callable[..., str]) -> str:
    """The conversation as Markdown; `say` gives phrases in its language.

    Questions and thoughts are fenced, so that their text is not rendered.
    """
    parts = [f"# {conversation.title}"]
    for turn in conversation.turns:
        parts.append(f"## {say('chat.you')}")
        parts.append(_fenced(turn.content))
        for answer in turn.answers:
            parts += _answer_parts(answer, say)
    return "\n\n".join(filter(None, parts)) + "\n"


def _answer_parts(answer: Answer, say: Callable[..., str]) -> list[str]:
    """An answer's heading, thought, content, and its state if it is not complete."""
    parts = [f"## {answer.model}"]
    if answer.thought:
        tokens = say("chat.tokens", count=answer.meter.thought_tokens)
        parts.append(f"*{say('chat.thought')}, {tokens}*")
        parts.append(_fenced(answer.thought))
    parts.append(answer.content)
    if answer.state not in ("done", "running"):
        parts.append(f"*{say('chat.' + answer.state)}*")
    return parts


def as_json(conversation: Conversation) -> dict[str, Any]:
    """The conversation as JSON.

    Each side has `messages` for `/v1/chat/completions`, and the settings of its answers.
    """
    count = max((len(turn.answers) for turn in conversation.turns), default=0)
    sides = [_side(conversation, side) for side in range(count)]
    return {"id": conversation.id, "title": conversation.title, "sides": sides}


def _side(conversation: Conversation, side: int) -> dict[str, Any]:
    """Messages and answers of one side; a turn with fewer sides gives its first answer."""
    messages: list[dict[str, str]] = []
    answers = []
    for turn in conversation.turns:
        answer = turn.answers[side if side < len(turn.answers) else 0]
        reply = {"role": "assistant", "content": answer.content}
        if answer.thought:
            reply["reasoning_content"] = answer.thought
        messages.append({"role": "user", "content": turn.content})
        messages.append(reply)
        answers.append(_metadata(answer))
    return {"messages": messages, "answers": answers}


def _metadata(answer: Answer) -> dict[str, Any]:
    """An answer's model, state, settings and meter."""
    return {
        "model": answer.model,
        "state": answer.state,
        "temperature": answer.settings.temperature,
        "thought_budget": answer.settings.budget,
        **vars(answer.meter),
    }


def _fenced(text: str) -> str:
    """Text in a fence that is longer than any fence inside it."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"
