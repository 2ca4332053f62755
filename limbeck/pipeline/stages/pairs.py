"""`pairs`: the best and the worst completion of each problem as a preference pair, with TRL's column
names."""

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

SHARED = (
    "id",
    "prompt",
    "language",
    "system",
    "template",
    "origin",
)  # columns that both responses have in common


def run(job: Job) -> Outcome:
    """Sample completions, score them, and keep one pair per problem, if its best and worst scores differ by
    more than the setting `margin`."""
    stage: Pairs = job.stage
    tokenizer = job.tokenizer(stage.model)
    origin = {"sampler": job.manifest(stage.model)["digest"]}
    rank, take_usage = ranking_of(job)

    def judge(group: Group) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return (the pair of one problem's completions as a list of one row, no reasons), or ([], the reason
        why there is no pair)."""
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
        return [{**{key: chosen[key] for key in SHARED if key in chosen}, **pair}], Counter()

    result = sweep(job, ROWS, stage.prompts, judge, take_usage)
    result["notes"]["tokenizer"] = tokenizer_digest(tokenizer)
    return result
