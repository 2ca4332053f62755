"""The command `limbeck ask`, which puts one question to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device

if TYPE_CHECKING:
    from ..engine.sampling import SamplingParams

app = typer.Typer()


@app.command()
def ask(
    model: Annotated[Path, typer.Argument(help="a model directory, or an artifact's folder")],
    question: Annotated[str, typer.Argument(help="what to ask")],
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Ask a model a question and watch it think."""
    from ..engine.sampling import SamplingParams

    top_p = 0.95 if temperature else 1.0
    sampling = SamplingParams(temperature, top_p, max_new_tokens)
    for text in stream_answer(model, question, sampling, seed, device):
        print(text, end="", flush=True)
    print()


def stream_answer(
    model: Path, question: str, sampling: SamplingParams, seed: int, device: str = "cpu"
) -> Iterator[str]:
    """Yield the answer to `question` in pieces of text, while it is sampled.

    `model` is a model directory or an artifact's folder that holds one. `device` is the name of what computes
    (model/ops/devices.py); a card computes in bfloat16 where the weights are stored so. Control characters
    are removed, and a character whose bytes span several tokens is held back until it is complete.
    """
    import torch

    from ..engine.rollout import Engine
    from ..model import weights
    from ..model.ops import devices, place
    from ..text.tokenizer import Tokenizer
    from .display import printable

    directory = model / "model" if (model / "model").is_dir() else model
    tokenizer = Tokenizer.from_directory(directory)
    name = devices.resolve(device)
    devices.prepare(name)
    dtype = weights.stored_dtype(directory) if devices.is_card(name) else torch.float32
    engine = Engine(place(weights.load(directory, dtype), name), tokenizer)
    tokens: list[int] = []
    printed = 0
    for token in engine.stream(tokenizer.prompt(question), sampling, seed):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # an incomplete character, until its next token
            yield printable(text[printed:])
            printed = len(text)
