"""Mistakes in a recipe, reported as sentences: those that pydantic finds, and citations of stages that are
missing or of the wrong kind. This module does not import torch.

A citation is the name of a stage or of a source of problems as the value of a setting of another stage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from ..text.prompt_format import system_fault, template_fault
from ..types import LimbeckError
from .learned_rewards import Calibrate, LearnedReward, Reward
from .parts import PENALTIES, TARGETS, LoRA, Optimizer, Settings
from .recipe import (
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
    Report,
    Sample,
    Screen,
    Stage,
    Sums,
    cited_rows,
    inputs,
    sources,
)

# Kinds of stages by what their artifacts hold.
MODELS = {"load", "pretrain", "rl", "sft", "dpo", "distill"}
ROWS = {"sample", "curate", "general", "label"}
PAIRS = {"pairs"}
SOURCES: dict[str, type[Settings]] = {"miniature": Miniature, "gym": Gym, "sums": Sums, "files": Files}
STAGES: dict[str, type[Stage]] = {
    "load": Load, "remote": Remote, "pretrain": Pretrain, "rl": RL, "screen": Screen, "sample": Sample,
    "curate": Curate, "sft": SFT, "general": General, "label": Label, "pairs": Pairs, "dpo": DPO,
    "distill": Distill, "calibrate": Calibrate, "reward": Reward, "evaluate": Evaluate, "report": Report,
}  # fmt: skip
KINDS: dict[str, type[Settings]] = {**SOURCES, **STAGES}

# ---------------------------------------------------------------- what pydantic finds


def explain(error: ValidationError, schema: type[Settings] = Recipe) -> str:
    """Return one sentence about the first of pydantic's mistakes. Unknown keys are reported before missing
    ones, since a misspelt key also counts as a missing one. `schema` is what the settings
    were checked against."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    sentence = _sentence(first, schema)
    if error.error_count() > 1:
        return f"{sentence} ({error.error_count() - 1} more after it)"
    return sentence


def _sentence(mistake: dict[str, Any], schema: type[Settings]) -> str:
    """Return a sentence about one of the mistakes that pydantic found."""
    # pydantic puts the chosen member of a union into the path; people did not write it
    location = [str(part) for i, part in enumerate(mistake["loc"]) if i != 2 or part not in KINDS]
    where = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        return f"unknown key {where}; {_hint(location[-1], _known_keys(mistake['loc'], schema))}"
    if location[-1] == "[key]":  # of a table whose names are settled
        known = re.findall(r"'([^']+)'", mistake["ctx"]["expected"])
        return f"unknown key {'.'.join(location[:-1])}{_meant(location[-2], known)}"
    if mistake["type"] == "missing":
        return f"{where} is missing"
    if mistake["type"].startswith("union_tag"):
        key, choices = ("source", SOURCES) if location[0] == "problems" else ("kind", STAGES)
        return f"{where}.{key} is missing or unknown; choose one of {', '.join(choices)}"
    message = mistake["msg"][0].lower() + mistake["msg"][1:]
    # YAML reads a text in braces, such as {problem}, as a mapping
    remedy = "; put it in quotes" if message.endswith("string") and isinstance(mistake["input"], dict) else ""
    return f"{where}: {message}, but it is {mistake['input']!r}{remedy}"


def _hint(word: str, known: list[str]) -> str:
    """Return a hint for an unknown key `word`: the most similar known key, or else all known keys."""
    close = _closest(word, known)
    return f"did you mean {close}?" if close else f"known keys: {', '.join(known)}"


def _known_keys(location: tuple, schema: type[Settings]) -> list[str]:
    """Return the keys that are allowed in the mapping at `location`, the path of a mistake."""
    model: type[Settings] | None = schema
    for i, part in enumerate(location[:-1]):
        if i == 2 and part in KINDS:
            model = KINDS[part]
        elif model and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            choices = get_args(annotation) or (annotation,)  # a setting may be None as well
            models = [one for one in choices if isinstance(one, type) and issubclass(one, Settings)]
            model = models[0] if models else None
    return sorted(model.model_fields) if model else []


# ---------------------------------------------------------------- what stages cite


def check_references(path: Path, recipe: Recipe) -> None:
    """Check the citations of all stages. Raises LimbeckError unless each names something that exists and is
    of the right kind, and no stage cites itself directly or through others."""
    if not re.fullmatch(r"\w[\w.-]*", recipe.name) or recipe.name == "store":
        raise LimbeckError(
            f"{path}: name {recipe.name!r} names a folder: letters, digits, - _ . only, and not store"
        )
    _check_prompts(path, recipe)
    for name, stage in recipe.stages.items():
        references = _References(path, recipe, name)
        _check_any_stage(references, stage)
        check = _CHECKS.get(type(stage))
        if check:
            check(references, stage)
    _check_iterate(path, recipe)
    _refuse_cycles(path, recipe)


def _check_iterate(path: Path, recipe: Recipe) -> None:
    """Check that the section `iterate` cites models, an evaluation and sources of problems."""
    iterate = recipe.iterate
    if iterate is None:
        return
    roles = {"model": MODELS, "base": MODELS, "teacher": MODELS, "evaluation": {"evaluate"}}
    for role, kinds in roles.items():
        cited = getattr(iterate, role)
        if cited and (cited not in recipe.stages or recipe.stages[cited].kind not in kinds):
            fitting = [name for name, stage in recipe.stages.items() if stage.kind in kinds]
            need = "an evaluation" if role == "evaluation" else "a model"
            raise LimbeckError(
                f"{path}: iterate.{role} cites {cited}, which is no stage with {need}{_meant(cited, fitting)}"
            )
    named = {
        "screen.problems": iterate.screen.problems if iterate.screen else {},
        "gate.problems": iterate.gate.problems,
        "gate.general": iterate.gate.general or [],
    }
    for key, sources_of_key in named.items():
        for source in sources_of_key:
            if source not in recipe.problems:
                meant = _meant(source, recipe.problems)
                raise LimbeckError(
                    f"{path}: iterate.{key} cites {source}, which is not under problems{meant}"
                )


def _check_prompts(path: Path, recipe: Recipe) -> None:
    """Raise LimbeckError for a template without `{problem}`, for other placeholders, and for an empty system
    prompt."""
    for name, source in recipe.problems.items():
        if not isinstance(source, Gym | Sums | Files):  # sources of one's own need no template
            continue
        for key, fault in (
            ("template", template_fault(source.template)),
            ("system", "" if source.system is None else system_fault(source.system)),
        ):
            if fault:
                raise LimbeckError(f"{path}: problems.{name}.{key} {fault}")


@dataclass(frozen=True)
class _References:
    """Checks the citations of one stage, `name`, of the recipe in the file `path`."""

    path: Path
    recipe: Recipe
    name: str

    def error(self, sentence: str) -> LimbeckError:
        """Return an error about this stage. `sentence` continues after the stage's name, as in `.model cites
        …`."""
        return LimbeckError(f"{self.path}: stages.{self.name}{sentence}")

    def cite(self, key: str, cited: str, kinds: set[str], need: str) -> None:
        """Raise LimbeckError unless `cited` is the name of a stage of one of `kinds`. `key` is the setting
        that cites it; `need` says in the message what the setting needs."""
        stages = self.recipe.stages
        if cited not in stages:
            raise self.error(f".{key} cites {cited}, which is no stage{_meant(cited, stages)}")
        kind = stages[cited].kind
        if kind in kinds:
            return
        if kind == "remote":
            raise self.error(
                f".{key} needs {need}, but {cited} is remote: it gives text, no weights and no logits, "
                "and so withholds learning, evaluation, logit and on-policy distillation; it can be asked by "
                "sample stages and judge"
            )
        raise self.error(f".{key} needs {need}, but {cited} is a {kind} stage")

    def cite_all(self, key: str, names: Iterable[str], kinds: set[str], need: str) -> None:
        """Raise LimbeckError unless all of `names` are stages of one of `kinds`; see `cite`."""
        for cited in names:
            self.cite(key, cited, kinds, need)


def _check_any_stage(references: _References, stage: Stage) -> None:
    """Check the citations that stages of several kinds can have."""
    if "/" in references.name:
        raise references.error(": a stage's name has no slash")
    for source in sources(stage):
        _check_source(references, source)
    model = getattr(stage, "model", None)
    if model and not isinstance(stage, Remote):
        kinds = MODELS | {"remote"} if isinstance(stage, Sample) else MODELS
        references.cite("model", model, kinds, "a model")
    flops_of = getattr(stage, "flops_of", None)
    if flops_of:
        references.cite("flops_of", flops_of, MODELS, "a stage that learns")
    scored_by = getattr(stage, "scored_by", None)
    if scored_by:
        references.cite("scored_by", scored_by, MODELS | {"calibrate"}, "a model or a calibrated judge")
    lora = getattr(stage, "lora", None)
    if lora:
        _check_lora(references, lora, stage.optimizer)
    _check_masters(references, stage)
    if isinstance(stage, SFT | Label | Distill):
        references.cite_all("rows", stage.rows, ROWS, "rows")


def _check_lora(references: _References, lora: LoRA, optimizer: Optimizer) -> None:
    """Check that adapters name layers that some model has, and are trained by AdamW."""
    for name in lora.names:
        if name not in (*TARGETS, "all"):
            meant = _meant(name, ("all", *TARGETS))
            raise references.error(f".lora.targets names {name}, which is no linear layer{meant}")
    if optimizer.name != "adamw":
        raise references.error(
            f".lora: adapters are trained by AdamW, but optimizer.name is {optimizer.name}; "
            "set it to adamw, and give optimizer.learning_rate"
        )


def _check_masters(references: _References, stage: Any) -> None:
    """Check that a stage does without masters only where its weights are in 16 bits and learn themselves."""
    optimizer = getattr(stage, "optimizer", None)
    if optimizer is None or optimizer.masters is not False:
        return
    if getattr(stage, "lora", None):
        raise references.error(
            ".lora: adapters learn in float32 and have no masters; leave optimizer.masters: false out"
        )
    if (stage.precision or references.recipe.precision) != "bfloat16":
        raise references.error(
            ".optimizer.masters: false rounds updates into weights in bfloat16, but precision is float32; "
            "set precision: bfloat16, or leave masters out"
        )


def _check_source(references: _References, source: str) -> None:
    """Check that a name under `problems` is a source of problems or a `screen` stage."""
    recipe = references.recipe
    screens = [name for name, stage in recipe.stages.items() if isinstance(stage, Screen)]
    if source not in recipe.problems and source not in screens:
        meant = _meant(source, [*recipe.problems, *screens])
        raise references.error(f".problems cites {source}, which is not under problems{meant}")


def _check_sample(references: _References, stage: Sample) -> None:
    """Check a `sample` stage: its judge is calibrated, the filter `judged` has a judge, and a remote
    endpoint is not used with drafted tokens (speculative decoding)."""
    if stage.sampling.speculate and isinstance(references.recipe.stages[stage.model], Remote):
        raise references.error(f".sampling.speculate is not for {stage.model}, which is remote")
    if stage.judge:
        references.cite("judge", stage.judge, {"calibrate"}, "a calibration of the judge")
    elif stage.judged is not None:
        raise references.error(
            f".judged needs a judge: name a calibrate stage in stages.{references.name}.judge"
        )


def _check_calibrate(references: _References, stage: Calibrate) -> None:
    """Check that the judge of a `calibrate` stage is a model or an endpoint, and that its rows are
    preference pairs."""
    references.cite("judge", stage.judge, MODELS | {"remote"}, "a model")
    references.cite_all("rows", cited_rows(stage.rows), PAIRS, "rows of preferences")


def _check_reward(references: _References, stage: Reward) -> None:
    """Check that the rows of a `reward` stage are preference pairs."""
    references.cite_all("rows", cited_rows(stage.rows), PAIRS, "rows of preferences")


def _check_sft(references: _References, stage: SFT) -> None:
    """Check that the system prompts of an `sft` stage are given for rows that the stage uses."""
    for cited in stage.system or {}:
        if cited not in stage.rows:
            raise references.error(
                f".system cites {cited}, which gives it no rows{_meant(cited, stage.rows)}"
            )


def _check_dpo(references: _References, stage: DPO) -> None:
    """Check that the pairs of a `dpo` stage come from `pairs` stages or from files."""
    references.cite_all("pairs", cited_rows(*stage.pairs), PAIRS, "pairs")


def _check_curate(references: _References, stage: Curate) -> None:
    """Check that the rows of a `curate` stage come from a stage that produces rows."""
    references.cite("rows", stage.rows, ROWS, "rows")


def _check_load(references: _References, stage: Load) -> None:
    """Check that the rows that tell which layers to keep come from a stage that produces rows."""
    if stage.rows:
        references.cite("rows", stage.rows, ROWS, "rows")


def _check_evaluate(references: _References, stage: Evaluate) -> None:
    """Check that an `evaluate` stage cites models as its models, and no `screen` stages as its problems."""
    recipe = references.recipe
    references.cite_all("models", [*stage.models, *stage.forced], MODELS, "a model")
    references.cite_all("without_thought", stage.without_thought or [], MODELS, "a model")
    if not stage.problems:
        raise references.error(".problems is empty; name problems, of which the first makes the headline")
    for source in stage.problems:
        if source in recipe.stages and source not in recipe.problems:
            raise references.error(
                f".problems cites {source}, a screening, which keeps training problems only; cite what it "
                "screened"
            )


def _check_report(references: _References, stage: Report) -> None:
    """Check that a `report` stage cites an `evaluate` stage as its evaluation, and that every value of its
    setting `story` is a model, with or without the suffix `+forced` or `+cut`."""
    references.cite("evaluation", stage.evaluation, {"evaluate"}, "an evaluation")
    for role, model in stage.story.items():
        references.cite(
            f"story.{role}", model.removesuffix("+forced").removesuffix("+cut"), MODELS, "a model"
        )


def _check_corpus(references: _References, stage: Pretrain | General) -> None:
    """Check that the problems of the stage come from the clock countdown (`Miniature`), the only source from
    which a corpus can be made."""
    cited = stage.problems
    if cited and not isinstance(references.recipe.problems.get(cited), Miniature):
        raise references.error(".problems must be a miniature, which has a corpus")


def _check_distill(references: _References, stage: Distill) -> None:
    """Check that the teachers of a `distill` stage are models, that each is named for a source of problems
    of the recipe, and that every source from which the student gets problems has a teacher. The stage's rows
    are checked too."""
    recipe = references.recipe
    for domain, teacher in stage.teachers.items():
        references.cite(f"teachers.{domain}", teacher, MODELS, "a model")
    for domain in stage.teachers:
        written = getattr(recipe.stages.get(domain), "kind", "") == "general"
        if domain not in recipe.problems and not written:
            raise references.error(
                f".teachers cites {domain}, which is not under problems{_meant(domain, recipe.problems)}"
            )
    untaught = _problems_behind(recipe, list(stage.problems)) - set(stage.teachers)
    if untaught:
        raise references.error(f".teachers has none for {min(untaught)}; name a stage whose model teaches it")
    _check_labels(references, stage)


def _check_labels(references: _References, stage: Distill) -> None:
    """Check that rows with token labels are not used with the divergence `text`, and that rows without
    labels have teachers."""
    labels: list[str] = []
    unlabelled: list[str] = []
    for name in stage.rows:
        is_label = isinstance(references.recipe.stages[name], Label)
        (labels if is_label else unlabelled).append(name)
    if labels and stage.divergence == "text":
        raise references.error(
            f".rows cites {labels[0]}, labels of tokens, which divergence text cannot use; cite its rows"
        )
    if labels and stage.completion_only_loss is False:
        raise references.error(
            f".completion_only_loss is false, but {labels[0]} labels no prompts; cite its rows and a teacher"
        )
    if unlabelled and not stage.teachers:
        raise references.error(
            f".rows cites {unlabelled[0]}, which nobody has labelled; name teachers, or cite a label stage"
        )


def _problems_behind(recipe: Recipe, names: list[str]) -> set[str]:
    """Return the sources of problems among `names`, and the sources that the `screen` stages among `names`
    use."""
    found: set[str] = set()
    for name in names:
        if name in recipe.problems:
            found.add(name)
        else:
            found |= _problems_behind(recipe, sources(recipe.stages[name]))
    return found


def _check_rl(references: _References, stage: RL) -> None:
    """Check that an `rl` stage samples without penalties, and that each learned part of its reward cites its
    stage, has a weight, and is used for enough steps to fill the window of its alarm.

    The learner scores a token by the tokens before it alone: with a penalty its log-probabilities would not
    be the sampler's."""
    name = references.name
    for penalty, neutral in PENALTIES.items():
        value = getattr(stage.sampling, penalty)
        if value not in (None, neutral):
            raise references.error(
                f".sampling.{penalty} = {value:g} is not for rl, whose learner scores tokens without "
                "penalties; leave it out"
            )
    if stage.engine:
        _check_engine(references, stage)
    learned = stage.learned_rewards or {}
    for part, kind in (("judge", "calibrate"), ("preference", "reward")):
        if part in stage.rewards and part not in learned:
            raise references.error(
                f".rewards.{part} is an opinion: name its {kind} stage in "
                f"stages.{name}.learned_rewards.{part}.of"
            )
    for part, opinion in learned.items():
        _check_opinion(references, stage, part, opinion)


def _check_engine(references: _References, stage: RL) -> None:
    """Check that an `rl` stage asks a vLLM server for what it can give: tokens of the whole softmax, not
    exact, and without drafts."""
    sampling = stage.sampling
    unfit = {
        "exact": stage.exact, "policy.keep_sampling_mask": stage.policy.keep_sampling_mask,
        "sampling.temperature": not sampling.temperature, "sampling.top_p": sampling.top_p < 1,
        "sampling.top_k": sampling.top_k, "sampling.min_p": sampling.min_p,
        "sampling.speculate": sampling.speculate,
    }  # fmt: skip
    for key in (key for key, given in unfit.items() if given):
        raise references.error(f".{key} is not for an engine elsewhere; leave it out, or leave engine out")


def _check_opinion(references: _References, stage: RL, part: str, opinion: LearnedReward) -> None:
    """Check one learned part of the reward: the stage it cites, its weight, its problems, and the window of
    its alarm."""
    key = f"learned_rewards.{part}"
    if part == "judge":
        references.cite(f"{key}.of", opinion.of, {"calibrate"}, "a calibration of the judge")
    else:
        references.cite(f"{key}.of", opinion.of, {"reward"}, "a reward model")
    if part not in stage.rewards:
        raise references.error(
            f".{key} earns nothing; say what it is worth in stages.{references.name}.rewards.{part}"
        )
    for source in opinion.problems:
        if source not in stage.problems:
            meant = _meant(source, stage.problems)
            raise references.error(f".{key}.problems cites {source}, of which the stage has none{meant}")
    steps = min(opinion.last_steps or stage.steps, stage.steps)
    if opinion.window > steps:
        raise references.error(
            f".{key}.window = {opinion.window} is longer than the {steps} steps in which {part} counts, "
            "so its alarm could never ring; shorten it, or raise steps or last_steps"
        )


_CHECKS: dict[type[Stage], Callable[[_References, Any], None]] = {
    Sample: _check_sample, Calibrate: _check_calibrate, Reward: _check_reward, RL: _check_rl, SFT: _check_sft,
    DPO: _check_dpo, Distill: _check_distill, Curate: _check_curate, Evaluate: _check_evaluate,
    Load: _check_load, Report: _check_report, Pretrain: _check_corpus, General: _check_corpus,
}  # fmt: skip


def _refuse_cycles(path: Path, recipe: Recipe) -> None:
    """Raise LimbeckError if a stage cites itself, directly or through other stages."""
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            cycle = [*trail[trail.index(name) :], name]
            raise LimbeckError(f"{path}: stages go in a circle: {' -> '.join(cycle)}")
        if name in done:
            return
        stage = recipe.stages[name]
        screens = [source for source in sources(stage) if source in recipe.stages]
        for cited in [*inputs(stage), *screens]:
            visit(cited, (*trail, name))
        done.add(name)

    for name in recipe.stages:
        visit(name, ())


def _closest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most similar to `word`; an empty string if none is similar."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return close[0] if close else ""


def _meant(word: str, known: Collection[str]) -> str:
    """Return the end of a sentence about an unknown word: the most similar known word, or else all known
    words."""
    close = _closest(word, known)
    return f"; did you mean {close}?" if close else f"; there are {', '.join(known) or 'none'}"
