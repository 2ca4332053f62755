"""The control "cut" of an evaluation: the model must answer without a thought, since its response begins with
an empty one and the beginning of an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...engine.rollout import Engine
from ...engine.sampling import SamplingParams
from ...tasks.answers import mark_answer
from ...tasks.numerals import DIGITS
from ...text.reasoning_parser import CLOSE, OPEN
from ...types import Completion, Group, Problem
from ..dataset_rows import source_of

LONGEST = 32  # tokens of an answer; a model that was made to begin with it seldom stops after it
_NUMBER = re.compile(DIGITS)


@dataclass(frozen=True)
class CutThought:
    """Samples from an engine with the thought cut off: every response begins with
    `<think> </think> The answer is`, or with the beginning that another style of answers has.

    `styles` maps problem sources to their styles (see `answers.extract`). The text of a completion has the
    beginning, its tokens are those that the model wrote after it, `LONGEST` at most. If the model does not
    stop by itself, the text ends after the first number, and counts as stopped.
    """

    engine: Engine
    styles: Mapping[str, str]

    def rollout(
        self, problems: Sequence[Problem], group_size: int, sampling: SamplingParams, seed: Any
    ) -> list[Group]:
        """Return a group of `group_size` completions for every problem; all are of one source."""
        if not problems:
            return []
        before, after = mark_answer("\0", self.styles[source_of(problems[0].id)]).split("\0")
        tokenizer = self.engine.tokenizer
        opened = tokenizer.render([{"role": "user", "content": ""}]).rstrip().endswith(OPEN)
        begin = f"{'' if opened else OPEN} {CLOSE} {before}".strip()
        prefix = tuple(tokenizer.encode(begin))
        limit = min(LONGEST, sampling.max_new_tokens)
        params = replace(sampling, max_new_tokens=limit, response_prefix=prefix)
        groups = self.engine.rollout(problems, group_size, params, seed)
        return [
            replace(
                group,
                completions=tuple(self._complete(one, prefix, after) for one in group.completions),
                scores=(),  # those of a fleet are of the text without its beginning
            )
            for group in groups
        ]

    def _complete(self, completion: Completion, prefix: tuple[int, ...], after: str) -> Completion:
        """Return the completion with its beginning and, unless it stopped, cut after its first number and
        closed with the text `after`."""
        decode = self.engine.tokenizer.decode
        text = decode([*prefix, *completion.tokens.tolist()])
        number = _NUMBER.search(text, len(decode(prefix)))
        if completion.stopped or not number:
            return replace(completion, text=text)
        return replace(completion, text=text[: number.end()] + after, stopped=True)
