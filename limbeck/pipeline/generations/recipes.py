"""The recipe of each generation, derived from the user's: a pure function of that recipe and of what was
promoted before.

Generation 1 is the part of the recipe that leads to its model. A later generation has all that leads to the
champion, the best model so far, as it was, and repeats the stages between the teacher and the model with the
champion in the teacher's place. A repeated stage of generation 2 is called `NAME_g2`; as seeds of stages
derive from their names, it draws anew. The champion's stages keep their names, keys and results, so nothing
is computed twice, and the lineage of a model goes back through all generations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.iterate import Iterate
from ...config.recipe import RL, Recipe, Report, Screen, Stage, inputs, sources
from ...config.validate import MODELS
from ...types import LimbeckError

STORY = {"model": "r1", "base": "base", "teacher": "zero"}  # roles of a report's story, by those of `iterate`
CITING = ("model", "flops_of", "scored_by", "judge", "rows", "problems", "pairs", "system")  # settings
SCREEN = "harder"  # the stage that screens problems
DIGITS = 6  # decimal digits of shares
GUIDE = "docs/how-to/iterate.md"


@dataclass(frozen=True)
class Plan:
    """What is repeated: `Plan("r1", "base", "zero", "evaluation", Iterate(), "t1", ("clock",), ("chat",))`.

    `model`, `base`, `teacher` (None for none) and `evaluation` are names of stages of the recipe. `mode` is
    the way of sampling that the gate compares. `better` are the names of the problems on which a candidate
    has to be better, `general` those of the problems on which it must not be worse.
    """

    model: str
    base: str
    teacher: str | None
    evaluation: str
    settings: Iterate
    mode: str
    better: tuple[str, ...]
    general: tuple[str, ...]


def find_plan(recipe: Recipe) -> Plan:
    """Return what `iterate` and the report's story say about generations.

    Raises LimbeckError if they leave a role open, or if nothing would differ between generations."""
    settings = recipe.iterate or Iterate()
    reports = [stage for stage in recipe.stages.values() if isinstance(stage, Report)]
    story = reports[0].story if reports else {}
    roles = {role: getattr(settings, role) or story.get(told) for role, told in STORY.items()}
    if roles["teacher"] == roles["model"]:
        roles["teacher"] = None
    for role in ("model", "base"):
        if not roles[role]:
            raise LimbeckError(
                f"{recipe.name}: nothing says which stage is the {role} of a generation; add "
                f"iterate: {{{role}: STAGE}} to the recipe, or {STORY[role]} to the report's story ({GUIDE})"
            )
    evaluation = settings.evaluation or (reports[0].evaluation if reports else None)
    if evaluation is None:
        raise LimbeckError(
            f"{recipe.name}: nothing says which held-out problems a generation is asked; add "
            f"iterate: {{evaluation: STAGE}} to the recipe ({GUIDE})"
        )
    plan = Plan(**roles, evaluation=evaluation, settings=settings, **_compared(recipe, settings, evaluation))
    _refuse_idle(recipe, plan)
    return plan


def _compared(recipe: Recipe, settings: Iterate, evaluation: str) -> dict[str, Any]:
    """Return the way of sampling and the problems that the gate compares. Raises LimbeckError for those that
    the evaluation does not ask."""
    stage = recipe.stages[evaluation]
    gate = settings.gate
    modes = [mode for mode in stage.modes if not mode.startswith("pass@")]
    mode = gate.mode or ("t1" if "t1" in modes else next(iter(modes), "t1"))
    if mode not in modes:
        raise LimbeckError(
            f"{recipe.name}: the gate compares {mode}, which stages.{evaluation}.modes does not have; add it "
            "there, or set iterate.gate.mode"
        )
    better = tuple(gate.problems or stage.problems[:1])
    general = gate.general
    if general is None:
        general = [source for source in stage.problems if source not in better]
    for source in (*better, *general):
        if source not in stage.problems:
            raise LimbeckError(
                f"{recipe.name}: the gate compares {source}, which stages.{evaluation}.problems does not "
                "have; add it there"
            )
    return {"mode": mode, "better": better, "general": tuple(general)}


def _refuse_idle(recipe: Recipe, plan: Plan) -> None:
    """Raise LimbeckError unless the champion's place in later generations leads to their model."""
    replaced = replaced_stages(recipe, plan)
    if not replaced:
        raise LimbeckError(
            f"{recipe.name}: a generation that trains the base again needs a teacher; add iterate: "
            f"{{teacher: STAGE}}, or go on with the last model: {{start: last}} ({GUIDE})"
        )
    if plan.model not in _repeated(recipe, plan):
        raise LimbeckError(
            f"{recipe.name}: {plan.model} does not depend on {' or '.join(replaced)}, so every generation "
            f"would be the same; set iterate.teacher to a stage that leads to {plan.model} ({GUIDE})"
        )


def replaced_stages(recipe: Recipe, plan: Plan) -> list[str]:
    """Return the stages whose place the champion takes in later generations: the teacher, the models between
    the base and the teacher, and, if generations go on with the last model, the base."""
    taught = _needs(recipe, plan.teacher) - {plan.base} if plan.teacher else set()
    replaced = {name for name in taught if plan.base in _needs(recipe, name)} | {plan.teacher}
    if plan.settings.start == "last":
        replaced.add(plan.base)
    return [name for name, stage in recipe.stages.items() if name in replaced and stage.kind in MODELS]


# ---------------------------------------------------------------- recipes


def suffixed(name: str, generation: int) -> str:
    """Return the name of a stage of a generation; the first keeps the recipe's names."""
    return name if generation == 1 else f"{name}_g{generation}"


def first_recipe(recipe: Recipe, plan: Plan) -> Recipe:
    """Return the recipe of generation 1: the stages that lead to the model and to the base, and the
    evaluation of these two."""
    stages = _leading(recipe, plan.model, plan.base)
    return _finished(recipe, plan, 1, stages, (plan.base, plan.model), {})


def next_recipe(recipe: Recipe, plan: Plan, generation: int, previous: Recipe, champion: str) -> Recipe:
    """Return the recipe of a later generation. `previous` is the recipe that made the champion, in which
    `champion` is its stage.

    Raises LimbeckError if a stage already has a name that the generation needs."""
    repeated = _repeated(recipe, plan)
    renamed = {name: suffixed(name, generation) for name in repeated}
    renamed |= dict.fromkeys(replaced_stages(recipe, plan), champion)
    stages = _leading(previous, champion)
    stages |= _leading(recipe, *_kept(recipe, repeated, plan))
    taken = [suffixed(SCREEN, generation), *(renamed[name] for name in repeated)]
    for name in taken:
        if name in stages or name in recipe.problems:
            raise LimbeckError(f"{recipe.name}: generation {generation} needs the name {name}; rename yours")
    new = {renamed[name]: _cited(recipe, recipe.stages[name], renamed) for name in repeated}
    new = {name: _with_longer(recipe, plan, stage, champion) for name, stage in new.items()}
    screen = _screen(recipe, plan, champion, new)
    if screen:
        name = suffixed(SCREEN, generation)
        stages[name] = screen
        new = {other: _with_harder(stage, name, plan, new) for other, stage in new.items()}
    pair = (champion, suffixed(plan.model, generation))
    return _finished(recipe, plan, generation, stages | new, pair, renamed)


def recipe_of(recipe: Recipe, plan: Plan, promoted: Sequence[bool]) -> tuple[Recipe, str]:
    """Return the recipe of the generation after those whose promotion is given, and the stage of the model
    that it has to beat (the base, for generation 1)."""
    current = first_recipe(recipe, plan)
    if not promoted:
        return current, plan.base
    champion = (current, plan.model)
    for generation, won in enumerate([*promoted[1:], False], start=2):
        current = next_recipe(recipe, plan, generation, *champion)
        if won:
            champion = (current, suffixed(plan.model, generation))
    return current, champion[1]


def _finished(
    recipe: Recipe,
    plan: Plan,
    generation: int,
    stages: dict[str, Stage],
    pair: tuple[str, str],
    renamed: Mapping[str, str],
) -> Recipe:
    """Return the recipe of a generation: its stages, the evaluation of the two models `pair`, and a report
    if the recipe has one."""
    evaluation = suffixed(plan.evaluation, generation)
    asked = {"models": list(pair), "forced": [], "without_thought": None}
    stages = {**stages, evaluation: recipe.stages[plan.evaluation].model_copy(update=asked)}
    for name, stage in recipe.stages.items():
        if isinstance(stage, Report):
            kept = {role: renamed.get(model, model) for role, model in stage.story.items()}
            story = {role: model for role, model in kept.items() if model in stages and model != pair[0]}
            if generation == 1:
                story = {role: model for role, model in kept.items() if model in stages}
            told = {"evaluation": evaluation, "story": story, "compare": {}}
            stages[name] = stage.model_copy(update=told)
            break
    return recipe.model_copy(
        update={
            "name": run_name(recipe.name, generation),
            "description": f"Generation {generation} of {recipe.name}. {recipe.description}".strip(),
            "stages": stages,
            "iterate": None,
        }
    )


def run_name(name: str, generation: int) -> str:
    """Return the name of the run of a generation of the recipe `name`."""
    return f"{name}-g{generation}"


# ---------------------------------------------------------------- what depends on what


def _leading(recipe: Recipe, *names: str) -> dict[str, Stage]:
    """Return the named stages and all that they need, in the recipe's order."""
    needed = set().union(*(_needs(recipe, name) for name in names)) if names else set()
    return {name: stage for name, stage in recipe.stages.items() if name in needed}


def _needs(recipe: Recipe, name: str) -> set[str]:
    """Return a stage's name and those of all stages that it needs, directly or through others."""
    needed: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        if current not in needed:
            needed.add(current)
            pending += _cites(recipe, recipe.stages[current])
    return needed


def _cites(recipe: Recipe, stage: Stage) -> list[str]:
    """Return the names of the stages that a stage cites, `screen` stages included."""
    screens = [name for name in sources(stage) if name in recipe.stages and name not in recipe.problems]
    return [*inputs(stage), *screens]


def _repeated(recipe: Recipe, plan: Plan) -> list[str]:
    """Return the stages that a later generation repeats: those between the replaced ones and the model."""
    replaced = set(replaced_stages(recipe, plan))
    leading = _needs(recipe, plan.model) - replaced
    return [name for name in recipe.stages if name in leading and replaced & _needs(recipe, name)]


def _kept(recipe: Recipe, repeated: Sequence[str], plan: Plan) -> list[str]:
    """Return the stages that repeated stages cite and that are neither repeated nor replaced."""
    cited = (other for name in repeated for other in _cites(recipe, recipe.stages[name]))
    passing = {*repeated, *replaced_stages(recipe, plan)}
    return [name for name in dict.fromkeys(cited) if name not in passing]


def _cited(recipe: Recipe, stage: Stage, renamed: Mapping[str, str]) -> Stage:
    """Return a stage of the recipe with the names of the stages that it cites replaced."""
    settings = stage.model_dump(mode="json")
    screens = {old: new for old, new in renamed.items() if old not in recipe.problems}
    for key in CITING:
        if key in settings:
            settings[key] = _rename(settings[key], screens if key == "problems" else renamed)
    if settings.get("teachers"):
        settings["teachers"] = {name: _rename(one, renamed) for name, one in settings["teachers"].items()}
    for learned in (settings.get("learned_rewards") or {}).values():
        learned["of"] = _rename(learned["of"], renamed)
    return type(stage).model_validate(settings)


def _rename(cited: Any, renamed: Mapping[str, str]) -> Any:
    """Return a name, or a mapping whose keys are names, with the names replaced; None stays."""
    if isinstance(cited, dict):
        return {renamed.get(name, name): share for name, share in cited.items()}
    return renamed.get(cited, cited)


def _with_longer(recipe: Recipe, plan: Plan, stage: Stage, champion: str) -> Stage:
    """Return a repeated stage; if it asks the champion, with responses as long as the champion's."""
    sampling = getattr(stage, "sampling", None)
    if sampling is None or getattr(stage, "model", None) != champion:
        return stage
    learned = getattr(recipe.stages[plan.model], "sampling", sampling)
    longest = plan.settings.max_new_tokens or max(sampling.max_new_tokens, learned.max_new_tokens)
    return stage.model_copy(update={"sampling": sampling.model_copy(update={"max_new_tokens": longest})})


# ---------------------------------------------------------------- harder problems


def _screen(recipe: Recipe, plan: Plan, champion: str, new: Mapping[str, Stage]) -> Screen | None:
    """Return the stage in which the champion is asked for problems that it solves sometimes; None if nothing
    would draw from it. `new` are the repeated stages."""
    harder = plan.settings.screen
    drawing = [stage for stage in new.values() if _draws(stage, new)]
    if harder is None or not drawing:
        return None
    problems = harder.problems or _sources_behind(recipe, *(stage.problems for stage in drawing))
    return Screen(
        kind="screen",
        title="problems that the last model solves sometimes",
        model=champion,
        problems=problems,
        sampling=drawing[0].sampling,
        precision=drawing[0].precision,
        exact=drawing[0].exact,
        **harder.model_dump(include={"limit", "samples", "low", "high"}),
    )


def _draws(stage: Stage, new: Mapping[str, Stage]) -> bool:
    """Return True for an `rl` stage none of whose problems are screened by a repeated stage already."""
    return isinstance(stage, RL) and not any(name in new for name in stage.problems)


def _with_harder(stage: Stage, screen: str, plan: Plan, new: Mapping[str, Stage]) -> Stage:
    """Return a repeated stage; if it draws problems for `rl`, with the screened ones among them."""
    if not _draws(stage, new):
        return stage
    rest = (1 - plan.settings.screen.share) / sum(stage.problems.values())
    own = {name: round(share * rest, DIGITS) for name, share in stage.problems.items()}
    return stage.model_copy(update={"problems": {screen: plan.settings.screen.share, **own}})


def _sources_behind(recipe: Recipe, *mixtures: Mapping[str, float]) -> dict[str, float]:
    """Return the sources of problems behind mixtures of sources and `screen` stages, with their shares."""
    shares: dict[str, float] = {}
    for mixture in mixtures:
        total = sum(mixture.values())
        for name, share in mixture.items():
            behind = {name: 1.0}
            if name not in recipe.problems:
                behind = _sources_behind(recipe, recipe.stages[name].problems)
            for source, part in behind.items():
                shares[source] = shares.get(source, 0.0) + share / total * part / len(mixtures)
    return {source: round(share, DIGITS) for source, share in shares.items()}
