"""A person at a terminal: reviewing rows of the human queue, and asking a model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..pipeline.review import reviews
from ..types import LimbeckError
from .display import printable

KEYS = {"a": "accept", "e": "edit", "r": "reject", "q": "quit"}


def review_at_terminal(queue: Path, reviewer: str) -> None:
    """Row after row: accept, edit (in $EDITOR), reject with a reason; every verdict is saved at once. After them the rows
    on which two people disagree, to be settled."""
    if not sys.stdin.isatty():
        raise LimbeckError("curate needs a terminal; use --export FILE and --import FILE to review elsewhere")
    asked = [row for row in reviews.standings(queue) if row.due(reviewer)]
    disputed = [row for row in reviews.standings(queue) if row.state == "disputed"]
    for number, row in enumerate([*asked, *disputed], 1):
        print(
            f"\n[{number}/{len(asked) + len(disputed)}] {printable(row.row['question'])}\n\n{printable(row.row['prompt'])}\n"
        )
        if not _review(queue, row, reviewer, number > len(asked)):
            break
    left, ours = len(reviews.pending(queue)), sum(row.due(reviewer) for row in reviews.standings(queue))
    print(
        f"{left} rows are left" + ("" if ours or not left else ", for other people")
        if left
        else "all rows are reviewed: run the recipe again and it goes on"
    )


def _review(queue: Path, row: reviews.Standing, reviewer: str, settle: bool) -> bool:
    """Show one row and save what is said of it; False if the person has had enough."""
    print(printable(row.row["completion"]) + "\n")
    for name, said in row.verdicts.items() if settle else ():
        print(
            printable(
                f"{name} says {said['verdict']}: {said.get('completion') or said.get('reason') or 'as it is'}\n"
            )
        )
    began, key = time.monotonic(), _choose()
    if key == "q":
        return False
    entry = {
        "id": row.id,
        "verdict": KEYS[key],
        "reviewer": reviewer,
        **({"resolves": True} if settle else {}),
    }
    if key == "e":
        entry["completion"] = _edit(row.row["completion"])
    if key == "r":
        entry["reason"] = input("why? ")
    reviews.review(queue, {**entry, "seconds": round(time.monotonic() - began, 1)})
    return True


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
    from ..engine.rollout import Engine
    from ..engine.sampling import SamplingParams
    from ..model import weights
    from ..text.tokenizer import Tokenizer

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
