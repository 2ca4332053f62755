"""The command `limbeck ask`, which puts one question to a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import MODEL, RUNS, Device, Home, hold_device, open_model

if TYPE_CHECKING:
    from ..engine.sampling import SamplingParams

app = typer.Typer()


@app.command()
def ask(
    model: Annotated[str, typer.Argument(help=MODEL)],
    question: Annotated[str, typer.Argument(help="what to ask")],
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: int = 0,
    device: Device = "cpu",
    top_p: Annotated[
        float, typer.Option(min=0.001, max=1, help="the likeliest tokens with this share")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="this many likeliest tokens; 0 is all")] = 0,
    min_p: Annotated[float, typer.Option(min=0, max=1, help="share of the greatest probability")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(min=-2, max=2)] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(min=-2, max=2)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1 is none")] = 1.0,
    runs: Home = RUNS,
) -> None:
    """Ask a model a question and watch it think.

    For instance: `limbeck ask quickstart/r1 "use 5 1 6 make 4 ?"`
    """
    from ..engine.sampling import SamplingParams

    sampling = SamplingParams(
        temperature,
        top_p,
        max_new_tokens,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
    )
    directory = open_model(model, runs).directory()
    with hold_device(device, f"limbeck ask {model}") as name:
        for text in stream_answer(directory, question, sampling, seed, name):
            print(text, end="", flush=True)
    print()


def stream_answer(
    directory: Path, question: str, sampling: SamplingParams, seed: int, device: str = "cpu"
) -> Iterator[str]:
    """Yield the answer to `question` in pieces of text, while it is sampled.

    `directory` is the model's directory. `device` is the resolved name of what computes (see
    `weights.load_onto`). Control characters are removed, and a character whose bytes span several tokens is
    held back until it is complete.
    """
    from ..engine.rollout import Engine
    from ..model import weights
    from ..text.tokenizer import Tokenizer
    from .display import printable

    tokenizer = Tokenizer.from_directory(directory)
    engine = Engine(weights.load_onto(directory, device), tokenizer)
    tokens: list[int] = []
    printed = 0
    messages = tokenizer.prompt_format.apply([{"role": "user", "content": question}])
    for token in engine.stream(tokenizer.prompt(messages), sampling, seed):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # an incomplete character, until its next token
            yield printable(text[printed:])
            printed = len(text)
