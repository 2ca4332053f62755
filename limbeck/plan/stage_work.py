"""The work of a recipe's stages in tokens: sampled, learned and read tokens, their lengths, and updates.

Most of it follows from the recipe. The length of completions, the rows that pass a filter and the groups that
differ do not: for these there are priors, each with its range, and lengths that follow from the miniature's
rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import comb, factorial
from pathlib import Path
from typing import NamedTuple

from ..config.recipe import (
    DPO,
    RL,
    SFT,
    Curate,
    Distill,
    Evaluate,
    Files,
    General,
    Gym,
    Label,
    Load,
    Miniature,
    Pairs,
    Pretrain,
    Recipe,
    Remote,
    Sample,
    Screen,
    Stage,
    sources,
)
from ..model.config import ModelConfig

CHUNK = 64  # problems that a sampling stage samples at once (pipeline/stages/sweep.py)
SMALL = 10_000_000  # parameters up to which an engine has 256 rows in flight, and not 64 (pipeline/job.py)
PROMPT = 45  # tokens of a question from a file or a generator: SmolLM2's sums have 47

# Priors of what no recipe gives, for the miniature and for problems of files and generators. From three
# runs of the quickstart and one of SmolLM2's recipe: groups whose completions are not all right or all
# wrong; completions that pass every filter; and the length of completions as a share of the limit: (low,
# middle, high).
INFORMATIVE = {"miniature": 0.75, "real": 0.4}
PASSED = {"miniature": 0.8, "real": 0.35}
REACHED = {"base": (0.3, 0.6, 0.9), "learned": (0.1, 0.22, 0.6)}
REDRAWN = 1.3  # rollouts that `zero_variance: replace` samples, for each that a step needs
CHANGING = 0.1  # share of an RL run in which completions still have their initial length
BRIEF_ANSWER = 7  # tokens of an answer without its thought, at most
TABLE_ROWS = 1000  # rows of a Parquet file; their number is not read
TABLE_LENGTH = 100  # tokens of an answer in a table


@dataclass(frozen=True)
class Rollout:
    """Completions sampled together: `calls` times `rows` completions for `prompts` prompts.

    `length` is their mean in tokens, `longest` the longest, `prompt` the mean of the prompts.
    """

    calls: float
    rows: float
    length: float
    longest: float
    prompt: float
    prompts: float

    @property
    def tokens(self) -> float:
        """Sampled tokens in all."""
        return self.calls * self.rows * self.length


@dataclass(frozen=True)
class StageWork:
    """The work of one stage with one model: `StageWork("zero", "rl", "zero", updates=90, ...)`.

    `learned` tokens go forward and backward. `read` tokens go forward only, through model `reader` (a
    teacher, a reference). `written` is text of the miniature in tokens, `people` the number of rows that a
    person reviews. `sure` is the factor within which the tokens are known.
    """

    stage: str
    kind: str
    model: str = ""
    rollouts: tuple[Rollout, ...] = ()
    updates: float = 0.0
    learned: float = 0.0
    length: float = 0.0
    optimizer: str = "adamw"
    read: float = 0.0
    reader: str = ""
    written: float = 0.0
    people: int = 0
    saved: bool = False
    sure: float = 1.05
    inputs: tuple[str, ...] = ()

    @property
    def sampled(self) -> float:
        """Sampled tokens in all."""
        return sum(rollout.tokens for rollout in self.rollouts)

    def flops(self, config: ModelConfig) -> float:
        """FLOPs of all tokens; a teacher counts by the same model's size.

        A token's forward FLOPs are those in the middle of its sequence.
        """
        sampling = 0.0
        for rollout in self.rollouts:
            prefilled = rollout.calls * rollout.prompts * rollout.prompt
            middle = rollout.prompt + rollout.length / 2
            sampling += (rollout.tokens + prefilled) * config.flops_per_token(middle)
        middle = max(1.0, self.length / 2)
        learning = self.learned * config.flops_per_token(middle, backward=True)
        reading = self.read * config.flops_per_token(middle)
        return sampling + learning + reading


class _Tokens(NamedTuple):
    """Mean tokens of a completion and of its prompt, and the factor within which they are known."""

    length: float
    prompt: float
    sure: float


@dataclass
class _Output:
    """A stage's output, as later stages need it: the model's style of completions, and the rows.

    `style` is `base`, `learned` or `brief` (answers without thoughts).
    """

    style: str = "base"
    rows: float = 0.0
    length: float = 0.0
    prompt: float = float(PROMPT)
    sure: float = 1.05


@dataclass
class Walk:
    """The work of all stages, inputs first. `configs` has the shape of each stage's model."""

    recipe: Recipe
    configs: Mapping[str, ModelConfig]
    outputs: dict[str, _Output] = field(default_factory=dict)
    efforts: dict[str, StageWork] = field(default_factory=dict)

    def add(self, node: str, stage: Stage, inputs: tuple[str, ...], control: str | None = None) -> StageWork:
        """The work of a node of the graph; its inputs must have been added before."""
        if isinstance(stage, Evaluate):
            work = self._evaluate(node, stage, inputs[0], control)
        else:
            work = self._stage(node, stage)
        work = replace(work, inputs=inputs)
        self.efforts[node] = work
        return work

    def _stage(self, node: str, stage: Stage) -> StageWork:
        """The work of a stage by its kind."""
        match stage:
            case Pretrain():
                return self._pretrain(node, stage)
            case RL():
                return self._rl(node, stage)
            case SFT():
                return self._sft(node, stage)
            case DPO():
                return self._dpo(node, stage)
            case Distill():
                return self._distill(node, stage)
            case Sample() | Screen() | Pairs():
                return self._sample(node, stage)
            case Label():
                return self._label(node, stage)
            case Curate():
                return self._curate(node, stage)
            case General():
                return self._general(node, stage)
            case Load():
                self.outputs[node] = _Output("base")
                return StageWork(node, "load", node, saved=True)
        self.outputs[node] = _Output("learned")
        return StageWork(node, stage.kind, getattr(stage, "model", ""), sure=2.0)

    # ------------------------------------------------------------ lengths

    def _tokens(self, problems: str, style: str, limit: int, control: str | None = None) -> _Tokens:
        """Tokens of a completion for a source of problems, or for the sources of a screen stage."""
        source = self.recipe.problems.get(problems)
        if source is None and problems in self.recipe.stages:
            screened = sources(self.recipe.stages[problems])
            parts = [self._tokens(name, style, limit, control) for name in screened]
            return _Tokens(*(sum(column) / len(parts) for column in zip(*parts, strict=True)))
        if isinstance(source, Miniature):
            return _miniature_tokens(source, style, limit, control)
        low, middle, high = REACHED["base" if style == "base" else "learned"]
        return _Tokens(middle * limit, PROMPT, (high / low) ** 0.5)

    def _mean_tokens(self, problems: Mapping[str, float], style: str, limit: int) -> _Tokens:
        """Tokens of a completion for a mixture of problems, by their shares."""
        parts = [self._tokens(name, style, limit) for name in problems]
        shares = list(problems.values())
        means: list[float] = []
        for column in zip(*parts, strict=True):
            weighted = sum(share * value for share, value in zip(shares, column, strict=True))
            means.append(weighted / sum(shares))
        return _Tokens(*means)

    def _world(self, problems: Mapping[str, float]) -> str:
        """`miniature` if all problems are the miniature's, else `real`."""
        known = [self.recipe.problems.get(name) for name in problems]
        return "miniature" if all(isinstance(source, Miniature) for source in known) else "real"

    # ------------------------------------------------------------ stages that learn

    def _pretrain(self, node: str, stage: Pretrain) -> StageWork:
        """A pass over the miniature's corpus, which is written first."""
        self.outputs[node] = _Output("base")
        attempt = _attempt_tokens(self.recipe.problems[stage.problems])
        updates = stage.tokens / stage.batch_tokens
        return StageWork(
            node,
            "pretrain",
            node,
            updates=updates,
            learned=stage.tokens,
            length=attempt + 10,
            optimizer=stage.optimizer.name,
            written=stage.tokens,
            saved=True,
        )

    def _rl(self, node: str, stage: RL) -> StageWork:
        """Rollouts and updates; completions reach their final length after a tenth of the run."""
        policy = stage.policy
        tokens = self._rl_tokens(stage)
        replaces = policy.zero_variance == "replace"
        sampled = policy.prompts_per_step * (REDRAWN if replaces else 1.0)
        rollout = _rollout(1, sampled, policy.group_size, tokens, stage.sampling.max_new_tokens)
        groups = policy.prompts_per_step * self._learned_share(stage)
        learned = groups * (policy.group_size * tokens.length + tokens.prompt)
        step = StageWork(
            node,
            "rl",
            stage.model,
            (rollout,),
            policy.updates_per_rollout,
            learned,
            tokens.length + tokens.prompt,
            stage.optimizer.name,
            learned if policy.kl_coef else 0.0,
            stage.model,
        )
        steps = self._affordable(node, stage, step, stage.steps)
        self.outputs[node] = _Output("learned", sure=tokens.sure)
        return replace(
            step,
            model=node,
            rollouts=(replace(rollout, calls=steps),),
            updates=steps * step.updates,
            learned=steps * learned,
            read=steps * step.read,
            reader=stage.model if step.read else "",
            saved=True,
            sure=tokens.sure * 1.15,
        )

    def _rl_tokens(self, stage: RL) -> _Tokens:
        """Mean tokens of a completion over a run of reinforcement learning."""
        limit = stage.sampling.max_new_tokens
        first = self._mean_tokens(stage.problems, self.outputs[stage.model].style, limit)
        last = self._mean_tokens(stage.problems, "learned", limit)
        return _Tokens(*(CHANGING * a + 0.9 * b for a, b in zip(first, last, strict=True)))

    def _learned_share(self, stage: RL) -> float:
        """Share of a step's groups that are learned from."""
        if stage.policy.zero_variance == "drop":
            return INFORMATIVE[self._world(stage.problems)]
        return 1.0

    def _affordable(self, node: str, stage: Stage, step: StageWork, steps: float) -> float:
        """The steps that a budget of FLOPs pays for; `steps` without one."""
        budget = stage.flops
        if stage.flops_of:
            compared = self.efforts[stage.flops_of]
            budget = compared.flops(self.configs[stage.flops_of])
        if not budget:
            return steps
        return min(steps, max(1.0, budget / step.flops(self.configs[node])))

    def _sft(self, node: str, stage: SFT) -> StageWork:
        """Passes over rows; without thoughts the completions are short."""
        rows = self._rows(stage.rows)
        brief = stage.thoughts == "drop"
        completion = min(rows.length, BRIEF_ANSWER) if brief else rows.length
        length = completion + rows.prompt
        learned = rows.rows * length * stage.epochs
        self.outputs[node] = _Output("brief" if brief else "learned", sure=rows.sure)
        whole = StageWork(node, "sft", node, updates=1, learned=learned, length=length)
        learned *= self._affordable(node, stage, whole, 1.0)
        return replace(
            whole,
            updates=max(1.0, learned / stage.batch_tokens),
            learned=learned,
            optimizer=stage.optimizer.name,
            saved=True,
            sure=rows.sure * 1.3,
        )

    def _dpo(self, node: str, stage: DPO) -> StageWork:
        """Passes over pairs; the reference reads each pair once."""
        rows = self._rows(stage.pairs)
        length = rows.length + rows.prompt
        learned = 2 * rows.rows * length * stage.epochs
        updates = max(1.0, learned / stage.batch_tokens)
        self.outputs[node] = _Output("learned", sure=rows.sure)
        return StageWork(
            node,
            "dpo",
            node,
            updates=updates,
            learned=learned,
            length=length,
            optimizer=stage.optimizer.name,
            read=learned / stage.epochs,
            reader=stage.model,
            saved=True,
            sure=rows.sure * 1.3,
        )

    def _distill(self, node: str, stage: Distill) -> StageWork:
        """Steps on the student's completions and on rows; a teacher reads all that is learned."""
        tokens = self._distill_tokens(stage)
        limit = stage.sampling.max_new_tokens
        calls = stage.steps * stage.on_policy
        rollout = _rollout(calls, stage.prompts_per_step, stage.group_size, tokens, limit)
        completions = stage.prompts_per_step * stage.group_size
        learned = stage.steps * completions * (tokens.length + tokens.prompt)
        teacher = next(iter(stage.teachers.values()), "")
        whole = StageWork(
            node,
            "distill",
            node,
            (rollout,),
            stage.steps,
            learned,
            tokens.length + tokens.prompt,
            stage.optimizer.name,
            learned if teacher else 0.0,
            teacher,
        )
        paid = self._affordable(node, stage, whole, 1.0)
        self.outputs[node] = _Output("learned", sure=tokens.sure)
        rollout = replace(rollout, calls=paid * rollout.calls)
        return replace(
            whole,
            rollouts=(rollout,) if stage.on_policy else (),
            updates=paid * stage.steps,
            learned=paid * learned,
            read=paid * whole.read,
            saved=True,
            sure=tokens.sure * 1.1,
        )

    def _distill_tokens(self, stage: Distill) -> _Tokens:
        """Tokens of a completion of the student, or of a row where it samples nothing."""
        if stage.problems:
            style = self.outputs[stage.model].style
            return self._mean_tokens(stage.problems, style, stage.sampling.max_new_tokens)
        rows = self._rows(stage.rows)
        return _Tokens(rows.length, rows.prompt, 1.5)

    def _rows(self, shares: Mapping[str, float]) -> _Output:
        """The rows of several stages or files by their shares, as one output."""
        outputs = {name: self.outputs.get(name) or _table_output(name) for name in shares}
        counts = {name: share * outputs[name].rows for name, share in shares.items()}
        rows = max(1e-9, sum(counts.values()))
        length = sum(count * outputs[name].length for name, count in counts.items()) / rows
        prompt = sum(count * outputs[name].prompt for name, count in counts.items()) / rows
        sure = max(output.sure for output in outputs.values())
        return _Output("learned", rows, length, prompt, sure)

    # ------------------------------------------------------------ stages that give rows or figures

    def _sample(self, node: str, stage: Sample | Screen | Pairs) -> StageWork:
        """Several completions of each problem, and the rows that pass."""
        limit = stage.sampling.max_new_tokens
        style = self.outputs[stage.model].style
        tokens = self._mean_tokens(stage.problems, style, limit)
        problems = stage.limit if isinstance(stage, Screen) else stage.prompts
        calls = max(1.0, problems / CHUNK)
        rollout = _rollout(calls, min(CHUNK, problems), stage.samples, tokens, limit)
        keep = getattr(stage, "keep_per_problem", 2)
        passed = PASSED[self._world(stage.problems)]
        # problems are solved often or hardly ever, so more tries help less than they might
        passing = 1.2 * passed * (1 + 0.45 * (keep - 1))
        rows = problems * min(keep, stage.samples, passing)
        self.outputs[node] = _Output("learned", rows, tokens.length, tokens.prompt, tokens.sure * 1.3)
        remote = isinstance(self.recipe.stages.get(stage.model), Remote)
        return StageWork(node, stage.kind, "" if remote else stage.model, (rollout,), sure=tokens.sure)

    def _label(self, node: str, stage: Label) -> StageWork:
        """A teacher's pass over rows."""
        rows = self._rows(stage.rows)
        self.outputs[node] = rows
        length = rows.length + rows.prompt
        return StageWork(
            node,
            "label",
            stage.model,
            read=rows.rows * length,
            reader=stage.model,
            length=length,
            sure=rows.sure,
        )

    def _curate(self, node: str, stage: Curate) -> StageWork:
        """Rows that people review, where no policy decides."""
        rows = self.outputs[stage.rows]
        self.outputs[node] = rows
        people = 0 if stage.auto else int(rows.rows)
        return StageWork(node, "curate", people=people, sure=rows.sure)

    def _general(self, node: str, stage: General) -> StageWork:
        """Rows that need no model."""
        tokens = self._tokens(stage.problems, "learned", 1000)
        self.outputs[node] = _Output("learned", stage.rows, tokens.length, tokens.prompt)
        return StageWork(node, "general")

    def _evaluate(self, node: str, stage: Evaluate, model: str, control: str | None) -> StageWork:
        """Completions of held-out problems in every mode."""
        rollouts: list[Rollout] = []
        sure = 1.05
        for name in stage.problems:
            tokens = self._tokens(name, self.outputs[model].style, stage.max_new_tokens, control)
            sure = max(sure, tokens.sure)
            problems = min(stage.prompts, _held_out(self.recipe.problems[name]))
            for mode in stage.modes:
                samples = {"greedy": 1, "pass@8": 8}.get(mode, stage.samples)
                prompts = max(1, problems // 8) if mode == "pass@8" else problems
                rollouts.append(_rollout(1, prompts, samples, tokens, stage.max_new_tokens))
        return StageWork(node, "evaluate", model, tuple(rollouts), sure=sure)


def _rollout(calls: float, prompts: float, group_size: float, tokens: _Tokens, limit: int) -> Rollout:
    """A rollout of `group_size` completions for each prompt; the longest one grows with their number."""
    rows = prompts * group_size
    longest = min(limit, tokens.length * (1 + 1.2 * max(0.0, rows) ** 0.25))
    return Rollout(calls, rows, tokens.length, longest, tokens.prompt, prompts)


# ---------------------------------------------------------------- lengths of the problems


def _attempt_tokens(source: Miniature) -> float:
    """Tokens of one attempt: `try 6 *5 gives 2 +1 gives 3 =4 gives 6 no` has 12 for three numbers."""
    return 3 * source.numbers + 3


def _miniature_tokens(source: Miniature, style: str, limit: int, control: str | None) -> _Tokens:
    """Tokens of a completion for the miniature, five tags included.

    A base model makes one attempt. A learned one makes attempts until one is right; of all expressions one in
    `modulus` is.
    """
    prompt = 2 * source.numbers + 4
    attempt = _attempt_tokens(source)
    if source.task == "repeat" or style == "brief":
        return _Tokens(attempt if style == "base" else source.numbers + 3, prompt, 1.3)
    if style == "base" and not control:
        return _Tokens(attempt + source.numbers + 5, prompt, 1.2)
    attempts = _mean_attempts(source, max(1, int((limit - 8) // attempt)))
    if control:  # forced on after each "no", the base finds less than it looks for
        attempts = 1 + (attempts - 1) / 2
    return _Tokens(min(0.95 * limit, attempts * attempt + source.numbers + 5), prompt, 1.25)


def _mean_attempts(source: Miniature, limit: int) -> float:
    """Mean number of different expressions tried until one is right, or `limit`.

    It is the sum over t of P(none of t expressions is right).
    """
    expressions = factorial(source.numbers) * 3 ** (source.numbers - 1)
    wrong = expressions - max(1, round(expressions / source.modulus))
    tries = range(min(limit, wrong + 1))
    return sum(comb(wrong, t) / comb(expressions, t) for t in tries)


def _table_output(name: str) -> _Output:
    """Preferences in a table: its lines are counted, but those of Parquet."""
    path = Path(name)
    rows = TABLE_ROWS
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            rows = sum(1 for _ in file)
    return _Output("learned", rows, TABLE_LENGTH, PROMPT, 3.0)


def _held_out(source: Miniature | Gym | Files) -> int:
    """Number of held-out problems of a source, about."""
    if not isinstance(source, Miniature):
        return int(0.9 * source.held_out)  # some are repeated or too near to one another
    return int(0.15 * source.largest**3) if source.task == "repeat" else 10**9
