"""Conversions of rows (training examples as JSON objects): completions to rows, rows to tokenized samples,
and tables of preference pairs to rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...config.learned_rewards import TABLES
from ...run_log import read
from ...tasks.files import read_table
from ...text.prompt_format import PLACEHOLDER, conversation
from ...text.reasoning_parser import split_thought
from ...text.tokenizer import Tokenizer
from ...types import Completion, Group, LimbeckError, Sample
from ..dataset_rows import ROWS, take_share
from ..job import Job
from ..store import digest_of

Row = dict[str, Any]
PREFERENCE = ("prompt", "chosen", "rejected")  # columns of a preference


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer. The token ids in a row are valid only for the tokenizer with the
    digest noted beside the rows."""
    return digest_of(tokenizer.backend.to_str())


def to_row(group: Group, completion: Completion, origin: dict[str, str]) -> Row:
    """Return a completion as a row, with its `origin` (such as the model that sampled it) and its sampled
    token ids. The token ids of a remote model are unknown, so that its rows have none."""
    thought = split_thought(completion.text)
    row: Row = {
        "id": f"{group.problem.id}#{completion.sample}",
        "prompt": group.problem.prompt,
        "language": group.problem.language,
        "completion": completion.text,
        "reasoning_content": thought.thought,
        "content": thought.answer,
    }
    if group.problem.system:
        row["system"] = group.problem.system
    if group.problem.template != PLACEHOLDER:
        row["template"] = group.problem.template
    if (completion.tokens >= 0).all():
        row["tokens"] = completion.tokens.tolist()
    row["origin"] = {"problem": group.problem.origin, **origin}
    return row


def given_rows(job: Job, name: str, share: float, tokenizer: Tokenizer) -> list[Row]:
    """Return a share of the rows of the input `name` (1 = all). Token ids are removed if they were made by
    another tokenizer than `tokenizer`."""
    rows = take_share(job.rows(name), share, (job.seed, name))
    made_by = job.manifest(name)["notes"].get("tokenizer")
    if made_by in (None, tokenizer_digest(tokenizer)):
        return rows
    return [{key: value for key, value in row.items() if not key.endswith("tokens")} for row in rows]


def to_sample(row: Row, tokenizer: Tokenizer, thoughts: str) -> Sample:
    """Return a row as token ids: the sampled ids if the row has them, else its text tokenized. With
    `thoughts="drop"`, the response is the final answer alone."""
    prompt = tokenizer.prompt(conversation(row["prompt"], row.get("system", "")))
    if thoughts == "drop":
        response = tokenizer.response(row.get("content") or row["completion"])
    elif "tokens" in row:
        response = np.array(row["tokens"], dtype=np.int64)
    else:
        response = tokenizer.response(row["completion"])
    return Sample(np.concatenate([prompt, response]), start=len(prompt))


def preferences(job: Job, rows: str) -> Iterator[tuple[int, Row]]:
    """Yield (number, row) for each preference pair in a table file or a stage named `rows`. Each row has
    `prompt`, `chosen` and `rejected`; numbers are those of lines in a table, or count from 1.

    Raises LimbeckError for a row in which one of the three is missing or not text.
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
