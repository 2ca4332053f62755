"""A sampler whose completions come from an OpenAI-compatible endpoint, with retries, rate limits and a
response cache.

It returns text, and log-probabilities if they are requested and the endpoint supports them, but never token
ids, logits or weights. The network is used only for recipes that name an endpoint.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..activity import Phase, phase
from ..config.parts import OPTIONAL_SAMPLING
from ..config.recipe import Remote
from ..text.prompt_format import conversation
from ..types import Group, LimbeckError, Message, Problem, Resumable
from .chat_completion import InvalidResponse, parse, to_completion, unknown_tokens
from .rate_limit import RateLimiter, Stopped, retry_after
from .response_cache import ResponseCache

if TYPE_CHECKING:
    from .sampling import SamplingParams

ATTEMPTS = 8  # requests, with pauses of 1, 2, 4 ... 30 seconds between them: about two minutes
FIRST_WAIT = 1.0  # seconds
MAX_WAIT = 30.0  # seconds between two attempts
CHECK_TIMEOUT = 30.0  # seconds for the list of models
MAX_RETRY_AFTER = 900.0  # seconds; if an endpoint demands a longer pause, the stage stops and can be resumed
MAX_DETAIL = 300  # characters of an endpoint's error message
HIDDEN_HEADERS = (
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

Progress = Callable[[int], None]


class Endpoint:
    """The `Sampler` for the endpoint that `settings` describe. `name` is the endpoint's key in the recipe,
    such as `stages.teacher`, for error messages; `folder` holds the response cache; `stopping` returns True
    once the stage should stop.

    A response depends on the endpoint, the model, the messages, the parameters and the number of the sample
    within its group. Each such response is requested once: all stages of all runs that share `folder` read it
    from there. A recipe's seed selects problems but is not sent to the endpoint, so the same question has the
    same cached responses under another seed.
    """

    def __init__(
        self, name: str, settings: Remote, folder: Path, stopping: Callable[[], bool] = lambda: False
    ):
        self.name = name
        self.settings = settings
        self.cache = ResponseCache(folder)
        self.stop_requested = stopping
        self.key = key_of(name, settings)
        self.client: Any = None
        self.failed = threading.Event()
        self.reached = False  # True once a request has succeeded
        self.lock = threading.Lock()
        self.rate_limiter = RateLimiter(settings.requests_per_minute, self._stopping)
        self._usage: dict[str, dict[str, int]] = {}

    # ------------------------------------------------------------ the interface of a sampler

    def rollout(
        self,
        problems: Sequence[Problem],
        group_size: int,
        sampling: SamplingParams,
        seed: object = None,
        progress: Progress | None = None,
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem, in the order of the problems. Token
        ids are unknown: each is -1. `seed` has no effect; `progress(1)` is called for each response.

        Raises LimbeckError for a wrong address, key or model, and for sampling parameters that need token
        ids; Resumable if the endpoint still fails after all retries, or if the stage is stopping. Responses
        that have arrived stay in the cache.
        """
        if sampling.force or sampling.keep_mask or sampling.stop_ids or sampling.response_prefix:
            raise LimbeckError(f"{self.name} is remote: tokens cannot be forced, masked or stopped at there")
        bodies = [self.body(conversation(problem.prompt, problem.system), sampling) for problem in problems]
        keys = [[self._key(body, sample) for sample in range(group_size)] for body in bodies]
        requests: dict[str, tuple[dict[str, Any], int]] = {}
        for body, group_keys in zip(bodies, keys, strict=True):
            for sample, key in enumerate(group_keys):
                requests.setdefault(key, (body, sample))
        responses = self._fetch_all(requests, progress)
        groups = []
        for problem, group_keys in zip(problems, keys, strict=True):
            completions = [to_completion(responses[key], sample) for sample, key in enumerate(group_keys)]
            prompt_tokens = unknown_tokens(responses[group_keys[0]], "prompt_tokens")
            groups.append(Group(problem, prompt_tokens, tuple(completions)))
        return groups

    def check(self) -> None:
        """Test the connection by requesting the list of models, which costs nothing. Raises LimbeckError if
        the endpoint is unreachable or refuses the key."""
        client = self._client()
        import openai

        try:
            client.models.list(extra_headers=_hidden_headers(), timeout=CHECK_TIMEOUT)
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._explain(error) from None
        except openai.OpenAIError:
            pass  # not every endpoint can list its models

    def take_usage(self) -> dict[str, float]:
        """Return the numbers of prompt and response tokens of all different responses since the last call,
        including responses from the cache, and reset them. If the recipe sets prices, `money` is their cost
        in the currency of the prices, which are per million tokens."""
        prompt = sum(usage.get("prompt_tokens", 0) for usage in self._usage.values())
        response = sum(usage.get("completion_tokens", 0) for usage in self._usage.values())
        self._usage = {}
        metrics: dict[str, float] = {"prompt_tokens": prompt, "response_tokens": response}
        prices = self.settings.prices
        if prices:
            metrics["money"] = (prompt * prices.input + response * prices.output) / 1e6
        return metrics

    def body(self, prompt: str | list[Message], sampling: SamplingParams) -> dict[str, Any]:
        """Return the JSON body of a chat-completion request for `prompt`, a question or a conversation. The
        recipe's `extra` overrides or adds fields; a field that `extra` sets to null is removed."""
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }
        for name, neutral in OPTIONAL_SAMPLING.items():
            value = getattr(sampling, name)
            if value != neutral:
                body[name] = value
        if self.settings.logprobs:
            body["logprobs"] = True
        body |= self.settings.extra
        return {name: value for name, value in body.items() if value is not None}

    # ------------------------------------------------------------ requests

    def _key(self, body: dict[str, Any], sample: int) -> str:
        url = self.settings.url.rstrip("/")
        return ResponseCache.key({"endpoint": url, "request": body, "sample": sample})

    def _fetch_all(
        self, requests: dict[str, tuple[dict[str, Any], int]], progress: Progress | None
    ) -> dict[str, dict[str, Any]]:
        """Fetch responses concurrently and return them by key; `requests` maps each key of the response cache
        to a request body and a sample number. After the first failure no further request is sent, and the
        failure is raised."""
        self.failed.clear()
        answered = phase("asking", "rows", len(requests))
        with answered as rows, ThreadPoolExecutor(self.settings.max_concurrency) as pool:
            futures = {
                key: pool.submit(self._fetch, key, body, sample, (rows, progress))
                for key, (body, sample) in requests.items()
            }
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                pool.shutdown(cancel_futures=True)
        ended = [future for future in futures.values() if future.done() and not future.cancelled()]
        self._raise_first(future.exception() for future in ended)
        responses = {key: future.result() for key, future in futures.items()}
        self._usage |= {key: response["usage"] for key, response in responses.items()}
        return responses

    def _fetch(
        self, key: str, body: dict[str, Any], sample: int, counts: tuple[Phase, Progress | None]
    ) -> dict[str, Any]:
        """Return the response with this `key` from the cache; if it is not there, request it from the
        endpoint and add it to the cache. `counts` are what the response is counted in."""
        response = self.cache.get(key)
        if response is None:
            with self.cache.claim(key):
                response = self.cache.get(key)
                if response is None:
                    response = {"endpoint": self.settings.url, "request": body, "sample": sample}
                    response |= self._request(body)
                    self.cache.put(key, response)
        rows, progress = counts
        rows.advance()
        if progress:
            progress(1)
        return response

    def _request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the fields of its completion. Failures that may be temporary are
        retried; the last failure is raised as LimbeckError."""
        client = self._client()
        import openai
        import stamina

        logging.getLogger("stamina").setLevel(logging.ERROR)  # a retry is no news
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        attempts = stamina.retry_context(
            on=self._retry, attempts=ATTEMPTS, timeout=None, wait_initial=FIRST_WAIT, wait_max=MAX_WAIT
        )
        try:
            for attempt in attempts:
                with attempt:
                    self.rate_limiter.wait()
                    response = client.chat.completions.create(
                        model=body["model"],
                        messages=body["messages"],
                        extra_body=fields,
                        extra_headers=_hidden_headers(),
                    )
                    completion = parse(response)
                    self.reached = True
        except (openai.OpenAIError, InvalidResponse) as error:
            self.failed.set()  # stops the other requests
            raise self._explain(error) from None
        return completion

    def _client(self) -> Any:
        """Return the OpenAI client, which is created at the first call. It sends the API key, and no header
        that describes this machine or its owner."""
        try:
            import openai
            import stamina  # noqa: F401
        except ImportError:
            raise LimbeckError(
                f"{self.name} is remote, which takes two more packages: pip install 'limbeck[remote]'"
            ) from None
        with self.lock:
            if self.client is None:
                headers = {
                    "OpenAI-Organization": openai.Omit(),
                    "OpenAI-Project": openai.Omit(),
                    "User-Agent": "limbeck",
                }
                self.client = openai.OpenAI(
                    base_url=self.settings.url,
                    api_key=self.key or "none",
                    max_retries=0,
                    timeout=self.settings.timeout,
                    default_headers={**headers, **_hidden_headers()},
                )
            return self.client

    def _retry(self, error: Exception) -> bool | float:
        """Tell stamina, the retry library, what to do after `error`: True to retry after its usual wait, 0 to
        retry after the pause that the endpoint demands, False to give up."""
        import openai

        if self._stopping():
            return False
        if isinstance(error, openai.APIStatusError):
            return self._retry_status(error)
        if isinstance(error, openai.APITimeoutError):
            return True
        # Before any request has succeeded, these errors more likely come from a wrong address: do not retry.
        return self.reached and isinstance(error, (openai.APIConnectionError, InvalidResponse))

    def _retry_status(self, error: Any) -> bool | float:
        """Tell stamina what to do after a response with an HTTP error status; the values are those of
        `_retry`."""
        passing = error.status_code in (408, 409, 429) or error.status_code >= 500
        if not passing or _error_code(error) == "insufficient_quota":
            return False
        seconds = retry_after(error.response.headers)
        if seconds is None:
            return True
        if seconds > MAX_RETRY_AFTER:
            return False
        self.rate_limiter.pause(seconds)
        return 0.0

    def _stopping(self) -> bool:
        return self.failed.is_set() or self.stop_requested()

    def _raise_first(self, errors: Iterable[BaseException | None]) -> None:
        """Raise the first of `errors` that is not None and not `Stopped`, if there is any. If all are
        `Stopped`, which requests raise when they are cancelled, raise Resumable."""
        failures = [error for error in errors if error]
        for error in failures:
            if not isinstance(error, Stopped):
                raise error
        if failures:
            raise Resumable(f"{self.name} stopped asking; the same command goes on from here")

    # ------------------------------------------------------------ error messages

    def _explain(self, error: Exception) -> LimbeckError:
        """Return a LimbeckError whose one sentence states the failure and its remedy. The sentence never
        contains the API key, even if the endpoint's message repeats it."""
        import openai

        url = self.settings.url
        if isinstance(error, openai.APITimeoutError):
            seconds = f"{self.settings.timeout:g} seconds"
            return self._resumable(f"{url} did not answer within {seconds}, {ATTEMPTS} times")
        if isinstance(error, openai.APIConnectionError):
            reason = str(error.__cause__ or error)
            return LimbeckError(
                f"{self.name}.url: {url} cannot be reached ({reason}); "
                "check the address, and that the server runs"
            )
        if isinstance(error, InvalidResponse):
            return self._no_chat_api()
        return self._explain_status(error, getattr(error, "status_code", None) or 0)

    def _explain_status(self, error: Any, status: int) -> LimbeckError:
        """Return the LimbeckError for an HTTP error with this `status`; 0 means that the error has no
        status."""
        url = self.settings.url
        if status in (401, 403):
            variable = self.settings.key
            key = f"the key in ${variable}" if variable else "requests without a key"
            return LimbeckError(
                f"{self.name}.key: {url} refuses {key} ({status}); "
                "put a valid one into that variable, or name another"
            )
        if status == 404:
            return self._explain_not_found(error)
        if _error_code(error) == "insufficient_quota":
            return self._resumable(f"the account at {url} has no credit left")
        if status == 429 or status >= 500:
            seconds = retry_after(error.response.headers)
            pause = f" and wants {seconds:.0f} seconds of quiet" if seconds else ""
            return self._resumable(f"{url} keeps answering {status}{pause}")
        return LimbeckError(
            f"{self.name}: {url} refuses the request ({status or None}: {self._detail(error)}); "
            "`extra` changes its fields"
        )

    def _explain_not_found(self, error: Any) -> LimbeckError:
        model = self.settings.model
        if _error_code(error) == "model_not_found" or model in self._detail(error):
            return LimbeckError(
                f"{self.name}.model: {self.settings.url} knows no model {model}; choose one that it offers"
            )
        return self._no_chat_api()

    def _no_chat_api(self) -> LimbeckError:
        return LimbeckError(
            f"{self.name}.url: {self.settings.url} answers, but not as a chat API does; "
            "most addresses end in /v1"
        )

    def _resumable(self, failure: str) -> Resumable:
        kept = "what was answered is kept, and the same command goes on from there"
        return Resumable(f"{self.name}: {failure}; {kept}")

    def _detail(self, error: Any) -> str:
        """Return the error message that the endpoint sent, at most `MAX_DETAIL` characters of it, with the
        API key replaced."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        words = str(message or body or error).split()
        text = " ".join(words)[:MAX_DETAIL]
        return text.replace(self.key, "[key]") if self.key else text


def key_of(name: str, settings: Remote) -> str:
    """Return the API key from the environment variable that `settings.key` names, or "" if it names none.
    `name` is the endpoint's key in the recipe. Raises LimbeckError if the variable is not set."""
    if not settings.key:
        return ""
    key = os.environ.get(settings.key, "").strip()
    if not key:
        raise LimbeckError(
            f"{name}.key names the environment variable {settings.key}, which is not set; "
            "export it and run again"
        )
    return key


def _hidden_headers() -> dict[str, Any]:
    """Return the headers in which the OpenAI client would describe this machine, each marked to be
    omitted."""
    import openai

    return {f"X-Stainless-{name}": openai.Omit() for name in HIDDEN_HEADERS}


def _error_code(error: Any) -> str:
    """Return the `code`, or else the `type`, in the body of an HTTP error; "" if the body has neither."""
    body = getattr(error, "body", None)
    if not isinstance(body, dict):
        return ""
    return str(body.get("code") or body.get("type") or "")
