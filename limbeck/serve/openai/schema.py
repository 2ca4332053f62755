"""What clients of OpenAI's API send, with a bound on every number and every list; and the shapes that they are sent.

What asks for nothing (null, an empty list, a penalty of 0) may be there; what asks for something that this server cannot do
is refused by name, never passed over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..service import Answered, GenerationOptions, Said, Served, Usage

MOST = 1 << 20  # tokens
SEED = 1 << 63
EFFORT = {
    "none": 0.0,
    "minimal": 1 / 64,
    "low": 1 / 16,
    "medium": 1 / 4,
    "high": None,
}  # of the model's positions
NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "parallel_tool_calls": True, "tool_choice": "none", "suffix": "",
    "response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium",
}  # fmt: skip

Tokens = Annotated[int, Field(ge=1, le=MOST)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Id = Annotated[int, Field(ge=0, le=MOST)]
Text = Annotated[str, Field(max_length=1 << 22)]


class Asked(BaseModel):
    """Unknown keys are mistakes, unless they ask for nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing_asked(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        empty = {
            key
            for key, value in data.items()
            if value is None or value in ([], {}, False) or NEUTRAL.get(key, ...) == value
        }
        return {key: value for key, value in data.items() if key in cls.model_fields or key not in empty}


class TextPart(Asked):
    """Content in parts, as newer clients send it; only text is understood."""

    type: Literal["text"]
    text: Text


class Turn(Asked):
    """One message. An assistant's thought may come back as `reasoning_content`, as `reasoning`, inside the content, or not at all."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    name: Annotated[str, Field(max_length=200)] | None = None

    def plain(self) -> dict[str, str]:
        """As a template reads it."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {
            "role": role,
            "content": text,
            "reasoning_content": self.reasoning_content or self.reasoning or "",
        }


class StreamOptions(Asked):
    """Whether a stream ends with its usage."""

    include_usage: bool = False


class Sampled(Asked):
    """What both kinds of request may say about sampling."""

    model: Annotated[str, Field(max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: Annotated[str, Field(max_length=1000)] | None = None  # what follows is taken, and not used
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=100)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampled):
    """`POST /v1/chat/completions`. `thinking_budget` is in tokens; `reasoning_effort` is one in proportion to the model's room."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    thinking_budget: Annotated[int, Field(ge=0, le=MOST)] | None = None
    keep_reasoning: bool = False

    def wish(self, served: Served) -> GenerationOptions:
        share = EFFORT[self.reasoning_effort] if self.reasoning_effort else None
        budget = None if share is None else int(share * served.config.max_positions)
        return GenerationOptions(
            0.6 if self.temperature is None else self.temperature,
            0.95 if self.top_p is None else self.top_p,
            self.max_completion_tokens or self.max_tokens,
            self.n or 1,
            self.seed,
            self.stops,
            budget if self.thinking_budget is None else self.thinking_budget,
            (self.top_logprobs or 0) if self.logprobs else None,
            endless=self.ignore_eos,
        )


class CompletionRequest(Sampled):
    """`POST /v1/completions`: a text goes on. `echo` gives the prompt back, with `logprobs` its log-probabilities too."""

    prompt: (
        Text
        | Annotated[list[Id], Field(min_length=1, max_length=MOST)]
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[
            list[Annotated[list[Id], Field(min_length=1, max_length=MOST)]],
            Field(min_length=1, max_length=128),
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MOST)] | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of other than n is not served here; ask for n and choose")
        return self

    def wish(self, served: Served) -> GenerationOptions:
        return GenerationOptions(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.max_tokens,
            self.n or 1,
            self.seed,
            self.stops,
            None,
            self.logprobs,
            bool(self.echo and self.logprobs is not None),
            self.ignore_eos,
            plain=True,
        )

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


# ---------------------------------------------------------------- what is sent


def usage_of(usages: list[Usage]) -> dict[str, Any]:
    """The usage of one request, which may have had several prompts."""
    read, said = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    told = {
        "prompt_tokens": read,
        "completion_tokens": said,
        "total_tokens": read + said,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
        "completion_tokens_details": {"reasoning_tokens": sum(u.reasoning_tokens for u in usages)},
    }
    costs = [u.cost for u in usages if u.cost is not None]
    return {**told, "cost": sum(costs)} if costs else told


def message_of(answered: Answered) -> dict[str, Any]:
    """The thought under both names that clients know."""
    thought = (
        {"reasoning_content": answered.thought, "reasoning": answered.thought} if answered.thought else {}
    )
    return {"role": "assistant", "content": answered.answer, **thought}


def delta_of(kind: str, text: str) -> dict[str, str]:
    """As `message_of`, piece by piece."""
    return {"reasoning_content": text, "reasoning": text} if kind == "thought" else {"content": text}


def chat_logprobs(served: Served, said: tuple[Said, ...], thought: tuple[Said, ...]) -> dict[str, Any]:
    """Log-probabilities of an answer's tokens, and apart from them those of its thought's."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        label = served.tokenizer.label(token)
        return {"token": label, "logprob": max(logprob, -9999.0), "bytes": list(label.encode())}

    def entries(many: tuple[Said, ...]) -> list[dict[str, Any]]:
        return [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
            for one in many
        ]

    return {
        "content": entries(said),
        "refusal": None,
        **({"reasoning_content": entries(thought)} if thought else {}),
    }


def text_logprobs(
    served: Served, said: list[tuple[int, float | None, tuple]], offset: int = 0
) -> dict[str, Any]:
    """As `/v1/completions` tells them: four lists side by side; the first token of all has no probability."""
    labels = [served.tokenizer.label(token) for token, _, _ in said]
    tops: list[dict[str, float] | None] = []
    for label, (_, logprob, top) in zip(labels, said, strict=True):
        told: dict[str, float] = {}
        for token, one in top:
            told.setdefault(served.tokenizer.label(token), one)
        tops.append(None if logprob is None else {**told, label: told.get(label, logprob)})
    offsets = [offset + sum(map(len, labels[:i])) for i in range(len(labels))]
    return {
        "tokens": labels,
        "token_logprobs": [logprob for _, logprob, _ in said],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
