"""Chat completions of OpenAI-compatible endpoints, read into what the response cache stores and into
`Completion`s.
N tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..text.reasoning_parser import CLOSE, join_thought
from ..types import Completion


class InvalidResponse(Exception):
    """The endpoint's response is no chat completion."""


def parse(response: Any) -> dict[str, Any]:
    """The stored fields of a chat completion.

    The thought is in `reasoning_content` (DeepSeek, vLLM) or in `reasoning` (OpenRouter, newer vLLM), or
    inside the text in its tags. Raises `InvalidResponse` if there is no message.
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
    """The `sample`-th completion of a problem from a stored response, its thought in tags."""
    text = response["content"].strip()
    if response["thought"] and CLOSE not in text:
        text = join_thought(response["thought"], text)
    tokens = unknown_tokens(response, "completion_tokens")
    logprobs = np.array(response["logprobs"], dtype=np.float32)
    return Completion(tokens, logprobs, text, response["finish"] == "stop", sample)


def unknown_tokens(response: dict[str, Any], name: str) -> np.ndarray:
    """As many ids [N] as the endpoint counted: each is -1, since an endpoint does not return ids."""
    return np.full(response["usage"][name], -1, dtype=np.int64)
