"""The command `limbeck iterate`: generations of a model, each promoted only if it is better."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import RUNS, AsJson, Auto, Device, Home, find_recipe, load_recipe, print_json, tell
from .run import Overrides, RecipeFile, Right, carry_out, ignore_interrupts
from .watch import choose_display

if TYPE_CHECKING:
    from ..config.recipe import Recipe
    from ..pipeline.generations.ledger import Entry, Ledger
    from ..pipeline.generations.recipes import Plan
    from ..pipeline.run import Run

app = typer.Typer()


@app.command()
def iterate(
    recipe: RecipeFile,
    generations: Annotated[int, typer.Option(min=1, help="generations in all, the first included")] = 3,
    runs: Home = RUNS,
    set_: Overrides = [],  # noqa: B006
    auto: Auto = False,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="dollars an hour of this machine, for the money", show_default=False),
    ] = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    right: Right = None,
) -> None:
    """Repeat a recipe: each generation begins where the last one ended, and counts only if it is better.

    Generation 1 is the recipe. In the next one, the best model so far takes the teacher's place: it writes
    the rows that the base learns again (or goes on itself, with `start: last`), and is asked for problems
    that it solves sometimes. The new model is promoted if paired tests on held-out problems find it better,
    and not worse by a margin in language, in general ability, and in the arena's votes, where there are any.
    Otherwise the best model stays, and the next generation draws anew.

    Each generation is a run, RECIPE-g1, RECIPE-g2 and so on; decisions, accuracy, tokens, seconds and money
    are in the ledger, runs/RECIPE-generations. Ctrl-C checkpoints and stops; the same command goes on, and
    with more --generations adds some. The section `iterate` of a recipe says what is repeated, and sets the
    gate (docs/how-to/iterate.md).

    For instance: `limbeck iterate generations --auto`, `limbeck iterate mine.yaml --generations 2`
    """
    from ..pipeline.generations.iteration import Iteration

    path = find_recipe(recipe)
    loaded = load_recipe(path, set_, auto)
    carry = _Carrier(path.parent, runs, device, right)
    iteration = Iteration(loaded, runs, carry.carry_out, _votes(runs), tell)
    tell(_told_plan(iteration.plan))
    try:
        ledger = iteration.advance(generations)
    finally:
        ignore_interrupts()
    page = _write_page(ledger, price)
    if as_json:
        print_json(_to_json(ledger, price), page=str(page))
        return
    for line in table(ledger, price):
        print(line)
    print(f"The ledger is at {page}")


class _Carrier:
    """Carries the runs of generations out, one after the other, until the user stops one."""

    def __init__(self, base: Path, runs: Path, device: str, right: str | None):
        """`base` is the folder of the recipe's file, `runs` that of the runs. `right` is the user's reason
        for a claim to be exempt from a licence's terms."""
        self.base = base
        self.runs = runs
        self.device = device
        self.right = right
        self.job: Run | None = None

    def carry_out(self, recipe: Recipe) -> None:
        """Carry the recipe of a generation out. Raises Resumable if the user stopped it, or stopped the one
        before after its last stage."""
        from ..pipeline.run import Run
        from ..types import Resumable
        from .display import Tree

        if self.job and self.job.stopping:
            raise Resumable("stopped; the same command goes on from here")
        display = choose_display(False, sys.stderr)
        try:
            self.job = Run(recipe, self.base, self.runs, display, self.right, self.device)
            carry_out(self.job)
        finally:
            if isinstance(display, Tree):
                display.close()


def _votes(runs: Path) -> Callable[[str, str], Sequence[int]]:
    """Return the function that reads people's votes on two models from the studio's arena."""

    def votes(champion: str, candidate: str) -> Sequence[int]:
        """Return people's votes on two models, named by their artifacts; none if nobody has voted yet."""
        from ..serve.votes import FILE, VoteStore

        folder = runs / ".studio"
        return VoteStore(folder).between(champion, candidate) if (folder / FILE).exists() else []

    return votes


def _told_plan(plan: Plan) -> str:
    """Return the sentence that says what is repeated, and what the gate compares."""
    start = "the base again" if plan.settings.start == "again" else "the last model"
    teacher = f", in the place of {plan.teacher}" if plan.teacher else ""
    general = f", and not worse on {', '.join(plan.general)}" if plan.general else ""
    return (
        f"a generation ends with {plan.model}; the next begins with {start} and takes the best model so "
        f"far{teacher}; to be promoted a model must be better on {', '.join(plan.better)} ({plan.mode})"
        f"{general}"
    )


def _write_page(ledger: Ledger, price: float | None) -> Path:
    """Write the ledger's page and return its path."""
    from ..pipeline.generations.ledger import PAGE
    from ..pipeline.store import write
    from ..report.ledger_page import render

    page = ledger.folder / PAGE
    write(page, render(ledger, price))
    return page


def _to_json(ledger: Ledger, price: float | None) -> dict[str, Any]:
    """Return the ledger as a JSON object, with the reasons in words."""
    from ..pipeline.generations.ledger import to_json
    from ..report.ledger_page import check_sentence

    rows = []
    for entry in ledger.entries:
        reasons = [check_sentence(check).en for check in entry.decision.checks]
        rows.append({**to_json(entry, price), "reasons": reasons})
    best = ledger.best
    return {
        "name": ledger.name,
        "generations": rows,
        "best": {"generation": best.generation, "run": best.run, "stage": best.candidate.stage},
        "gates": ledger.gates,
        "false_promotion_rate": ledger.rate(),
    }


def table(ledger: Ledger, price: float | None) -> Iterator[str]:
    """Yield the lines that the command prints: a table of the generations, the reasons of each decision, and
    what the rate of false promotions is."""
    from ..report.ledger_page import check_sentence, outcome, price_sentence, rate_sentence

    columns = f"{'tokens':>8} {'s/right':>9} {'FLOPs/right':>12} {'$/right':>9}"
    yield f"{'':3} {'model':24} {'accuracy':>8} {'95 %':>14} {columns}"
    for entry in ledger.entries:
        yield _line(entry, price)
    for entry in ledger.entries:
        yield f"{entry.generation}: {outcome(entry).en}, compared with {entry.champion.stage}"
        for check in entry.decision.checks:
            yield f"   {'+' if check.passed else '-'} {check_sentence(check).en}"
    yield rate_sentence(ledger).en
    yield price_sentence(price).en
    best = ledger.best
    yield f"The best model is {best.run}/{best.candidate.stage}"


def _line(entry: Entry, price: float | None) -> str:
    """Return the line of a generation in the table."""
    from ..pipeline.generations.ledger import dollars
    from ..report.i18n import bounds, percent
    from ..report.ledger_page import significant

    model = entry.candidate
    shares = f"{percent(model.accuracy.mean):>8} {bounds(model.accuracy):>14}"
    seconds = model.seconds_per_right
    costs = f"{significant(seconds):>9} {significant(model.flops_per_right):>12}"
    money = significant(dollars(seconds, price))
    return f"{entry.generation:<3} {model.stage:24} {shares} {model.tokens:8.1f} {costs} {money:>9}"
