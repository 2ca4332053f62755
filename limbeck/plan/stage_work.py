"""What the stages of a recipe do, in tokens: how many are sampled, learned and read, of which length, in how many updates.

Most of it the recipe says. What it can't say is how long completions will be, how many rows are kept and how many groups
differ: for these stand priors, each with its range, and lengths that the miniature's own rules imply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import comb, factorial
from pathlib import Path

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

CHUNK = 64  # problems that a sampling stage asks at once (pipeline/stages/basic.py)
SMALL = 10_000_000  # parameters up to which an engine has 256 rows in flight, and not 64 (pipeline/job.py)
PROMPT = 45  # tokens of a question from a file or a generator: SmolLM2's sums have 47

# Priors of what no recipe says, for the miniature and for problems of files and generators. From three runs of the quickstart and
# one of SmolLM2's recipe: groups whose completions are not all right or all wrong; completions that pass every filter; and
# how long completions are, as a share of the most that is allowed: (low, middle, high).
INFORMATIVE = {"miniature": 0.75, "real": 0.4}
PASSED = {"miniature": 0.8, "real": 0.35}
REACHED = {"base": (0.3, 0.6, 0.9), "learned": (0.1, 0.22, 0.6)}
REDRAWN = 1.3  # rollouts that `zero_variance: replace` asks for, of what a step needs


@dataclass(frozen=True)
class Rollout:
    """`calls` times `rows` completions of `length` tokens, the longest of `longest`, for `prompts` prompts of `prompt` tokens."""

    calls: float
    rows: float
    length: float
    longest: float
    prompt: float
    prompts: float

    @property
    def tokens(self) -> float:
        return self.calls * self.rows * self.length


@dataclass(frozen=True)
class StageWork:
    """What one stage does with one model: `StageWork("zero", "rl", "zero", rollouts=(...), updates=90, learned=850_000, ...)`.

    `learned` tokens go forward and backward, `read` forward alone, by model `reader` (a teacher, a reference). `written` is text
    that the miniature writes, `people` rows that somebody looks at. `sure` is how well the tokens are known: a factor.
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
        return sum(r.tokens for r in self.rollouts)

    def flops(self, config: ModelConfig) -> float:
        """All of it, teachers by the same model's size; forward FLOPs a token at half of a sequence's length."""
        sampling = sum(
            (r.tokens + r.calls * r.prompts * r.prompt) * config.flops_per_token(r.prompt + r.length / 2)
            for r in self.rollouts
        )
        seen = max(1.0, self.length / 2)
        return (
            sampling
            + self.learned * config.flops_per_token(seen, backward=True)
            + self.read * config.flops_per_token(seen)
        )


@dataclass
class _Known:
    """What later stages ask of one: how it speaks, and the rows it gives."""

    says: str = "base"
    rows: float = 0.0
    length: float = 0.0
    prompt: float = float(PROMPT)
    sure: float = 1.05


@dataclass
class Walk:
    """Efforts of all stages, inputs first. `configs` has the shape of each stage's model."""

    recipe: Recipe
    configs: Mapping[str, ModelConfig]
    known: dict[str, _Known] = field(default_factory=dict)
    efforts: dict[str, StageWork] = field(default_factory=dict)

    def add(self, node: str, stage: Stage, inputs: tuple[str, ...], control: str | None = None) -> StageWork:
        """A node of the graph; its inputs came before."""
        match stage:
            case Pretrain():
                effort = self._pretrain(node, stage)
            case RL():
                effort = self._rl(node, stage)
            case SFT():
                effort = self._sft(node, stage)
            case Sample() | Screen() | Pairs():
                effort = self._sweep(node, stage)
            case Evaluate():
                effort = self._evaluate(node, stage, inputs[0], control)
            case Distill():
                effort = self._distill(node, stage)
            case DPO():
                effort = self._dpo(node, stage)
            case Label():
                effort = self._label(node, stage)
            case Curate():
                before = self.known[stage.rows]
                self.known[node] = before
                effort = StageWork(
                    node, "curate", people=0 if stage.auto else int(before.rows), sure=before.sure
                )
            case General():
                length, prompt, _ = self._says(stage.problems, "learned", 1000)
                self.known[node] = _Known("learned", stage.rows, length, prompt)
                effort = StageWork(node, "general")
            case Load():
                self.known[node] = _Known("base")
                effort = StageWork(node, "load", node, saved=True)
            case _:
                self.known[node] = _Known("learned")
                effort = StageWork(node, stage.kind, getattr(stage, "model", ""), sure=2.0)
        effort = StageWork(**{**effort.__dict__, "inputs": inputs})
        self.efforts[node] = effort
        return effort

    # ------------------------------------------------------------ how long

    def _says(
        self, problems: str, says: str, most: int, control: str | None = None
    ) -> tuple[float, float, float]:
        """Tokens of a completion, of its prompt, and how sure that is."""
        source = self.recipe.problems.get(problems)
        if source is None and problems in self.recipe.stages:  # a screening: of what it screened
            parts = [self._says(name, says, most, control) for name in sources(self.recipe.stages[problems])]
            return tuple(sum(p[i] for p in parts) / len(parts) for i in range(3))
        if isinstance(source, Miniature):
            return _miniature(source, says, most, control)
        low, middle, high = REACHED["base" if says == "base" else "learned"]
        return middle * most, PROMPT, (high / low) ** 0.5

    def _world(self, problems: Mapping[str, float]) -> str:
        """Whether the problems are the miniature's."""
        named = [self.recipe.problems.get(name) for name in problems]
        return "miniature" if all(isinstance(source, Miniature) for source in named) else "real"

    def _mean_says(self, problems: Mapping[str, float], says: str, most: int) -> tuple[float, float, float]:
        parts = [(share, self._says(name, says, most)) for name, share in problems.items()]
        whole = sum(share for share, _ in parts)
        return tuple(sum(share * p[i] for share, p in parts) / whole for i in range(3))

    def _rollout(
        self, calls: float, prompts: float, group: float, said: tuple[float, float, float], most: int
    ) -> Rollout:
        length, prompt, _ = said
        rows = prompts * group
        longest = min(most, length * (1 + 1.2 * max(0.0, rows) ** 0.25))
        return Rollout(calls, rows, length, longest, prompt, prompts)

    # ------------------------------------------------------------ stages

    def _pretrain(self, node: str, stage: Pretrain) -> StageWork:
        self.known[node] = _Known("base")
        source = self.recipe.problems[stage.problems]
        length = _attempt(source) + 10
        return StageWork(
            node,
            "pretrain",
            node,
            updates=stage.tokens / stage.batch_tokens,
            learned=stage.tokens,
            length=length,
            optimizer=stage.optimizer.name,
            written=stage.tokens,
            saved=True,
        )

    def _rl(self, node: str, stage: RL) -> StageWork:
        """Completions take a few steps to change from how the model spoke to how it will speak: a tenth of the run."""
        policy, most = stage.policy, stage.sampling.max_new_tokens
        begin, end = (
            self._mean_says(stage.problems, says, most) for says in (self.known[stage.model].says, "learned")
        )
        said = tuple(0.1 * a + 0.9 * b for a, b in zip(begin, end, strict=True))
        share = 1.0 if policy.zero_variance == "keep" else INFORMATIVE[self._world(stage.problems)]
        redrawn = REDRAWN if policy.zero_variance == "replace" else 1.0
        rollout = self._rollout(1, policy.prompts_per_step * redrawn, policy.group_size, said, most)
        groups = policy.prompts_per_step * (1.0 if policy.zero_variance == "replace" else share)
        learned = groups * (policy.group_size * said[0] + said[1])
        read = learned if policy.kl_coef else 0.0
        one = StageWork(
            node,
            "rl",
            stage.model,
            (rollout,),
            policy.updates_per_rollout,
            learned,
            said[0] + said[1],
            stage.optimizer.name,
            read,
            stage.model,
        )
        steps = self._affordable(node, stage, one, stage.steps)
        self.known[node] = _Known("learned", sure=said[2])
        return StageWork(
            node,
            "rl",
            node,
            (Rollout(steps, rollout.rows, *said[:1], rollout.longest, said[1], rollout.prompts),),
            steps * one.updates,
            steps * learned,
            one.length,
            one.optimizer,
            steps * read,
            stage.model if read else "",
            saved=True,
            sure=said[2] * 1.15,
        )

    def _affordable(self, node: str, stage: Stage, one: StageWork, steps: float) -> float:
        """Steps that a budget of FLOPs pays for."""
        config = self.configs[node]
        budget = stage.flops
        if stage.flops_of:
            other = self.efforts[stage.flops_of]
            budget = other.flops(self.configs[stage.flops_of])
        return min(steps, max(1.0, budget / one.flops(config))) if budget else steps

    def _rows(self, given: Mapping[str, float]) -> tuple[float, float, float, float]:
        """Rows, tokens of a completion and a prompt, how sure."""
        found = {name: self.known.get(name) or _of_a_file(name) for name in given}
        parts = [(share * found[name].rows, found[name]) for name, share in given.items()]
        rows = max(1e-9, sum(n for n, _ in parts))
        length, prompt = (sum(n * getattr(k, key) for n, k in parts) / rows for key in ("length", "prompt"))
        return rows, length, prompt, max(k.sure for _, k in parts)

    def _sft(self, node: str, stage: SFT) -> StageWork:
        rows, length, prompt, sure = self._rows(stage.rows)
        brief = stage.thoughts == "drop"
        length = min(length, 7) if brief else length
        self.known[node] = _Known("brief" if brief else "learned", sure=sure)
        learned = rows * (length + prompt) * stage.epochs
        one = StageWork(node, "sft", node, updates=1, learned=learned, length=length + prompt)
        learned *= self._affordable(node, stage, one, 1.0)
        return StageWork(
            node,
            "sft",
            node,
            updates=max(1.0, learned / stage.batch_tokens),
            learned=learned,
            length=length + prompt,
            optimizer=stage.optimizer.name,
            saved=True,
            sure=sure * 1.3,
        )

    def _sweep(self, node: str, stage: Sample | Screen | Pairs) -> StageWork:
        most = stage.sampling.max_new_tokens
        said = self._mean_says(stage.problems, self.known[stage.model].says, most)
        count = stage.limit if isinstance(stage, Screen) else stage.prompts
        rollout = self._rollout(max(1.0, count / CHUNK), min(CHUNK, count), stage.samples, said, most)
        keep = getattr(stage, "keep_per_problem", 2)
        passed = PASSED[
            self._world(stage.problems)
        ]  # problems are solved often or hardly ever, so more tries help less than they might
        kept = count * min(keep, stage.samples, 1.2 * passed * (1 + 0.45 * (keep - 1)))
        self.known[node] = _Known("learned", kept, said[0], said[1], said[2] * 1.3)
        remote = isinstance(self.recipe.stages.get(stage.model), Remote)
        return StageWork(node, stage.kind, "" if remote else stage.model, (rollout,), sure=said[2])

    def _evaluate(self, node: str, stage: Evaluate, model: str, control: str | None) -> StageWork:
        rollouts, sure = [], 1.05
        for name in stage.problems:
            says = self.known[model].says
            length, prompt, doubt = self._says(name, says, stage.max_new_tokens, control)
            sure = max(sure, doubt)
            asked = min(stage.prompts, _held_out(self.recipe.problems[name]))
            for mode in stage.modes:
                copies = {"greedy": 1, "pass@8": 8}.get(mode, stage.samples)
                prompts = max(1, asked // 8) if mode == "pass@8" else asked
                rollouts.append(
                    self._rollout(1, prompts, copies, (length, prompt, doubt), stage.max_new_tokens)
                )
        return StageWork(node, "evaluate", model, tuple(rollouts), sure=sure)

    def _distill(self, node: str, stage: Distill) -> StageWork:
        most = stage.sampling.max_new_tokens
        says = self.known[stage.model].says
        said = (
            self._mean_says(stage.problems, says, most)
            if stage.problems
            else (*self._rows(stage.rows)[1:3], 1.5)
        )
        rows = stage.prompts_per_step * stage.group_size
        steps = stage.steps
        learned = steps * rows * (said[0] + said[1])
        teacher = next(iter(stage.teachers.values()), "")
        spoken = self._rollout(steps * stage.on_policy, stage.prompts_per_step, stage.group_size, said, most)
        whole = StageWork(
            node,
            "distill",
            node,
            (spoken,),
            steps,
            learned,
            said[0] + said[1],
            stage.optimizer.name,
            learned if teacher else 0.0,
            teacher,
        )
        paid = self._affordable(node, stage, whole, 1.0)
        self.known[node] = _Known("learned", sure=said[2])
        spoken = Rollout(
            paid * spoken.calls,
            *(getattr(spoken, key) for key in ("rows", "length", "longest", "prompt", "prompts")),
        )
        return StageWork(
            node,
            "distill",
            node,
            (spoken,) if stage.on_policy else (),
            paid * steps,
            paid * learned,
            whole.length,
            whole.optimizer,
            paid * whole.read,
            teacher,
            saved=True,
            sure=said[2] * 1.1,
        )

    def _dpo(self, node: str, stage: DPO) -> StageWork:
        rows, length, prompt, sure = self._rows(stage.pairs)
        learned = 2 * rows * (length + prompt) * stage.epochs
        self.known[node] = _Known("learned", sure=sure)
        return StageWork(
            node,
            "dpo",
            node,
            updates=max(1.0, learned / stage.batch_tokens),
            learned=learned,
            length=length + prompt,
            optimizer=stage.optimizer.name,
            read=learned / stage.epochs,
            reader=stage.model,
            saved=True,
            sure=sure * 1.3,
        )

    def _label(self, node: str, stage: Label) -> StageWork:
        rows, length, prompt, sure = self._rows(stage.rows)
        self.known[node] = _Known("learned", rows, length, prompt, sure)
        return StageWork(
            node,
            "label",
            stage.model,
            read=rows * (length + prompt),
            reader=stage.model,
            length=length + prompt,
            sure=sure,
        )


# ---------------------------------------------------------------- what the problems imply


def _attempt(source: Miniature) -> float:
    """Tokens of one attempt: `try 6 *5 gives 2 +1 gives 3 =4 gives 6 no` has 12 for three numbers."""
    return 3 * source.numbers + 3


def _miniature(source: Miniature, says: str, most: int, control: str | None) -> tuple[float, float, float]:
    """A base tries once; one that has learned tries until it is right: of all expressions one in `modulus` is. Five tags beside."""
    prompt = 2 * source.numbers + 4
    if source.task == "repeat" or says == "brief":
        return (source.numbers + 3 if says != "base" else _attempt(source)), prompt, 1.3
    once = _attempt(source)
    if says == "base" and not control:
        return once + source.numbers + 5, prompt, 1.2
    tries = _attempts(source, max(1, int((most - 8) // once)))
    if control:  # forced on after each "no", the base finds less than it looks for
        tries = 1 + (tries - 1) / 2
    return min(0.95 * most, tries * once + source.numbers + 5), prompt, 1.25


def _attempts(source: Miniature, most: int) -> float:
    """Mean number of different expressions tried until one is right, or `most`: sum over t of P(none of t is right)."""
    whole = factorial(source.numbers) * 3 ** (source.numbers - 1)
    right = max(1, round(whole / source.modulus))
    return sum(comb(whole - right, t) / comb(whole, t) for t in range(most) if whole - right >= t)


def _of_a_file(name: str) -> _Known:
    """Preferences in a table: as many as it has lines, as long as answers are; of Parquet's nobody looks how many."""
    path = Path(name)
    rows = sum(1 for _ in path.open("rb")) if path.suffix == ".jsonl" and path.is_file() else 1000
    return _Known("learned", rows, 100, PROMPT, 3.0)


def _held_out(source: Miniature | Gym | Files) -> int:
    if not isinstance(source, Miniature):
        return int(0.9 * source.held_out)  # some are repeated or too near to one another
    return int(0.15 * source.largest**3) if source.task == "repeat" else 10**9
