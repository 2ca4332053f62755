"""Settings of `limbeck iterate` in a recipe: which stages a further generation repeats, the harder problems
that it gets, and the gate that its model has to pass. This module does not import torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .parts import Settings


class Harder(Settings):
    """The `screen` stage that a generation begins with: the last model is asked, and what it solves sometimes
    becomes a part of the problems of every repeated `rl` stage."""

    problems: dict[str, float] = Field(
        {},
        description="names of problems to choose from, with their shares; none means those of the "
        "repeated `rl` stages",
    )
    share: float = Field(
        0.7, gt=0, lt=1, description="share of what is screened among the problems of each `rl` stage"
    )
    limit: int = Field(256, ge=1, description="how many problems are measured")
    samples: int = Field(8, ge=2, description="completions of each problem")
    low: float = Field(0.0, ge=0, le=1, description="drop problems solved this often or less")
    high: float = Field(0.8, ge=0, le=1, description="drop problems solved this often or more")


class Gate(Settings):
    """The tests that a candidate must pass to be promoted, all of them at level `alpha`: it has to be better
    in accuracy, and not worse by a margin in anything else."""

    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="level of each test: the probability, at most, that one generation promotes a model "
        "that is no better, or worse by a margin",
    )
    problems: list[str] = Field(
        [],
        description="names of problems on whose held-out part the candidate has to be better; none means "
        "the evaluation's first",
    )
    general: list[str] | None = Field(
        None,
        description="names of problems on which together it must not be worse; all others of the evaluation "
        "if not set",
    )
    mode: Literal["t1", "t06", "greedy"] | None = Field(
        None, description="the way of sampling that is compared; `t1`, or the evaluation's first, if not set"
    )
    language_margin: float = Field(
        0.05, gt=0, lt=1, description="what the share of words in the question's language may lose"
    )
    general_margin: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="what the accuracy on `general` and on named benchmarks together may lose",
    )
    arena_margin: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of the arena's votes by which it may lose more often than it wins",
    )
    votes: int = Field(
        30, ge=2, description="votes of people on the two models from which on they count; fewer do not"
    )
    wait_for_votes: bool = Field(
        False, description="stop, resumably, before each decision until there are as many as `votes`"
    )


class Iterate(Settings):
    """What `limbeck iterate` repeats. Roles that are not given are taken from the `story` of the report
    stage: `r1`, `base` and `zero`."""

    model: str | None = Field(None, description="the stage whose model ends a generation")
    base: str | None = Field(None, description="the stage whose model a generation begins with")
    teacher: str | None = Field(
        None,
        description="the stage whose place the last model takes in later generations: it writes the rows "
        "of the cold start",
    )
    evaluation: str | None = Field(
        None, description="the `evaluate` stage whose held-out problems are asked; the report's if not set"
    )
    start: Literal["again", "last"] = Field(
        "again", description="later generations train the base again, or go on with the last model"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="the longest response of the last model where it is asked in the teacher's place; if not "
        "set, as long as it learned to write, where that is longer than the stage's own",
    )
    screen: Harder | None = Field(
        Harder(), description="harder problems for `rl` stages; `null` leaves their problems as they are"
    )
    gate: Gate = Field(Gate(), description="when a model is promoted")

    @model_validator(mode="after")
    def _distinct(self) -> Iterate:
        """Refuse a model that is also the base or the teacher, since nothing would lie between them."""
        for role in ("base", "teacher"):
            if self.model and getattr(self, role) == self.model:
                raise ValueError(f"model and {role} are both {self.model}; name two different stages")
        return self
