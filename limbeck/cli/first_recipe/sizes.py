"""The sizes of a first recipe: as many steps as the planner's forecast lets fit into the time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...types import LimbeckError
from ..options import usage_error

if TYPE_CHECKING:
    from ...config.recipe import Recipe

STEPS = 100  # steps of the draft that the forecast is made for
FEWEST, MOST = 10, 400  # steps
FINE, COARSE = 10, 50  # steps: what their number is a multiple of, below and above STEPS
SCREENING = 80  # steps from which on there is time to screen the problems first
UNFORESEEN = 40  # steps where no forecast can be made


@dataclass(frozen=True)
class Sizes:
    """The sizes of a first recipe: steps of reinforcement learning, and whether problems are screened.
    `note` is a sentence for the user."""

    steps: int
    screened: bool
    note: str


def fit(draft: Recipe, folder: Path, minutes: float, runs: Path) -> Sizes:
    """Return the sizes that fit into `minutes` on this machine.

    `draft` is the recipe with STEPS steps, in which the stage `sometimes` screens, if it has one. Raises a
    usage error if not even FEWEST steps fit.
    """
    from ...pipeline.graph import Graph
    from ...pipeline.store import Store
    from ..plan_text import duration
    from ..recipe_plan import WORKER_START, forecast_here

    try:
        stages = forecast_here(Graph(draft, Store(runs / ".none"), folder)).stages
    except LimbeckError as error:
        return Sizes(UNFORESEEN, False, f"not foreseen: {error}")
    learning = stages.pop("zero")
    screening = stages.pop("sometimes").seconds if "sometimes" in stages else 0.0
    per_step = (learning.seconds - learning.parts["loading and saving"]) / STEPS
    fixed = WORKER_START + learning.parts["loading and saving"]
    fixed += sum(stage.seconds for stage in stages.values())
    possible = (60 * minutes - fixed) / per_step
    screened = bool(screening) and (60 * minutes - fixed - screening) / per_step >= SCREENING
    if screened:
        fixed += screening
        possible -= screening / per_step
    if possible < FEWEST:
        needed = (fixed + FEWEST * per_step) / 60
        raise usage_error(
            f"--minutes {minutes:g}: {FEWEST} steps and the evaluations take about {needed:.0f} minutes "
            f"here; give --minutes {int(needed) + 1}, or a smaller model"
        )
    steps = _round(min(MOST, possible))
    seconds = fixed + steps * per_step
    return Sizes(steps, screened, f"forecast: {duration(seconds)} here, of which {steps} steps of learning "
                 f"take {duration(steps * per_step)}")  # fmt: skip


def _round(steps: float) -> int:
    """Return a number of steps that is rounded down to a multiple of FINE, or above STEPS of COARSE."""
    unit = COARSE if steps >= STEPS + COARSE else FINE
    return int(steps) // unit * unit
