"""The report's page: chooses from a run the charts, tables and example responses that the template shows.

base, zero, control, r1, small and so on are roles of models, explained in `loaded_run`. A "section" function
returns the template's variables for one section of the page, or None if the page leaves that section out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup, escape

from ..eval.statistics import Interval
from ..run_log import ROLLOUTS, read
from ..train.learning_signal import UNTAUGHT
from . import charts, comparison, graph_drawing, i18n, preview, sentences, summary
from .i18n import Text, W
from .loaded_run import MODES, Run, StageView
from .suite_table import suite_rows

_FOLDER = Path(__file__).parent
_RETRY = re.compile(r"(?=\bwait\b)|(?=等(?![于式号]))", re.IGNORECASE)
_TAG = re.compile(r"(</?(?:think|answer)>)")
_SHORT_RESPONSE = len("<think></think><answer></answer>")  # characters of a response without text
_MEASURES = (
    (W["length_short"], "length", i18n.number),
    (W["thought_short"], "thought_length", i18n.number),
    (W["attempts_short"], "attempts", i18n.number),
    (W["persist_short"], "persist", i18n.percent),
    (W["language_short"], "language_consistency", i18n.percent),
)
_MODEL_KINDS = ("load", "pretrain", "rl", "sft", "dpo", "distill")  # stages whose output is a model

Response = tuple[str, dict[str, Any]]  # a model's name and its row of samples


def render(run: Run, numbers: dict[str, Any]) -> str:
    """Return the whole page as HTML. `numbers` is the content of `report.json`.

    Every text that comes from a model or a recipe is escaped.
    """
    environment = page_environment()
    environment.filters["thought"] = format_response
    template = environment.get_template("report.html.jinja")
    css = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return template.render(
        run=run,
        told=numbers,
        css=Markup(css),
        **_results(run),
        **_sections(run),
        **_record(run, numbers),
    )


def page_environment() -> jinja2.Environment:
    """Return the environment of the pages' templates, which have the words of both languages."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(W=W, words=i18n)
    return environment


def _results(run: Run) -> dict[str, Any]:
    """Return the template's variables for the accuracies and the example responses."""
    return {
        "opening": summary.opening(run),
        "figures": _figures(run),
        "accuracy": _accuracy_chart(run),
        "models": _models(run),
        "others": [(source, _models(run, source)) for source in run.sources[1:]],
        "suites": suite_rows(run),
        "thoughts": _thoughts(run),
        "unsolved": _unsolved(run),
    }


def _sections(run: Run) -> dict[str, Any]:
    """Return the template's variables for the sections about single stages of the recipe."""
    sampled = [stage for stage in run.of_kind("sample") if "sampled" in stage.notes]
    return {
        "learning": _learning(run),
        "control": _control(run),
        "languages": _languages(run),
        "distilled": _distillation(run),
        "compared": _comparison(run),
        "desk": summary.curation(run),
        "drawn": sampled,
        "more": _more_curves(run),
    }


def _record(run: Run, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the template's variables for the run as a whole: graph, costs, forecast, limits, alarms,
    versions, licences, recipe.

    `numbers` is the content of `report.json`.
    """
    versions = {stage.manifest.get("code_version") for stage in run.stages}
    licences: set[str] = set()
    continued: list[Text] = []
    for stage in run.stages:
        continued += sentences.continued(stage.name, stage.manifest.get("continued"))
        licences.update(map(str, stage.manifest.get("licences") or []))
    return {
        "graph": _graph(run),
        "costs": _costs(run, numbers),
        "continued": continued,
        "forecast": numbers["forecast"],
        "not_shown": summary.not_shown(run),
        "alarms": _alarms(run),
        "versions": sorted(version for version in versions if version),
        "licences": sorted(licences),
        "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
    }


def _alarms(run: Run) -> list[tuple[str, Text, int, int, list[Text]]]:
    """Return every alarm as (stage, message, first step, number of times, quotations): one response of the
    stage where rewards taught nothing.
    """
    rows = []
    for stage, message, first, times in run.alarms():
        quoted = []
        if message.startswith(UNTAUGHT):
            logged = next(read(run.stage(stage).folder / ROLLOUTS), None)
            quoted = [sentences.quote(logged)] if logged else []
        rows.append((stage, sentences.alarm(message), first, times, quoted))
    return rows


def format_response(text: str) -> Markup:
    """Return a model's response as HTML: think and answer tags are dimmed, and each new attempt (a "wait")
    starts a line.

    The characters of the response are unchanged.
    """
    lines = Markup("")
    for line in _RETRY.split(text):
        if line:
            parts = Markup("").join(map(_dim_tag, _TAG.split(line)))
            lines += Markup('<span class="line">{}</span>').format(parts)
    return lines


def _dim_tag(part: str) -> Markup:
    """Return a think or answer tag in a dimmed span; any other text is only escaped."""
    if _TAG.fullmatch(part):
        return Markup('<span class="tag">{}</span>').format(part)
    return escape(part)


# ---------------------------------------------------------------- accuracy


def _figures(run: Run) -> list[tuple[str, Interval]]:
    """Return the accuracies at the top of the page, with the models' names: base, zero, r1 and small,
    where evaluated.
    """
    figures = []
    for role in ("base", "zero", "r1", "small"):
        interval = run.accuracy(run.role(role))
        if interval:
            figures.append((run.cast.get(role, ""), interval))
    return figures


def _dots(run: Run, models: list[str]) -> Markup | None:
    """Return the dot plot of the models' accuracies at temperature 1 and in greedy decoding, or None if
    none was measured.
    """
    rows = []
    for model in models:
        points = []
        for mode, tone in (("t1", "one"), ("greedy", "two")):
            interval = run.accuracy(model, mode)
            if interval:
                points.append((interval.mean, interval.low, interval.high, tone))
        if points:
            rows.append(charts.Dots(model, points))
    return charts.dots(rows) if rows else None


def _accuracy_chart(run: Run) -> Markup | None:
    """Return the dot plot of the accuracies of the models with a main role, or of all models if none has
    one.

    The control and the other small models are left out, as their sections have charts of their own.
    """
    roles = ("base", "zero", "dev1", "dev2", "dev3", "r1", "small")
    main = [run.cast[role] for role in roles if role in run.cast]
    return _dots(run, main or list(run.evaluations))


def _models(run: Run, source: str | None = None) -> dict[str, Any]:
    """Return the table of all models evaluated on `source` (None for the headline problems), with the
    columns that at least one model has values for.
    """
    names = [name for name in run.evaluations if run.modes(name, source)]
    modes = []
    for mode in MODES:
        if any(run.accuracy(name, mode, source) for name in names):
            modes.append(mode)
    measures = [] if source else _available_measures(run, names)
    rows = []
    for name in names:
        accuracies = [run.accuracy(name, mode, source) for mode in modes]
        values = [write(run.measure(name, measure)) for _, measure, write in measures]
        rows.append((name, accuracies, values, i18n.size(run.parameters(name))))
    return {
        "modes": [i18n.COLUMNS[mode] for mode in modes],
        "measures": [title for title, _, _ in measures],
        "rows": rows,
    }


def _available_measures(run: Run, names: list[str]) -> list[tuple[Text, str, Any]]:
    """Return the entries of `_MEASURES` (title, measure, format) that at least one of the models in
    `names` has a value for.
    """
    measured = []
    for column in _MEASURES:
        _, measure, _ = column
        if any(run.measure(name, measure) is not None for name in names):
            measured.append(column)
    return measured


# ---------------------------------------------------------------- sections of the recipe


def _learning(run: Run) -> dict[str, Any] | None:
    """Return the section with the learning curves of the model `zero`, or of the first RL stage if no
    model has that role.

    Return None without metrics.
    """
    stage = run.stage(run.cast.get("zero")) or next(iter(run.of_kind("rl")), None)
    if stage is None or not stage.metrics:
        return None
    drawn = []
    for key, percent in (("accuracy", True), ("length", False), ("attempts", False), ("persist", True)):
        chart = _curve([stage], key, percent=percent)
        if chart:
            drawn.append((W[key], chart))
    persists = any(title == W["persist"] for title, _ in drawn)
    is_zero = stage.name == run.cast.get("zero")
    return {
        "name": stage.name,
        "title": W["aha"] if persists and is_zero else W["learning"],
        "said": summary.persistence(run),
        "preview": _preview(run, stage.name),
        "charts": drawn,
    }


def _preview(run: Run, stage: str) -> list[Text]:
    """Return what the preview of a stage counted before it began, as sentences; [] if there was none."""
    found = (run.summary.get("previews") or {}).get(stage)
    return [W["preview"], preview.summary(found), *preview.remedies(found)] if found else []


def _curve(stages: list[StageView], key: str, percent: bool = False, log: bool = False) -> Markup | None:
    """Return the chart of the metric `key`, with one curve for each stage.

    Stages where it is missing or always 0 are left out; return None if that leaves none. With `percent` the
    metric is a share, with `log` the y axis is logarithmic.
    """
    lines = []
    for stage in stages:
        x, y = stage.column(key)
        if x and any(y):
            tone = charts.HUES[len(lines) % len(charts.HUES)]
            lines.append(charts.Line(stage.name, x, y, tone))
    return charts.curves(lines, percent, log) if lines else None


def _more_curves(run: Run) -> list[tuple[Text, Markup]]:
    """Return the titles and charts of further metrics, each over all stages that have the metric."""
    rl = run.of_kind("rl", "distill")
    other = run.of_kind("pretrain", "sft", "dpo", "distill")
    drawn = [
        (W["reward"], _curve(rl, "reward")),
        (W["entropy"], _curve(rl, "entropy")),
        (W["language_consistency"], _curve(rl, "language_consistency", percent=True)),
        (W["length"], _curve(rl, "length")),
        (W["gap"], _curve(rl, "gap", log=True)),
        (W["loss"], _curve(other, "loss")),
    ]
    return [(title, chart) for title, chart in drawn if chart]


def _thoughts(run: Run) -> list[list[Response]]:
    """Return, for each language, the responses to one problem that base gets wrong and zero solves,
    preferably after about two retries.

    If no solved problem is in either language, take the best one of any.
    """
    base = run.samples("base")
    zero = run.samples("zero")
    solved = []
    for problem, row in zero.items():
        if problem in base and row["correct"] and not base[problem]["correct"]:
            solved.append(row)
    solved.sort(key=lambda row: _readability(row, base[row["problem"]]))
    chosen = []
    for language in ("en", "zh"):
        chosen += [row for row in solved if row["language"] == language][:1]
    if not chosen:
        chosen = solved[:1]
    return [_side_by_side(run, row["problem"]) for row in chosen]


def _readability(row: dict[str, Any], before: dict[str, Any]) -> tuple[bool, int, int]:
    """Return the sort key of zero's response `row` as an example; the smallest key is the best example.

    Examples are best with two retries and when short. Those for which base's response, `before`, is nearly
    empty come last.
    """
    retries = len(_RETRY.findall(row["text"]))
    is_empty = len(before["text"]) <= _SHORT_RESPONSE
    distance = abs(retries - 2) + 3 * (retries == 0)
    return (is_empty, distance, row["length"])


def _side_by_side(run: Run, problem: str) -> list[Response]:
    """Return the responses of base, zero and r1 to one problem, with the models' names; models without one
    are left out.
    """
    responses = []
    for role in ("base", "zero", "r1"):
        row = run.samples(role).get(problem)
        if row:
            responses.append((run.cast.get(role, ""), row))
    return responses


def _unsolved(run: Run) -> list[Response]:
    """Return the responses to the first problem that zero gets wrong, an empty list if there is none.

    It is always the first, so that the example is not hand-picked.
    """
    for row in run.samples("zero").values():
        if not row["correct"]:
            return _side_by_side(run, row["problem"])
    return []


def _control(run: Run) -> dict[str, Any] | None:
    """Return the section on base with forced retries.

    Return None unless base, control and zero were all evaluated.
    """
    roles = ("base", "control", "zero")
    if not all(run.accuracy(run.role(role)) for role in roles):
        return None
    models = [run.cast[role] for role in roles]
    return {"chart": _dots(run, models), "said": summary.control(run)}


def _languages(run: Run) -> dict[str, Any] | None:
    """Return the section on language consistency (the share of words in the question's language).

    Return None if fewer than two models have it.
    """
    names = []
    shares = []
    for role in ("base", "zero", "dev1", "dev2", "dev3", "r1"):
        if role not in run.cast:
            continue
        share = run.measure(run.role(role), "language_consistency")
        if share is not None:
            names.append(run.cast[role])
            shares.append(share)
    if len(shares) < 2:
        return None
    return {"chart": charts.ladder(names, shares), "said": summary.language(run)}


def _distillation(run: Run) -> dict[str, Any] | None:
    """Return the section on the small models.

    Return None unless `small` and another small model were evaluated.
    """
    candidates = ("small_base", "small_answers", "small_rl", "small")
    roles = [role for role in candidates if run.accuracy(run.role(role))]
    if "small" not in roles or len(roles) < 2:
        return None
    models = [run.cast[role] for role in roles]
    rows = []
    for role, model in zip(roles, models, strict=True):
        training = i18n.scientific(run.spent(model, "flops"))
        sampling = i18n.scientific(_rows_flops(run, model))
        rows.append((model, W[role], training, sampling, i18n.duration(run.spent(model, "seconds"))))
    return {"chart": _dots(run, models), "said": summary.distillation(run), "rows": rows}


def _rows_flops(run: Run, model: str) -> float | None:
    """Return the FLOPs of sampling the training rows that the stage of `model` reads, directly or through
    a curate stage.

    Return None if no rows were sampled for it.
    """
    stage = run.stage(model)
    inputs = _input_stages(run, stage) if stage else []
    curated = [source for source in inputs if source.kind == "curate"]
    for source in curated:
        inputs += _input_stages(run, source)
    flops = [source.manifest.get("flops") for source in inputs if source.kind == "sample"]
    return sum(filter(None, flops)) or None


def _input_stages(run: Run, stage: StageView) -> list[StageView]:
    """Return the stages that `stage` reads, without those that are not in the run."""
    inputs = [run.stage(name) for name in stage.inputs]
    return [source for source in inputs if source]


# ---------------------------------------------------------------- the run as a whole


def _comparison(run: Run) -> dict[str, Any] | None:
    """Return the section that compares ways of pretraining: the loss of every run against its compute.
    Return None if there are fewer than two ways.

    The chart's compute is in units of 10^12 FLOPs.
    """
    compared = comparison.compare(run)
    if compared is None:
        return None
    lines = []
    for i, way in enumerate(comparison.curves(run)):
        tone = charts.HUES[i % len(charts.HUES)]
        for losses in way.losses:
            lines.append(charts.Line(way.name, way.flops / 1e12, losses, tone))
    return {"chart": charts.curves(lines), "said": summary.comparison(compared), "ways": compared["ways"]}


def _graph(run: Run) -> Markup | None:
    """Return the drawing of the run's stages, without evaluations and reports.

    Return None if no stage is left.
    """
    boxes = []
    for stage in run.stages:
        if stage.kind not in ("evaluate", "report"):
            family = "model" if stage.kind in _MODEL_KINDS else "rows"
            boxes.append(graph_drawing.Box(stage.name, _caption(stage), stage.inputs, family))
    return graph_drawing.draw(boxes) if boxes else None


def _caption(stage: StageView) -> Text:
    """Return the caption of a stage in the drawing: its kind and, if known, its duration."""
    kind = i18n.KINDS.get(stage.kind, i18n.plain(stage.kind))
    time = i18n.duration(stage.manifest.get("seconds"))
    if time.en == i18n.UNKNOWN:
        return kind
    return i18n.plain("{} · {}").format(kind, time)


def _costs(run: Run, numbers: dict[str, Any]) -> list[tuple[Text, Text]]:
    """Return the list of the run's costs as pairs of a name and an amount.

    `numbers` is the content of `report.json`.
    """
    memory = i18n.gibibytes(numbers["peak_memory_bytes"])
    return [
        (W["wall"], i18n.duration(numbers["seconds"])),
        (W["cpu"], i18n.duration(numbers["cpu_seconds"])),
        (W["memory"], i18n.plain(memory)),
        (W["tokens"], i18n.plain(i18n.count(numbers["tokens"]))),
        (W["flops"], i18n.plain(i18n.scientific(numbers["flops"]))),
        (W["energy"], _energy(numbers["joules"])),
        (W["money"], _price(numbers["cost"], run.summary.get("currency", ""))),
    ]


def _energy(joules: float | None) -> Text:
    """Return the energy in watt-hours; for None the words that it cannot be read on this machine."""
    if joules is None:
        return W["unreadable"]
    return i18n.plain(f"{joules / 3600:.2f} Wh")


def _price(cost: float | None, currency: str) -> Text:
    """Return the cost with its currency; for None the words that no price was given."""
    if cost is None:
        return W["unpriced"]
    return i18n.plain(f"{cost:.3g} {currency}".strip())
