"""A server in a thread that answers as vLLM does, and samples with our engine from the files handed over."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from limbeck.engine.decode_batch import DecodeBatch
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.types import generator


def uniforms(count: int, length: int, seed: int) -> np.ndarray:
    """The random numbers of the completions of a request [count, length]."""
    return np.stack([generator(seed, sample).random(length) for sample in range(count)])


class VLLMStub:
    """`with VLLMStub() as stub`: `calls` are the addresses asked, `prompts` the token ids of each request.

    It knows no weights until it is handed some. With `deaf` it keeps the first for ever; without `ids` it
    returns text alone, as other servers do; `answers` completions are given before it dies. Log-probabilities
    are off by `noise`, up and down in turn."""

    def __init__(
        self, deaf: bool = False, ids: bool = True, answers: float = float("inf"), noise: float = 0.0
    ):
        self.deaf, self.ids, self.answers, self.noise = deaf, ids, answers, noise
        self.calls: list[str] = []
        self.prompts: list[list[int]] = []
        self.folders: list[Path] = []
        self.model: Any = None
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub.lock:
                    self.send(*stub.post(self.path, body))

            def send(self, status: int, told: dict) -> None:
                text = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # it died, or who asked did

        self.server = Server(("127.0.0.1", 0), Handler)
        serve = {"poll_interval": 0.02}
        threading.Thread(target=self.server.serve_forever, kwargs=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def post(self, path: str, body: dict) -> tuple[int, dict]:
        self.calls.append(path)
        if path == "/collective_rpc" and body["method"] == "reload_weights":
            self.folders.append(Path(body["kwargs"]["weights_path"]))
            if self.model is None or not self.deaf:
                self.model = weights.load(self.folders[-1])
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/v1/completions":
            return 200, self.complete(body)
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def complete(self, body: dict) -> dict:
        if self.answers <= 0:
            raise ConnectionAbortedError
        self.answers -= 1
        assert body["ignore_eos"] and body["logprobs"] == 0
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1, 0, 0, 1)
        self.prompts.append(body["prompt"])
        count, length = body["n"], body["max_tokens"]
        sampling = SamplingParams(body["temperature"], max_new_tokens=length)
        batch = DecodeBatch(self.model, body["stop_token_ids"][0], sampling)
        batch.admit([(0, np.array(body["prompt"]))], uniforms(count, length, body["seed"]), count)
        rows: list[Any] = [None] * count
        while batch.busy:
            for row in batch.step():
                rows[row.sample] = row
        return {"choices": [self.choice(index, row) for index, row in enumerate(rows)]}

    def choice(self, index: int, row: Any) -> dict:
        told = row.logprobs + self.noise * (-1.0) ** np.arange(len(row.logprobs))
        logprobs = {"tokens": [], "token_logprobs": told.tolist()}
        ids = {"token_ids": row.tokens.tolist()} if self.ids else {}
        return {"index": index, "text": "", "logprobs": logprobs, "finish_reason": "stop", **ids}
