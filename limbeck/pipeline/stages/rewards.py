"""Opens the judges and reward models that a stage names; refuses a judge that failed its calibration, and a reward model that is
no better than chance."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...config.learned_rewards import Judging
from ...config.parts import Optimizer
from ...config.recipe import RL
from ...engine.sampling import SamplingParams, params_of
from ...tasks.judge import Judge
from ...tasks.task import Mixture
from ...train.learned_rewards import Panel, Tasks, Voice, with_opinion
from ...train.reward_model import RewardModel, RewardModelLearner
from ...types import Group, LimbeckError
from ..job import Job

CALIBRATION, VALUE, MEASURED = "calibration.json", "value.safetensors", "reward.json"


def panel_of(job: Job, tasks: Tasks, sampling: SamplingParams) -> Panel:
    """The opinions that an `rl` stage listens to, and what it listens with."""
    stage: RL = job.stage
    makers = {"judge": judge_of, "preference": reward_of}
    voices: dict[str, Voice] = {
        part: makers[part](job, opinion.of) for part, opinion in (stage.learned_rewards or {}).items()
    }
    return Panel(stage, voices, tasks, sampling, job.seed)


class Judged:
    """Tasks whose scores have the part `judge`: rows are kept by it, and nothing is earned."""

    def __init__(self, tasks: Mixture, judge: Judge):
        self.tasks, self.judge, self.draw, self.bill = tasks, judge, tasks.draw, judge.bill

    def score(self, group: Group) -> Group:
        return with_opinion(self.tasks.score(group), self.judge.opinions([group])[0], "judge", 0.0)


def heard(job: Job) -> Mixture | Judged:
    """A stage's problems, with a judge beside their checker where it names one."""
    tasks, name = (
        job.mixture(job.stage.problems, getattr(job.stage, "rewards", None)),
        getattr(job.stage, "judge", None),
    )
    return Judged(tasks, judge_of(job, name)) if name else tasks


def judge_of(job: Job, name: str) -> Judge:
    """The judge of a `calibrate` stage, asked as it was there. One that failed the bar is refused, with its numbers."""
    told = json.loads((job.inputs[name] / CALIBRATION).read_text(encoding="utf-8"))
    if not told["passed"]:
        raise LimbeckError(
            f"stages.{job.name}: the judge {told['judge']} is refused as a reward by {name}: {'; '.join(told['refusals'])}; "
            f"take another judge, or ask it otherwise (stages.{name}.judging)"
        )
    return open_judge(job, told["judge"], Judging(**told["judging"]))


def open_judge(job: Job, model: str, judging: Judging) -> Judge:
    """A stage's model, or an endpoint, as a judge."""
    return Judge(job.sampler(model), judging, params_of(judging.sampling), job.seed)


def reward_of(job: Job, name: str) -> RewardModel:
    """The reward model of a `reward` stage. One that is no better than chance on pairs it has not seen is refused."""
    told = json.loads((job.inputs[name] / MEASURED).read_text(encoding="utf-8"))
    accuracy = told["accuracy"]
    if accuracy["low"] <= 0.5:
        raise LimbeckError(
            f"stages.{job.name}: the reward model {name} is refused: on {accuracy['n']} held-out pairs it is right in "
            f"{accuracy['mean']:.0%} [{accuracy['low']:.0%}, {accuracy['high']:.0%}], no better than chance; give it more pairs"
        )
    decoder, tokenizer = job.model(name)
    learner = RewardModelLearner(decoder, Optimizer(), 1)
    with torch.no_grad():
        decoder.value.weight.copy_(load_value(job.inputs[name]))
    return RewardModel(learner, tokenizer, told["centre"])


def load_value(folder: Path) -> torch.Tensor:
    return load_file(folder / VALUE)["value.weight"]
