"""The view of a run for its readers: the progress of each stage in numbers, in a drawing and in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..config.recipe import RL
from ..report import flips, graph_drawing, i18n, sentences, summary
from ..report.flips import Flips
from ..report.history import History
from ..report.i18n import Text
from ..report.loaded_run import EVALUATION
from ..report.loaded_run import Run as Reported
from .run_state import RunState, StageState

FAMILY = dict.fromkeys(("load", "pretrain", "rl", "sft", "dpo", "distill", "reward"), "model")
LEFT_OUT = ("evaluate", "report")  # kinds that are not drawn: one a model, and one at the end of everything


@lru_cache(maxsize=256)
def _history(folder: Path) -> History:
    """The history of a stage's folder; each call of `look` reads on where the last one stopped."""
    return History(folder)


@dataclass(frozen=True)
class Line:
    """One stage at present:
    `Line(stage_state, "running", history, {"seconds": 76.0, "low": 60.0, "high": 95.0})`.

    `state` is done, running, begun (but no process is at work), asks or waits. `history` is read up to now;
    `foreseen` is the forecast, if one was made.
    """

    standing: StageState
    state: str
    history: History
    foreseen: dict[str, float] | None = None

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
        """The share of its steps that is done, 0 to 1."""
        if self.state == "done":
            return 1.0
        return self.history.done / self.history.total if self.history.total else 0.0

    @property
    def seconds(self) -> float | None:
        """The time that it took, or has taken so far."""
        return self.standing.manifest.get("seconds") or self.history.seconds or None

    @property
    def said(self) -> list[Text]:
        """The stage in sentences."""
        if self.state == "asks":
            text = Text("{} waits for people: {} rows to review.", "{} 在等人审阅：还有 {} 行。")
            return [text.format(self.name, self.standing.open_rows)]
        manifest = self.standing.manifest
        texts = [sentences.progress(self.name, self.kind, self.state, self.history, manifest)]
        texts += sentences.curves(self.kind, self.history)
        texts += sentences.soundness(self.history)
        if self.state == "done" and manifest:
            texts += sentences.outcome(self.standing.view)
        if self.foreseen and self.seconds:
            texts.append(sentences.foreseen(self.seconds, self.foreseen, self.state == "done"))
        return texts

    def rewards(self) -> list[str]:
        """The parts of its reward; none unless it is reinforcement."""
        stage = self.standing.stage
        return list(stage.rewards) if isinstance(stage, RL) else []


# ---------------------------------------------------------------- all stages


def lines(run: RunState, alive: bool) -> list[Line]:
    """All stages; `alive` if a process executes the run."""
    return [line_of(run, stage, alive) for stage in run.stages]


def line_of(run: RunState, standing: StageState, alive: bool) -> Line:
    """One stage of the run, with its history read up to now."""
    state = "running" if standing.state == "begun" and alive else standing.state
    history = _history(standing.folder).look() if standing.folder else History(Path())
    return Line(standing, state, history, run.foreseen.get(standing.name))


def narrate(run: RunState, stages: Sequence[Line]) -> list[Text]:
    """The run in a paragraph: stages done, results, stages at work, forecast beside the time taken."""
    done = [line for line in stages if line.state == "done"]
    text = Text("{} of {} stages are done.", "{1} 个阶段中已完成 {0} 个。")
    texts = [text.format(len(done), len(stages))]
    views = tuple(line.standing.view for line in done if line.kind != "report")
    if any(view.kind == "evaluate" for view in views):
        texts += summary.opening(Reported(views, run.recipe.model_dump(mode="json"), {}))
    for line in stages:
        if line.state == "running":
            texts += line.said
        elif line.state in ("begun", "asks"):
            texts += line.said[:1]
    return texts + _compare_forecast(stages)


def _compare_forecast(stages: Sequence[Line]) -> list[Text]:
    """The time of all finished stages that had a forecast beside its sum, if there are at least two."""
    finished = [line for line in stages if line.foreseen and line.state == "done" and line.seconds]
    if len(finished) < 2:
        return []
    forecast = {}
    for key in ("seconds", "low", "high"):
        forecast[key] = sum(line.foreseen[key] for line in finished)
    seconds = sum(line.seconds for line in finished)
    return [sentences.foreseen(seconds, forecast, True)]


def draw(stages: Sequence[Line], label: str, link: Callable[[str], str]) -> Markup:
    """The graph of the stages, each with its state, its progress, and a link to its page."""
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
    """The kind of a stage, and its rows to review, its steps, or its time."""
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
    """One chart: `Panel(W["accuracy"], ("accuracy",), "share")`.

    `scale` is share (in percent), log or plain.
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
    """The charts of a stage: its reward and the parts first, then the metrics that have a name."""
    parts = line.rewards()
    if not parts:
        return list(PANELS)
    return [Panel(Text("Reward and its parts", "奖励及其各部分"), ("reward", *parts)), *PANELS]


def rivals(run: RunState, line: Line) -> list[str]:
    """Evaluations to compare this one with, those of its model's ancestors first."""
    if line.kind != "evaluate" or line.state != "done":
        return []
    others = []
    for stage in run.stages:
        if stage.kind == "evaluate" and stage.state == "done" and stage.name != line.name:
            others.append(stage.name)
    ancestors = _ancestors(run, line.standing.inputs[0])
    return sorted(others, key=lambda name: name.split("/")[-1] not in ancestors)


def _ancestors(run: RunState, model: str) -> list[str]:
    """The models that a model's weights went through, the last one first."""
    ancestors: list[str] = []
    while True:
        stage = run.stage(model)
        model = getattr(stage.stage, "model", None) if stage else None
        if not model or model in ancestors:
            return ancestors
        ancestors.append(model)


def flipped(run: RunState, line: Line, against: str = "") -> tuple[str, Flips, Text] | None:
    """The problems that flipped between two evaluations, or between the steps of one stage: the other
    evaluation's name ("" within a stage), the flips, and a sentence. `against` chooses among the rivals."""
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
    """The groups recorded nearest to a step, by default the last, with the recorded steps around it."""
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


def samples(line: Line) -> list[dict[str, Any]]:
    """The first response of an evaluation to each problem."""
    from ..report.loaded_run import samples_of

    folder = line.standing.folder
    if line.kind != "evaluate" or not folder or not (folder / EVALUATION).exists():
        return []
    return list(samples_of(folder).values())
