"""The judges and reward models that a stage uses. A judge that failed its calibration, or a reward model that
is no better than chance, is refused."""

from __future__ import annotations

import json

from safetensors.torch import load_file

from ...config.learned_rewards import JudgeConfig
from ...config.recipe import RL
from ...engine.sampling import SamplingParams, to_sampling_params
from ...tasks.judge import Judge
from ...tasks.mixture import Mixture
from ...train.learned_rewards import LearnedRewards, RewardFunction, Tasks, add_reward_part
from ...train.reward_model import RewardModelScorer
from ...types import Group, LimbeckError
from ..job import Job

CALIBRATION = "calibration.json"  # file with the calibration of a judge
VALUE = "value.safetensors"  # the value head of a reward model
MEASURED = "reward.json"  # a reward model's accuracy on held-out pairs


def learned_rewards(job: Job, tasks: Tasks, sampling: SamplingParams) -> LearnedRewards:
    """Return the learned rewards (judge, preference model) of an `rl` stage, added to those of `tasks`.
    `sampling` is how the stage samples completions."""
    stage: RL = job.stage
    open_function = {"judge": judge_of, "preference": reward_model_of}
    functions: dict[str, RewardFunction] = {}
    for part, settings in (stage.learned_rewards or {}).items():
        functions[part] = open_function[part](job, settings.of)
    return LearnedRewards(stage, functions, tasks, sampling, job.seed)


class JudgedTasks:
    """Tasks whose scores have an additional part `judge`. Its weight in the reward is 0: it is only used to
    filter rows."""

    def __init__(self, tasks: Mixture, judge: Judge):
        self.tasks = tasks
        self.judge = judge
        self.draw = tasks.draw
        self.take_usage = judge.take_usage

    def score(self, group: Group) -> Group:
        """Return the group with the scores of the tasks and of the judge."""
        scores = self.judge.score_groups([group])[0]
        return add_reward_part(self.tasks.score(group), scores, "judge", 0.0)


def tasks_of(job: Job) -> Mixture | JudgedTasks:
    """Return the stage's problems with their checkers, and with a judge if the setting `judge` names one."""
    tasks = job.mixture(job.stage.problems, getattr(job.stage, "rewards", None))
    name = getattr(job.stage, "judge", None)
    return JudgedTasks(tasks, judge_of(job, name)) if name else tasks


def judge_of(job: Job, name: str) -> Judge:
    """Return the judge that the `calibrate` stage `name` measured, with the same judging settings.

    Raises LimbeckError, with the measured numbers, if the judge failed the calibration.
    """
    calibration = json.loads((job.inputs[name] / CALIBRATION).read_text(encoding="utf-8"))
    judge = calibration["judge"]
    if not calibration["passed"]:
        raise LimbeckError(
            f"stages.{job.name}: the judge {judge} is refused as a reward by {name}: "
            f"{'; '.join(calibration['refusals'])}; "
            f"take another judge, or ask it otherwise (stages.{name}.judging)"
        )
    return open_judge(job, judge, JudgeConfig(**calibration["judging"]))


def open_judge(job: Job, model: str, judging: JudgeConfig) -> Judge:
    """Return the model or endpoint of the input `model` as a judge with the settings `judging`."""
    return Judge(job.sampler(model), judging, to_sampling_params(judging.sampling), job.seed)


def reward_model_of(job: Job, name: str) -> RewardModelScorer:
    """Return the reward model that the `reward` stage `name` trained.

    Raises LimbeckError if its accuracy on held-out pairs is no better than chance.
    """
    measured = json.loads((job.inputs[name] / MEASURED).read_text(encoding="utf-8"))
    accuracy = measured["accuracy"]
    if accuracy["low"] <= 0.5:
        interval = f"{accuracy['mean']:.0%} [{accuracy['low']:.0%}, {accuracy['high']:.0%}]"
        raise LimbeckError(
            f"stages.{job.name}: the reward model {name} is refused: on {accuracy['n']} held-out pairs "
            f"it is right in {interval}, no better than chance; give it more pairs"
        )
    decoder, tokenizer = job.model(name)
    value = load_file(job.inputs[name] / VALUE)["value.weight"]
    return RewardModelScorer(decoder, value, tokenizer, measured["centre"])
