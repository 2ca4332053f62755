"""Generated parts of the documentation: tables of the recipes' settings and of the commands.

    python docs/generate.py            write them, between their marks in docs/**/*.md
    python docs/generate.py --check    change nothing; exit code 1 and the names of pages that are out of date

A part stands between `<!-- generated: NAME ARGUMENT -->` and `<!-- end -->`.
"""

from __future__ import annotations

import os
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["USER"] = "$USER"  # the default reviewer, so that it is the same on every machine

import typer
import yaml
from pydantic.fields import FieldInfo

from limbeck.cli import app
from limbeck.config import hosts, iterate, learned_rewards, parts, recipe
from limbeck.eval.published import published_scores
from limbeck.eval.suites.catalogue import SUITES
from limbeck.eval.suites.suite import Protocol, Suite
from limbeck.pipeline.graph import QUIET

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- generated: (\w+)(?: (\w+))? -->\n).*?(<!-- end -->)", re.DOTALL)
TAGS = ("kind", "source")
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def main(check: bool) -> int:
    """Bring every page up to date, or with `check` only name those that are not; returns the exit code."""
    stale = []
    for page in sorted(DOCS.rglob("*.md")):
        written = page.read_text(encoding="utf-8")
        fresh = render(written)
        if fresh == written:
            continue
        stale.append(page.name)
        if not check:
            page.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


def render(text: str) -> str:
    """The text of a page with all its generated parts made anew."""
    return PART.sub(_render_part, text)


def _render_part(match: re.Match[str]) -> str:
    """One generated part between its marks."""
    start, name, argument, end = match.groups()
    content = PARTS[name](argument).strip()
    return f"{start}\n{content}\n\n{end}"


# ---------------------------------------------------------------- settings


def settings(name: str) -> str:
    """The table of the keys of one settings model.

    Keys that all stages share are in the table of `Stage` alone; there a star marks the keys that do not
    change a stage's result.
    """
    model = _find_model(name)
    shared = () if name == "Stage" else recipe.Stage.model_fields
    rows = []
    for key, field in model.model_fields.items():
        if key in TAGS or key in shared:
            continue
        star = " \\*" if name == "Stage" and key in QUIET else ""
        rows.append([f"`{key}`{star}", value(field), default(field), field.description or ""])
    return table(["key", "value", "default", "meaning"], rows)


def _find_model(name: str) -> type[parts.Settings]:
    """The settings model with a name."""
    for module in (recipe, learned_rewards, parts, iterate, hosts):
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"no settings are called {name}")


def value(field: FieldInfo) -> str:
    """The values that a key accepts, in words: `integer, at least 1`."""
    accepted = kind(field.annotation)
    limits = _limits(field)
    if not limits:
        return accepted
    accepted, _, null = accepted.partition(" or ")
    text = f"{accepted}, {limits}"
    return f"{text}, or {null}" if null else text


def _limits(field: FieldInfo) -> str:
    """The limits of a number in words: `at least 0 and below 1`."""
    limits = {}
    for constraint in field.metadata:
        for name, words in LIMITS.items():
            if hasattr(constraint, name):
                limits[name] = f"{words} {getattr(constraint, name)}"
    return " and ".join(limits.values())


def kind(annotation: Any) -> str:
    """A type in words."""
    if annotation in NAMES:
        return NAMES[annotation]
    origin = typing.get_origin(annotation)
    if origin is not None:
        return _generic(origin, typing.get_args(annotation), annotation)
    if isinstance(annotation, type) and issubclass(annotation, parts.Settings):
        name = annotation.__name__.lower()
        return f"[{name}](#{name})"
    return _named(annotation)


def _generic(origin: Any, arguments: tuple[Any, ...], annotation: Any) -> str:
    """A type with arguments in words: a choice, an optional value, a list, a mapping."""
    if origin is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("`null`" if choice is types.NoneType else kind(choice) for choice in arguments)
    if origin is tuple and arguments[-1] is ...:
        return f"list of {_plural(arguments[0])}"
    if origin is tuple:
        return " and ".join(map(kind, arguments))
    if origin is list:
        return f"list of {_plural(arguments[0])}"
    if origin is dict:
        item = kind(arguments[1])
        article = "a " if item in ("number", "text") else ""
        return f"{_plural(arguments[0])}, each with {article}{item}"
    return _named(annotation)


def _plural(annotation: Any) -> str:
    """A type of which there are several, in words."""
    return {str: "names", int: "integers"}.get(annotation) or kind(annotation)


def _named(annotation: Any) -> str:
    """A union of settings models in words."""
    return "a source of problems" if "Miniature" in str(annotation) else "a stage"


def default(field: FieldInfo) -> str:
    """The default as YAML; a key without a default is required."""
    if field.is_required():
        return "**required**"
    chosen = field.default
    if isinstance(chosen, parts.Settings):
        chosen = chosen.model_dump(mode="json", exclude_unset=True)
        return code(chosen) if chosen else "its own"
    return code(list(chosen) if isinstance(chosen, tuple) else chosen)


def code(chosen: Any) -> str:
    """A value as YAML on one line, in backticks."""
    if chosen == "":
        return "none"
    text = yaml.safe_dump(chosen, default_flow_style=True, width=1000, sort_keys=False, allow_unicode=True)
    text = text.removesuffix("...\n")  # the end of a document that is a bare scalar
    return f"`{text.strip()}`"


def presets(_: None) -> str:
    """The table of the settings in which the presets differ."""
    names = list(parts.PRESETS)
    keys = dict.fromkeys(key for preset in parts.PRESETS.values() for key in preset)
    policies = [parts.Policy(preset=name) for name in names]
    rows = []
    for key in keys:
        values = [code(getattr(policy, key)) for policy in policies]
        rows.append([f"`{key}`", *values])
    return table(["key", *(f"`{name}`" for name in names)], rows)


# ---------------------------------------------------------------- commands


def commands(_: None) -> str:
    """A section for each command, from its help."""
    group = typer.main.get_command(app)
    return "\n\n".join(command(name, click_command) for name, click_command in group.commands.items())


def command(name: str, click_command: Any) -> str:
    """The section of one command: its help, its usage, and the table of its arguments and options."""
    usage = ["limbeck", name]
    arguments = []
    options = []
    for parameter in click_command.params:
        row = [preset(parameter), parameter.help or ""]
        if parameter.param_type_name == "argument":
            word = metavar(parameter)
            usage.append(word if parameter.required else f"[{word}]")
            arguments.append([f"`{word}`", *row])
        elif parameter.name != "help":
            options.append([f"`{', '.join(parameter.opts)}`", *row])
    usage.append("[OPTIONS]")
    text = " ".join((click_command.help or "").split())
    parameters = table(["", "default", "meaning"], arguments + options)
    return f"## limbeck {name}\n\n{text}\n\n```text\n{' '.join(usage)}\n```\n\n{parameters}"


def metavar(parameter: Any) -> str:
    """The name of an argument in the usage line."""
    return parameter.metavar or parameter.name.upper()


def preset(parameter: Any) -> str:
    """The default of an argument or option; empty for flags and for options without one."""
    if parameter.required:
        return "**required**"
    chosen = parameter.default
    if chosen is False or chosen in (None, "", []) or callable(chosen):
        return ""
    return f"`{chosen}`"


# ---------------------------------------------------------------- tables


# ---------------------------------------------------------------- named benchmarks


def suites(_: str | None) -> str:
    """A section for each suite: its files, and for each protocol prompt, examples, metrics and sampling."""
    return "\n\n".join(_suite(suite) for suite in SUITES.values())


def _suite(suite: Suite) -> str:
    """The section of one suite."""
    files = ", ".join(f"`{pattern}`" for pattern in suite.files["test"])
    paper = f"[{suite.paper.title}]({suite.paper.url}) ({suite.paper.version})"
    columns = ", ".join(f"`{name}`" for name in suite.fields)
    lines = [
        f"### {suite.name}",
        f"{suite.title}: {suite.size:,} items. {paper}. Published at {_linked(suite.home)}.",
        f"Files, the first pattern that matches: {files} (Parquet, JSONL or CSV). Columns: {columns}.",
    ]
    return "\n\n".join([*lines, *(_protocol(protocol) for protocol in suite.protocols)])


def _linked(text: str) -> str:
    """A text whose addresses are links."""
    return re.sub(r"https://[^\s,)]+", lambda match: f"<{match[0]}>", text)


def _protocol(protocol: Protocol) -> str:
    """One way of measuring a suite."""
    source = protocol.source
    version = f", {source.version}" if source.version else ""
    prompt = protocol.prompt
    lines = [f"- source: [{source.title}]({source.url}){version}", f"- examples: {_shots(protocol)}"]
    lines += [f"- `{metric.name}`: {metric.extraction}" for metric in protocol.metrics]
    if protocol.metrics and protocol.metrics[0].answer and protocol.sampling.temperature:
        samples = protocol.sampling.samples
        vote = f"`cons@{samples}`" if samples > 1 else "`cons@N`, with `--samples N`"
        lines.append(f"- {vote}: the verdict on the most frequent answer, for each item")
    if protocol.sampling is None:
        options = ", ".join(f"`{option}`" for option in protocol.options) or "the letter"
        lines += [
            f"- `acc`: the option with the greatest log-likelihood, of {options} after a space",
            "- `acc_norm`: the same, divided by the number of its characters",
        ]
    lines.append(f"- sampling: {_suite_sampling(protocol)}")
    if protocol.note:
        lines.append(f"- {protocol.note}")
    kind = "a user's message" if prompt.chat else "a text to continue"
    text = prompt.description + prompt.template
    head = f"**As `{protocol.name}`**; the prompt is {kind}"
    head += f", an option is `{prompt.choice}`:" if "{choices}" in prompt.template else ":"
    return "\n\n".join([head, f"```text\n{text}\n```", "\n".join(lines)])


def _shots(protocol: Protocol) -> str:
    """The worked examples of a protocol in words."""
    shots = protocol.prompt.shots
    if shots is None:
        return "none"
    if shots.fixed:
        return f"{shots.count}, always the same"
    if shots.order == "random":
        return f"{shots.count} of the file `*{shots.split}*`, others for each item (seed 1234)"
    return f"the first {shots.count} of the item's category in the file `*{shots.split}*`"


def _suite_sampling(protocol: Protocol) -> str:
    """How a protocol samples, in words."""
    sampling = protocol.sampling
    if sampling is None:
        return "none"
    way = "greedy"
    if sampling.temperature:
        way = f"temperature {sampling.temperature}, top-p {sampling.top_p}"
    stop = ", ".join(f"`{text}`" for text in sampling.stop)
    responses = f"{sampling.samples} response{'s' * (sampling.samples > 1)} to each item"
    return f"{way}, {responses}, at most {sampling.max_new_tokens:,} tokens" + (
        f", until {stop}" if stop else ""
    )


def published(_: str | None) -> str:
    """The table of published scores, and their sources."""
    scores = published_scores()
    sources = list(dict.fromkeys((one.title, one.url, one.date, one.how) for one in scores))
    measured = {(one.suite, one.metric) for one in scores}
    columns = sorted(measured, key=lambda column: (list(SUITES).index(column[0]), column[1]))
    cells: dict[tuple[str, int], dict[tuple[str, str], str]] = {}
    for one in scores:
        number = sources.index((one.title, one.url, one.date, one.how)) + 1
        cells.setdefault((one.model, number), {})[one.suite, one.metric] = f"{one.score:.1f}"
    rows = [
        [model, f"[{number}]", *(found.get(column, "") for column in columns)]
        for (model, number), found in cells.items()
    ]
    heads = [f"`{suite}` {metric}".strip() for suite, metric in columns]
    lines = [table(["model", "source", *heads], rows), ""]
    for number, (title, url, date, how) in enumerate(sources, start=1):
        lines.append(f"- [{number}] [{title}]({url}), {date}: {how}")
    return "\n".join(lines)


# ---------------------------------------------------------------- tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append([cell.replace("|", "\\|") for cell in row])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PARTS: dict[str, Callable[[Any], str]] = {
    "settings": settings,
    "presets": presets,
    "commands": commands,
    "suites": suites,
    "published": published,
}


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
