"""Requests of OpenAI's API, with a bound on every number and every list, and the JSON of its responses.

A parameter with a neutral value, which asks for nothing (null, an empty list, a penalty of 0), is accepted
even if this server does not know it. A parameter that asks for something that this server cannot do is an
error that names the parameter; it is never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..types import ChatOutput, GenerationOptions, ServedModel, TokenLogprob, Usage

MAX_TOKENS = 1 << 20  # tokens
MAX_SEED = 1 << 63  # seeds are signed 64-bit integers
MIN_LOGPROB = -9999.0  # JSON has no minus infinity
EFFORT = {
    "none": 0.0,
    "minimal": 1 / 64,
    "low": 1 / 16,
    "medium": 1 / 4,
    "high": None,
}  # thinking budget as a share of the model's positions; None: no limit
NEUTRAL: dict[str, Any] = {
    "parallel_tool_calls": True, "tool_choice": "none", "suffix": "", "response_format": {"type": "text"},
    "modalities": ["text"], "verbosity": "medium",
}  # fmt: skip

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Id = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Text = Annotated[str, Field(max_length=1 << 22)]
ScoredToken = tuple[
    int, float | None, tuple
]  # a token, its log-probability, and the likeliest tokens with theirs


class StrictModel(BaseModel):
    """A request object: an unknown key is an error unless its value asks for nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        """Return the request without its unknown keys whose values are neutral; they cause no error."""
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if key in cls.model_fields or not _is_neutral(key, value)
        }


def _is_neutral(key: str, value: Any) -> bool:
    """True if a parameter's value asks for nothing.

    Such a value is null, empty, false, or the default of the parameter in OpenAI's API.
    """
    if value is None or value in ([], {}, False):
        return True
    return key in NEUTRAL and NEUTRAL[key] == value


class TextPart(StrictModel):
    """A text part of a message; no other type of part is accepted."""

    type: Literal["text"]
    text: Text


class Turn(StrictModel):
    """One message.

    An assistant's thought may be in `reasoning_content`, in `reasoning`, in the content, or absent.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    name: Annotated[str, Field(max_length=200)] | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates read it: role, content as one text, and thought."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": content,
            "reasoning_content": self.reasoning_content or self.reasoning or "",
        }


class StreamOptions(StrictModel):
    """Options of a stream; with `include_usage` its last chunk holds the usage."""

    include_usage: bool = False


class SamplingRequest(StrictModel):
    """Parameters that chat and text completions share. A `top_k` of 0 or -1 keeps all tokens, as in vLLM."""

    model: Annotated[str, Field(max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: Annotated[str, Field(max_length=1000)] | None = (
        None  # this and what follows is accepted and not used
    )
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=100)] | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, whether `stop` is one string or a list."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """True if the last chunk of the stream is to hold the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, temperature: float, top_p: float) -> dict[str, Any]:
        """Return the fields of `GenerationOptions` that chat and text completions have in common.

        `temperature` and `top_p` are the defaults for a request without these parameters.
        """
        return {
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": top_p if self.top_p is None else self.top_p,
            "n": self.n or 1,
            "seed": self.seed,
            "stop": self.stop_strings,
            "ignore_eos": self.ignore_eos,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
        }


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`.

    `thinking_budget` is in tokens, `reasoning_effort` a share of the model's positions.
    """

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    keep_reasoning: bool = False

    def options(self, served: ServedModel) -> GenerationOptions:
        """Return the options of generation; by default the sampling that is recommended for DeepSeek-R1."""
        top_logprobs = None
        if self.logprobs:
            top_logprobs = self.top_logprobs or 0
        return GenerationOptions(
            **self.sampling(temperature=0.6, top_p=0.95),
            max_tokens=self.max_completion_tokens or self.max_tokens,
            thought_budget=self._thought_budget(served),
            top_logprobs=top_logprobs,
        )

    def _thought_budget(self, served: ServedModel) -> int | None:
        """Return the greatest number of tokens in the thought, None for no limit.

        It is `thinking_budget`, else the share of the model's positions that `reasoning_effort` stands for.
        """
        if self.thinking_budget is not None:
            return self.thinking_budget
        share = EFFORT[self.reasoning_effort] if self.reasoning_effort else None
        return None if share is None else int(share * served.config.max_positions)


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`.

    `echo` returns the prompt before the completion, with its `logprobs` if they are requested.
    """

    prompt: (
        Text
        | Annotated[list[Id], Field(min_length=1, max_length=MAX_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, max_length=MAX_TOKENS)]],
            Field(min_length=1, max_length=128),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        """Return the request; raises ValueError for a `best_of` other than `n`."""
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of other than n is not served here; ask for n and choose")
        return self

    def options(self) -> GenerationOptions:
        """Return the options of generation; the output is not split into a thought and an answer."""
        return GenerationOptions(
            **self.sampling(temperature=1.0, top_p=1.0),
            max_tokens=self.max_tokens,
            top_logprobs=self.logprobs,
            echo=bool(self.echo and self.logprobs is not None),
            plain=True,
        )

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


# ---------------------------------------------------------------- responses


def usage_of(usages: list[Usage]) -> dict[str, Any]:
    """Return the `usage` of a response: token counts and cost, summed over the prompts of the request."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    total = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "completion_tokens_details": {"reasoning_tokens": sum(usage.reasoning_tokens for usage in usages)},
    }
    costs = [usage.cost for usage in usages if usage.cost is not None]
    if costs:
        total["cost"] = sum(costs)
    return total


def message_of(output: ChatOutput) -> dict[str, Any]:
    """Return the assistant's `message` of a complete choice."""
    message = {"role": "assistant", "content": output.answer}
    if output.thought:
        message |= _reasoning(output.thought)
    return message


def delta_of(kind: str, text: str) -> dict[str, str]:
    """Return the `delta` of a streamed choice for a text of this kind: "thought" or "answer"."""
    return _reasoning(text) if kind == "thought" else {"content": text}


def _reasoning(text: str) -> dict[str, str]:
    """Return a thought under both of the names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def chat_logprobs(
    served: ServedModel, answer: Sequence[TokenLogprob], thought: Sequence[TokenLogprob]
) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice, or of a part of it.

    The answer's tokens are in `content`, the thought's in `reasoning_content`, which is absent without a
    thought.
    """
    logprobs: dict[str, Any] = {
        "content": [_chat_logprob(served, token) for token in answer],
        "refusal": None,
    }
    if thought:
        logprobs["reasoning_content"] = [_chat_logprob(served, token) for token in thought]
    return logprobs


def _chat_logprob(served: ServedModel, scored: TokenLogprob) -> dict[str, Any]:
    """Return a sampled token, its log-probability, and the likeliest tokens at its position."""
    top = [_token_logprob(served, token, logprob) for token, logprob in scored.top]
    return {**_token_logprob(served, scored.token, scored.logprob), "top_logprobs": top}


def _token_logprob(served: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    """Return a token's text, log-probability and UTF-8 bytes."""
    label = served.tokenizer.label(token)
    return {"token": label, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(label.encode())}


def text_logprobs(served: ServedModel, tokens: Sequence[ScoredToken], offset: int = 0) -> dict[str, Any]:
    """Return the `logprobs` of a text completion, or of a part of it: four parallel lists.

    `offset` is the position, in characters, at which the part begins in the choice's text. The first token of
    a prompt has no log-probability (None).
    """
    labels = [served.tokenizer.label(token) for token, _, _ in tokens]
    logprobs = [logprob for _, logprob, _ in tokens]
    tops = [
        _top_logprobs(served, label, logprob, top)
        for label, (_, logprob, top) in zip(labels, tokens, strict=True)
    ]
    offsets = list(accumulate(map(len, labels), initial=offset))
    return {
        "tokens": labels,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets[:-1],
    }


def _top_logprobs(
    served: ServedModel, label: str, logprob: float | None, top: Sequence[tuple[int, float]]
) -> dict[str, float] | None:
    """Return the log-probabilities of the sampled token and of the likeliest tokens, by their text.

    `label` is the text of the sampled token. Of several tokens with the same text, the likeliest counts. None
    if `logprob` is None.
    """
    if logprob is None:
        return None
    logprobs: dict[str, float] = {}
    for token, value in top:
        logprobs.setdefault(served.tokenizer.label(token), value)
    logprobs.setdefault(label, logprob)
    return logprobs
