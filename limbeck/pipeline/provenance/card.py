"""The model card of a release. Every number in it comes from the model's lineage (the record of all stages
behind the model) or from an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ...text.prompt_format import PromptFormat
from .licences import CombinedTerms, bind, terms

TEMPLATE = Path(__file__).parent / "card.md.jinja"
TRUNCATION_LIMIT = 0.05  # share of responses that ran out of tokens, above which the card warns
WAYS = {
    "t1": "temperature 1",
    "t06": "temperature 0.6",
    "greedy": "greedy",
    "pass@8": "any of 8 right",
    "cons@8": "majority of 8",
}


def card(
    name: str,
    lineage: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    ggufs: Sequence[str],
    prompt_format: PromptFormat,
) -> str:
    """Return the text of the README.md: YAML front matter as model hubs read it, then Markdown.

    `lineage` is the published result of `Lineage.tell()`, `evaluations` are the contents of `evaluation.json`
    files, and `ggufs` the names of the GGUF files in the released directory. `prompt_format` is the format of
    the prompts that the model was trained with.
    """
    entries = list(lineage["artifacts"].values())
    head = lineage["artifacts"][lineage["root"]]
    bonds = bind(lineage["licences"])
    results = _results(evaluations)
    environment = jinja2.Environment(
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    body = template.render(
        name=name,
        head=head,
        stages=entries[::-1],
        bonds=bonds,
        terms={licence: terms(licence) for licence in bonds.licences},
        rights=lineage["rights"],
        sources=lineage["sources"],
        results=results,
        ggufs=ggufs,
        prompt_format=prompt_format,
        plain=prompt_format == PromptFormat(),
        parameters=_parameters([head, *entries]),
        total=_total(entries),
        desks=[entry for entry in entries if entry["kind"] == "curate"],
        checked=_decontaminations(entries),
        limits=_limits(head, entries, results),
        brought=[entry for entry in entries if entry["kind"] == "load"],
        number=_number,
    )
    front = yaml.safe_dump(_front(name, bonds, entries, results), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body.strip()}\n"


# ---------------------------------------------------------------- front matter


def _front(
    name: str, bonds: CombinedTerms, entries: Sequence[Mapping], results: Sequence[Mapping]
) -> dict[str, Any]:
    """Return the YAML front matter: tags, licence, base models, and results as a model index. `entries` are
    the lineage's stages, `bonds` the combined terms of their licences."""
    front: dict[str, Any] = {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["limbeck", "reasoning"],
        **_hub_licence(bonds),
    }
    sources = [str(_notes(entry).get("source", "")) for entry in entries]
    bases = [source.removeprefix("hf:") for source in sources if source.startswith("hf:")]
    if bases:
        front["base_model"] = bases
    if results:
        front["model-index"] = [{"name": name, "results": [_hub_result(results)]}]
    return front


def _hub_licence(bonds: CombinedTerms) -> dict[str, str]:
    """Return the licence keys of the front matter. Several licences, or one that the hub does not know,
    become "other"."""
    binding = [licence for licence in bonds.licences if licence != "own"]
    if not binding:
        return {}
    hub = terms(binding[0]).hub
    if len(binding) == 1 and hub != "other":
        return {"license": hub}
    return {"license": "other", "license_name": " AND ".join(binding), "license_link": "NOTICE"}


def _hub_result(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the accuracies on the first problem source as one entry of a model index."""
    source = results[0]["problems"]
    metrics = []
    for result in results:
        if result["problems"] == source:
            accuracy = round(100 * result["mean"], 1)
            metrics.append(
                {"type": "accuracy", "name": f"accuracy, {result['way']}", "value": accuracy},
            )
    dataset = {"name": source, "type": source}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}


# ---------------------------------------------------------------- numbers


def _results(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per problem source and way of sampling: the accuracy, its interval, and other
    metrics."""
    return [
        _result(source, way, metrics)
        for evaluation in evaluations
        for source, measured in evaluation["sources"].items()
        for way, metrics in measured["modes"].items()
    ]


def _result(source: str, way: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = metrics["accuracy"]
    return {
        **accuracy,
        "problems": source,
        "way": WAYS.get(way, way),
        "asked": accuracy["problems"],
        "length": metrics.get("length"),
        "language": metrics.get("language_consistency"),
        "truncated": metrics.get("truncated"),
    }


def _total(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the tokens, FLOPs and seconds of all stages, and the joules (None unless every stage with FLOPs
    has measured them)."""
    total: dict[str, Any] = {}
    for key in ("tokens", "flops", "seconds"):
        total[key] = sum(entry.get(key) or 0 for entry in entries)
    joules = [entry.get("joules") for entry in entries if entry.get("flops")]
    total["joules"] = sum(joules) if joules and all(joules) else None
    return total


def _parameters(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of model parameters from the first entry that has it in its notes, None if there is
    none."""
    for entry in entries:
        parameters = _notes(entry).get("parameters")
        if parameters:
            return parameters
    return None


def _decontaminations(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of all comparisons of training data with tests, each with the name of its stage."""
    compared = [entry for entry in entries if entry.get("decontamination")]
    return [{"stage": entry["stage"], **entry["decontamination"]} for entry in compared]


def _notes(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    return entry.get("notes") or {}


def _limits(head: Mapping[str, Any], entries: Sequence[Mapping], results: Sequence[Mapping]) -> list[str]:
    """Return sentences on what the evidence for the model does not show."""
    limits = ["It was made by one run with one seed; another seed may give other numbers."]
    limits.append(_limit_of_evaluation(results))
    limits.append("It was neither trained nor tested for safety, truthfulness or fairness.")
    if not _decontaminations(entries):
        limits.append("What it learned from was not compared with any test.")
    if any((result["truncated"] or 0) > TRUNCATION_LIMIT for result in results):
        limits.append("More than one response in twenty ran out of tokens.")
    limits += _limits_of_training(head, entries)
    return limits


def _limits_of_training(head: Mapping[str, Any], entries: Sequence[Mapping]) -> list[str]:
    limits = []
    for entry in entries:
        for alarm in _notes(entry).get("alarms") or {}:
            limits.append(f"While it was trained this alarm rang: {alarm}.")
        if _notes(entry).get("weights_changed") is False:
            limits.append(f"Its stage {entry['stage']} left all weights as they were.")
    if any(entry["kind"] in ("load", "remote") for entry in entries):
        limits.append(
            "What the models that were brought in had learned before is known to their makers alone."
        )
    if any(name.startswith("reviewer ") for name in head["sources"]["editors"]):
        limits.append("What people said at the desk is not in `recipe.yaml`: whoever runs it reviews anew.")
    return limits


def _limit_of_evaluation(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "It was not evaluated: nothing is known of how well it does."
    sources = dict.fromkeys(result["problems"] for result in results)
    return f"It was measured on {', '.join(sources)} and on nothing else: nothing is known of other tasks."


def _number(value: float | None) -> str:
    """Format a number as `1,234` or `3.1e+09`; None becomes "not measured"."""
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.2g}"
