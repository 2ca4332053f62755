"""`pairs`: the best and the worst completion of each problem, with TRL's column names."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ...config.methods import Pairs
from ...train.pairs import best_and_worst
from ...types import Group
from ..dataset_rows import ROWS
from ..job import Job
from .outcome import Outcome
from .ranking import ranking_of
from .rows import to_row, tokenizer_digest
from .sweep import sweep

SHARED = ("id", "prompt", "language", "origin")  # columns that both responses have in common


def run(job: Job) -> Outcome:
    """Sample completions, rank them, and keep a pair per problem whose scores differ by more than
    `margin`."""
    stage: Pairs = job.stage
    tokenizer = job.model(stage.model)[1]
    origin = {"sampler": job.manifest(stage.model)["digest"]}
    rank, take_usage = ranking_of(job)

    def judge(group: Group) -> tuple[list[dict[str, Any]], Counter[str]]:
        """The pair of a group as a row, or the reason why there is none."""
        scores = rank(group)
        places = best_and_worst(scores, stage.margin)
        if places is None:
            return [], Counter(["none is better"])
        best, worst = places
        chosen = to_row(group, group.completions[best], origin)
        rejected = to_row(group, group.completions[worst], origin)
        pair = {
            "chosen": chosen["completion"],
            "rejected": rejected["completion"],
            "chosen_score": scores[best],
            "rejected_score": scores[worst],
            "chosen_tokens": chosen["tokens"],
            "rejected_tokens": rejected["tokens"],
        }
        return [{**{key: chosen[key] for key in SHARED}, **pair}], Counter()

    result = sweep(job, ROWS, stage.prompts, judge, take_usage)
    result["notes"]["tokenizer"] = tokenizer_digest(tokenizer)
    return result
