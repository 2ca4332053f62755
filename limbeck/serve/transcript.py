"""Exports of the branch of a conversation that is on view: Markdown to read, JSON to continue with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .conversations import Answer, Conversation


def as_markdown(conversation: Conversation, say: Callable[..., str]) -> str:
    """Return the conversation as Markdown.

    `say` returns the phrase of a key in the reader's language. Questions and thoughts are inside code fences,
    so that their text is not rendered.
    """
    parts = [f"# {conversation.title}"]
    for turn in conversation.turns:
        parts.append(f"## {say('chat.you')}")
        parts.append(_fenced(turn.content))
        for answer in turn.answers:
            parts += _answer_parts(answer, say)
    return "\n\n".join(filter(None, parts)) + "\n"


def _answer_parts(answer: Answer, say: Callable[..., str]) -> list[str]:
    """Return the parts of an answer as Markdown.

    They are a heading with the model's name, the thought, the content, and the state if it is not "done".
    """
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
    """Return the conversation as a JSON object.

    A side is one of the models that answer side by side. For each side, the object has `messages` for
    `/v1/chat/completions`, and `answers` with the model and the settings of each answer.
    """
    count = max((len(turn.answers) for turn in conversation.turns), default=0)
    sides = [_side(conversation, side) for side in range(count)]
    return {"id": conversation.id, "title": conversation.title, "sides": sides}


def _side(conversation: Conversation, side: int) -> dict[str, Any]:
    """Return the messages and the answers of one side.

    For a turn that was answered by fewer models, the answer of its first side is taken.
    """
    messages: list[dict[str, str]] = []
    answers = []
    if conversation.settings.system:
        messages.append({"role": "system", "content": conversation.settings.system})
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
    """Return the model, state, settings, token counts and times of an answer."""
    return {
        "model": answer.model,
        "state": answer.state,
        "temperature": answer.settings.temperature,
        "thought_budget": answer.settings.budget,
        "top_p": answer.settings.top_p,
        "max_tokens": answer.settings.max_tokens,
        "system": answer.settings.system,
        **vars(answer.meter),
    }


def _fenced(text: str) -> str:
    """Return the text inside a code fence that is longer than any fence in the text."""
    longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}text\n{text}\n{fence}"
