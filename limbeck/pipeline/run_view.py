"""A run prepared for display: the progress of each stage as numbers, as a drawing and as sentences."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ..config.recipe import RL
from ..plan.forecast import wall
from ..report import flips, graph_drawing, i18n, sentences, summary
from ..report import preview as sentences_of
from ..report.flips import Flips
from ..report.history import History
from ..report.i18n import Text
from ..report.loaded_run import EVALUATION
from ..report.loaded_run import Run as Reported
from . import preview, run_status
from .continuation import CONTINUED
from .progress import Figures, Progress
from .run_folder import clock_seconds, read_json
from .run_state import RunState, StageState

FAMILY = dict.fromkeys(("load", "pretrain", "rl", "sft", "dpo", "distill", "reward"), "model")
LEFT_OUT = ("evaluate", "report")  # kinds of stages that are not drawn


@lru_cache(maxsize=256)
def _history(folder: Path) -> History:
    """Return the history of metrics in a stage's folder. It is cached, so that each call of its `look` reads
    only what was appended since the last call."""
    return History(folder)


@dataclass(frozen=True)
class Line:
    """One stage of a run as it is displayed:
    `Line(stage_state, "running", history, {"seconds": 76.0, "low": 60.0, "high": 95.0})`.

    `standing` is the state read from the run's folder. `state` is `done`, `running`, `begun` (started, but no
    process works on it), `asks` (people must review rows) or `waits`. `history` has the metrics up to now;
    `foreseen` is the forecast of the stage's duration in seconds, if one was made. `figures` is the progress
    at this moment of a stage that is running.
    """

    standing: StageState
    state: str
    history: History
    foreseen: dict[str, float] | None = None
    figures: Figures | None = None

    @property
    def name(self) -> str:
        """The name of the stage."""
        return self.standing.name

    @property
    def kind(self) -> str:
        """The kind of the stage, such as `rl`."""
        return self.standing.kind

    @property
    def share(self) -> float:
        """The share of the stage's steps that is done, from 0 to 1."""
        if self.state == "done":
            return 1.0
        return self.history.done / self.history.total if self.history.total else 0.0

    @property
    def unchanged(self) -> bool:
        """True if the stage trains a model and left all weights as they were."""
        return self.standing.view.notes.get("weights_changed") is False

    @property
    def seconds(self) -> float | None:
        """The seconds that the stage took, or has taken so far; None if unknown."""
        return self.standing.manifest.get("seconds") or self.history.seconds or None

    @property
    def continued(self) -> dict[str, Any] | None:
        """The artifact and the step that the stage continues from, as in its manifest; None if it began at
        its beginning."""
        standing = self.standing
        if standing.manifest or not standing.folder:
            return standing.manifest.get("continued")
        return read_json(standing.folder / CONTINUED) or None

    @property
    def said(self) -> list[Text]:
        """The state, curves and results of the stage as sentences."""
        if self.state == "asks":
            text = Text("{} waits for people: {} rows to review.", "{} 在等人审阅：还有 {} 行。")
            return [text.format(self.name, self.standing.open_rows)]
        manifest = self.standing.manifest
        texts = [sentences.progress(self.name, self.kind, self.state, self.history, manifest)]
        texts += self._now()
        texts += sentences.continued(self.name, self.continued)
        texts += sentences.curves(self.kind, self.history)
        texts += sentences.soundness(self.history)
        if self.state == "done" and manifest:
            texts += sentences.outcome(self.standing.view)
        if self.foreseen and self.seconds:
            texts.append(sentences.foreseen(self.seconds, self.foreseen, self.state == "done"))
        return texts

    def _now(self) -> list[Text]:
        """Return a sentence on what a running stage does at this moment, its speed and the time left."""
        if not self.figures:
            return []
        rate = self.figures.rate
        left = self.figures.left
        return sentences.now(
            self.figures.phases,
            (rate.value, rate.unit) if rate else None,
            (left.low, left.high, left.at_most) if left else None,
        )

    def rewards(self) -> list[str]:
        """Return the names of the parts of the stage's reward; [] unless it is an `rl` stage."""
        stage = self.standing.stage
        return list(stage.rewards) if isinstance(stage, RL) else []


# ---------------------------------------------------------------- all stages


def lines(run: RunState, alive: bool) -> list[Line]:
    """Return all stages of a run for display. `alive` is True if a process executes the run."""
    return [line_of(run, stage, alive) for stage in run.stages]


def line_of(run: RunState, standing: StageState, alive: bool) -> Line:
    """Return one stage of a run for display, with its metrics up to now. `alive` is True if a process
    executes the run."""
    state = "running" if standing.state == "begun" and alive else standing.state
    history = _history(standing.folder).look() if standing.folder else History(Path())
    progress = progress_of(run, standing) if state == "running" else None
    return Line(standing, state, history, run.foreseen.get(standing.name), progress and progress.figures())


def narrate(run: RunState, stages: Sequence[Line]) -> list[Text]:
    """Describe the run in sentences: how many stages are done, the results, the stages at work, and the
    forecast beside the time taken."""
    done = [line for line in stages if line.state == "done"]
    text = Text("{} of {} stages are done.", "{1} 个阶段中已完成 {0} 个。")
    texts = [text.format(len(done), len(stages))]
    views = tuple(line.standing.view for line in done if line.kind != "report")
    texts += summary.opening(Reported(views, run.recipe.model_dump(mode="json"), {}))
    for line in stages:
        if line.state == "running":
            texts += line.said
        elif line.state in ("begun", "asks"):
            texts += [*line.said[:1], *sentences.alarms(line.history)]
    compared = against_clock(run)
    if compared:
        texts.append(sentences.foreseen(compared["took"], compared, True))
    return texts


class _Foreseen(NamedTuple):
    """The forecast of a stage's `seconds`, `low` and `high`, and the stages that it reads."""

    seconds: float
    low: float
    high: float
    inputs: tuple[str, ...]


def against_clock(run: RunState) -> dict[str, float] | None:
    """Return the forecast `seconds`, `low` and `high` of the finished stages together, as the clock shows
    them where stages run side by side, and the time that they `took` by the clock.

    Stages that were reused, and those without a forecast, are left out. Return None for fewer than two.
    """
    forecasts = {}
    artifacts = []
    for stage in run.stages:
        foreseen = run.foreseen.get(stage.name)
        done = bool(foreseen) and stage.state == "done" and stage.folder is not None
        if done and clock_seconds(run.folder, [stage.folder.name]):
            times = [foreseen[key] for key in ("seconds", "low", "high")]
            forecasts[stage.name] = _Foreseen(*times, stage.inputs)
            artifacts.append(stage.folder.name)
    if len(forecasts) < 2:
        return None
    compared = {"took": round(clock_seconds(run.folder, artifacts), 1)}
    for key in ("seconds", "low", "high"):
        compared[key] = round(wall(forecasts, run.recipe.workers, key=key), 1)
    return compared


def at_work(run: RunState) -> dict[str, Progress]:
    """Return the progress of each stage that the run's process works on, by the stage's name; {} if no
    process executes the run."""
    if not run_status.is_running(run.folder):
        return {}
    return {stage.name: progress_of(run, stage) for stage in run.stages if stage.state == "begun"}


def progress_of(run: RunState, stage: StageState) -> Progress:
    """Return the progress of a stage that the run's process works on."""
    status = run_status.status(run.folder)
    spent = time.time() - status.starts.get(stage.name, status.since)
    began = time.monotonic() - max(0.0, spent)
    return Progress(stage, stage.folder, began, run.foreseen.get(stage.name))


def draw(stages: Sequence[Line], label: str, link: Callable[[str], str]) -> Markup:
    """Draw the graph of the stages as SVG, each with its state, its progress, and a link to its page. `label`
    describes the drawing to screen readers; `link` maps a stage's name to the URL of its page."""
    boxes = []
    for line in stages:
        if line.kind in LEFT_OUT:
            continue
        box = graph_drawing.Box(
            line.name,
            _caption(line),
            line.standing.inputs,
            FAMILY.get(line.kind, "rows"),
            link(line.name),
            line.state,
            0.0 if line.state == "done" else line.share,
        )
        boxes.append(box)
    return graph_drawing.draw(boxes, label) if boxes else Markup()


def _caption(line: Line) -> Text:
    """Return the caption of a stage's box: its kind, and the number of rows to review, the steps, or the time
    taken."""
    kind = i18n.KINDS.get(line.kind, i18n.plain(line.kind))
    if line.state == "asks":
        progress = Text("{} rows", "{} 行").format(line.standing.open_rows)
    elif line.state in ("running", "begun") and line.history.total:
        progress = i18n.plain(f"{line.history.done}/{line.history.total}")
    else:
        progress = i18n.duration(line.seconds)
    if progress.en == i18n.UNKNOWN:
        return kind
    return Text(f"{kind.en} · {progress.en}", f"{kind.zh} · {progress.zh}")


# ---------------------------------------------------------------- one stage


@dataclass(frozen=True)
class Panel:
    """One chart of a stage's metrics: `Panel(_W["accuracy"], ("accuracy",), "share")`.

    `columns` are the names of the metrics drawn in it. `scale` is `share` (0 to 1, shown in percent), `log`
    or `plain`.
    """

    title: Text
    columns: tuple[str, ...]
    scale: str = "plain"


_W = i18n.W
PANELS = (
    Panel(_W["accuracy"], ("accuracy", "held_out_accuracy"), "share"),
    Panel(_W["length"], ("length",)),
    Panel(Text("Loss", "损失"), ("loss", "loss_ahead", "loss_balance")),
    Panel(_W["language_consistency"], ("language_consistency",), "share"),
    Panel(_W["entropy"], ("entropy",)),
    Panel(_W["gap"], ("gap",), "log"),
    Panel(_W["attempts"], ("attempts",)),
    Panel(_W["persist"], ("persist",), "share"),
    Panel(
        Text("Groups that teach, responses cut off", "有信息的组，被截断的回答"),
        ("informative", "truncated"),
        "share",
    ),
    Panel(Text("Norm of the gradient", "梯度范数"), ("gradient_norm",)),
    Panel(Text("Busiest expert, of the mean", "最忙专家与平均之比"), ("expert_load",)),
    Panel(Text("Entropy of the router", "路由器的熵"), ("router_entropy",)),
    Panel(Text("Rows kept", "留下的行"), ("kept",)),
)


def panels(line: Line) -> list[Panel]:
    """Return the charts of a stage: first its reward and the reward's parts, then the metrics in `PANELS`."""
    parts = line.rewards()
    if not parts:
        return list(PANELS)
    return [Panel(Text("Reward and its parts", "奖励及其各部分"), ("reward", *parts)), *PANELS]


def rivals(run: RunState, line: Line) -> list[str]:
    """Return the names of the finished evaluations that this evaluation can be compared with. Evaluations of
    models that the evaluated model was trained from come first. Return [] for other kinds of stages."""
    if line.kind != "evaluate" or line.state != "done":
        return []
    others = []
    for stage in run.stages:
        if stage.kind == "evaluate" and stage.state == "done" and stage.name != line.name:
            others.append(stage.name)
    ancestors = _ancestors(run, line.standing.inputs[0])
    return sorted(others, key=lambda name: name.split("/")[-1] not in ancestors)


def _ancestors(run: RunState, model: str) -> list[str]:
    """Return the names of the stages whose weights the model `model` was trained from, the nearest first."""
    ancestors: list[str] = []
    while True:
        stage = run.stage(model)
        model = getattr(stage.stage, "model", None) if stage else None
        if not model or model in ancestors:
            return ancestors
        ancestors.append(model)


def flipped(run: RunState, line: Line, against: str = "") -> tuple[str, Flips, Text] | None:
    """Find the problems that changed from wrong to right or the reverse, between two evaluations or between
    the steps of one stage.

    Return (name of the other evaluation, the changes, a sentence about them); the name is "" within one
    stage. `against` chooses the other evaluation from those that `rivals` returns. Return None if there is
    nothing to compare.
    """
    others = rivals(run, line)
    if others:
        other = against if against in others else others[0]
        between = flips.between(run.stage(other).folder, line.standing.folder)
        return other, between, sentences.flipped(other, line.name, between)
    if not line.history.shown:
        return None
    within = flips.within(line.history.shown)
    return ("", within, sentences.learned(within)) if within.asked else None


def responses(line: Line, step: int | None) -> dict[str, Any] | None:
    """Return the response groups logged at the step nearest to `step` (by default the last one), with the
    numbers of the first, last, previous and next logged steps. Return None if none are logged."""
    steps = sorted({group.step for group in line.history.shown})
    if not steps:
        return None
    place = len(steps) - 1
    if step is not None:
        place = min(range(len(steps)), key=lambda i: abs(steps[i] - step))
    return {
        "step": steps[place],
        "groups": line.history.responses(steps[place]),
        "first": steps[0],
        "last": steps[-1],
        "count": len(steps),
        "before": steps[place - 1] if place else None,
        "after": steps[place + 1] if place + 1 < len(steps) else None,
    }


def previewed(run: RunState, line: Line) -> dict[str, Any] | None:
    """Return the preview that was made when the stage began, with its counts and remedies as sentences under
    `said`; None if there is none."""
    found = preview.read(run.folder, line.name)
    if not found:
        return None
    return {**found, "said": [sentences_of.summary(found), *sentences_of.remedies(found)]}


def samples(line: Line) -> list[dict[str, Any]]:
    """Return an evaluation's first response to each problem; [] for other stages."""
    from ..report.loaded_run import samples_of

    folder = line.standing.folder
    if line.kind != "evaluate" or not folder or not (folder / EVALUATION).exists():
        return []
    return list(samples_of(folder).values())
