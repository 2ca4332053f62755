"""A server over two tiny random models, one of which thinks, for the tests of the API and of clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from studio import serving

from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.serve.app import build
from limbeck.serve.models import open_service
from limbeck.serve.service import Service
from limbeck.text.tokenizer import Tokenizer

KEY = "sesame"
QUESTION = "use 5 1 6 make 4 ?"


def save(folder: Path, tokenizer: Tokenizer, opens: bool = False, positions: int = 4096) -> Path:
    """A random model whose every token is open; with `opens` the prompt ends inside a thought."""
    shape = {
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "max_positions": positions,
    }
    model = Decoder(ModelConfig("llama", tokenizer.size, **shape)).initialize(0)
    with torch.no_grad():
        model.head.weight.mul_(6)
    template = tokenizer.template.replace(
        "{% if add_generation_prompt %}Assistant:", "{% if add_generation_prompt %}Assistant:<think>"
    )
    weights.save(
        model,
        folder,
        Tokenizer(
            tokenizer.backend,
            template if opens else tokenizer.template,
            tokenizer.end,
            tokenizer.pad,
            tokenizer.bos,
        ),
    )
    return folder


@dataclass(frozen=True)
class Server:
    """An address with its key, and the service behind it."""

    url: str
    service: Service
    app: Any

    @property
    def client(self) -> dict[str, Any]:
        """What OpenAI's clients are opened with."""
        return {"base_url": self.url + "/v1", "api_key": KEY, "max_retries": 0, "timeout": 300}

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}


@contextmanager
def server(folder: Path, *names: str, **options: Any) -> Iterator[Server]:
    """Models by `NAME=DIRECTORY`, served in a thread of this process."""
    service = open_service(names, folder / "runs", threads=1, **options)
    app = build(folder / "runs", service, KEY)
    with serving(app) as url:
        yield Server(url, service, app)


@contextmanager
def slowly(service: Service, name: str, seconds: float) -> Iterator[None]:
    """Every step of a model takes so long at least."""
    serving_batch = service.models[name].scheduler.serving_batch
    step = serving_batch.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    serving_batch.step = slow
    yield
    serving_batch.step = step


def routes(app: Any) -> list[Any]:
    """Every route of an application, those of included routers too."""

    def inside(some: list[Any]) -> Iterator[Any]:
        for route in some:
            inner = getattr(route, "original_router", None)
            yield from inside(inner.routes) if inner is not None else [route]

    return [route for route in inside(app.app.routes) if getattr(route, "methods", None)]


def soon(condition: Callable[[], object], seconds: float) -> float:
    """Seconds until it was so."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.005)
    return time.monotonic() - begin
