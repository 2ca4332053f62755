"""YAML in, a recipe out, or one sentence that says what is wrong and what was probably meant; and back to YAML.

Reading a recipe imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..types import LimbeckError
from .learned_rewards import Calibrate, Reward
from .parts import Settings
from .recipe import (
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
    Preference,
    Pretrain,
    Recipe,
    Remote,
    Report,
    Sample,
    Screen,
    Stage,
    cited_rows,
    inputs,
    sources,
)


def dump(recipe: Recipe) -> str:
    """The resolved recipe: every default spelled out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def with_auto_curation(recipe: Recipe) -> Recipe:
    """The recipe with each curate stage's policy in the place of people."""
    stages = {
        n: s.model_copy(update={"auto": True}) if isinstance(s, Curate) else s
        for n, s in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages})


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
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", written[i].start_mark
                )
        return super().construct_mapping(node, deep)


def shipped() -> list[Path]:
    """The recipes that come with Limbeck."""
    return sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def _shipped() -> str:
    return ", ".join(f"recipes/{path.name}" for path in shipped()) or "none found"


def _override(tree: dict, override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise LimbeckError(f"--set {override}: write key.path=value, for instance stages.zero.steps=10")
    *parents, last = key.split(".")
    for i, parent in enumerate(parents):
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise LimbeckError(
                f"--set {override}: {parent} is not a mapping, so it has no key {[*parents, last][i + 1]}"
            )
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise LimbeckError(f"--set {override}: the value is not valid YAML") from None


def _explain(error: ValidationError, tree: dict) -> str:
    """The first mistake of many, in one sentence; misspelt keys before what is missing because of them."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    # pydantic puts the chosen member of a union into the path; people did not write it
    location = [str(part) for i, part in enumerate(first["loc"]) if i != 2 or part not in _KINDS]
    where = ".".join(location)
    more = f" ({error.error_count() - 1} more after it)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"], tree)
        meant = difflib.get_close_matches(location[-1], known, 1, 0.5)
        hint = f"did you mean {meant[0]}?" if meant else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}{more}"
    if location[-1] == "[key]":  # of a table whose names are settled
        known = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        return f"unknown key {'.'.join(location[:-1])}{_meant(location[-2], known)}{more}"
    if first["type"] == "missing":
        return f"{where} is missing{more}"
    if first["type"].startswith("union_tag"):
        key = "source" if location[0] == "problems" else "kind"
        kinds = ", ".join(_SOURCES if key == "source" else _STAGES)
        return f"{where}.{key} is missing or unknown; choose one of {kinds}{more}"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}, but it is {first['input']!r}{more}"


_SOURCES: dict[str, type[Settings]] = {"miniature": Miniature, "gym": Gym, "files": Files}
_STAGES: dict[str, type[Stage]] = {
    "load": Load, "remote": Remote, "pretrain": Pretrain, "rl": RL, "screen": Screen, "sample": Sample, "curate": Curate,
    "sft": SFT, "general": General, "label": Label, "pairs": Pairs, "preference": Preference, "distill": Distill,
    "calibrate": Calibrate, "reward": Reward, "evaluate": Evaluate, "report": Report,
}  # fmt: skip
_KINDS = {*_SOURCES, *_STAGES}


def _known_keys(location: tuple, tree: dict) -> list[str]:
    model: Any = Recipe
    for i, part in enumerate(location[:-1]):
        if i == 2 and part in _KINDS:
            model = {**_SOURCES, **_STAGES}[part]
        elif isinstance(model, type) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            model = annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None
    return sorted(model.model_fields) if model else []


MODELS, ROWS = (
    {"load", "pretrain", "rl", "sft", "preference", "distill"},
    {"sample", "curate", "general", "label"},
)
PAIRS = {"pairs"}


def _check_references(path: Path, recipe: Recipe) -> None:
    """Every citation exists and is of the right kind, and no stage waits for itself."""
    stages = recipe.stages

    def cite(name: str, key: str, cited: str, kinds: set[str], what: str) -> None:
        if cited not in stages:
            raise LimbeckError(
                f"{path}: stages.{name}.{key} cites {cited}, which is no stage{_meant(cited, stages)}"
            )
        if isinstance(stages[cited], Remote) and "remote" not in kinds:
            raise LimbeckError(
                f"{path}: stages.{name}.{key} needs {what}, but {cited} is remote: it gives text, no weights and no logits, "
                "and so withholds learning, evaluation, logit and on-policy distillation; it can be asked by sample stages and judge"
            )
        if stages[cited].kind not in kinds:
            raise LimbeckError(
                f"{path}: stages.{name}.{key} needs {what}, but {cited} is a {stages[cited].kind} stage"
            )

    if not re.fullmatch(r"\w[\w.-]*", recipe.name) or recipe.name == "store":
        raise LimbeckError(
            f"{path}: name {recipe.name!r} names a folder: letters, digits, - _ . only, and not store"
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
        if getattr(stage, "model", None) and not isinstance(stage, Remote):
            asked = MODELS | {"remote"} if isinstance(stage, Sample) else MODELS
            cite(name, "model", stage.model, asked, "a model")
        for key, kinds, what in (
            ("flops_of", MODELS, "a stage that learns"),
            ("scored_by", MODELS | {"calibrate"}, "a model or a calibrated judge"),
        ):
            if getattr(stage, key, None):
                cite(name, key, getattr(stage, key), kinds, what)
        for row in stage.rows if isinstance(stage, SFT | Label | Distill) else ():
            cite(name, "rows", row, ROWS, "rows")
        match stage:
            case Sample():
                if stage.sampling.speculate and isinstance(stages[stage.model], Remote):
                    raise LimbeckError(
                        f"{path}: stages.{name}.sampling.speculate is not for {stage.model}, which is remote"
                    )
                if stage.judge:
                    cite(name, "judge", stage.judge, {"calibrate"}, "a calibration of the judge")
                elif stage.judged is not None:
                    raise LimbeckError(
                        f"{path}: stages.{name}.judged needs a judge: name a calibrate stage in stages.{name}.judge"
                    )
            case Calibrate():
                cite(name, "judge", stage.judge, MODELS | {"remote"}, "a model")
                for row in cited_rows(stage.rows):
                    cite(name, "rows", row, PAIRS, "rows of preferences")
            case Reward():
                for row in cited_rows(stage.rows):
                    cite(name, "rows", row, PAIRS, "rows of preferences")
            case RL():
                _check_opinions(path, name, stage, cite)
            case SFT():
                _check_system(path, name, stage)
            case Preference():
                for pairs in cited_rows(*stage.pairs):
                    cite(name, "pairs", pairs, {"pairs"}, "pairs")
            case Distill():
                for domain, teacher in stage.teachers.items():
                    cite(name, f"teachers.{domain}", teacher, MODELS, "a model")
                _check_teachers(path, name, stage, recipe)
            case Curate():
                cite(name, "rows", stage.rows, ROWS, "rows")
            case Evaluate():
                for model in [*stage.models, *stage.forced]:
                    cite(name, "models", model, MODELS, "a model")
                for source in set(stage.problems) & set(stages) - set(recipe.problems):
                    raise LimbeckError(
                        f"{path}: stages.{name}.problems cites {source}, a screening, which keeps training problems "
                        "only; cite what it screened"
                    )
            case Report():
                cite(name, "evaluation", stage.evaluation, {"evaluate"}, "an evaluation")
                for role, model in stage.story.items():
                    cite(name, f"story.{role}", model.removesuffix("+forced"), MODELS, "a model")
            case Pretrain() | General():
                if not isinstance(recipe.problems.get(stage.problems), Miniature):
                    raise LimbeckError(
                        f"{path}: stages.{name}.problems must be a miniature, which has a corpus"
                    )
    _refuse_cycles(path, recipe)


def _check_system(path: Path, name: str, stage: SFT) -> None:
    for cited in stage.system or {}:
        if cited not in stage.rows:
            raise LimbeckError(
                f"{path}: stages.{name}.system cites {cited}, which gives it no rows{_meant(cited, stage.rows)}"
            )


def _check_teachers(path: Path, name: str, stage: Distill, recipe: Recipe) -> None:
    """Every problem that the student may be asked has a teacher; so have rows that nobody has labelled."""
    for domain in stage.teachers:
        if domain not in recipe.problems:
            raise LimbeckError(
                f"{path}: stages.{name}.teachers cites {domain}, which is not under problems{_meant(domain, recipe.problems)}"
            )

    def asked(names: list[str]) -> set[str]:
        screens = [recipe.stages[n] for n in names if n not in recipe.problems]
        return {n for n in names if n in recipe.problems}.union(
            *(asked(sources(screen)) for screen in screens)
        )

    for domain in sorted(asked(list(stage.problems)) - set(stage.teachers)):
        raise LimbeckError(
            f"{path}: stages.{name}.teachers has none for {domain}; name a stage whose model teaches it"
        )
    labels = [row for row in stage.rows if recipe.stages[row].kind == "label"]
    if labels and stage.divergence == "text":
        raise LimbeckError(
            f"{path}: stages.{name}.rows cites {labels[0]}, labels of tokens, which divergence text cannot use; cite its rows"
        )
    bare = [row for row in stage.rows if recipe.stages[row].kind != "label"]
    if bare and not stage.teachers:
        raise LimbeckError(
            f"{path}: stages.{name}.rows cites {bare[0]}, which nobody has labelled; name teachers, or cite a label stage"
        )


def _check_opinions(path: Path, name: str, stage: RL, cite: Callable[..., None]) -> None:
    """A part of the reward that is an opinion says whose; one that says whose is worth something, and its alarm can ring."""
    opinions, where = stage.opinions or {}, f"{path}: stages.{name}"
    for part in {"judge", "preference"} & set(stage.rewards) - set(opinions):
        kind = "calibrate" if part == "judge" else "reward"
        raise LimbeckError(
            f"{where}.rewards.{part} is an opinion: name its {kind} stage in stages.{name}.opinions.{part}.of"
        )
    for part, opinion in opinions.items():
        kind, what = (
            ("calibrate", "a calibration of the judge") if part == "judge" else ("reward", "a reward model")
        )
        cite(name, f"opinions.{part}.of", opinion.of, {kind}, what)
        if part not in stage.rewards:
            raise LimbeckError(
                f"{where}.opinions.{part} earns nothing; say what it is worth in stages.{name}.rewards.{part}"
            )
        for problems in set(opinion.problems) - set(stage.problems):
            raise LimbeckError(
                f"{where}.opinions.{part}.problems cites {problems}, of which the stage has none{_meant(problems, stage.problems)}"
            )
        counting = min(opinion.last_steps or stage.steps, stage.steps)
        if opinion.window > counting:
            raise LimbeckError(
                f"{where}.opinions.{part}.window = {opinion.window} is longer than the {counting} steps in which {part} counts, so its "
                "alarm could never ring; shorten it, or raise steps or last_steps"
            )


def _refuse_cycles(path: Path, recipe: Recipe) -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            raise LimbeckError(
                f"{path}: stages go in a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
            )
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
