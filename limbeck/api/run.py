"""Execution of a recipe from Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.display import Lines, printable
from ..cli.recipe_plan import cached_forecast
from ..config.hosts import load_hosts
from ..config.load import find, load, with_auto_curation
from ..config.recipe import Recipe
from ..pipeline.loggers.stream import log_metrics
from ..pipeline.run import Display
from ..pipeline.run import Run as Execution
from .results import Run


class NotebookLines(Lines):
    """The display of a notebook: plain lines below the cell, on standard output. A notebook draws standard
    error as a warning."""

    def say(self, text: str) -> None:
        """Print a message for people, without control characters."""
        print(printable(text), flush=True)


def run(
    recipe: str | Path | Recipe | Mapping[str, Any],
    /,
    *,
    runs: str | Path = "runs",
    auto: bool = False,
    log: str | Sequence[str] = (),
    display: Display | None = None,
    device: str = "cpu",
    hosts: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Execute a recipe and return what it has made. Stages that are already finished are not run again.

    `recipe` is a file, the name of a recipe that comes with Limbeck, a `Recipe`, or a mapping of its
    settings. `settings` replace settings of the recipe: `stages={"zero": {"steps": 5}}`, or by a dotted name
    `**{"stages.zero.steps": 5}`. `runs` is the folder of all runs. With `auto`, the policies of curate stages
    decide in place of people. `log` names one or several of the loggers jsonl, tensorboard and wandb, which
    get the metrics too. `display` shows the progress: by default lines of text, `Quiet()` for none. `device`
    is what computes: `auto` (a card if torch sees one), `cpu`, `cuda`, `cuda:1` or `mps`. `hosts` is a file
    of processes that sample and grade (docs/how-to/several-machines.md).

    Works in any thread: no signal handler is installed. After Ctrl-C (KeyboardInterrupt) the stages at work
    write a checkpoint first; the same call goes on from it.

    Raises LimbeckError for a mistake in the recipe or a failed stage, and Resumable if the run was stopped or
    waits for reviews: the same call then continues it.
    """
    checked = load(recipe, settings=settings)
    if auto:
        checked = with_auto_curation(checked)
    base = find(recipe).parent if isinstance(recipe, str | Path) else Path()
    seats = load_hosts(Path(hosts)) if hosts else None
    execution = Execution(checked, base, Path(runs), display or _display(), device=device, hosts=seats)
    with log_metrics(execution, [log] if isinstance(log, str) else log):
        execution.execute(cached_forecast(execution.graph))
    return Run(execution.folder)


def _display() -> Display:
    """Return the display for the place where Python runs: a notebook, or anywhere else."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    in_notebook = type(shell).__name__ == "ZMQInteractiveShell"
    return NotebookLines() if in_notebook else Lines()
