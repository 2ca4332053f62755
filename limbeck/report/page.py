"""The report's page: picks charts, tables and thoughts from a run, and hands them to the template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from . import charts, comparison, graph_drawing, i18n, summary
from .i18n import Text, W
from .loaded_run import MODES, Run, StageView

_FOLDER = Path(__file__).parent
_RETRY = re.compile(r"(?=\bwait\b)|(?=等(?![于式号]))", re.IGNORECASE)
_TAG = re.compile(r"(</?(?:think|answer)>)")
_HALF = len("<think></think><answer></answer>")


def render(run: Run, told: dict[str, Any]) -> str:
    """The whole page as one string; every text of a model or a recipe is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["thought"] = thought
    environment.globals.update(W=W, words=i18n)
    return environment.get_template("report.html.jinja").render(
        run=run,
        told=told,
        css=Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        recipe=yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        opening=summary.opening(run),
        figures=_figures(run),
        accuracy=_accuracy_chart(run),
        learning=_learning(run),
        thoughts=_thoughts(run),
        unsolved=_unsolved(run),
        control=_control(run),
        languages=_languages(run),
        models=_models(run),
        others=[(source, _models(run, source)) for source in run.sources[1:]],
        distilled=_distilled(run),
        compared=_compared(run),
        desk=summary.desk(run),
        drawn=[stage for stage in run.of_kind("sample") if "sampled" in stage.notes],
        more=_more_curves(run),
        graph=_graph(run),
        costs=_costs(run, told),
        forecast=told["forecast"],
        not_shown=summary.not_shown(run),
        alarms=list(run.alarms()),
        versions=sorted({v for s in run.stages if (v := s.manifest.get("code_version"))}),
        licences=sorted({str(licence) for s in run.stages for licence in s.manifest.get("licences") or []}),
    )


def thought(text: str) -> Markup:
    """A response with its tags set back and each new attempt on its own line; not a character is changed."""
    return Markup("").join(
        Markup('<span class="line">{}</span>').format(Markup("").join(map(_set_back, _TAG.split(line))))
        for line in _RETRY.split(text)
        if line
    )


def _set_back(part: str) -> Markup:
    return Markup('<span class="tag">{}</span>').format(part) if _TAG.fullmatch(part) else escape(part)


# ---------------------------------------------------------------- accuracy


def _figures(run: Run) -> list[tuple[str, Any]]:
    """The four numbers at the top."""
    found = [
        (run.cast.get(role, ""), run.accuracy(run.role(role))) for role in ("base", "zero", "r1", "small")
    ]
    return [(name, interval) for name, interval in found if interval]


def _dots(run: Run, models: list[str]) -> Markup | None:
    rows = []
    for model in models:
        found = [(run.accuracy(model, mode), tone) for mode, tone in (("t1", "one"), ("greedy", "two"))]
        points = [(i.mean, i.low, i.high, tone) for i, tone in found if i]
        if points:
            rows.append(charts.Dots(model, points))
    return charts.dots(rows) if rows else None


def _accuracy_chart(run: Run) -> Markup | None:
    """The story's models where there is a story, else all; controls and foils have their own charts."""
    told = [
        run.cast[role] for role in ("base", "zero", "dev1", "dev2", "dev3", "r1", "small") if role in run.cast
    ]
    return _dots(run, told or list(run.evaluations))


def _models(run: Run, source: str | None = None) -> dict[str, Any]:
    """The table of all models: only the columns that some model fills."""
    names = [name for name in run.evaluations if run.modes(name, source)]
    modes = [mode for mode in MODES if any(run.accuracy(name, mode, source) for name in names)]
    measures = (
        []
        if source
        else [
            (W["length_short"], "length", i18n.number),
            (W["attempts_short"], "attempts", i18n.number),
            (W["persist_short"], "persist", i18n.percent),
            (W["language_short"], "language_consistency", i18n.percent),
        ]
    )
    measures = [m for m in measures if any(run.measure(name, m[1]) is not None for name in names)]
    return {
        "modes": [i18n.COLUMNS[mode] for mode in modes],
        "measures": [title for title, _, _ in measures],
        "rows": [
            (
                name,
                [run.accuracy(name, mode, source) for mode in modes],
                [write(run.measure(name, measure)) for _, measure, write in measures],
                i18n.size(run.parameters(name)),
            )
            for name in names
        ],
    }


# ---------------------------------------------------------------- sections of the story


def _learning(run: Run) -> dict[str, Any] | None:
    stage = run.stage(run.cast.get("zero")) or next(iter(run.of_kind("rl")), None)
    if stage is None or not stage.metrics:
        return None
    wanted = [("accuracy", True), ("length", False), ("attempts", False), ("persist", True)]
    small = [(W[key], chart) for key, percent in wanted if (chart := _curve([stage], key, percent=percent))]
    persists = any(title == W["persist"] for title, _ in small)
    return {
        "name": stage.name,
        "title": W["aha"] if persists and stage.name == run.cast.get("zero") else W["learning"],
        "said": summary.persistence(run),
        "charts": small,
    }


def _curve(stages: list[StageView], key: str, percent: bool = False, log: bool = False) -> Markup | None:
    lines = []
    for stage in stages:
        x, y = stage.column(key)
        if x and any(y):
            lines.append(charts.Line(stage.name, x, y, charts.HUES[len(lines) % len(charts.HUES)]))
    return charts.curves(lines, percent, log) if lines else None


def _more_curves(run: Run) -> list[tuple[Text, Markup]]:
    stages = run.of_kind("rl", "distill")
    wanted = [
        ("reward", stages, False, False),
        ("entropy", stages, False, False),
        ("language_consistency", stages, True, False),
        ("length", stages, False, False),
        ("gap", stages, False, True),
        ("loss", run.of_kind("pretrain", "sft", "dpo", "distill"), False, False),
    ]
    drawn = [(W[key], _curve(of, key, percent, log)) for key, of, percent, log in wanted]
    return [(title, chart) for title, chart in drawn if chart]


def _thoughts(run: Run) -> list[list[tuple[str, dict[str, Any]]]]:
    """For each language, a problem that base fails and zero solves after a retry or two."""
    base, zero = run.samples("base"), run.samples("zero")
    turned = [zero[p] for p in zero if p in base and zero[p]["correct"] and not base[p]["correct"]]
    turned.sort(key=lambda row: _readability(row, base[row["problem"]]))
    chosen = [next((row for row in turned if row["language"] == tongue), None) for tongue in ("en", "zh")]
    if not any(chosen):
        chosen = turned[:1]
    return [_side_by_side(run, row["problem"]) for row in chosen if row]


def _readability(row: dict[str, Any], before: dict[str, Any]) -> tuple[bool, int, int]:
    """Two retries show the habit and still fit the eye; a base that said next to nothing shows little."""
    retries = len(_RETRY.findall(row["text"]))
    return (len(before["text"]) <= _HALF, abs(retries - 2) + 3 * (retries == 0), row["length"])


def _side_by_side(run: Run, problem: str) -> list[tuple[str, dict[str, Any]]]:
    shown = [(run.cast.get(role, ""), run.samples(role).get(problem)) for role in ("base", "zero", "r1")]
    return [(name, row) for name, row in shown if row]


def _unsolved(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """The first problem that zero gets wrong: one that nobody picked."""
    failed = next((row for row in run.samples("zero").values() if not row["correct"]), None)
    return _side_by_side(run, failed["problem"]) if failed else []


def _control(run: Run) -> dict[str, Any] | None:
    if not all(run.accuracy(run.role(role)) for role in ("base", "control", "zero")):
        return None
    return {
        "chart": _dots(run, [run.cast[role] for role in ("base", "control", "zero")]),
        "said": summary.control(run),
    }


def _languages(run: Run) -> dict[str, Any] | None:
    roles = [role for role in ("base", "zero", "dev1", "dev2", "dev3", "r1") if role in run.cast]
    shares = [
        (run.cast[role], share)
        for role in roles
        if (share := run.measure(run.role(role), "language_consistency")) is not None
    ]
    if len(shares) < 2:
        return None
    names, values = zip(*shares, strict=True)
    return {"chart": charts.ladder(names, values), "said": summary.language(run)}


def _distilled(run: Run) -> dict[str, Any] | None:
    roles = [r for r in ("small_base", "small_answers", "small_rl", "small") if run.accuracy(run.role(r))]
    if "small" not in roles or len(roles) < 2:
        return None
    rows = [
        (
            run.cast[r],
            W[r],
            i18n.scientific(run.spent(run.cast[r], "flops")),
            i18n.scientific(_rows_flops(run, run.cast[r])),
            i18n.duration(run.spent(run.cast[r], "seconds")),
        )
        for r in roles
    ]
    return {
        "chart": _dots(run, [run.cast[r] for r in roles]),
        "said": summary.distillation(run),
        "rows": rows,
    }


def _rows_flops(run: Run, model: str) -> float | None:
    """What sampling the rows of a model's last training cost, where rows were sampled for it."""
    stage = run.stage(model)
    above = [run.stage(name) for name in stage.inputs] if stage else []
    above += [run.stage(name) for rows in above if rows and rows.kind == "curate" for name in rows.inputs]
    spent = [s.manifest.get("flops") for s in above if s and s.kind == "sample"]
    return sum(f for f in spent if f) or None


# ---------------------------------------------------------------- the run as a whole


def _compared(run: Run) -> dict[str, Any] | None:
    """Ways of pretraining side by side: every run's loss against its compute, in units of 10^12."""
    ways, told = comparison.curves(run), comparison.compared(run)
    if told is None:
        return None
    lines = [
        charts.Line(way.name, way.flops / 1e12, losses, charts.HUES[i % len(charts.HUES)])
        for i, way in enumerate(ways)
        for losses in way.losses
    ]
    return {"chart": charts.curves(lines), "said": summary.compared(told), "ways": told["ways"]}


def _graph(run: Run) -> Markup | None:
    family = dict.fromkeys(("load", "pretrain", "rl", "sft", "dpo", "distill"), "model")
    boxes = [
        graph_drawing.Box(s.name, _caption(s), s.inputs, family.get(s.kind, "rows"))
        for s in run.stages
        if s.kind not in ("evaluate", "report")
    ]
    return graph_drawing.draw(boxes) if boxes else None


def _caption(stage: StageView) -> Text:
    time = i18n.duration(stage.manifest.get("seconds"))
    kind = i18n.KINDS.get(stage.kind, i18n.plain(stage.kind))
    return kind if time.en == i18n.UNKNOWN else Text(f"{kind.en} · {time.en}", f"{kind.zh} · {time.zh}")


def _costs(run: Run, told: dict[str, Any]) -> list[tuple[Text, Text]]:
    joules, cost = told["joules"], told["cost"]
    currency = run.summary.get("currency", "")
    return [
        (W["wall"], i18n.duration(told["seconds"])),
        (W["cpu"], i18n.duration(told["cpu_seconds"])),
        (W["memory"], i18n.plain(i18n.gibibytes(told["peak_memory_bytes"]))),
        (W["tokens"], i18n.plain(i18n.count(told["tokens"]))),
        (W["flops"], i18n.plain(i18n.scientific(told["flops"]))),
        (W["energy"], W["unreadable"] if joules is None else i18n.plain(f"{joules / 3600:.2f} Wh")),
        (W["money"], W["unpriced"] if cost is None else i18n.plain(f"{cost:.3g} {currency}".strip())),
    ]
