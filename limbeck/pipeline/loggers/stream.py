"""The stream of a run's metrics from the stages' logs to loggers: `limbeck run --log tensorboard`.

The stages' own logs are the source. Whatever a logger wrote for the run before is written anew from them when
the run begins, and from then on each logger follows the stages at work. So a run that was killed and resumed
gives the same series as one that was not, and no step is written twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...run_log import METRICS, Tail
from ...types import LimbeckError
from ..graph import Graph, Node
from ..progress import Progress
from ..run import Display, Run
from ..store import Artifact

# name -> the class in the module of that name, and the package that must be installed ("" for none)
LOGGERS = {
    "jsonl": ("JsonlLogger", ""),
    "tensorboard": ("TensorBoardLogger", "tensorboard"),
    "wandb": ("WandbLogger", "wandb"),
}


class Logger(Protocol):
    """A writer of metrics for one tool. It is opened with the run's folder and the recipe's settings, and
    first deletes what an earlier process wrote for the run."""

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of a stage. The steps of a stage come in ascending order."""

    def flush(self) -> None:
        """Hand everything written so far to the tool or to the disk."""

    def close(self) -> None:
        """Finish writing."""


class LoggedDisplay:
    """A display that also passes the metrics of finished and running stages on to loggers."""

    def __init__(self, display: Display, loggers: Sequence[Logger]):
        self.display = display
        self.loggers = loggers
        self._tails: dict[str, Tail] = {}
        self._last: dict[str, int] = {}  # stage -> the last step written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.display, name)

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Write what the stages in `running` have logged since the last call, and show the state."""
        for name, progress in running.items():
            self.follow(name, progress.folder)
        self.display.show(graph, running)

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Write the rest of the metrics of the stage `node`, and show that it has finished."""
        self.follow(node.name, artifact.folder)
        self.display.finished(node, artifact)

    def follow(self, stage: str, folder: Path) -> None:
        """Write the metrics that the log in `folder` has had added since the last call for this stage."""
        tail = self._tails.setdefault(stage, Tail(folder / METRICS))
        tail.path = folder / METRICS
        _, lines = tail.more()
        for _, line in lines:
            row = json.loads(line)
            step = row.pop("step")
            if step > self._last.get(stage, -1):  # a stage that resumes logs its last steps again
                self._last[stage] = step
                for logger in self.loggers:
                    logger.write(stage, step, scalars(row))
        if lines:
            for logger in self.loggers:
                logger.flush()


@contextmanager
def log_metrics(run: Run, names: Sequence[str]) -> Iterator[None]:
    """Context manager around the execution of a run: its metrics go to the loggers `names`, those of stages
    that are finished already included.

    Raises LimbeckError, before anything runs, for a name that is not known or a package that is not
    installed.
    """
    chosen = list(dict.fromkeys(names))
    _check_names(chosen)
    if not chosen:
        yield
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    loggers = [_open(name, run) for name in chosen]
    run.display = LoggedDisplay(run.display, loggers)
    try:
        for node in run.graph.nodes.values():
            if node.artifact:
                run.display.follow(node.name, node.artifact.folder)
        yield
    finally:
        for logger in loggers:
            logger.close()


def _check_names(names: Sequence[str]) -> None:
    """Raise LimbeckError unless each name is that of a logger whose package is installed."""
    for name in names:
        if name not in LOGGERS:
            raise LimbeckError(f"--log {name}: there is no such logger; choose one of {', '.join(LOGGERS)}")
        package = LOGGERS[name][1]
        if package and find_spec(package) is None:
            raise LimbeckError(
                f"--log {name}: the package {package} is not installed; `pip install 'limbeck[{package}]'`"
            )


def _open(name: str, run: Run) -> Logger:
    """Return the logger `name`, opened for a run."""
    kind = getattr(import_module(f"{__package__}.{name}"), LOGGERS[name][0])
    return kind(run.folder, run.recipe.model_dump(mode="json"))


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row of metrics, by name. Words in the row become part of the names.

    >>> scalars({"source": "clock", "mode": "t1", "accuracy": 0.5})
    {'accuracy/clock/t1': 0.5}
    """
    words = [value for value in row.values() if isinstance(value, str)]
    numbers = {}
    for name, value in row.items():
        if isinstance(value, int | float) and math.isfinite(value):
            numbers["/".join([name, *words])] = float(value)
    return numbers
