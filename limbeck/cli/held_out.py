"""The held-out problems that a command asks models: those of a user's file or of a recipe, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import find_recipe, load_recipe, usage_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..config.recipe import Evaluate
    from ..pipeline.evaluation_run import HeldOut

MODES = ("t1", "t06", "greedy", "pass@8")
ANSWERS = ("tags", "boxed", "final")
KEPT = {"problems", "prompts", "samples", "modes", "max_new_tokens", "precision", "exact", "retry"}
TABLES = (".jsonl", ".parquet")

Asked = Annotated[
    str,
    typer.Option(
        help="a JSONL or Parquet file, or a recipe (its name or file) for its problems, RECIPE:SOURCE for "
        "those of one source"
    ),
]
Modes = Annotated[
    list[str], typer.Option(help=f"how answers are sampled: {', '.join(MODES)}", show_default=False)
]
Prompts = Annotated[int | None, typer.Option(min=1, help="held-out problems of each source, at most")]
Longest = Annotated[int | None, typer.Option(min=1, help="the longest answer, in tokens")]
Kept = Annotated[
    int, typer.Option(min=1, help="of a file: problems that are kept for testing, as in a recipe")
]
Answer = Annotated[str, typer.Option(help=f"of a file: where the answer is looked for: {', '.join(ANSWERS)}")]
Columns = Annotated[str, typer.Option(help="of a file: its columns: problem=ask,answer=gold")]


@dataclass(frozen=True)
class FileOptions:
    """How a file of problems is read: how many are held out, where the answer is looked for, and the columns
    as the user wrote them, "" to find them."""

    held_out: int
    answer: str
    columns: str


def find_problems(name: str, changes: Mapping[str, Any], options: FileOptions) -> HeldOut:
    """Return what a command's `--problems` names, with the settings that the user gave: `changes` has None
    for the others.

    Raises a usage error for what is neither a file of problems nor a recipe, and for a setting that there is
    not.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    for mode in given.get("modes", ()):
        if mode not in MODES:
            raise usage_error(f"--mode {mode}: choose {', '.join(MODES)}")
    if Path(name).suffix in TABLES:
        return _of_file(Path(name), given, options)
    recipe, _, source = name.partition(":")
    return _of_recipe(recipe, source, given)


def _of_file(path: Path, changes: dict[str, Any], options: FileOptions) -> HeldOut:
    """Return the held-out problems of a user's file. Raises a usage error for a setting that there is not,
    and for a file that does not have so many different problems."""
    from ..config.recipe import Files
    from ..pipeline.evaluation_run import HeldOut
    from ..tasks.files import read_table
    from .first_recipe.problems import choose_columns

    if not path.is_file():
        raise usage_error(f"--problems {path}: there is no such file")
    if options.answer not in ANSWERS:
        raise usage_error(f"--answer {options.answer}: choose {', '.join(ANSWERS)}")
    rows = list(read_table(path))
    if not rows:
        raise usage_error(f"--problems {path}: the file has no rows")
    columns = choose_columns(path, rows[0], options.columns)
    different = {str(row[columns["problem"]]) for _, row in rows if columns["problem"] in row}
    if len(different) <= options.held_out:
        raise usage_error(
            f"--held-out {options.held_out}: too many for {path} (different problems: {len(different)}), as "
            "one must be left over; give a lower number, or add rows"
        )
    settings = {"path": str(path.resolve()), "columns": columns, "answer": options.answer}
    source = Files(source="files", held_out=options.held_out, **settings)
    return HeldOut(_settings([path.stem], changes), {path.stem: source})


def _of_recipe(name: str, source: str, changes: dict[str, Any]) -> HeldOut:
    """Return the test of a recipe: its first `evaluate` stage, or all its problems if it has none; of one
    source, if one is named.

    Raises a usage error for a recipe without problems, or without that source.
    """
    from ..config.recipe import Evaluate
    from ..pipeline.evaluation_run import HeldOut
    from ..pipeline.graph import resolve_paths, with_defaults

    path = find_recipe(name)
    recipe = load_recipe(path, [], False)
    stages = {key: stage for key, stage in recipe.stages.items() if isinstance(stage, Evaluate)}
    recipe = resolve_paths(recipe.model_copy(update={"stages": {}}), path.parent)
    if not recipe.problems:
        raise usage_error(f"{path} has no problems to ask")
    if source and source not in recipe.problems:
        raise usage_error(f"--problems {name}:{source}: {path} has {', '.join(recipe.problems)}")
    for key, stage in stages.items():
        kept = with_defaults(recipe, stage).model_dump(include=KEPT)
        asked = kept.pop("problems")
        settings = _settings([source] if source else asked, kept | changes)
        return HeldOut(settings, recipe.problems, recipe.seed, key)
    settings = _settings([source] if source else list(recipe.problems), changes)
    return HeldOut(settings, recipe.problems, recipe.seed)


def _settings(sources: list[str], changes: dict[str, Any]) -> Evaluate:
    """Return the settings of the evaluation on `sources`."""
    from ..config.recipe import Evaluate

    return Evaluate(kind="evaluate", models=["model"], problems=sources, **changes)
