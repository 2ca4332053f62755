"""Rows of datasets: sampled completions as rows, rows as samples, tables of preferences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...config.learned_rewards import TABLES
from ...run_log import read
from ...tasks.files import read_table
from ...text.reasoning_parser import split_thought
from ...text.tokenizer import Tokenizer
from ...types import Completion, Group, LimbeckError, Sample
from ..dataset_rows import ROWS, take_share
from ..job import Job
from ..store import digest_of

Row = dict[str, Any]
PREFERENCE = ("prompt", "chosen", "rejected")  # columns of a preference


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """The digest that tells tokenizers apart; token ids in rows are valid for one of them only."""
    return digest_of(tokenizer.backend.to_str())


def to_row(group: Group, completion: Completion, origin: dict[str, str]) -> Row:
    """A completion as a row with its origin, and with its token ids as sampled. Ids of a remote model are
    unknown: its rows are text only."""
    thought = split_thought(completion.text)
    row: Row = {
        "id": f"{group.problem.id}#{completion.sample}",
        "prompt": group.problem.prompt,
        "language": group.problem.language,
        "completion": completion.text,
        "reasoning_content": thought.thought,
        "content": thought.answer,
    }
    if (completion.tokens >= 0).all():
        row["tokens"] = completion.tokens.tolist()
    row["origin"] = {"problem": group.problem.origin, **origin}
    return row


def given_rows(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[Row]:
    """A share of a stage's rows; without token ids if another tokenizer made them."""
    rows = take_share(job.rows(name), share, (job.seed, name))
    made_by = job.manifest(name)["notes"].get("tokenizer")
    if made_by in (None, tokenizer_digest(tokenizer)):
        return rows
    return [{key: value for key, value in row.items() if not key.endswith("tokens")} for row in rows]


def to_sample(row: Row, tokenizer: Tokenizer, thoughts: str, system: str = "") -> Sample:
    """A row as tokens: the sampled ids if the row has them, else its text tokenized; `thoughts: drop` leaves
    the final answer only."""
    prompt = tokenizer.prompt(_messages(row["prompt"], system))
    if thoughts == "drop":
        response = tokenizer.response(row.get("content") or row["completion"])
    elif "tokens" in row:
        response = np.array(row["tokens"], dtype=np.int64)
    else:
        response = tokenizer.response(row["completion"])
    return Sample(np.concatenate([prompt, response]), start=len(prompt))


def _messages(prompt: str, system: str) -> str | list[dict[str, str]]:
    """A prompt, or the messages of a system prompt and a prompt."""
    if not system:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def preferences(job: Job, rows: str) -> Iterator[tuple[int, Row]]:
    """Numbered rows with `prompt`, `chosen` and `rejected`, from a table or a stage.

    Raises LimbeckError for a row that lacks one.
    """
    is_table = rows.endswith(TABLES)
    numbered = read_table(Path(rows)) if is_table else enumerate(read(job.inputs[rows] / ROWS), start=1)
    for number, row in numbered:
        if row.get("id") in job.dropped:
            continue
        for name in PREFERENCE:
            if not isinstance(row.get(name), str):
                where = f"{rows}, line {number}" if is_table else f"stages.{rows}, row {number}"
                raise LimbeckError(
                    f"{where}: {name} is missing or no text; "
                    "rows of preferences have prompt, chosen and rejected"
                )
        yield number, dict(row)
