"""A recipe: where problems come from, and the stages that turn a base model into a reasoning one.

YAML in, resolved YAML out. Every model forbids unknown keys and says which key was probably meant.
Validators reject; they never rewrite. Reading a recipe imports no torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .types import LimbeckError


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------- what is asked


class Miniature(Settings):
    """The clock countdown: reach a target, mod `modulus`, from a few numbers; English and Chinese."""

    source: Literal["miniature"]
    modulus: int = Field(7, ge=3, le=31)
    numbers: int = Field(3, ge=2, le=5)
    largest: int = Field(6, ge=2, le=30)
    chinese: float = Field(0.35, ge=0, le=1)
    held_out: float = Field(0.15, gt=0, lt=1)
    task: Literal["countdown", "repeat"] = "countdown"
    seed: int = 0


class Gym(Settings):
    """A generator of reasoning-gym by name (`pip install limbeck[gym]`)."""

    source: Literal["gym"]
    generator: str
    config: dict[str, Any] = {}
    size: int = Field(2000, ge=2)
    held_out: int = Field(500, ge=1)
    instruction: str = "{problem}"
    answer: Literal["tags", "boxed", "final"] = "boxed"
    seed: int = 0


class Files(Settings):
    """Your own JSONL or Parquet; `columns` maps `problem` and `answer` to the names in the file."""

    source: Literal["files"]
    path: str
    columns: dict[Literal["problem", "answer", "language"], str] = {}
    held_out: int = Field(200, ge=1)
    limit: int | None = Field(None, ge=2)
    instruction: str = "{problem}"
    answer: Literal["tags", "boxed", "final"] = "boxed"
    seed: int = 0


Problems = Annotated[Miniature | Gym | Files, Field(discriminator="source")]


# ---------------------------------------------------------------- parts of a stage


class Shape(Settings):
    """The dimensions of a model trained from scratch (Llama-style, tied embeddings)."""

    hidden_size: int = Field(64, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(2, ge=1)
    intermediate_size: int = Field(176, ge=8)


class Sampling(Settings):
    """How completions are drawn. `temperature: 0` is greedy."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(160, ge=1)


class Optimizer(Settings):
    """AdamW, or Muon for the matrices with AdamW for the rest; linear warm-up, then the schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: float = Field(0.1, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)


PRESETS: dict[str, dict[str, Any]] = {
    # DAPO and Dr. GRPO: token-level loss, mean baseline, clip-higher, no KL (arXiv 2503.14476, 2503.20783)
    "default": {},
    # DeepSeek-R1 (arXiv 2501.12948v2, sections 2.1 and 3.2.1); the reference is refreshed every 400 updates
    "r1": {
        "group_size": 16, "advantage_scale": "group", "reduction": "sequence", "kl_coef": 0.001,
        "reference_every": 400, "clip_low": 1.0, "clip_high": 10.0, "zero_variance": "keep",
        "mask_truncated": False, "updates_per_rollout": 16,
    },
}  # fmt: skip


class Policy(Settings):
    """Group-relative policy optimisation: what makes an advantage, and how far one step may go."""

    preset: Literal["default", "r1"] = "default"
    group_size: int = Field(8, ge=2)
    prompts_per_step: int = Field(32, ge=1)
    updates_per_rollout: int = Field(1, ge=1)
    advantage_scale: Literal["none", "group", "batch"] = "none"
    reduction: Literal["token", "sequence", "constant"] = "token"
    clip_low: float = Field(0.2, gt=0, le=1)
    clip_high: float = Field(0.28, gt=0)
    kl_coef: float = Field(0.0, ge=0)
    kl_unbiased: bool = False
    reference_every: int = Field(0, ge=0)
    zero_variance: Literal["replace", "drop", "keep"] = "replace"
    mask_truncated: bool = True
    off_policy_threshold: float | None = Field(None, gt=0)
    keep_sampling_mask: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**PRESETS.get(given.get("preset", "default"), {}), **given}


# ---------------------------------------------------------------- stages


class Stage(Settings):
    """What every stage has. `title` and `log_every` change no result and so no key."""

    title: str = ""
    log_every: int = Field(10, ge=1)
    save_every: float = Field(60, gt=0, description="seconds between checkpoints: what a kill may cost")


class Load(Stage):
    """Bring in a base model: an HF directory, a GGUF file, or the name of a model that was pulled."""

    kind: Literal["load"]
    path: str


class Pretrain(Stage):
    """Train a base from scratch on the miniature's corpus."""

    kind: Literal["pretrain"]
    problems: str
    shape: Shape = Shape()
    corpus: dict[str, float] = {}
    tokens: int = Field(2_500_000, ge=1000)
    batch_tokens: int = Field(1024, ge=64)
    optimizer: Optimizer = Optimizer(name="muon", learning_rate=7e-3, warmup_steps=50, schedule="linear")


class RL(Stage):
    """Reinforcement learning with verifiable rewards."""

    kind: Literal["rl"]
    model: str
    problems: dict[str, float]
    rewards: dict[str, float] = {"accuracy": 1.0, "format": 0.2}
    steps: int = Field(60, ge=1)
    policy: Policy = Policy()
    sampling: Sampling = Sampling()
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, warmup_steps=5, schedule="linear", final_ratio=0.3)
    batch_tokens: int = Field(4096, ge=64)


class Screen(Stage):
    """Measure pass rates, and keep the problems the model sometimes solves."""

    kind: Literal["screen"]
    model: str
    problems: dict[str, float]
    limit: int = Field(512, ge=1)
    samples: int = Field(8, ge=2)
    low: float = Field(0.0, ge=0, le=1, description="drop problems solved this often or less")
    high: float = Field(1.0, ge=0, le=1, description="drop problems solved this often or more")
    sampling: Sampling = Sampling()


class Sample(Stage):
    """Rejection sampling: several completions a problem, and only what passes every filter is kept."""

    kind: Literal["sample"]
    model: str
    problems: dict[str, float]
    prompts: int = Field(512, ge=1)
    samples: int = Field(8, ge=1)
    keep_per_problem: int = Field(1, ge=1)
    correct: bool = True
    wellformed: bool = True
    language: float = Field(0.0, ge=0, le=1, description="least language consistency of a kept row")
    max_repeats: int | None = Field(None, ge=0)
    sampling: Sampling = Sampling()


class Curate(Stage):
    """People at a desk: a queue of rows to accept, edit or reject. With `auto` the policy decides instead."""

    kind: Literal["curate"]
    rows: str
    question: str = "Is this thought correct, readable, and in one language?"
    auto: bool = False
    policy: Literal["accept", "translate"] = "accept"


class SFT(Stage):
    """Supervised fine-tuning on rows; `thoughts: drop` trains on the answers alone."""

    kind: Literal["sft"]
    model: str
    rows: dict[str, float]
    epochs: float = Field(2, gt=0)
    thoughts: Literal["keep", "drop"] = "keep"
    batch_tokens: int = Field(2048, ge=64)
    optimizer: Optimizer = Optimizer(name="muon", learning_rate=2e-3, schedule="cosine")


class General(Stage):
    """Rows that need no thought: the general half of the second fine-tuning."""

    kind: Literal["general"]
    problems: str
    rows: int = Field(500, ge=1)


class Evaluate(Stage):
    """Accuracy with intervals on held-out problems, for each model and each way of sampling."""

    kind: Literal["evaluate"]
    models: list[str]
    problems: list[str]
    prompts: int = Field(1000, ge=1)
    samples: int = Field(1, ge=1, description="completions a problem at temperature 1")
    modes: list[Literal["t1", "t06", "greedy", "pass@8"]] = Field(["t1", "greedy"], min_length=1)
    forced: list[str] = Field([], description="models that are also shown with retries forced on them")
    retry: dict[str, str] = Field({}, description="for those: the word put after each of these words")
    max_new_tokens: int = Field(160, ge=1)


class Report(Stage):
    """One page a run."""

    kind: Literal["report"]
    evaluation: str
    story: dict[str, str] = Field({}, description="who plays base, zero, r1, small, control, answers")


AnyStage = Annotated[
    Load | Pretrain | RL | Screen | Sample | Curate | SFT | General | Evaluate | Report,
    Field(discriminator="kind"),
]


class Recipe(Settings):
    """A named graph of stages over named problems. `workers` and `threads` change no result's meaning."""

    name: str
    description: str = ""
    seed: int = 0
    workers: int = Field(1, ge=1, description="stages that run side by side")
    threads: int = Field(0, ge=0, description="threads of each worker; 0 shares the cores evenly")
    licence: str = Field("", description="licence of the base model, where one is brought in")
    problems: dict[str, Problems] = {}
    stages: dict[str, AnyStage]


def dump(recipe: Recipe) -> str:
    """The resolved recipe: every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.path=value` pairs. Any mistake is one sentence."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise LimbeckError(f"{path}: no such recipe; recipes that come with Limbeck: {_shipped()}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LimbeckError(f"{path}: cannot be read as text ({error})") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise LimbeckError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise LimbeckError(f"{path}: a recipe is a mapping with the keys name, problems and stages")
    for override in overrides:
        _override(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise LimbeckError(f"{path}: {_explain(error, tree)}") from None
    _check_references(path, recipe)
    return recipe


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses the same key twice in one mapping, where plain YAML keeps the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.value[i][0].start_mark)
        return super().construct_mapping(node, deep)


def _shipped() -> str:
    folder = Path(__file__).parent.parent / "recipes"
    return ", ".join(sorted(f"recipes/{p.name}" for p in folder.glob("*.yaml"))) or "none found"


def _override(tree: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise LimbeckError(f"--set {override}: write key.path=value, for instance stages.zero.steps=10")
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise LimbeckError(f"--set {override}: {parent} is not a mapping, so it has no key {last}")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise LimbeckError(f"--set {override}: the value is not valid YAML") from None


def _explain(error: ValidationError, tree: dict) -> str:
    """The first mistake of many, in one sentence."""
    first = error.errors()[0]
    # pydantic puts the chosen member of a union into the path; people did not write it
    location = [str(part) for part in first["loc"] if part not in _KINDS]
    where = ".".join(location)
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"], tree)
        meant = difflib.get_close_matches(location[-1], known, 1, 0.5)
        hint = f"did you mean {meant[0]}?" if meant else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}{more}"
    if first["type"] == "missing":
        return f"{where} is missing{more}"
    if first["type"].startswith("union_tag"):
        key = "source" if location[0] == "problems" else "kind"
        kinds = ", ".join(_SOURCES if key == "source" else _STAGES)
        return f"{where}.{key} is missing or unknown; choose one of {kinds}{more}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, but it is {first['input']!r}{more}"


_SOURCES: dict[str, type[Settings]] = {"miniature": Miniature, "gym": Gym, "files": Files}
_STAGES: dict[str, type[Stage]] = {
    "load": Load, "pretrain": Pretrain, "rl": RL, "screen": Screen, "sample": Sample, "curate": Curate,
    "sft": SFT, "general": General, "evaluate": Evaluate, "report": Report,
}  # fmt: skip
_KINDS = {*_SOURCES, *_STAGES}


def _known_keys(location: tuple, tree: dict) -> list[str]:
    model: Any = Recipe
    for part in location[:-1]:
        if part in _SOURCES or part in _STAGES:
            model = {**_SOURCES, **_STAGES}[part]
        elif isinstance(model, type) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None
    return sorted(model.model_fields) if model else []


# ---------------------------------------------------------------- what cites what


def inputs(stage: Stage) -> list[str]:
    """The stages that a stage takes its artifacts from; names of problems that are stages are added by `graph`."""
    match stage:
        case RL() | Screen() | Sample():
            return [stage.model]
        case SFT():
            return [stage.model, *stage.rows]
        case Curate():
            return [stage.rows]
        case Evaluate():
            return [*dict.fromkeys([*stage.models, *stage.forced])]
        case Report():
            return [stage.evaluation]
    return []


def sources(stage: Stage) -> list[str]:
    """The problems that a stage draws on: names under `problems`, or of `screen` stages."""
    cited = getattr(stage, "problems", {})
    return [cited] if isinstance(cited, str) else list(cited)


MODELS, ROWS = {"load", "pretrain", "rl", "sft"}, {"sample", "curate", "general"}


def _check_references(path: Path, recipe: Recipe) -> None:
    """Every citation exists and is of the right kind, and no stage waits for itself."""
    stages = recipe.stages

    def cite(name: str, key: str, cited: str, kinds: set[str], what: str) -> None:
        if cited not in stages:
            raise LimbeckError(f"{path}: stages.{name}.{key} cites {cited}, which is no stage{_meant(cited, stages)}")
        if stages[cited].kind not in kinds:
            raise LimbeckError(
                f"{path}: stages.{name}.{key} needs {what}, but {cited} is a {stages[cited].kind} stage"
            )

    for name, stage in stages.items():
        if "/" in name:
            raise LimbeckError(f"{path}: stages.{name}: a stage's name has no slash")
        for source in sources(stage):
            if source not in recipe.problems and getattr(stages.get(source), "kind", "") != "screen":
                known = [*recipe.problems, *(n for n, s in stages.items() if s.kind == "screen")]
                raise LimbeckError(
                    f"{path}: stages.{name}.problems cites {source}, which is not under problems{_meant(source, known)}"
                )
        match stage:
            case RL() | Screen() | Sample():
                cite(name, "model", stage.model, MODELS, "a model")
            case SFT():
                cite(name, "model", stage.model, MODELS, "a model")
                for row in stage.rows:
                    cite(name, "rows", row, ROWS, "rows")
            case Curate():
                cite(name, "rows", stage.rows, ROWS, "rows")
            case Evaluate():
                for model in [*stage.models, *stage.forced]:
                    cite(name, "models", model, MODELS, "a model")
            case Report():
                cite(name, "evaluation", stage.evaluation, {"evaluate"}, "an evaluation")
            case Pretrain() | General():
                if not isinstance(recipe.problems.get(stage.problems), Miniature):
                    raise LimbeckError(f"{path}: stages.{name}.problems must be a miniature, which has a corpus")
    _refuse_cycles(path, recipe)


def _refuse_cycles(path: Path, recipe: Recipe) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise LimbeckError(f"{path}: stages go in a circle: {' -> '.join([*trail[trail.index(name):], name])}")
        if name not in done:
            stage = recipe.stages[name]
            for cited in [*inputs(stage), *(s for s in sources(stage) if s in recipe.stages)]:
                visit(cited, (*trail, name))
            done.add(name)

    for name in recipe.stages:
        visit(name, ())


def _meant(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known) or 'none'}"
