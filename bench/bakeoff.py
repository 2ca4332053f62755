"""The bake-off over several seeds: every way of distilling and RL alone on one student, at the same FLOPs.

    python -m bench.bakeoff docs/results --seeds 0 1 2

Writes bakeoff.md and bakeoff.svg there. A run that is done already is read again and not repeated. A
difference from RL alone is called one where it stands on every seed, between intervals that take the two as
independent.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from limbeck.eval.statistics import Interval, difference

from . import seeds

RECIPE = Path(__file__).parent.parent / "limbeck" / "recipes" / "bakeoff.yaml"
ALONE, START, TEACHER = "alone", "small_base", "zero"
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantiles with n - 1 degrees of freedom


@dataclass(frozen=True)
class Way:
    """One method over the seeds: what it reached, and what it took, its rows and its teacher included."""

    name: str
    title: str
    accuracies: list[Interval]
    greedy: list[float]
    lengths: list[float | None]
    languages: list[float | None]
    flops: float
    teaching: float
    seconds: float
    tokens: float
    joules: float | None

    @property
    def mean(self) -> float:
        """The mean accuracy over seeds."""
        return statistics.fmean(interval.mean for interval in self.accuracies)

    @property
    def error(self) -> float:
        """Half the 95 % interval of the mean over seeds."""
        means = [interval.mean for interval in self.accuracies]
        return (
            STUDENT_T[len(means)] * statistics.stdev(means) / math.sqrt(len(means))
            if len(means) in STUDENT_T
            else math.nan
        )


def main() -> None:
    """Run the recipe with every seed and write the page and the chart."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    reports = [seeds.run(options.recipe, f"bakeoff-{seed}", seed, options.runs) for seed in options.seeds]
    ways = sorted(gathered(reports), key=lambda way: -way.mean)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "bakeoff.md").write_text(
        "\n".join(page(ways, reports, options.seeds)) + "\n", encoding="utf-8"
    )
    draw(ways, options.folder / "bakeoff.svg")


def gathered(reports: Sequence[dict]) -> Iterator[Way]:
    """Each way with its results over all seeds."""
    for name in reports[0]["models"]:
        models = [report["models"][name] for report in reports]
        stages = [_stage(report, name) for report in reports]
        yield _way(name, models, stages)


def _stage(report: dict, name: str) -> dict:
    """The stage of a report with a name."""
    return next(stage for stage in report["stages"] if stage["name"] == name)


def _way(name: str, models: Sequence[dict], stages: Sequence[dict]) -> Way:
    """One way from its model and its stage in each seed's report; FLOPs include its rows and its teacher."""
    data = [stage["notes"].get("data_flops", 0.0) for stage in stages]
    teacher = [stage["notes"].get("teacher_flops", 0.0) for stage in stages]
    training = [stage["flops"] for stage in stages]
    joules = [stage["joules"] for stage in stages]
    return Way(
        name,
        stages[0]["title"],
        accuracies=[Interval(**model["accuracy"]["t1"]) for model in models],
        greedy=[model["accuracy"]["greedy"]["mean"] for model in models],
        lengths=[model["length"] for model in models],
        languages=[model["language_consistency"] for model in models],
        flops=statistics.fmean(map(sum, zip(training, data, strict=True))),
        teaching=statistics.fmean(map(sum, zip(data, teacher, strict=True))),
        seconds=statistics.fmean(stage["seconds"] for stage in stages),
        tokens=statistics.fmean(stage["tokens"] for stage in stages),
        joules=None if None in joules else statistics.fmean(joules),
    )


def page(ways: Sequence[Way], reports: Sequence[dict], drawn: Sequence[int]) -> Iterator[str]:
    """The lines of the page, in Markdown."""
    alone = next(way for way in ways if way.name == ALONE)
    yield from _head(reports, drawn, alone.accuracies[0].n)
    yield from map(_row, ways)
    compared = [way for way in ways if way.name not in (START, TEACHER)]
    most = max(way.flops for way in compared)
    less = [f"`{way.name}`" for way in compared if way.flops < 0.9 * most]
    if less:
        names = ", ".join(less)
        yield f"\n{names} ended before the budget did: their recipe gives so few rows no more passes."
    yield "\n## Against RL alone\n"
    yield "| way | difference on each seed, with its 95 % interval | verdict |\n|---|---|---|"
    for way in compared:
        if way is not alone:
            yield _row_against(way, alone)


def _head(reports: Sequence[dict], drawn: Sequence[int], problems: int) -> Iterator[str]:
    """The page's title, its conditions, its chart, and the head of the table."""
    machine = reports[0]["machine"]
    times = ", ".join(f"{report['seconds']:.0f}" for report in reports)
    command = f"python -m bench.bakeoff docs/results --seeds {' '.join(map(str, drawn))}"
    yield "# The bake-off\n"
    yield f"`{command}` wrote this page. {machine['processor']},"
    yield f"{machine['cores']:g} cores; a run took {times} s. Every way has the same student and the same"
    yield (
        "FLOPs, in which all that its teacher and its rows took is counted; the teacher's own upbringing is "
        "not. Held-out problems,"
    )
    yield f"n = {problems} a seed at temperature 1.\n"
    yield "![accuracy against compute](bakeoff.svg)\n"
    yield (
        "| way | accuracy, T = 1, mean of seeds | each seed | greedy | length | one language | GFLOPs "
        "| of which rows and teacher | tokens | seconds | joules |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"


def _row(way: Way) -> str:
    """One way's row of the table."""
    cells = [
        f"`{way.name}`: {way.title}",
        f"{way.mean:.1%} ± {way.error:.1%}",
        ", ".join(f"{interval.mean:.1%}" for interval in way.accuracies),
        f"{statistics.fmean(way.greedy):.1%}",
        told(way.lengths, ".0f"),
        told(way.languages, ".3f"),
        f"{way.flops / 1e9:.0f}",
        f"{way.teaching / 1e9:.0f}",
        f"{way.tokens / 1e3:.0f}k",
        f"{way.seconds:.0f}",
        "not readable" if way.joules is None else f"{way.joules:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _row_against(way: Way, alone: Way) -> str:
    """One way's row of the comparison with RL alone."""
    pairs = zip(way.accuracies, alone.accuracies, strict=True)
    gaps = [difference(mine, theirs) for mine, theirs in pairs]
    shown = "; ".join(f"{gap:+.1%} ({low:+.1%} to {high:+.1%})" for gap, low, high in gaps)
    return f"| `{way.name}` | {shown} | {verdict(gaps)} |"


def told(values: Sequence[float | None], form: str) -> str:
    """The mean of what was measured: of a model that says nothing there is no language."""
    known = [value for value in values if value is not None]
    return format(statistics.fmean(known), form) if known else "–"


def verdict(gaps: Sequence[tuple[float, float, float]]) -> str:
    """A verdict on the differences from RL: (difference, low, high) of each seed."""
    if all(low > 0 for _, low, _ in gaps):
        return "better on every seed"
    if all(high < 0 for _, _, high in gaps):
        return "worse on every seed"
    return "not told apart on every seed"


def draw(ways: Sequence[Way], path: Path) -> None:
    """Accuracy against compute: a dot a way, its seeds' range, and the front that none surpasses."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained")
    best = -1.0
    front = []
    for way in sorted(ways, key=lambda way: way.flops):
        if way.name in (START, TEACHER):
            axis.axhline(100 * way.mean, color="#888", linewidth=0.8, linestyle=":")
            axis.text(
                0.01,
                100 * way.mean + 0.7,
                way.name,
                color="#666",
                fontsize=8,
                transform=axis.get_yaxis_transform(),
            )
            continue
        if way.mean > best:
            best = way.mean
            front.append(way)
        each = [100 * interval.mean for interval in way.accuracies]
        axis.plot([way.flops / 1e9] * 2, [min(each), max(each)], color="#2b6cb0", linewidth=1.2, alpha=0.5)
        axis.plot(
            way.flops / 1e9,
            100 * way.mean,
            "o",
            color="#c05621" if way.name == ALONE else "#2b6cb0",
            markersize=5,
        )
        axis.annotate(
            way.name, (way.flops / 1e9, 100 * way.mean), xytext=(5, 3), textcoords="offset points", fontsize=8
        )
    axis.plot(
        [way.flops / 1e9 for way in front],
        [100 * way.mean for way in front],
        color="#2b6cb0",
        linewidth=0.8,
        linestyle="--",
    )
    axis.set(
        xlabel="GFLOPs of the student's learning, its rows and its teacher",
        ylabel="held-out accuracy, %",
        xscale="log",
    )
    axis.grid(True, alpha=0.2)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
