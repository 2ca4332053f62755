"""What is said of a model on a cluster: training, reinforcement learning, serving, rules, deadlines."""

from __future__ import annotations

from dataclasses import replace
from datetime import date as Date
from pathlib import Path
from typing import Any

from ..plan import cluster as clusters
from ..plan import export_rules, models, runs
from ..plan.cluster import Cluster
from ..plan.runs import Range, Training
from ..types import LimbeckError
from .options import mistake


class Answer:
    """What is said to people, and the same for programs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.data: dict[str, Any] = {}

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{name:14} {text}".rstrip())


# ---------------------------------------------------------------- models


def of_model(
    name: str,
    on: str,
    figures: dict[str, Any],
    changes: dict[str, Any],
    given: dict[str, Any],
    price: float | None,
    until: str | None,
    svg: Path | None,
) -> Answer:
    config = models.find(name)
    cluster = clusters.cluster(on or _asked(name), **figures)
    work = runs.workload(name, given)
    answer = Answer()
    answer.lines.append(f"{name} on {cluster.tell()}")
    answer.data |= {"model": name, "on": cluster.tell(), "workload": runs.told(work)}
    answer.data["plan"] = _one(answer, name, config, cluster, work, price, until, svg)
    if changes:
        other = clusters.cluster(on, **figures | changes)
        answer.lines += ["", f"what if {told_changes(changes)}: {other.tell()}"]
        answer.data["what_if"] = {
            "changes": changes,
            **_one(answer, name, config, other, work, price, until, None),
        }
        _compare(answer)
    return answer


def _one(
    answer: Answer,
    name: str,
    config: Any,
    cluster: Cluster,
    work: Any,
    price: float | None,
    until: str | None,
    svg: Path | None,
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if work.kind == "rl":
        cost, bill = runs.reinforce(config, cluster, price)
        data["rl"], data["bill"] = runs.told(cost), runs.told(bill)
        hours = {part: seconds / 3600 for part, seconds in cost.parts.items() if seconds}
        answer.say("RL", f"650 rollouts of 8,192 completions, {_short(cost.tokens)} tokens; {cost.binds}")
        answer.say("of which", ", ".join(f"{part} {h:,.0f} h" for part, h in hours.items()))
        _bill(answer, bill, until)
    else:
        try:
            data |= _training(answer, config, cluster, work, price, until, svg)
        except LimbeckError as error:
            data["training"] = {"refused": str(error)}
            answer.say("training", f"cannot be: {error}")
            _shorter(answer, config, cluster, work)
    if work.teacher:
        taught = runs.teach(work)
        data["teacher"] = runs.told(taught)
        answer.say(
            "teacher",
            f"{_range(taught.tokens)} tokens by {work.teacher['model']}: {_range(taught.chip_hours)} H800-hours of a service "
            f"like DeepSeek's, or ${_range(taught.money)} by its list",
        )
    data["serving"] = _serving(answer, config, cluster, price)
    return data


def _training(
    answer: Answer,
    config: Any,
    cluster: Cluster,
    work: Any,
    price: float | None,
    until: str | None,
    svg: Path | None,
) -> dict[str, Any]:
    run = runs.train(config, cluster, work, price)
    step = run.choices[0].step
    answer.say(
        "training",
        f"{_short(work.tokens)} tokens in {run.steps:,.0f} steps of {work.batch:,} x {work.seq:,}, {work.precision} ({work.source})",
    )
    if run.averaging:
        answer.say("sites", run.averaging.tell())
    for i, choice in enumerate(run.choices):
        answer.say(
            "best layout" if i == 0 else f"{i + 1}th" if i > 2 else ("2nd", "3rd")[i - 1], choice.tell()
        )
    answer.say(
        "a step",
        f"{step.seconds:.3g} s ({step.low:.3g} to {step.high:.3g}); {step.tflops:.0f} TFLOPS a chip, MFU {step.mfu:.1%} (causal, of the 16-bit peak)",
    )
    answer.say(
        "operations",
        f"{run.operations:.3g}, causal"
        + (f"; {run.operations / 1e26:.1%} of 1e26" if run.operations > 1e23 else ""),
    )
    _bill(answer, run.bill, until)
    if svg:
        answer.say("drawn", ", ".join(map(str, _draw(run, config, cluster, svg))))
    return {"training": runs.told(run)}


def _shorter(answer: Answer, config: Any, cluster: Cluster, work: Any) -> None:
    """Whether shorter sequences would fit, as long as they are of use."""
    seq = work.seq // 2
    while seq >= 1024:
        shorter = replace(work, seq=seq, batch=work.batch * work.seq // seq)
        try:
            run = runs.train(config, cluster, shorter, None, top=1)
        except LimbeckError:
            seq //= 2
            continue
        answer.say(
            "but",
            f"with sequences of {seq:,} it can: {run.choices[0].tell()}; {duration(run.bill.seconds.middle)} in all",
        )
        return


def _bill(answer: Answer, bill: Any, until: str | None) -> None:
    share = bill.goodput
    answer.say(
        "goodput",
        f"{share.share:.1%} ({share.low:.1%} to {share.high:.1%}): {share.failures_per_day:.2g} failures a day, a checkpoint every "
        f"{share.interval_seconds / 60:.0f} min",
    )
    hours = bill.chip_hours
    answer.say(
        "in all",
        f"{duration(bill.seconds.middle)} ({duration(bill.seconds.low)} to {duration(bill.seconds.high)}); "
        f"{_range(hours)} chip-hours on {bill.chips:,} chips",
    )
    if bill.power:
        answer.say(
            "energy",
            f"{_range(Range(bill.power.kwh, bill.power.low, bill.power.high))} kWh, PUE {bill.power.pue:g}",
        )
    if bill.money:
        source = f"{bill.rental.source}, {bill.rental.date}" if bill.rental.date else "the price given"
        answer.say(
            "money",
            f"${_range(bill.money)} at ${bill.rental.low:g} to ${bill.rental.high:g} an hour ({source})",
        )
    for text in bill.unknown:
        answer.say("not known", text)
    if until:
        deadline(answer, bill.seconds.middle, until, bill.chips)


def _serving(answer: Answer, config: Any, cluster: Cluster, price: float | None) -> dict[str, Any]:
    try:
        served = runs.serve(config, cluster, price=price)
    except LimbeckError as error:
        answer.say("serving", f"cannot be: {error}")
        return {"refused": str(error)}
    money = (
        f"; ${served.money[0]:.2g} a million tokens read, ${served.money[1]:.2g} written"
        if served.money
        else ""
    )
    answer.say(
        "serving",
        f"a copy on {served.chips} chips, {served.precision}: {served.rows:,.0f} conversations of {served.context:,} tokens at {served.speed:.0f} tokens/s; "
        f"a chip writes {served.decode.tokens:,.0f} tokens/s ({served.decode.binds}), reads {served.prefill.tokens:,.0f}{money}",
    )
    return runs.told(served)


def _draw(run: Training, config: Any, cluster: Cluster, svg: Path) -> list[Path]:
    """What each chip of the best layout's pipeline does, where it has one; and beside it, time against memory of the layouts found."""
    from ..plan import gantt, pipeline_schedules, step

    layout, work = run.choices[0].layout, run.workload
    drawn = [
        gantt.trade(list(run.choices), svg.with_name(f"{svg.stem}-layouts.svg") if layout.pp > 1 else svg)
    ]
    if layout.pp > 1:
        at = step.foresee(config, cluster, layout, work.batch, work.seq, work.precision)
        line = pipeline_schedules.simulate(layout.schedule, at.times, layout.pp, at.micro, layout.chunks)
        drawn.insert(0, gantt.schedule(line, svg, layout.tell()))
    return drawn


def _compare(answer: Answer) -> None:
    """How much longer or shorter the change makes it."""
    pairs = []
    for key in ("training", "rl"):
        before, after = answer.data["plan"].get(key), answer.data["what_if"].get(key)
        if before and after and "refused" not in before and "refused" not in after:
            at = (lambda d: d["bill"]["seconds"]["middle"]) if key == "training" else (lambda d: d["seconds"])
            pairs.append(at(after) / at(before))
    if pairs:
        answer.data["what_if"]["times"] = pairs[0]
        answer.say("compared", f"{pairs[0]:.2f} times as long")


# ---------------------------------------------------------------- rules and deadlines


def rule(
    answer: Answer, on: str, figures: dict[str, Any], changes: dict[str, Any], to: str, date: str | None
) -> None:
    """Whether the chips may be sold there on that day; and the model's weights, were they kept closed."""
    if not on:
        raise mistake("--to asks whether chips may be sold: name them with --on, for instance --on 2048xH800")
    day = _day(date) if date else Date.today()
    told = []
    chips = {
        chip.name: chip
        for chip in (clusters.cluster(on, **each).chip for each in (figures | changes, figures))
    }
    for chip in reversed(chips.values()):
        verdict = export_rules.judge(export_rules.ware(chip), to, day)
        told.append({"chip": chip.name, **runs.told(verdict)})
        answer.say("rules", f"{chip.name} to {to} on {day}: {verdict.sentence}")
    operations = answer.data.get("plan", {}).get("training", {}).get("operations")
    if operations:
        verdict = export_rules.judge(export_rules.Weights(answer.data["model"], operations), to, day)
        told.append({"weights": answer.data["model"], **runs.told(verdict)})
        answer.say("rules", f"weights, were they closed: {verdict.sentence}")
    answer.data["rules"] = told


def days_left(until: str) -> int:
    """From today to that day, which is yet to come."""
    left = (_day(until) - Date.today()).days
    if left <= 0:
        raise mistake(f"--until {until}: that day has passed")
    return left


def deadline(answer: Answer, seconds: float, until: str, chips: int = 1) -> None:
    """What will be done when stock runs out, and what it would take to be through by then."""
    left = days_left(until) * 86400
    share = min(1.0, left / seconds)
    faster = (
        f"about {int(-(-chips * seconds // left)):,} chips"
        if chips > 1
        else f"{seconds / left:.2g} times as many chips, or as fast ones"
    )
    text = "all of it is done" if share == 1 else f"{share:.0%} is done; to be through by then takes {faster}"
    answer.data["until"] = {"date": str(_day(until)), "share": share}
    answer.say("until", f"{_day(until)}, {left / 86400:.0f} days from today: {text}")


def _day(text: str) -> Any:
    parts = text.split("-")
    try:
        return Date.fromisoformat("-".join([*parts, *["01"] * (3 - len(parts))]))
    except ValueError:
        raise mistake(f"{text}: no day; write it as 2027-03-01 or 2027-03") from None


# ---------------------------------------------------------------- words


def told_changes(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items())


def _asked(name: str) -> str:
    raise mistake(f"{name}: on which chips? say --on, for instance --on 2048xH800 or --on 8x4090")


def _range(value: Range) -> str:
    """`102K (74K to 180K)`."""
    return f"{_short(value.middle)} ({_short(value.low)} to {_short(value.high)})"


def _short(number: float) -> str:
    """Three digits and a letter: `2.67M`."""
    for letter, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{float(f'{number / size:.3g}'):g}{letter}"
    return f"{float(f'{number:.3g}'):g}"


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
