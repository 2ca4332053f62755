"""Settings of the distillation methods that are stages of a recipe: teacher labels, preference pairs, DPO
and divergences. This module does not import torch.

Plain fine-tuning on a teacher's outputs needs only the stages `sample` and `sft`. The methods here use more
of the teacher than its sampled tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .parts import RECOMPUTE, Budgeted, ModelStage, Optimizer, Recompute, RewardPart, Sampling


class Label(ModelStage):
    """A stage that computes a teacher's top-k log-probabilities at every token of rows (stored training
    examples). They are computed once and can be used for any number of students."""

    kind: Literal["label"]
    model: str = Field(description="the teacher's stage")
    rows: dict[str, float] = Field(description="stages that give rows, with the share of each")
    top_k: int = Field(
        32,
        ge=1,
        description="tokens whose log-probabilities are kept; the mass of the others is kept as one number",
    )
    temperature: float = Field(
        1.0, gt=0, description="divides the logits; whoever learns from the labels uses the same"
    )
    batch_tokens: int = Field(4096, ge=64, description="tokens at once, at most")


class Pairs(ModelStage):
    """A stage that samples completions from a student and keeps the best and the worst one for each problem
    as a preference pair, for `dpo`."""

    kind: Literal["pairs"]
    model: str = Field(description="the stage whose model is asked")
    problems: dict[str, float] = Field(
        description="names of problems or of `screen` stages, with their shares"
    )
    rewards: dict[RewardPart, float] = Field(
        {"accuracy": 1.0, "format": 0.2}, description="what each part of a score is worth"
    )
    scored_by: str | None = Field(
        None,
        description="a teacher's stage, whose mean log-probability of a completion is the score, in "
        "place of `rewards`; or a `calibrate` "
        "stage, whose judge gives it",
    )
    prompts: int = Field(512, ge=1, description="how many problems are asked")
    samples: int = Field(
        8, ge=2, description="completions of each problem, of which the best and the worst are kept"
    )
    margin: float = Field(0.0, ge=0, description="leave out pairs whose scores differ by no more than this")
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")


class DPO(Budgeted):
    """A stage of direct preference optimisation on preference pairs (arXiv 2305.18290). The model at the
    beginning of the stage is the reference."""

    kind: Literal["dpo"]
    model: str = Field(description="the stage whose model learns")
    pairs: dict[str, float] = Field(
        description="`pairs` stages, and JSONL or Parquet with `prompt`, `chosen` and `rejected`, "
        "with the share of each"
    )
    licence: str | None = Field(
        None,
        description="of pairs that are a file: `own`, `internal`, or the data set's; learning needs to know",
    )
    beta: float = Field(
        0.1, gt=0, description="how much of a difference from the reference settles a preference"
    )
    normalized: bool = Field(
        False,
        description="compare mean log-probabilities, not sums: a longer response gains nothing by its length",
    )
    epochs: float = Field(1, gt=0, description="passes over the pairs; 2.5 ends in the middle of the third")
    batch_tokens: int = Field(4096, ge=64, description="tokens of one update, about")
    recompute: Recompute = Field(False, description=RECOMPUTE)
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=2e-4, warmup_steps=5, schedule="linear"), description="how the weights move"
    )


class Distill(Budgeted):
    """A stage that trains a student on the token distributions of its teachers: on completions that the
    student samples, on rows (stored training examples), or on both."""

    kind: Literal["distill"]
    model: str = Field(description="the student's stage")
    teachers: dict[str, str] = Field(
        {},
        description="names of problems, and of `general` stages whose rows a model wrote, each with the "
        "stage of the teacher for them; `label` stages need none",
    )
    divergence: Literal["forward", "reverse", "jsd", "text"] = Field(
        "reverse",
        description="KL(teacher, student), which covers; KL(student, teacher), which selects; "
        "between them; or of spans of "
        "text, for teachers with other tokenizers",
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="of `jsd`: towards 0 it acts as `forward`, towards 1 as `reverse`"
    )
    temperature: float = Field(1.0, gt=0, description="divides the logits of both; not that of sampling")
    on_policy: float = Field(
        1.0, ge=0, le=1, description="share of the steps in which the student writes what is learned from"
    )
    problems: dict[str, float] = Field(
        {}, description="where it does: problems or `screen` stages, with their shares"
    )
    rows: dict[str, float] = Field(
        {}, description="in the other steps: stages that give rows, `label` among them, with their shares"
    )
    completion_only_loss: bool | None = Field(
        None, description="of rows, true by default; `false` learns the tokens of their prompts as well"
    )
    steps: int = Field(100, ge=1, description="updates")
    prompts_per_step: int = Field(32, ge=1, description="problems of each step")
    group_size: int = Field(
        1, ge=1, description="completions of each problem; of rows a step takes as many as both make"
    )
    sampling: Sampling = Field(Sampling(), description="how the student's completions are drawn")
    batch_tokens: int = Field(
        4096, ge=64, description="tokens of one micro-batch, at most: it bounds memory, not the update"
    )
    recompute: Recompute = Field(False, description=RECOMPUTE)
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="linear", final_ratio=0.3),
        description="how the weights move",
    )

    @model_validator(mode="after")
    def _fed(self) -> Distill:
        """Refuse settings under which a step would have nothing to learn from."""
        if self.on_policy > 0 and not (self.problems and self.teachers):
            raise ValueError(
                f"on_policy = {self.on_policy:g} needs problems for the student to answer, and "
                "teachers for them"
            )
        if self.on_policy < 1 and not self.rows:
            raise ValueError(f"on_policy = {self.on_policy:g} leaves steps that need rows")
        if self.completion_only_loss is False and self.divergence == "text":
            raise ValueError(
                "completion_only_loss: false is not for divergence text, which compares responses; leave "
                "it out"
            )
        return self
