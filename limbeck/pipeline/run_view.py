"""A run as somebody who looks at it wants it told: how far each stage is, in numbers, in a drawing and in sentences."""

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
from .run_state import Overview, Standing

FAMILY = dict.fromkeys(("load", "pretrain", "rl", "sft", "dpo", "distill", "reward"), "model")
LEFT_OUT = ("evaluate", "report")  # of the drawing: one a model, and one at the end of everything


@lru_cache(maxsize=256)
def _history(folder: Path) -> History:
    return History(folder)


@dataclass(frozen=True)
class Line:
    """One stage now: `Line(standing, "running", history, {"seconds": 76.0, "low": 60.0, "high": 95.0})`.

    `state` is done, running, begun (and nobody is at work), asks or waits. `history` has been read up to now.
    """

    standing: Standing
    state: str
    history: History
    foreseen: dict[str, float] | None = None

    @property
    def name(self) -> str:
        return self.standing.name

    @property
    def kind(self) -> str:
        return self.standing.kind

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1."""
        return (
            1.0
            if self.state == "done"
            else self.history.done / self.history.total
            if self.history.total
            else 0.0
        )

    @property
    def seconds(self) -> float | None:
        """What it took, or has taken so far."""
        return self.standing.manifest.get("seconds") or self.history.seconds or None

    @property
    def said(self) -> list[Text]:
        """The whole stage in sentences."""
        if self.state == "asks":
            return [
                Text("{} waits for people: {} rows to review.", "{} 在等人审阅：还有 {} 行。").format(
                    self.name, self.standing.open_rows
                )
            ]
        said = [sentences.progress(self.name, self.kind, self.state, self.history, self.standing.manifest)]
        said += [*sentences.curves(self.kind, self.history), *sentences.soundness(self.history)]
        if self.state == "done" and self.standing.manifest:
            said += sentences.outcome(self.standing.view)
        return [*said, *self._against_plan()]

    def _against_plan(self) -> list[Text]:
        return (
            [sentences.foreseen(self.seconds, self.foreseen, self.state == "done")]
            if self.foreseen and self.seconds
            else []
        )

    def rewards(self) -> list[str]:
        """The parts that its reward is made of."""
        stage = self.standing.stage
        return list(stage.rewards) if isinstance(stage, RL) else []


def lines(run: Overview, alive: bool) -> list[Line]:
    """All stages; `alive` says whether somebody is at work on the run."""
    return [line_of(run, standing, alive) for standing in run.stages]


def line_of(run: Overview, standing: Standing, alive: bool) -> Line:
    state = "running" if standing.state == "begun" and alive else standing.state
    history = _history(standing.folder).look() if standing.folder else History(Path())
    return Line(standing, state, history, run.foreseen.get(standing.name))


def narrate(run: Overview, stages: Sequence[Line]) -> list[Text]:
    """The run in a paragraph: how far it is, what it has shown, what it does now, and how the plan fared."""
    done = [line for line in stages if line.state == "done"]
    said = [Text("{} of {} stages are done.", "{1} 个阶段中已完成 {0} 个。").format(len(done), len(stages))]
    views = tuple(line.standing.view for line in done if line.kind != "report")
    said += (
        summary.opening(Reported(views, run.recipe.model_dump(mode="json"), {}))
        if any(v.kind == "evaluate" for v in views)
        else []
    )
    for line in stages:
        if line.state in ("running", "begun", "asks"):
            said += line.said if line.state == "running" else line.said[:1]
    return [*said, *_plan(stages)]


def _plan(stages: Sequence[Line]) -> list[Text]:
    """All finished stages that were foreseen, together."""
    over = [line for line in stages if line.foreseen and line.state == "done" and line.seconds]
    if len(over) < 2:
        return []
    told = {key: sum(line.foreseen[key] for line in over) for key in ("seconds", "low", "high")}
    return [sentences.foreseen(sum(line.seconds for line in over), told, True)]


def draw(stages: Sequence[Line], label: str, link: Callable[[str], str]) -> Markup:
    """The graph of the stages, each with its state, how far it is, and a way to its page."""
    boxes = [
        graph_drawing.Box(
            line.name,
            _caption(line),
            line.standing.inputs,
            FAMILY.get(line.kind, "rows"),
            link(line.name),
            line.state,
            0.0 if line.state == "done" else line.share,
        )
        for line in stages
        if line.kind not in LEFT_OUT
    ]
    return graph_drawing.draw(boxes, label) if boxes else Markup()


def _caption(line: Line) -> Text:
    kind = i18n.KINDS.get(line.kind, i18n.plain(line.kind))
    told = i18n.duration(line.seconds)
    if line.state == "asks":
        told = Text("{} rows", "{} 行").format(line.standing.open_rows)
    elif line.state in ("running", "begun") and line.history.total:
        told = i18n.plain(f"{line.history.done}/{line.history.total}")
    return kind if told.en == i18n.UNKNOWN else Text(f"{kind.en} · {told.en}", f"{kind.zh} · {told.zh}")


# ---------------------------------------------------------------- one stage


@dataclass(frozen=True)
class Panel:
    """One chart: `Panel(W["accuracy"], ("accuracy",), "share")`; `scale` is share (of 1, written in percent), log or plain."""

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
    Panel(Text("Groups that teach, responses cut off", "有信息的组，被截断的回答"), ("informative", "truncated"), "share"),
    Panel(Text("Norm of the gradient", "梯度范数"), ("gradient_norm",)),
    Panel(Text("Busiest expert, of the mean", "最忙专家与平均之比"), ("expert_load",)),
    Panel(Text("Entropy of the router", "路由器的熵"), ("router_entropy",)),
    Panel(Text("Rows kept", "留下的行"), ("kept",)),
)  # fmt: skip


def panels(line: Line) -> list[Panel]:
    """The charts of a stage: rewards and their parts first, then what is known by name; the rest is found by its page."""
    parts = line.rewards()
    return [
        *([Panel(Text("Reward and its parts", "奖励及其各部分"), ("reward", *parts))] if parts else []),
        *PANELS,
    ]


def rivals(run: Overview, line: Line) -> list[str]:
    """Evaluations that this one can be compared with, what it was made from first."""
    if line.kind != "evaluate" or line.state != "done":
        return []
    found = [
        one.name
        for one in run.stages
        if one.kind == "evaluate" and one.state == "done" and one.name != line.name
    ]
    return sorted(found, key=lambda name: name.split("/")[-1] not in _ancestors(run, line.standing.inputs[0]))


def _ancestors(run: Overview, model: str) -> list[str]:
    """The models that a model's weights were before, the last one first."""
    found: list[str] = []
    while (
        (stage := run.stage(model)) and (model := getattr(stage.stage, "model", None)) and model not in found
    ):
        found.append(model)
    return found


def flipped(run: Overview, line: Line, against: str = "") -> tuple[str, Flips, Text] | None:
    """Which problems flipped: between two evaluations, or between the steps of one stage. With what they are compared."""
    if others := rivals(run, line):
        other = against if against in others else others[0]
        found = flips.between(run.stage(other).folder, line.standing.folder)
        return other, found, sentences.flipped(other, line.name, found)
    if not line.history.shown:
        return None
    found = flips.within(line.history.shown)
    return ("", found, sentences.learned(found)) if found.asked else None


def responses(line: Line, step: int | None) -> dict[str, Any] | None:
    """The groups that were written down at a step, or at the nearest one; the last by default. With its neighbours."""
    steps = sorted({one.step for one in line.history.shown})
    if not steps:
        return None
    at = steps[-1] if step is None else min(steps, key=lambda known: abs(known - step))
    place = steps.index(at)
    return {
        "step": at,
        "groups": line.history.responses(at),
        "first": steps[0],
        "last": steps[-1],
        "count": len(steps),
        "before": steps[place - 1] if place else None,
        "after": steps[place + 1] if place + 1 < len(steps) else None,
    }


def samples(line: Line) -> list[dict[str, Any]]:
    """What an evaluation asked and heard: the first response to each problem."""
    from ..report.loaded_run import samples_of

    done = line.kind == "evaluate" and line.standing.folder and (line.standing.folder / EVALUATION).exists()
    return list(samples_of(line.standing.folder).values()) if done else []
