"""A sampler elsewhere: any OpenAI-compatible endpoint, asked politely, and never twice for the same.

It gives text, and log-probabilities where asked and able; never token ids, logits or weights. The network is
opened by a recipe that names an endpoint, and by nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.recipe import Remote
from ..text.tokenizer import CLOSE, join_thought
from ..types import Completion, Group, LimbeckError, Problem, Resumable
from .rate_limit import Pace, Stopped, retry_after
from .response_cache import Responses

if TYPE_CHECKING:
    from .sampling import SamplingParams

ATTEMPTS = 8  # with waits of 1, 2, 4 ... 30 seconds between them: about two minutes
QUICK = 30.0  # seconds for a first sign of life
LONGEST_WAIT = 900.0  # seconds: an endpoint that asks for more is come back to another day
TELLTALES = (
    "Lang",
    "Package-Version",
    "OS",
    "Arch",
    "Runtime",
    "Runtime-Version",
    "Async",
    "Retry-Count",
    "Read-Timeout",
)


class Garbled(Exception):
    """The endpoint answered, but no chat completion."""


class Endpoint:
    """The `Sampler` that `settings` name; `name` is where, for error messages: `stages.teacher`.

    A response is decided by endpoint, model, messages, parameters and the sample's number; what was answered once,
    to any stage of any run that shares `folder`, is read from there. A recipe's seed chooses the problems and does
    not reach the endpoint: under another seed the same question has the same answers, already paid for.
    """

    def __init__(
        self, name: str, settings: Remote, folder: Path, stopping: Callable[[], bool] = lambda: False
    ):
        self.name, self.settings, self.responses, self.asked_to_stop = (
            name,
            settings,
            Responses(folder),
            stopping,
        )
        self.key, self.client = key_of(name, settings), None
        self.failed, self.reached, self.lock = threading.Event(), False, threading.Lock()
        self.pace = Pace(settings.requests_per_minute, self._stopping)
        self._bill: dict[str, dict[str, int]] = {}

    # ------------------------------------------------------------ what a sampler does

    def rollout(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        seed: object = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Group]:
        """`group_size` completions of every problem, in the problems' order. Token ids are unknown: each is -1.

        Raises LimbeckError for a wrong address, key or model, Resumable when the endpoint fails for good or
        somebody asks to stop; what was answered is kept.
        """
        if sampling.force or sampling.keep_mask or sampling.stop_ids:
            raise LimbeckError(f"{self.name} is remote: tokens cannot be forced, masked or stopped at there")
        bodies = {p.id: self.body(p.prompt, sampling) for p in problems}
        keys = {(i, s): self._key(bodies[p.id], s) for i, p in enumerate(problems) for s in range(group_size)}
        owners: dict[str, tuple[int, int]] = {}
        for place, key in keys.items():
            owners.setdefault(key, place)
        self.failed.clear()
        with ThreadPoolExecutor(self.settings.max_concurrency) as pool:
            tasks = {
                key: pool.submit(self._answer, key, bodies[problems[i].id], s, progress)
                for key, (i, s) in owners.items()
            }
            done, _ = wait(tasks.values(), return_when=FIRST_EXCEPTION)
            if any(task.exception() for task in done):
                pool.shutdown(cancel_futures=True)
        self._raise_first(
            [task.exception() for task in tasks.values() if task.done() and not task.cancelled()]
        )
        answers = {key: task.result() for key, task in tasks.items()}
        self._bill |= {key: answer["usage"] for key, answer in answers.items()}
        rows = [
            [_completion(answers[keys[i, s]], s) for s in range(group_size)] for i in range(len(problems))
        ]
        return [
            Group(p, _unknown(answers[keys[i, 0]], "prompt_tokens"), tuple(rows[i]))
            for i, p in enumerate(problems)
        ]

    def check(self) -> None:
        """Whether the endpoint can be reached and takes the key; asks for its list of models and for nothing that costs."""
        client = self._client()
        import openai

        try:
            client.models.list(extra_headers=_silence(), timeout=QUICK)
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._explain(error) from None
        except openai.OpenAIError:
            pass  # not every endpoint has a list

    def bill(self) -> dict[str, float]:
        """Tokens, and money where there are prices, of all responses since the last bill, found or bought."""
        prompt, response = (
            sum(usage.get(k, 0) for usage in self._bill.values())
            for k in ("prompt_tokens", "completion_tokens")
        )
        self._bill, prices = {}, self.settings.prices
        money = {"money": (prompt * prices.input + response * prices.output) / 1e6} if prices else {}
        return {"prompt_tokens": prompt, "response_tokens": response, **money}

    def body(self, prompt: str, sampling: SamplingParams) -> dict[str, Any]:
        """One request, as JSON goes out; the recipe's `extra` has the last word."""
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            **({"logprobs": True} if self.settings.logprobs else {}),
            **self.settings.extra,
        }
        return {name: value for name, value in body.items() if value is not None}

    # ------------------------------------------------------------ one request

    def _key(self, body: dict[str, Any], sample: int) -> str:
        return Responses.key({"endpoint": self.settings.url.rstrip("/"), "request": body, "sample": sample})

    def _answer(
        self, key: str, body: dict[str, Any], sample: int, progress: Callable[[int], None] | None
    ) -> dict[str, Any]:
        """From the disk, or else from the endpoint and to the disk."""
        found = self.responses.get(key)
        if found is None:
            with self.responses.claim(key):
                found = self.responses.get(key)
                if found is None:
                    found = {
                        "endpoint": self.settings.url,
                        "request": body,
                        "sample": sample,
                        **self._ask(body),
                    }
                    self.responses.put(key, found)
        if progress:
            progress(1)
        return found

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        client = self._client()
        import openai
        import stamina

        logging.getLogger("stamina").setLevel(logging.ERROR)  # retries are our daily bread
        rest = {k: v for k, v in body.items() if k not in ("model", "messages")}
        try:
            for attempt in stamina.retry_context(
                on=self._wait_after, attempts=ATTEMPTS, timeout=None, wait_initial=1.0, wait_max=30.0
            ):
                with attempt:
                    self.pace.wait()
                    response = client.chat.completions.create(
                        model=body["model"],
                        messages=body["messages"],
                        extra_body=rest,
                        extra_headers=_silence(),
                    )
                    answer = _read(response)
                    self.reached = True
        except (openai.OpenAIError, Garbled) as error:
            self.failed.set()  # nobody else need try
            raise self._explain(error) from None
        return answer

    def _client(self) -> Any:
        """Made at the first request; tells the endpoint the key and nothing of this machine or its owner."""
        try:
            import openai
            import stamina  # noqa: F401
        except ImportError:
            raise LimbeckError(
                f"{self.name} is remote, which takes two more packages: pip install 'limbeck[remote]'"
            ) from None
        with self.lock:
            if self.client is None:
                hidden = {
                    "OpenAI-Organization": openai.Omit(),
                    "OpenAI-Project": openai.Omit(),
                    "User-Agent": "limbeck",
                }
                self.client = openai.OpenAI(
                    base_url=self.settings.url,
                    api_key=self.key or "none",
                    max_retries=0,
                    timeout=self.settings.timeout,
                    default_headers={**hidden, **_silence()},
                )
            return self.client

    def _wait_after(self, error: Exception) -> bool | float:
        """What stamina asks after each failure: whether to try again, and how long to wait if the endpoint said so."""
        import openai

        if self._stopping():
            return False
        if isinstance(error, openai.APIStatusError):
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            asked = retry_after(error.response.headers)
            if not again or _code(error) == "insufficient_quota" or (asked or 0) > LONGEST_WAIT:
                return False
            if asked is not None:
                self.pace.hold(asked)
                return 0.0
            return True
        if isinstance(
            error, openai.APIConnectionError
        ):  # a wrong address looks like this from the first request on
            return self.reached or isinstance(error, openai.APITimeoutError)
        return isinstance(error, Garbled) and self.reached

    def _stopping(self) -> bool:
        return self.failed.is_set() or self.asked_to_stop()

    def _raise_first(self, errors: list[BaseException | None]) -> None:
        """The failure that tells most: a real one before those that only stopped because of it."""
        found = [error for error in errors if error]
        real = [error for error in found if not isinstance(error, Stopped)]
        if real:
            raise real[0]
        if found:
            raise Resumable(f"{self.name} stopped asking; the same command goes on from here")

    # ------------------------------------------------------------ what went wrong

    def _explain(self, error: Exception) -> LimbeckError:
        """One sentence: what the endpoint did, and the remedy. Never the key, not even a part that the endpoint told."""
        import openai

        where, url, model = self.name, self.settings.url, self.settings.model
        kept = "what was answered is kept, and the same command goes on from there"
        status = getattr(error, "status_code", None)
        if isinstance(error, openai.APITimeoutError):
            return Resumable(
                f"{where}: {url} did not answer within {self.settings.timeout:g} seconds, {ATTEMPTS} times; {kept}"
            )
        if isinstance(error, openai.APIConnectionError):
            reason = str(error.__cause__ or error)
            return LimbeckError(
                f"{where}.url: {url} cannot be reached ({reason}); check the address, and that the server runs"
            )
        if status in (401, 403):
            key = f"the key in ${self.settings.key}" if self.settings.key else "requests without a key"
            return LimbeckError(
                f"{where}.key: {url} refuses {key} ({status}); put a valid one into that variable, or name another"
            )
        if status == 404 and (_code(error) == "model_not_found" or model in self._said(error)):
            return LimbeckError(f"{where}.model: {url} knows no model {model}; choose one that it offers")
        if status == 404 or isinstance(error, Garbled):
            return LimbeckError(
                f"{where}.url: {url} answers, but not as a chat API does; most addresses end in /v1"
            )
        if _code(error) == "insufficient_quota":
            return Resumable(f"{where}: the account at {url} has no credit left; {kept}")
        if status == 429 or (status or 0) >= 500:
            said = retry_after(error.response.headers)
            patience = f" and wants {said:.0f} seconds of quiet" if said else ""
            return Resumable(f"{where}: {url} keeps answering {status}{patience}; {kept}")
        return LimbeckError(
            f"{where}: {url} refuses the request ({status}: {self._said(error)}); `extra` changes its fields"
        )

    def _said(self, error: Exception) -> str:
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(said or body or error).split())[:300]
        return text.replace(self.key, "[key]") if self.key else text


# ---------------------------------------------------------------- reading


def key_of(name: str, settings: Remote) -> str:
    """The API key from the environment; a variable that is named must be set."""
    key = os.environ.get(settings.key, "").strip() if settings.key else ""
    if settings.key and not key:
        raise LimbeckError(
            f"{name}.key names the environment variable {settings.key}, which is not set; export it and run again"
        )
    return key


def _silence() -> dict[str, Any]:
    """Headers in which the client would tell of this machine."""
    import openai

    return {f"X-Stainless-{name}": openai.Omit() for name in TELLTALES}


def _code(error: Exception) -> str:
    body = getattr(error, "body", None)
    return str(body.get("code") or body.get("type") or "") if isinstance(body, dict) else ""


def _read(response: Any) -> dict[str, Any]:
    """What we keep of a chat completion. The thought stands in `reasoning_content` (DeepSeek, vLLM) or in
    `reasoning` (OpenRouter, newer vLLM), or inside the text in its tags."""
    try:
        told = response.model_dump()
        choice = told["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Garbled("no choices") from None
    thought = message.get("reasoning_content") or message.get("reasoning")
    usage = {k: (told.get("usage") or {}).get(k) or 0 for k in ("prompt_tokens", "completion_tokens")}
    scored = (choice.get("logprobs") or {}).get("content") or []
    return {
        "content": content,
        "thought": thought if isinstance(thought, str) else "",
        "finish": choice.get("finish_reason"),
        "usage": usage,
        "logprobs": [token["logprob"] for token in scored],
        "answered_by": told.get("model"),
    }


def _completion(answer: dict[str, Any], sample: int) -> Completion:
    text = answer["content"].strip()
    if answer["thought"] and CLOSE not in text:
        text = join_thought(answer["thought"], text)
    logprobs = np.array(answer["logprobs"], dtype=np.float32)
    return Completion(
        _unknown(answer, "completion_tokens"), logprobs, text, answer["finish"] == "stop", sample
    )


def _unknown(answer: dict[str, Any], name: str) -> np.ndarray:
    """As many tokens as were counted; which ones they are, an endpoint does not tell."""
    return np.full(answer["usage"][name], -1, dtype=np.int64)
