"""The largest micro-batch of a stage, as the learner packs it (train/batch.py).

Completions are taken at their limit. Rows of tables have the mean length that the forecast assumes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.parts import ModelStage
from ..config.recipe import RL, Distill
from .stage_work import PROMPT, StageWork

LONG = 3072  # tokens from which a sequence does not share its prompt (model/packed.py)


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a stage.

    `tokens` go in, `predicted` are in the loss, in `sequences` sequences of at most `longest` tokens. `keys`
    is the number of keys, which is larger than `tokens` where completions share a prompt. `several`: an
    update has more than one micro-batch. `taught`: a teacher's distributions are compared with the model's.
    `ahead`: the modules of multi-token prediction learn too.
    """

    tokens: int
    predicted: int
    longest: int
    sequences: int
    keys: int
    several: bool = False
    taught: bool = False
    ahead: bool = False


def micro_batch(stage: ModelStage, work: StageWork) -> MicroBatch:
    """Return the largest micro-batch of a stage that learns."""
    if isinstance(stage, RL):
        return _of_groups(
            work, stage.batch_tokens, stage.policy.group_size, stage.sampling.max_new_tokens,
            stage.policy.prompts_per_step / stage.policy.updates_per_rollout,
        )  # fmt: skip
    if isinstance(stage, Distill) and stage.problems:
        return _of_groups(
            work, stage.batch_tokens, stage.group_size, stage.sampling.max_new_tokens,
            stage.prompts_per_step, bool(stage.teachers),
        )  # fmt: skip
    return _of_rows(stage, work)


def _of_groups(
    work: StageWork, batch_tokens: int, size: int, limit: int, groups: float, taught: bool = False
) -> MicroBatch:
    """Return the largest micro-batch of groups of `size` completions; `groups` of them make an update.

    A group shares its prompt unless its sequences are long, and is never divided.
    """
    prompt = round(work.rollouts[0].prompt) if work.rollouts else PROMPT
    whole = prompt + limit
    if size == 1 or whole > LONG:
        each = (whole - 1, limit, 1, whole - 1)
        groups *= size
    else:
        each = (prompt + size * (limit - 1), size * limit, 1 + size, prompt + size * (whole - 1))
    count = max(1, min(batch_tokens // each[0], round(groups)))
    tokens, predicted, sequences, keys = (count * number for number in each)
    return MicroBatch(tokens, predicted, whole, sequences, keys, count < groups, taught)


def _of_rows(stage: ModelStage, work: StageWork) -> MicroBatch:
    """Return the largest micro-batch of rows of text; a second one, of what was left, may follow it."""
    longest = max(2, round(work.length)) if work.length else stage.batch_tokens
    tokens = max(stage.batch_tokens, longest)
    sequences = max(1, tokens // longest)
    taught = isinstance(stage, Distill)
    ahead = stage.kind in ("pretrain", "sft")
    return MicroBatch(tokens, tokens, longest, sequences, tokens, True, taught, ahead)
