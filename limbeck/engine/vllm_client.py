"""An engine whose completions come from a vLLM server: token ids in, token ids and log-probabilities out.

Before the first rollout and after each update the weights are written as a folder of safetensors, which the
server loads in place (`/collective_rpc`, method `reload_weights`); then it forgets its cached prompts. Fields
and addresses are those of vLLM 0.33.0 (`entrypoints/openai/completion/protocol.py`,
`v1/worker/gpu/model_runner.py`). Dimensions: N tokens of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from ..activity import phase
from ..model import weights
from ..model.decoder import Decoder
from ..text.tokenizer import Tokenizer
from ..types import Completion, Group, LimbeckError, Problem, Resumable, fingerprint
from .rollout import Engine
from .sampling import SamplingParams

REQUESTS = 64  # at once; the server batches them
TIMEOUT = 1800.0  # seconds for the completions of one problem
HOW = "start it as docs/how-to/sample-with-vllm.md says"
# the whole softmax and our end of turn, whatever the server's defaults; `logprobs: 0` is the sampled token's
FIELDS = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
FIELDS |= {"logprobs": 0, "return_token_ids": True}


class VLLMEngine(Engine):
    """An `Engine` that lets the vLLM server at `url` sample with the weights of `model`.

    `name` is the setting that gives the address, for messages. Weights are handed over in a folder of its own
    among temporary files (`TMPDIR`), which the server must see under the same path.
    """

    def __init__(self, name: str, url: str, model: Decoder, tokenizer: Tokenizer):
        super().__init__(model, tokenizer)
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self.outdated = True  # the server has not the model's weights

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Copy the weights `tensors` into the model; the next rollout hands them over first."""
        super().load_weights(tensors)
        self.outdated = True

    def rollout(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, seed: object
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem, in the order of the problems; see
        `Engine.rollout`. The server draws from `seed`, but a completion may depend on those beside it.

        Raises Resumable if the server cannot be reached or fails, LimbeckError if it refuses a request or
        sends no token ids.
        """
        if self.outdated:
            self._hand_over()
        groups = []
        with phase("sampling", "problems", len(problems)) as done, ThreadPoolExecutor(REQUESTS) as pool:
            for group in pool.map(lambda problem: self._group(problem, group_size, sampling, seed), problems):
                done.advance()
                groups.append(group)
        return groups

    def _group(self, problem: Problem, size: int, sampling: SamplingParams, seed: object) -> Group:
        """Return the group of `size` completions of one problem, by one request."""
        prompt_N = self._prompt(problem, sampling)
        stop = sorted({self.tokenizer.end_id, *sampling.stop_ids})
        body = {"prompt": prompt_N.tolist(), "n": size, "seed": fingerprint(seed, problem.id) >> 1}
        body |= {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        body |= {"stop_token_ids": stop, **FIELDS}
        try:
            choices = self._ask("/v1/completions", body)["choices"]
            rows = [(np.array(row["token_ids"]), row["logprobs"]["token_logprobs"]) for row in choices]
            if len(rows) != size or any(len(ids) != len(logs) or not logs for ids, logs in rows):
                raise KeyError
        except (KeyError, TypeError):
            raise LimbeckError(
                f"{self.name}: {self.url} does not return all token ids and their log-probabilities "
                f"(`return_token_ids`), which learning needs; take a newer vLLM, and {HOW}"
            ) from None
        completions = [
            Completion(ids, np.float32(logs), self.tokenizer.decode(ids), ids[-1] in stop, sample)
            for sample, (ids, logs) in enumerate(rows)
        ]
        return Group(problem, prompt_N, tuple(completions))

    def _hand_over(self) -> None:
        """Let the server load the weights from a folder of a new name: it may keep files of a known name."""
        with phase("handing over the weights"), TemporaryDirectory(prefix="limbeck-weights-") as folder:
            weights.save(self.model, Path(folder), self.tokenizer)
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            self._ask("/reset_prefix_cache", {})
        self.outdated = False

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the server's JSON answer to a POST request with `body`."""
        from http.client import HTTPException
        from urllib import request

        headers = {"Content-Type": "application/json", "User-Agent": "limbeck"}
        asked = request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with request.build_opener(request.ProxyHandler({})).open(asked, timeout=TIMEOUT) as answer:
                return json.loads(answer.read() or b"{}")
        except (OSError, HTTPException, ValueError) as fault:
            detail = f": {fault.read(300).decode(errors='replace')}" if hasattr(fault, "read") else ""
            passing = getattr(fault, "code", 500) >= 500 and not isinstance(fault, ValueError)
            raise (Resumable if passing else LimbeckError)(
                f"{self.name}: {self.url}{path} does not answer as vLLM does ({fault}{detail}); {HOW}, and "
                "the same command goes on from the last checkpoint"
            ) from None
