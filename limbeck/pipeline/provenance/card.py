"""A model's card, from its lineage and its evaluations: nothing in it that no run has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from .licences import CombinedTerms, bind, terms

WAYS = {
    "t1": "temperature 1",
    "t06": "temperature 0.6",
    "greedy": "greedy",
    "pass@8": "any of 8 right",
    "cons@8": "majority of 8",
}


def card(
    name: str, lineage: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]], ggufs: Sequence[str]
) -> str:
    """The README.md: YAML front matter as model hubs read it, then Markdown."""
    bonds, entries = bind(lineage["licences"]), list(lineage["artifacts"].values())
    head, results = lineage["artifacts"][lineage["root"]], _results(evaluations)
    template = jinja2.Environment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    body = template.from_string((Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")).render(
        name=name,
        head=head,
        stages=entries[::-1],
        bonds=bonds,
        terms={licence: terms(licence) for licence in bonds.licences},
        rights=lineage["rights"],
        sources=lineage["sources"],
        results=results,
        ggufs=ggufs,
        parameters=_parameters(entries, head),
        total=_total(entries),
        desks=[e for e in entries if e["kind"] == "curate"],
        checked=_checked(entries),
        limits=_limits(head, entries, results),
        brought=[e for e in entries if e["kind"] == "load"],
        number=_number,
    )
    front = yaml.safe_dump(_front(name, bonds, entries, results), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.strip()}\n"


def _front(
    name: str, bonds: CombinedTerms, entries: Sequence[Mapping], results: Sequence[Mapping]
) -> dict[str, Any]:
    front: dict[str, Any] = {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["limbeck", "reasoning"],
    }
    binding = [licence for licence in bonds.licences if licence != "own"]
    if len(binding) == 1:
        front["license"] = terms(binding[0]).hub
    if len(binding) > 1 or front.get("license") == "other":
        front |= {"license": "other", "license_name": " AND ".join(binding), "license_link": "NOTICE"}
    bases = [
        str(e["notes"].get("source", "")).removeprefix("hf:")
        for e in entries
        if str((e.get("notes") or {}).get("source", "")).startswith("hf:")
    ]
    if bases:
        front["base_model"] = bases
    if results:
        metrics = [
            {"type": "accuracy", "name": f"accuracy, {r['way']}", "value": round(100 * r["mean"], 1)}
            for r in results
            if r["problems"] == results[0]["problems"]
        ]
        dataset = {"name": results[0]["problems"], "type": results[0]["problems"]}
        front["model-index"] = [
            {
                "name": name,
                "results": [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}],
            }
        ]
    return front


def _results(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each source of problems and each way of sampling: accuracy with its interval, and what was measured beside."""
    return [
        {
            "problems": source,
            "way": WAYS.get(way, way),
            **numbers["accuracy"],
            "asked": numbers["accuracy"]["problems"],
            "length": numbers.get("length"),
            "language": numbers.get("language_consistency"),
            "truncated": numbers.get("truncated"),
        }
        | {"problems": source}
        for evaluation in evaluations
        for source, told in evaluation["sources"].items()
        for way, numbers in told["modes"].items()
    ]


def _total(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over all stages; joules only where every stage that computed tells them."""
    joules = [entry.get("joules") for entry in entries if entry.get("flops")]
    return {
        "tokens": sum(e.get("tokens") or 0 for e in entries),
        "flops": sum(e.get("flops") or 0 for e in entries),
        "seconds": sum(e.get("seconds") or 0 for e in entries),
        "joules": sum(joules) if joules and all(joules) else None,
    }


def _parameters(entries: Sequence[Mapping[str, Any]], head: Mapping[str, Any]) -> int | None:
    told = [(entry.get("notes") or {}).get("parameters") for entry in (head, *entries)]
    return next(filter(None, told), None)


def _checked(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"stage": e["stage"], **e["decontamination"]} for e in entries if e.get("decontamination")]


def _limits(head: Mapping[str, Any], entries: Sequence[Mapping], results: Sequence[Mapping]) -> list[str]:
    """What the runs do not show, said plainly."""
    limits = ["It was made by one run with one seed; another seed may give other numbers."]
    if results:
        limits.append(
            f"It was measured on {', '.join(dict.fromkeys(r['problems'] for r in results))} and on nothing else: nothing is known of other tasks."
        )
    else:
        limits.append("It was not evaluated: nothing is known of how well it does.")
    limits.append("It was neither trained nor tested for safety, truthfulness or fairness.")
    if not any(e.get("decontamination") for e in entries):
        limits.append("What it learned from was not compared with any test.")
    if any(r["truncated"] and r["truncated"] > 0.05 for r in results):
        limits.append("More than one response in twenty ran out of tokens.")
    alarms = [alarm for e in entries for alarm in ((e.get("notes") or {}).get("alarms") or {})]
    limits += [f"While it was trained this alarm rang: {alarm}." for alarm in alarms]
    if any(e["kind"] in ("load", "remote") for e in entries):
        limits.append(
            "What the models that were brought in had learned before is known to their makers alone."
        )
    if any(name.startswith("reviewer ") for name in head["sources"]["editors"]):
        limits.append("What people said at the desk is not in `recipe.yaml`: whoever runs it reviews anew.")
    return limits


def _number(value: float | None) -> str:
    """`1,234` or `3.1e+09`."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"
