"""An OpenAI-compatible endpoint in a thread, on a port of its own, that counts what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "sk-very-secret-0123456789abcdef"


def completion(content: str, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as servers send it: 11 tokens in, 7 out."""
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "stub-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def fault(message: str, code: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code}}


Reply = tuple[int, dict[str, str], Any]  # status, headers, JSON or text


class Stub:
    """`with Stub(reply) as stub`: `reply(body, n)` answers the n-th chat request, from 0.

    `asked` holds the bodies of chat requests as they came, `answered` those whose answer was sent, `headers`
    their headers, `busy` the most that were on their way at once.
    """

    def __init__(
        self, reply: Callable[[dict, int], Reply] = lambda body, n: (200, {}, completion(f"answer {n}"))
    ):
        self.reply, self.lock = reply, threading.Lock()
        self.asked: list[dict] = []
        self.answered: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.lists = self.now = self.busy = 0

    def __enter__(self) -> Self:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                stub.lists += 1
                self.send(*stub.greet(dict(self.headers)))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path != "/v1/chat/completions":
                    return self.send(404, {}, {"detail": "Not Found"})
                with stub.lock:
                    n = len(stub.asked)
                    stub.asked.append(body)
                    stub.headers.append(dict(self.headers))
                    stub.now += 1
                    stub.busy = max(stub.busy, stub.now)
                try:
                    status, headers, told = stub.reply(body, n)
                finally:
                    with stub.lock:
                        stub.now -= 1
                self.send(status, headers, told)
                if status == 200:
                    with stub.lock:
                        stub.answered.append(body)

            def send(self, status: int, headers: dict[str, str], told: Any) -> None:
                text = told if isinstance(told, str) else json.dumps(told)
                self.send_response(status)
                kind = "text/html" if isinstance(told, str) else "application/json"
                for name, value in {
                    "content-type": kind,
                    "content-length": str(len(text.encode())),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # whoever asked was killed

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def greet(self, headers: dict[str, str]) -> Reply:
        return 200, {}, {"object": "list", "data": []}

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.asked]
