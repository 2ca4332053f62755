"""Settings of learned rewards in a recipe: LLM judges, their calibration, and reward models. This module
does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .parts import LORA, LoRA, ModelStage, Optimizer, Sampling, Settings

TABLES = (".jsonl", ".parquet")


class JudgeConfig(Settings):
    """The settings of an LLM judge: its prompt, the number of votes (replies to each prompt), and the
    sampling parameters."""

    method: Literal["pairwise", "rubric"] = Field(
        "pairwise",
        description="compare responses two by two, in both orders; or give each points for criteria",
    )
    question: str = Field(
        "Which one answers the question better?",
        description="of `pairwise`: what is asked about two responses",
    )
    criteria: dict[str, str] = Field(
        {"correct": "the answer is right"},
        min_length=1,
        description="of `rubric`: names of criteria, and what each means",
    )
    votes: int = Field(
        1, ge=1, description="replies to each prompt; the majority counts, or the mean of the points"
    )
    reference: bool = Field(True, description="show the judge the right answer where there is one")
    sampling: Sampling = Field(
        Sampling(temperature=0.0, max_new_tokens=512),
        description="how its replies are drawn; several votes want a temperature",
    )

    @model_validator(mode="after")
    def _vote(self) -> JudgeConfig:
        """Refuse several votes at temperature 0, since they would all be equal."""
        if self.votes > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"votes = {self.votes} at temperature 0 are the same vote; give sampling a temperature"
            )
        return self


class CalibrationThresholds(Settings):
    """The thresholds that a judge's calibration must meet. A judge that misses one of them cannot be used as
    a reward."""

    agreement: float = Field(
        0.8, ge=0, le=1, description="with the labels, at least: the lower end of the 95 % interval"
    )
    position: float = Field(0.2, ge=0, le=1, description="preference for a place, at most")
    length: float = Field(0.2, ge=0, le=1, description="preference for the longer response, at most")
    canaries: float = Field(
        0.05, ge=0, le=1, description="responses that say nothing and are not beaten by a good one, at most"
    )
    abstained: float = Field(0.1, ge=0, le=1, description="votes that cannot be read, at most")


class Calibrate(ModelStage):
    """A stage that measures a judge on pairs of responses whose better one is known. Only a judge that
    passes may be used as a reward."""

    kind: Literal["calibrate"]
    judge: str = Field(description="the stage whose model judges; a `remote` one will do")
    judging: JudgeConfig = Field(
        JudgeConfig(), description="how it is asked, here and wherever the calibration is cited"
    )
    bar: CalibrationThresholds = Field(CalibrationThresholds(), description="what it must reach")
    rows: str = Field(
        "",
        description="people's labels: JSONL or Parquet with `prompt`, `chosen` and `rejected`, or a "
        "stage with such rows",
    )
    model: str | None = Field(
        None,
        description="without `rows`: the stage whose model answers `problems`, which are then "
        "labelled by the truth",
    )
    problems: dict[str, float] = Field(
        {}, description="names of problems or of `screen` stages, with their shares"
    )
    samples: int = Field(
        4, ge=2, description="completions of each of them, of which a right and a wrong one make a pair"
    )
    sampling: Sampling = Field(Sampling(), description="how those are drawn")
    pairs: int = Field(100, ge=1, description="labelled pairs, at most; each is shown to the judge six times")

    @model_validator(mode="after")
    def _labelled(self) -> Calibrate:
        """Refuse settings that name two sources of labelled pairs, or none."""
        sampled = bool(self.model and self.problems)
        half = bool(self.model) != bool(self.problems)
        if bool(self.rows) == sampled or half:
            raise ValueError(
                "labels come from rows, or from model and problems together; give one of the two"
            )
        return self


class Reward(ModelStage):
    """A stage that trains a reward model, which gives a response a number, on preference pairs."""

    kind: Literal["reward"]
    model: str = Field(description="the stage whose model it begins from")
    rows: str = Field(
        description="JSONL or Parquet with `prompt`, `chosen` and `rejected`, or a stage with such rows"
    )
    licence: str | None = Field(
        None,
        description="of rows that are a file: `own`, `internal`, or the data set's; learning needs to know",
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="share of the prompts whose pairs are not learned from, but measured on"
    )
    epochs: float = Field(1, gt=0, description="passes over the pairs; 2.5 ends in the middle of the third")
    batch_pairs: int = Field(32, ge=1, description="pairs of one update")
    batch_tokens: int = Field(
        4096, ge=64, description="tokens of one micro-batch, at most: it bounds memory, not the update"
    )
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="linear"), description="how the weights move"
    )
    lora: LoRA | None = LORA


class LearnedReward(Settings):
    """The settings of one learned part of the reward in reinforcement learning, and of its alarm for reward
    hacking."""

    of: str = Field(
        description="for `judge` a `calibrate` stage that was passed, for `preference` a `reward` stage"
    )
    problems: list[str] = Field(
        [], description="names of problems whose responses it is asked about; none means all"
    )
    last_steps: int | None = Field(None, ge=1, description="count in so many last steps only")
    held_out: int = Field(
        32,
        ge=1,
        description="problems kept out of learning, on which the truth is looked at in every such step",
    )
    window: int = Field(30, ge=8, description="steps over which the alarm compares the two")
    on_alarm: Literal["drop", "stop"] = Field(
        "drop",
        description="when the opinion rises and the truth does not: go on without it, or end the stage",
    )
