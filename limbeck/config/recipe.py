"""A recipe: the sources of problems, and the stages that turn a base model into a reasoning model.

A stage produces one artifact, such as a model, rows (training examples) or an evaluation, and cites other
stages by name as its inputs. Every settings class refuses unknown keys. Validators reject values but do not
change them. `load.py` reads YAML into these classes; `validate.py` turns mistakes into sentences. This
module does not import torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .iterate import Iterate
from .learned_rewards import TABLES, Calibrate, LearnedReward, Reward
from .methods import DPO, Distill, Label, Pairs
from .parts import (
    RECOMPUTE,
    Budgeted,
    ModelStage,
    Optimizer,
    Policy,
    Prices,
    Recompute,
    RewardPart,
    Sampling,
    Settings,
    Shape,
    Stage,
    SuiteName,
    SuiteOptions,
)

CorpusShare = Literal[
    "textbook",
    "general",
    "plain",
    "tagged",
    "guessed",
    "direct_right",
    "systematic",
    "unverified",
    "slip",
    "misjudged",
    "same",
    "other",
]

# ---------------------------------------------------------------- what is asked


class Miniature(Settings):
    """A built-in source of problems, the clock countdown: combine a few given numbers so that the result
    equals a target modulo `modulus`. Problems are in English and Chinese."""

    source: Literal["miniature"]
    modulus: int = Field(7, ge=3, le=31, description="hours of the clock: sums are taken modulo this")
    numbers: int = Field(3, ge=2, le=5, description="how many numbers a problem gives")
    largest: int = Field(6, ge=2, le=30, description="the largest of them")
    chinese: float = Field(
        0.35, ge=0, le=1, description="share of Chinese in the corpus, and among the problems of `repeat`"
    )
    held_out: float = Field(
        0.15, gt=0, lt=1, description="share of the countdown's problems kept for testing"
    )
    task: Literal["countdown", "repeat"] = Field(
        "countdown", description="`countdown` needs a thought, `repeat` needs none"
    )
    seed: int = Field(0, description="chooses which problems are held out")


class Gym(Settings):
    """A source of problems: a generator of the package reasoning-gym, given by its name (`pip install
    limbeck[gym]`)."""

    source: Literal["gym"]
    generator: str = Field(description="a generator's name, for instance `chain_sum`")
    config: dict[str, Any] = Field({}, description="the generator's own settings")
    size: int = Field(2000, ge=2, description="training problems to generate; repeated ones are dropped")
    held_out: int = Field(500, ge=1, description="test problems to generate")
    system: str | None = Field(None, description="the system prompt, in the chat template's system role")
    template: str = Field("{problem}", description="the user message; `{problem}` stands for the question")
    answer: Literal["tags", "boxed", "final"] = Field(
        "boxed",
        description="where the answer is looked for: `<answer>` tags, `\\boxed{}`, or the last number",
    )
    seed: int = Field(0, description="draws the problems")


class Files(Settings):
    """A source of problems in the user's own JSONL or Parquet files. `columns` maps `problem` and `answer`
    to the column names in the files."""

    source: Literal["files"]
    path: str = Field(description="JSONL or Parquet, beside the recipe or here")
    columns: dict[Literal["problem", "answer", "language"], str] = Field(
        {}, description="the file's names for these, where they are not the usual ones"
    )
    held_out: int = Field(200, ge=1, description="problems kept for testing, chosen by their text")
    limit: int | None = Field(None, ge=2, description="read no more rows than this")
    system: str | None = Field(None, description="the system prompt, in the chat template's system role")
    template: str = Field("{problem}", description="the user message; `{problem}` stands for the question")
    answer: Literal["tags", "boxed", "final"] = Field(
        "boxed",
        description="where the answer is looked for: `<answer>` tags, `\\boxed{}`, or the last number",
    )
    seed: int = Field(0, description="chooses which problems are held out")
    licence: str | None = Field(
        None,
        description="of the rows: `own`, `internal` (must not leave the house), or the data set's; "
        "learning needs to know",
    )
    teachers: list[str] = Field(
        [], description="models that wrote, filtered or judged the rows; their terms bind as well"
    )
    download: str | None = Field(
        None, description="the command that fetches the file, for the sentence that says it is missing"
    )


class Sums(Settings):
    """A built-in source of problems: sums of a few whole numbers, worked out from left to right."""

    source: Literal["sums"]
    min_terms: int = Field(2, ge=2, le=20, description="the fewest numbers of a sum")
    max_terms: int = Field(2, ge=2, le=20, description="the most numbers of a sum")
    largest: int = Field(9, ge=2, le=10**9, description="numbers go from 1 to this")
    negative: bool = Field(False, description="whether partial results may fall below zero")
    story: bool = Field(
        False, description="told as a story of things gained and given away, not as an expression"
    )
    size: int = Field(2000, ge=2, description="training problems to generate, where so many sums exist")
    held_out: int = Field(200, ge=1, description="test problems; no sum is among both")
    system: str | None = Field(None, description="the system prompt, in the chat template's system role")
    template: str = Field("{problem}", description="the user message; `{problem}` stands for the question")
    answer: Literal["tags", "boxed", "final"] = Field(
        "boxed",
        description="where the answer is looked for: `<answer>` tags, `\\boxed{}`, or the last number",
    )
    seed: int = Field(0, description="draws the problems")

    @model_validator(mode="after")
    def _has_terms(self) -> Self:
        """Refuse a range that is empty, and stories with less than nothing."""
        if self.max_terms < self.min_terms:
            raise ValueError(f"max_terms ({self.max_terms}) is less than min_terms ({self.min_terms})")
        if self.story and self.negative:
            raise ValueError("a story has no negative numbers; leave negative out")
        return self


Problems = Annotated[Miniature | Gym | Sums | Files, Field(discriminator="source")]


# ---------------------------------------------------------------- stages


class Load(Stage):
    """A stage that imports a base model: a Hugging Face directory, a GGUF file, or the name of a model that
    was pulled."""

    kind: Literal["load"]
    path: str = Field(description="an HF directory, a GGUF file, or the name of a model that was pulled")
    layers: int | list[int] | None = Field(
        None,
        description="keep this many layers, evenly spaced, or those with these numbers, from 0: a student to "
        "start from",
    )
    rows: str | None = Field(
        None,
        description="with a number of layers: a stage whose rows the model reads, to keep the layers with "
        "the greatest block influence (arXiv 2403.03853) in place of evenly spaced ones",
    )
    adapter: str | None = Field(
        None, description="a PEFT directory with a LoRA adapter of this model, to merge into its weights"
    )
    licence: str | None = Field(None, description="this model's licence, where it is not the recipe's")
    chat_template: Literal["plain"] | None = Field(
        None,
        description="`plain` takes prompts as they stand, in place of the model's chat template, which a "
        "base model was not trained on",
    )
    eos_token: str | None = Field(
        None,
        description="the text of a token that ends responses in place of the tokenizer's, for instance an "
        'empty line, `"\\n\\n"`: a base model seldom writes its own after an answer',
    )

    @model_validator(mode="after")
    def _layers(self) -> Load:
        """Refuse numbers of layers that are not in ascending order, and rows where nothing is to choose."""
        if self.rows and not isinstance(self.layers, int):
            raise ValueError("rows tell which layers to keep; give layers, how many")
        if self.layers is not None and (self.depth or 0) < 1:
            raise ValueError(f"layers = {self.layers}: keep at least one")
        if isinstance(self.layers, list) and self.layers != sorted({max(0, layer) for layer in self.layers}):
            raise ValueError(f"layers = {self.layers}: name each once, from 0, in ascending order")
        return self

    @property
    def depth(self) -> int | None:
        """The number of layers that are kept; None for all."""
        return len(self.layers) if isinstance(self.layers, list) else self.layers


class Remote(Stage):
    """A stage that stands for a model behind an OpenAI-compatible endpoint. Such a model returns text only,
    so its weights and logits cannot be used."""

    kind: Literal["remote"]
    url: str = Field(
        pattern=r"^https?://[^\s/@]+(/[^\s?#]*)?$",
        description="where the API begins, for instance `https://api.deepseek.com/v1`",
    )
    model: str = Field(description="the model's name there")
    key: str = Field(
        "",
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$",
        description="the environment variable that holds the API key; the key itself is written nowhere",
    )
    licence: str = Field("", description="licence or terms that bind what the model writes")
    prices: Prices | None = Field(None, description="to count money beside tokens")
    requests_per_minute: float | None = Field(None, gt=0, description="at most so many, evenly spaced")
    max_concurrency: int = Field(4, ge=1, description="requests on their way at once")
    timeout: float = Field(600, gt=0, description="seconds to wait for one response")
    logprobs: bool = Field(
        False, description="ask for the log-probabilities of what was sampled; some endpoints refuse"
    )
    extra: dict[str, Any] = Field(
        {}, description="further fields of each request; null takes one of ours away"
    )


class Pretrain(ModelStage):
    """A stage that trains a base model from scratch, on a corpus made from the clock countdown."""

    kind: Literal["pretrain"]
    problems: str = Field(description="a miniature, whose corpus is read")
    fp8: bool = Field(
        False, description="round the factors of every product as DeepSeek-V3 trains in FP8 (simulated)"
    )
    shape: Shape = Field(Shape(), description="dimensions of the model")
    corpus: dict[CorpusShare, float] = Field(
        {}, description="shares of kinds of text, in place of the miniature's own"
    )
    tokens: int = Field(2_500_000, ge=1000, description="length of the corpus; it is read once")
    batch_tokens: int = Field(1024, ge=64, description="tokens of one update, about")
    optimizer: Optimizer = Field(
        Optimizer(name="muon", learning_rate=7e-3, warmup_steps=50, schedule="linear", final_ratio=0.0),
        description="how the weights move",
    )


class RL(Budgeted):
    """A stage of reinforcement learning with verifiable rewards."""

    kind: Literal["rl"]
    model: str = Field(description="the stage whose model learns")
    problems: dict[str, float] = Field(
        description="names of problems or of `screen` stages, with their shares"
    )
    rewards: dict[RewardPart, float] = Field(
        {"accuracy": 1.0, "format": 0.2},
        description="what each part of a score is worth; parts that are not named earn nothing",
    )
    learned_rewards: dict[Literal["judge", "preference"], LearnedReward] | None = Field(
        None, description="where the parts `judge` and `preference` come from, and when they count"
    )
    steps: int = Field(60, ge=1, description="rounds of sampling and learning")
    steps_without_signal: int = Field(
        10,
        ge=0,
        description="stop, resumably, after this many steps if in none of them rewards differed within a "
        "group, also if no step is left; 0 never stops",
    )
    policy: Policy = Field(Policy(), description="what makes an advantage, and how far a step may go")
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")
    optimizer: Optimizer = Field(
        Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="linear", final_ratio=0.3),
        description="how the weights move",
    )
    batch_tokens: int = Field(
        4096, ge=64, description="tokens of one micro-batch, at most: it bounds memory, not the update"
    )
    recompute: Recompute = Field(False, description=RECOMPUTE)
    engine: str | None = Field(
        None,
        pattern=r"^https?://[^\s/@?#]+(/v1)?/?$",
        description="a vLLM server that samples, such as `http://127.0.0.1:8000/v1`; nothing is exact then",
    )


class Screen(ModelStage):
    """A stage that measures a model's pass rate on problems, and keeps the problems that the model solves
    sometimes but not always."""

    kind: Literal["screen"]
    model: str = Field(description="the stage whose model is asked")
    problems: dict[str, float] = Field(
        description="names of problems or of `screen` stages, with their shares"
    )
    limit: int = Field(512, ge=1, description="how many problems are measured")
    samples: int = Field(8, ge=2, description="completions of each problem")
    low: float = Field(0.0, ge=0, le=1, description="drop problems solved this often or less")
    high: float = Field(1.0, ge=0, le=1, description="drop problems solved this often or more")
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")


class Sample(ModelStage):
    """A stage of rejection sampling: it samples several completions for each problem, and keeps only those
    that pass every filter."""

    kind: Literal["sample"]
    model: str = Field(description="the stage whose model is asked; a `remote` one will do")
    problems: dict[str, float] = Field(
        description="names of problems or of `screen` stages, with their shares"
    )
    prompts: int = Field(512, ge=1, description="how many problems are asked")
    samples: int = Field(8, ge=1, description="completions of each problem")
    keep_per_problem: int = Field(
        1, ge=1, description="how many different completions of a problem are kept, at most"
    )
    correct: bool = Field(True, description="keep right answers only")
    wellformed: bool = Field(True, description="keep responses only that have the form")
    language: float = Field(0.0, ge=0, le=1, description="least language consistency of a kept row")
    longest: int | None = Field(None, ge=1, description="drop responses of more tokens than this")
    keep: Literal["shortest", "best"] | None = Field(
        None,
        description="of the completions that pass keep the shortest, or those with the best score; "
        "else the first",
    )
    rewards: dict[RewardPart, float] | None = Field(
        None, description="what each part of the score is worth that `best` goes by; else accuracy alone"
    )
    scored_by: str | None = Field(
        None,
        description="a teacher's stage, whose mean log-probability of a completion is the score that "
        "`best` goes by; or a `calibrate` "
        "stage, whose judge gives it",
    )
    judge: str | None = Field(
        None, description="a `calibrate` stage that was passed: its judge scores the responses"
    )
    judged: float | None = Field(
        None, ge=0, le=1, description="least score by the judge of a kept row; 0.5 where there is one"
    )
    sampling: Sampling = Field(Sampling(), description="how completions are drawn")


class Curate(Stage):
    """A stage in which people review a queue of rows (training examples) and accept, edit or reject each.
    With `auto`, the policy in the settings decides instead of people."""

    kind: Literal["curate"]
    rows: str = Field(description="the stage whose rows are reviewed")
    question: str = Field(
        "Is this thought correct, readable, and in one language?",
        description="what people are asked about each row",
    )
    second: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the rows that two people review, neither knowing what the other said; "
        "can be changed at the desk",
    )
    auto: bool = Field(False, description="let `policy` decide; `--auto` sets this for every desk")
    policy: Literal["accept", "translate", "steps"] = Field(
        "accept",
        description="keep rows as they are; put a miniature's thoughts in the question's language; or write "
        "the steps of a sum in place of its response",
    )


class SFT(Budgeted):
    """A stage of supervised fine-tuning on rows (training examples). With `thoughts: drop`, it trains on the
    answers without the thoughts."""

    kind: Literal["sft"]
    model: str = Field(description="the stage whose model learns")
    rows: dict[str, float] = Field(
        description="stages that give rows, with the share of each: 0.5 takes half, 2 takes every row twice"
    )
    epochs: float = Field(2, gt=0, description="passes over the rows; 2.5 ends in the middle of the third")
    thoughts: Literal["keep", "drop"] = Field(
        "keep", description="learn thought and answer, or the answer alone"
    )
    system: dict[str, str] | None = Field(
        None, description="stages that give rows, with the system prompt that theirs are learned under"
    )
    batch_tokens: int = Field(2048, ge=64, description="tokens of one update, about")
    recompute: Recompute = Field(False, description=RECOMPUTE)
    optimizer: Optimizer = Field(
        Optimizer(name="muon", learning_rate=2e-3, schedule="cosine"), description="how the weights move"
    )


class General(ModelStage):
    """A stage that makes rows (training examples) that need no reasoning, for the general part of the second
    fine-tuning or for distillation: from a miniature, or written by a model itself, instruction and response
    (Magpie, arXiv 2406.08464)."""

    kind: Literal["general"]
    problems: str | None = Field(None, description="a miniature with `task: repeat`; or")
    model: str | None = Field(
        None, description="the stage of a model with a chat template, which writes instructions and responses"
    )
    rows: int = Field(
        500,
        ge=1,
        description="how many rows to write; of a model so many instructions are sampled, and those that ran "
        "out of tokens are left out",
    )
    sampling: Sampling | None = Field(
        None, description="how a model draws both, by default at temperature 1, 160 tokens at most"
    )

    @model_validator(mode="after")
    def _one(self) -> General:
        """Refuse a stage with two sources of rows, or with none."""
        if (self.problems is None) == (self.model is None):
            raise ValueError(
                "give either problems, a miniature, or model, a stage whose model writes the rows"
            )
        if self.problems and self.sampling:
            raise ValueError("sampling is how a model draws, but problems has none; leave sampling out")
        return self


class Evaluate(ModelStage):
    """A stage that measures accuracy, with confidence intervals, on held-out problems, for each model and
    each set of sampling parameters."""

    kind: Literal["evaluate"]
    models: list[str] = Field(description="stages whose models are asked")
    problems: list[str] = Field(
        description="names of problems, whose held-out part is asked; the first one makes the headline"
    )
    prompts: int = Field(1000, ge=1, description="held-out problems of each source, at most")
    samples: int = Field(
        1, ge=1, description="completions of each problem in `t1` and `t06`; 8 or more give pass@8, too"
    )
    modes: list[Literal["t1", "t06", "greedy", "pass@8"]] = Field(
        ["t1", "greedy"],
        min_length=1,
        description="temperature 1; 0.6 with top-p 0.95; greedy; and 8 completions a problem",
    )
    forced: list[str] = Field([], description="models that are also shown with retries forced on them")
    retry: dict[str, str] = Field({}, description="for those: the word put after each of these words")
    without_thought: list[str] | None = Field(
        None, description="models that are also shown with the thought cut off: they must answer at once"
    )
    max_new_tokens: int = Field(160, ge=1, description="the longest response, in tokens")
    suites: dict[SuiteName, SuiteOptions] | None = Field(
        None, description="named benchmarks to measure as well, each with its data"
    )


class Report(Stage):
    """A stage that writes a report of the run, on one page."""

    kind: Literal["report"]
    evaluation: str = Field(description="the `evaluate` stage that it tells of")
    story: dict[str, str] = Field(
        {}, description="which model plays which part of the story: base, zero, r1, small and others"
    )
    compare: dict[str, list[str]] = Field(
        {}, description="ways of pretraining to compare by compute, each with the stages that are its runs"
    )


AnyStage = Annotated[
    Load
    | Remote
    | Pretrain
    | RL
    | Screen
    | Sample
    | Curate
    | SFT
    | General
    | Label
    | Pairs
    | DPO
    | Distill
    | Calibrate
    | Reward
    | Evaluate
    | Report,
    Field(discriminator="kind"),
]


class Recipe(Settings):
    """A recipe: named sources of problems, and named stages that cite each other and so form a graph. The
    settings `workers` and `threads` do not change what a result means."""

    name: str = Field(description="of the run's folder")
    description: str = Field("", description="for people")
    seed: int = Field(0, description="the root of every random draw")
    workers: int = Field(1, ge=1, description="stages that run side by side")
    threads: int = Field(0, ge=0, description="threads of each worker; 0 shares the cores evenly")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="of every stage that does not set its own; see the stages"
    )
    exact: bool | None = Field(None, description="of every stage that does not set its own; see the stages")
    licence: str = Field(
        "", description="licence of the models that are brought in: `Apache-2.0`, or `MIT AND Llama-3.1`"
    )
    problems: dict[str, Problems] = Field({}, description="what is asked, by names that stages cite")
    stages: dict[str, AnyStage] = Field(description="what is done, by names that other stages cite")
    iterate: Iterate | None = Field(
        None, description="what `limbeck iterate` repeats, and when a model is promoted; `run` ignores it"
    )

    @classmethod
    def load(cls, source: str | Path | Recipe | Mapping[str, Any], /, **settings: Any) -> Recipe:
        """Return a checked recipe, read from a file, by the name of a recipe that comes with Limbeck, or from
        a mapping; `Recipe.load("smoke", stages={"zero": {"steps": 5}})` changes a setting.

        `settings` replace those of the recipe: a nested mapping is merged, and a name may be dotted
        (`**{"stages.zero.steps": 5}`). Raises LimbeckError with one sentence about the first mistake.
        """
        from .load import load

        return load(source, settings=settings)


# ---------------------------------------------------------------- what cites what


def inputs(stage: Stage) -> list[str]:
    """Return the names of the stages whose artifacts a stage needs. `screen` stages that are cited under
    `problems` are not included; `pipeline/graph.py` adds them."""
    match stage:
        case Budgeted():
            return _inputs_of_budgeted(stage)
        case Screen() | General():
            return _named(stage.model)
        case Sample():
            return [stage.model, *_named(stage.scored_by, stage.judge)]
        case Pairs():
            return [stage.model, *_named(stage.scored_by)]
        case Label():
            return [stage.model, *stage.rows]
        case Calibrate():
            return [stage.judge, *_named(stage.model), *cited_rows(stage.rows)]
        case Reward():
            return [stage.model, *cited_rows(stage.rows)]
        case Load() | Curate():
            return _named(stage.rows)
        case Evaluate():
            return list(dict.fromkeys([*stage.models, *stage.forced, *(stage.without_thought or [])]))
        case Report():
            return [stage.evaluation, *itertools.chain(*stage.compare.values())]
    return []


def _inputs_of_budgeted(stage: Budgeted) -> list[str]:
    """Return the names of the stages whose artifacts a training stage needs, including the stage whose FLOPs
    are its budget."""
    compared = _named(stage.flops_of)
    match stage:
        case RL():
            learned = stage.learned_rewards or {}
            return [stage.model, *compared, *(opinion.of for opinion in learned.values())]
        case SFT():
            return [stage.model, *stage.rows, *compared]
        case DPO():
            return [stage.model, *cited_rows(*stage.pairs), *compared]
        case Distill():
            return [stage.model, *stage.teachers.values(), *stage.rows, *compared]
    return compared


def _named(*stages: str | None) -> list[str]:
    """Return the names that are given; None and empty names are left out."""
    return [name for name in stages if name]


def cited_rows(*rows: str) -> list[str]:
    """Return the names of the stages among sources of rows (training examples); the other sources are
    files."""
    return [name for name in rows if name and not name.endswith(TABLES)]


def sources(stage: Stage) -> list[str]:
    """Return the names under `problems` of a stage: sources of problems, or `screen` stages."""
    cited = getattr(stage, "problems", None) or {}
    return [cited] if isinstance(cited, str) else list(cited)
