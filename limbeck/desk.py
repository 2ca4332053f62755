"""A person at a terminal: reviewing rows of the human queue, and asking a model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .display import printable
from .pipeline import curate
from .types import LimbeckError

KEYS = {"a": "accept", "e": "edit", "r": "reject", "q": "quit"}


def review_at_terminal(queue: Path, reviewer: str) -> None:
    """Row after row: accept, edit (in $EDITOR), reject with a reason; every verdict is saved at once."""
    rows = curate.pending(queue)
    if not sys.stdin.isatty():
        raise LimbeckError("curate needs a terminal; use --export FILE and --import FILE to review elsewhere")
    for number, row in enumerate(rows, 1):
        print(f"\n[{number}/{len(rows)}] {printable(row['question'])}\n\n{printable(row['prompt'])}\n\n{printable(row['completion'])}\n")
        key = _choose()
        if key == "q":
            break
        entry = {"id": row["id"], "verdict": KEYS[key], "reviewer": reviewer}
        if key == "e":
            entry["completion"] = _edit(row["completion"])
        if key == "r":
            entry["reason"] = input("why? ")
        curate.review(queue, entry)
    left = len(curate.pending(queue))
    print(f"{left} rows are left" if left else "all rows are reviewed: run the recipe again and it goes on")


def _choose() -> str:
    while (key := input("(a)ccept (e)dit (r)eject (q)uit: ").strip().lower()[:1]) not in KEYS:
        pass
    return key


def _edit(text: str) -> str:
    with tempfile.NamedTemporaryFile("w+", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        subprocess.run([*os.environ.get("EDITOR", "vi").split(), file.name], check=True)
        return Path(file.name).read_text(encoding="utf-8").rstrip("\n")


def answer(model: Path, question: str, temperature: float, max_new_tokens: int, seed: int) -> Iterator[str]:
    """The answer in pieces, as it is sampled."""
    from .engine.engine import Engine
    from .engine.sampling import SamplingParams
    from .model import weights
    from .tokenizer import Tokenizer

    directory = model / "model" if (model / "model").is_dir() else model
    tokenizer = Tokenizer.from_directory(directory)
    engine = Engine(weights.load(directory), tokenizer)
    sampling = SamplingParams(temperature, 0.95 if temperature else 1.0, max_new_tokens)
    tokens: list[int] = []
    said = ""
    for token in engine.stream(tokenizer.prompt(question), sampling, seed):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            yield printable(text[len(said) :])
            said = text
