"""Conversion of the chat completions of OpenAI-compatible endpoints: first to the JSON fields that the
response cache stores, then to `Completion`s.

Dimensions: N tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..text.reasoning_parser import CLOSE, join_thought
from ..types import Completion


class InvalidResponse(Exception):
    """The endpoint's response is not a chat completion."""


def parse(response: Any) -> dict[str, Any]:
    """Return the fields of a chat completion that the response cache stores: the text (`content`), the
    reasoning (`thought`), the finish reason, the token counts, the log-probabilities, and the model's name.

    The reasoning is read from `reasoning_content` (DeepSeek, vLLM) or `reasoning` (OpenRouter, newer vLLM);
    where the endpoint leaves it inside the text, between `<think>` tags, the text is returned as it is.
    Raises `InvalidResponse` if the response has no message.
    """
    try:
        body = response.model_dump()
        choice = body["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
    except (AttributeError, IndexError, KeyError, TypeError):
        raise InvalidResponse("no choices") from None
    thought = message.get("reasoning_content") or message.get("reasoning")
    usage = body.get("usage") or {}
    logprobs = choice.get("logprobs") or {}
    return {
        "content": content,
        "thought": thought if isinstance(thought, str) else "",
        "finish": choice.get("finish_reason"),
        "usage": {name: usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")},
        "logprobs": [token["logprob"] for token in logprobs.get("content") or []],
        "answered_by": body.get("model"),
    }


def to_completion(response: dict[str, Any], sample: int) -> Completion:
    """Return a stored response as a `Completion`; `sample` is its number within the problem's group.
    Reasoning that the endpoint returned separately is put before the text, between `<think>` tags."""
    text = response["content"].strip()
    if response["thought"] and CLOSE not in text:
        text = join_thought(response["thought"], text)
    tokens = unknown_tokens(response, "completion_tokens")
    logprobs = np.array(response["logprobs"], dtype=np.float32)
    return Completion(tokens, logprobs, text, response["finish"] == "stop", sample)


def unknown_tokens(response: dict[str, Any], name: str) -> np.ndarray:
    """Return an array [N] of -1 in place of the token ids, which an endpoint does not return. N is the count
    that the endpoint reports under `name`, such as `completion_tokens`."""
    return np.full(response["usage"][name], -1, dtype=np.int64)
