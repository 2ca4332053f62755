"""Which weights wrote a response: the checksum in the record of every step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from trainers import train_grpo

from limbeck.config.parts import Policy, Sampling
from limbeck.config.recipe import RL
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model.checksum import WIDTH, checksum
from limbeck.run_log import METRICS, TIMING, read
from limbeck.tasks.mixture import Mixture
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.learned_rewards import LearnedRewards
from limbeck.train.learner import Learner
from limbeck.types import Resumable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_any_one_weight_changes_the_checksum(dtype):
    module = nn.ParameterList([torch.randn(3, 3), torch.randn(2 * WIDTH + 5, 5)]).to(dtype)
    found = {checksum(module)}
    assert found == {checksum(module)}
    places = [(0, 0), (0, 8), (1, 0), (1, WIDTH), (1, 5 * 2 * WIDTH), (1, 5 * (2 * WIDTH + 5) - 1)]
    for which, place in places:
        with torch.no_grad():
            bits = module[which].view(-1).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
            bits[place] ^= 1
        found.add(checksum(module))
    assert len(found) == 1 + len(places)


def test_swapped_rows_and_swapped_values_have_other_checksums():
    weight = nn.Parameter(torch.arange(8.0 * WIDTH).view(8, WIDTH))
    module = nn.ParameterList([weight])
    before = checksum(module)
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    rows = checksum(module)
    with torch.no_grad():
        weight.copy_(weight.flip(1))
    assert len({before, rows, checksum(module)}) == 3


def train(folder: Path, decoder, tokenizer, clock, stop=lambda: False) -> list[str]:
    """Three steps of RL; the checksums in the record, one a step."""
    settings = RL(
        kind="rl",
        model="base",
        problems={"clock": 1},
        rewards={"language": 1.0},
        steps=3,
        policy=Policy(group_size=4, prompts_per_step=4, zero_variance="keep", mask_truncated=False),
        sampling=Sampling(max_new_tokens=16),
    )
    folder.mkdir(exist_ok=True)
    learner = Learner(decoder(), settings.optimizer, 3)
    tasks = Mixture({"clock": clock}, {"clock": 1}, settings.rewards)
    rewards = LearnedRewards(settings, {}, tasks, SamplingParams(max_new_tokens=16), "0/zero")
    checkpoint = Checkpoint(folder, 60, stop)
    train_grpo(folder, learner, Engine(learner.model, tokenizer), rewards, checkpoint, math.inf)
    return [row["weights"] for row in read(folder / TIMING) if "weights" in row]


def test_every_step_tells_the_weights_that_sampled_also_when_resumed(decoder, tokenizer, clock, tmp_path):
    whole = train(tmp_path / "whole", decoder, tokenizer, clock)
    assert len(set(whole)) == 3 and whole[0] == checksum(decoder())
    for _ in range(2):
        with pytest.raises(Resumable):
            train(tmp_path / "stopped", decoder, tokenizer, clock, lambda: True)
    again = train(tmp_path / "stopped", decoder, tokenizer, clock)
    assert again == whole
    rows = itertools.chain(read(tmp_path / "whole" / METRICS), read(tmp_path / "stopped" / METRICS))
    assert all("weights" not in row for row in rows)
