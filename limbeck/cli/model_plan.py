"""The plan of a model on a cluster: time and cost of its training or RL, of distillation from a teacher, and
of serving, and what export rules say.

Functions called `_add_...` and `_plan_...` append their lines for people to an `Answer`. A layout is a way of
splitting the model and the batch over the chips: degrees of parallelism and a pipeline schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date as Date
from pathlib import Path
from typing import Any

from ..model.config import ModelConfig
from ..plan import cluster as clusters
from ..plan import export_rules, runs
from ..plan.cluster import Cluster
from ..plan.runs import Bill, Range, Training, Workload
from ..types import LimbeckError
from .options import usage_error
from .plan_text import Answer, Conditions, add_deadline, changes_text, duration, parse_day, short

SHORTEST_SEQUENCE = 1024  # tokens, the shortest sequence that is suggested
REPORTED_OPERATIONS = 1e23  # operations from which the share of REGULATED_OPERATIONS is reported
REGULATED_OPERATIONS = 1e26  # operations, a threshold of rules on trained models


@dataclass(frozen=True)
class Work:
    """What is planned: a model's configuration, the cluster, and the workload (tokens, batch, sequence
    length, precision).
    """

    config: ModelConfig
    cluster: Cluster
    workload: Workload


def plan_model(
    name: str,
    config: ModelConfig,
    figures: dict[str, str],
    workload: dict[str, Any],
    conditions: Conditions,
    svg: Path | None,
) -> Answer:
    """Return the plan of the model `name` on the cluster `conditions.on`, as lines for people and data for
    programs.

    `config` are the model's shapes. `figures` replaces known properties of the cluster, `workload` the known
    ones of the model's training. With `svg` the best layout is drawn into that file. Raises a usage error
    without a cluster.
    """
    if not conditions.on:
        raise usage_error(f"{name}: on which chips? say --on, for instance --on 2048xH800 or --on 8x4090")
    work = Work(config, clusters.cluster(conditions.on, **figures), runs.workload(name, workload))
    cluster = work.cluster.tell()
    answer = Answer([f"{name} on {cluster}"])
    answer.data |= {"model": name, "on": cluster, "workload": runs.told(work.workload)}
    answer.data["plan"] = _plan(answer, work, conditions, svg)
    if conditions.changes:
        changed = clusters.cluster(conditions.on, **figures | conditions.changes)
        answer.lines += ["", f"what if {changes_text(conditions.changes)}: {changed.tell()}"]
        plan = _plan(answer, replace(work, cluster=changed), conditions, None)
        answer.data["what_if"] = {"changes": conditions.changes, **plan}
        _add_ratio(answer)
    return answer


def _plan(answer: Answer, work: Work, conditions: Conditions, svg: Path | None) -> dict[str, Any]:
    """Add the training or RL, the teacher's part of a distillation, and the serving of a model on one
    cluster, and return their data.

    With `svg` the layouts of the training are drawn into that file.
    """
    if work.workload.kind == "rl":
        data = _plan_rl(answer, work, conditions)
    else:
        data = _plan_training(answer, work, conditions, svg)
    if work.workload.teacher:
        data["teacher"] = _plan_teacher(answer, work.workload)
    data["serving"] = _plan_serving(answer, work, conditions.price)
    return data


# ---------------------------------------------------------------- training


def _plan_training(answer: Answer, work: Work, conditions: Conditions, svg: Path | None) -> dict[str, Any]:
    """Add the best layouts of a training and its cost, and return them as data.

    If the training does not fit on the cluster, add the reason and a shorter sequence length that would fit,
    and return the reason as `refused`.
    """
    try:
        run = runs.train(work.config, work.cluster, work.workload, conditions.price)
    except LimbeckError as error:
        answer.say("training", f"cannot be: {error}")
        _suggest_shorter(answer, work)
        return {"training": {"refused": str(error)}}
    _add_training(answer, run)
    _add_bill(answer, run.bill, conditions.until)
    if svg:
        drawings = _draw(run, work, svg)
        answer.say("drawn", ", ".join(map(str, drawings)))
    return {"training": runs.told(run)}


def _add_training(answer: Answer, run: Training) -> None:
    """Add the workload, the best layouts, the time of one training step, and the number of operations of a
    training.
    """
    work = run.workload
    batch = f"{work.batch:,} x {work.seq:,}, {work.precision} ({work.source})"
    answer.say("training", f"{short(work.tokens)} tokens in {run.steps:,.0f} steps of {batch}")
    if run.averaging:
        answer.say("sites", run.averaging.tell())
    for rank, choice in enumerate(run.choices):
        answer.say(_rank(rank), choice.tell())
    step = run.choices[0].step
    time = f"{step.seconds:.3g} s ({step.low:.3g} to {step.high:.3g})"
    speed = f"{step.tflops:.0f} TFLOPS a chip, MFU {step.mfu:.1%} (causal, of the 16-bit peak)"
    answer.say("a step", f"{time}; {speed}")
    operations = f"{run.operations:.3g}, causal"
    if run.operations > REPORTED_OPERATIONS:
        operations += f"; {run.operations / REGULATED_OPERATIONS:.1%} of 1e26"
    answer.say("operations", operations)


def _rank(rank: int) -> str:
    """Return the name of a layout by its rank, counted from 0: `best layout`, `2nd`, `3rd`, `4th`."""
    names = ("best layout", "2nd", "3rd")
    return names[rank] if rank < len(names) else f"{rank + 1}th"


def _suggest_shorter(answer: Answer, work: Work) -> None:
    """Add the longest sequence length with which the training fits, among halves, quarters and so on of the
    wanted one.

    The number of tokens a step stays the same. Nothing is added if none fits.
    """
    workload = work.workload
    seq = workload.seq // 2
    while seq >= SHORTEST_SEQUENCE:
        batch = workload.batch * workload.seq // seq
        shorter = replace(workload, seq=seq, batch=batch)
        try:
            run = runs.train(work.config, work.cluster, shorter, None, top=1)
        except LimbeckError:
            seq //= 2
            continue
        time = duration(run.bill.seconds.middle)
        answer.say("but", f"with sequences of {seq:,} it can: {run.choices[0].tell()}; {time} in all")
        return


def _draw(run: Training, work: Work, svg: Path) -> list[Path]:
    """Draw the step time of the best layouts against their memory and, if the best layout uses pipeline
    parallelism, its schedule. Return the files' paths.

    The schedule is drawn into `svg` and the layouts into a file beside it; without a pipeline the layouts are
    drawn into `svg`.
    """
    from ..plan import gantt, pipeline_schedules, step

    layout = run.choices[0].layout
    if layout.pp == 1:
        return [gantt.trade(list(run.choices), svg)]
    layouts = gantt.trade(list(run.choices), svg.with_name(f"{svg.stem}-layouts.svg"))
    workload = run.workload
    forecast = step.foresee(
        work.config, work.cluster, layout, workload.batch, workload.seq, workload.precision
    )
    line = pipeline_schedules.simulate(
        layout.schedule, forecast.times, layout.pp, forecast.micro, layout.chunks
    )
    return [gantt.schedule(line, svg, layout.tell()), layouts]


# ---------------------------------------------------------------- RL, distillation, serving


def _plan_rl(answer: Answer, work: Work, conditions: Conditions) -> dict[str, Any]:
    """Add the time and cost of RL of the model on the cluster, and return them as data."""
    cost, bill = runs.reinforce(work.config, work.cluster, conditions.price)
    hours = [f"{part} {seconds / 3600:,.0f} h" for part, seconds in cost.parts.items() if seconds]
    answer.say("RL", f"650 rollouts of 8,192 completions, {short(cost.tokens)} tokens; {cost.binds}")
    answer.say("of which", ", ".join(hours))
    _add_bill(answer, bill, conditions.until)
    return {"rl": runs.told(cost), "bill": runs.told(bill)}


def _plan_teacher(answer: Answer, workload: Workload) -> dict[str, Any]:
    """Add the number of tokens that the teacher generates for the distillation, and their cost; return them
    as data.
    """
    cost = runs.teach(workload)
    tokens = f"{_range(cost.tokens)} tokens by {workload.teacher['model']}"
    hours = f"{_range(cost.chip_hours)} H800-hours of a service like DeepSeek's"
    answer.say("teacher", f"{tokens}: {hours}, or ${_range(cost.money)} by its list")
    return runs.told(cost)


def _plan_serving(answer: Answer, work: Work, price: float | None) -> dict[str, Any]:
    """Add the number of concurrent conversations, the speed and the price of serving the model; return them
    as data.

    If the model cannot be served on the cluster, add the reason and return it as `refused`. `price` is in
    dollars an hour of a chip; None for the known rental prices.
    """
    try:
        service = runs.serve(work.config, work.cluster, price=price)
    except LimbeckError as error:
        answer.say("serving", f"cannot be: {error}")
        return {"refused": str(error)}
    conversations = f"{service.rows:,.0f} conversations of {service.context:,} tokens"
    replica = f"a copy on {service.chips} chips, {service.precision}"
    decode = f"writes {service.decode.tokens:,.0f} tokens/s ({service.decode.binds})"
    text = (
        f"{replica}: {conversations} at {service.speed:.0f} tokens/s; "
        f"a chip {decode}, reads {service.prefill.tokens:,.0f}"
    )
    if service.money:
        read, written = service.money
        text += f"; ${read:.2g} a million tokens read, ${written:.2g} written"
    answer.say("serving", text)
    return runs.told(service)


# ---------------------------------------------------------------- bills


def _add_bill(answer: Answer, bill: Bill, until: str | None) -> None:
    """Add the goodput (the share of time that failures and checkpoints leave), time, energy and money of a
    training or RL.

    With `until` (a date) also add the share of the work that is done by that day.
    """
    goodput = bill.goodput
    share = f"{goodput.share:.1%} ({goodput.low:.1%} to {goodput.high:.1%})"
    checkpoint = f"a checkpoint every {goodput.interval_seconds / 60:.0f} min"
    answer.say("goodput", f"{share}: {goodput.failures_per_day:.2g} failures a day, {checkpoint}")
    seconds = bill.seconds
    time = f"{duration(seconds.middle)} ({duration(seconds.low)} to {duration(seconds.high)})"
    answer.say("in all", f"{time}; {_range(bill.chip_hours)} chip-hours on {bill.chips:,} chips")
    if bill.power:
        energy = Range(bill.power.kwh, bill.power.low, bill.power.high)
        answer.say("energy", f"{_range(energy)} kWh, PUE {bill.power.pue:g}")
    if bill.money:
        rental = bill.rental
        source = f"{rental.source}, {rental.date}" if rental.date else "the price given"
        hourly = f"${rental.low:g} to ${rental.high:g} an hour"
        answer.say("money", f"${_range(bill.money)} at {hourly} ({source})")
    for text in bill.unknown:
        answer.say("not known", text)
    if until:
        add_deadline(answer, seconds.middle, until, bill.chips)


def _range(value: Range) -> str:
    """Return an estimate with its interval as text: `102K (74K to 180K)`."""
    return f"{short(value.middle)} ({short(value.low)} to {short(value.high)})"


def _add_ratio(answer: Answer) -> None:
    """Add the ratio of two times of the training or RL: with the changes of `--what-if` and without.

    Nothing is added if either is impossible.
    """
    before = _total_seconds(answer.data["plan"])
    after = _total_seconds(answer.data["what_if"])
    if before and after:
        answer.data["what_if"]["times"] = after / before
        answer.say("compared", f"{after / before:.2f} times as long")


def _total_seconds(plan: dict[str, Any]) -> float | None:
    """Return the estimated seconds of the whole training or RL from the data of a plan.

    Return None if the training is impossible on the cluster.
    """
    training = plan.get("training")
    if training:
        return None if "refused" in training else training["bill"]["seconds"]["middle"]
    return plan["rl"]["seconds"]


# ---------------------------------------------------------------- export rules


def apply_export_rules(
    answer: Answer, figures: dict[str, str], conditions: Conditions, to: str, date: str | None
) -> None:
    """Add what export rules say on a day about selling the cluster's chips to the country `to`, and about the
    model's weights if they were not openly published.

    `date` is today by default. If `--what-if` replaces the chip, both chips are judged. Raises a usage error
    if `conditions` has no cluster.
    """
    on = conditions.on
    if not on:
        raise usage_error(
            "--to asks whether chips may be sold: name them with --on, for instance --on 2048xH800"
        )
    day = parse_day(date) if date else Date.today()
    chip = clusters.cluster(on, **figures).chip
    changed = clusters.cluster(on, **figures | conditions.changes).chip
    chips = [chip] if chip.name == changed.name else [chip, changed]
    rules = []
    for judged in chips:
        verdict = export_rules.judge(export_rules.ware(judged), to, day)
        rules.append({"chip": judged.name, **runs.told(verdict)})
        answer.say("rules", f"{judged.name} to {to} on {day}: {verdict.sentence}")
    operations = answer.data.get("plan", {}).get("training", {}).get("operations")
    if operations:
        weights = export_rules.Weights(answer.data["model"], operations)
        verdict = export_rules.judge(weights, to, day)
        rules.append({"weights": answer.data["model"], **runs.told(verdict)})
        answer.say("rules", f"weights, were they closed: {verdict.sentence}")
    answer.data["rules"] = rules
