"""`sample`: rejection sampling. Completions that pass the stage's filters become rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ...config.recipe import Sample
from ...types import Completion, Group
from ..dataset_rows import ROWS
from ..job import Job
from .outcome import Outcome
from .ranking import ranked, ranking_of
from .rows import to_row, tokenizer_digest
from .sweep import sweep


def run(job: Job) -> Outcome:
    """Sample completions of each problem. Of those that pass the filters, keep the first `keep_per_problem`
    with different texts, in the order that the setting `keep` defines."""
    stage: Sample = job.stage
    origin = {"sampler": job.manifest(stage.model)["digest"]}
    remote = job.endpoints.get(stage.model)
    if remote:
        origin |= {"endpoint": remote.url, "model": remote.model}
    rank, take_usage = ranking_of(job) if stage.keep == "best" else (None, dict)

    def judge(group: Group) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return (the kept completions of one problem as rows, the number of the others by the reason for
        dropping them)."""
        faults = [_fault(group, place, stage) for place in range(len(group.completions))]
        places = [place for place in ranked(group, stage.keep, rank) if not faults[place]]
        passed = [group.completions[place] for place in places]
        kept = _distinct(passed, stage.keep_per_problem)
        dropped = Counter(fault for fault in faults if fault)
        dropped["one of many for its problem"] += len(passed) - len(kept)
        return [to_row(group, completion, origin) for completion in kept], dropped

    result = sweep(job, ROWS, stage.prompts, judge, take_usage)
    if not remote:
        result["notes"]["tokenizer"] = tokenizer_digest(job.tokenizer(stage.model))
    return result


def _fault(group: Group, place: int, stage: Sample) -> str | None:
    """Return the reason why the completion at index `place` of the group is dropped, None if it passes all
    filters."""
    completion = group.completions[place]
    parts = group.scores[place].parts
    judged = 0.5 if stage.judged is None else stage.judged
    if not completion.stopped:
        return "ran out of tokens"
    if stage.correct and parts["accuracy"] < 1:
        return "wrong"
    if stage.wellformed and parts.get("format", 1.0) < 1:
        return "not well-formed"
    if parts.get("language", 1.0) < stage.language:
        return "mixed languages"
    if stage.longest and len(completion.tokens) > stage.longest:
        return "too long"
    if parts.get("judge", 1.0) < judged:
        return "the judge thinks little of it"
    return None


def _distinct(completions: list[Completion], count: int) -> list[Completion]:
    """Return the first `count` completions with different texts. Of several with the same text the first is
    kept, but at the position of the last."""
    distinct: dict[str, Completion] = {}
    for completion in reversed(completions):
        distinct[completion.text] = completion
    return list(reversed(distinct.values()))[:count]
