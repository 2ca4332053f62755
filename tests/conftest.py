"""What several files of tests share: one thread, and a decoder small enough to run by the thousand tokens."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from studio import chromium, house, visit  # noqa: F401

from limbeck import cli
from limbeck.config.recipe import Miniature
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kernels import choice
from limbeck.tasks.clock_countdown import Countdown
from limbeck.text.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Products this small gain nothing from a second thread, and lose much where cores are contended."""
    torch.set_num_threads(1)


@pytest.fixture
def own_choice(monkeypatch, tmp_path) -> Iterator[Path]:
    """The choice of kernels is made anew and kept in `tmp_path`, so that other tests round as before."""
    monkeypatch.setattr(choice, "folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "_choices", {})
    monkeypatch.setattr(choice, "_timings", {})
    monkeypatch.setattr(choice, "_in_library", None)
    yield tmp_path
    monkeypatch.undo()
    choice._in_library = None


@pytest.fixture(scope="session")
def clock() -> Countdown:
    """The quickstart's task."""
    return Countdown("clock", Miniature(source="miniature"))


@pytest.fixture(scope="session")
def tokenizer(clock) -> Tokenizer:
    """Word-level: every number and every word is one token."""
    return clock.tokenizer()


@pytest.fixture
def decoder(tokenizer) -> Callable[..., Decoder]:
    """`decoder(dtype, seed=0, **sizes)`: random weights, whose next token is neither open nor certain."""

    def build(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes) -> Decoder:
        shape = {
            "vocab_size": tokenizer.size,
            "hidden_size": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "max_positions": 128,
        }
        model = Decoder(ModelConfig("llama", **{**shape, **sizes})).initialize(seed)
        with torch.no_grad():
            model.head.weight.mul_(12)
            model.head.weight[tokenizer.end_id] *= 2.2  # so that some rows end early
        return model.to(dtype)

    return build


@dataclass(frozen=True)
class Finished:
    """A tiny recipe that was carried out without interruption: its file, its runs, and what it printed."""

    recipe: Path
    home: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tokenizer) -> Finished:
    """Every kind of stage, run once with `limbeck run --json`."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = folder / "tiny.yaml"
    recipe.write_text(tiny.RECIPE)
    sizes = ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=128)
    weights.save(Decoder(sizes).initialize(0), folder / "model", tokenizer)
    return Finished(recipe, folder / "runs", *tiny.answer("run", recipe, "--runs", folder / "runs", "--json"))


@pytest.fixture(scope="session")
def nursery():
    """Forks processes that have torch already: a second try costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["limbeck.pipeline.stages"])
    return context


@pytest.fixture
def call(monkeypatch, capsys):
    """`call("show", "--runs", home)`: the command in this process."""

    def command(*arguments: object) -> tiny.Output:
        monkeypatch.setattr(sys, "argv", ["limbeck", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        streams = capsys.readouterr()
        return tiny.Output(ended.value.code or 0, streams.out, streams.err)

    return command
