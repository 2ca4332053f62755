"""The commands for a model's provenance and its release: why, recall, release.

A row is one training example. The lineage of a model is the tree of artifacts that it was made from; an
artifact is the folder with a finished stage's results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import MODEL, RUNS, AsJson, Home, open_store, print_json, print_rows, usage_error

if TYPE_CHECKING:
    from rich.tree import Tree

    from ..pipeline.provenance.lineage import Lineage, Recall

app = typer.Typer()

FACTS = ("rows", "pairs", "sampled", "kept", "accepted", "edited", "rejected", "parameters")


# ---------------------------------------------------------------- why


@app.command()
def why(
    model: Annotated[str, typer.Argument(help=f"{MODEL}; or a released directory")],
    runs: Home = RUNS,
    rows: Annotated[
        bool,
        typer.Option("--rows", help="list the rows that trained it: where they come from, who edited them"),
    ] = False,
    row: Annotated[
        str, typer.Option("--row", metavar="ID", help="show one of these rows", show_default=False)
    ] = "",
    fingerprints: Annotated[
        bool,
        typer.Option("--fingerprints", help="look for other models' traces in them: evidence, never proof"),
    ] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="with --fingerprints: a text or JSONL file of another model's outputs", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell what a model was made from: its licences first, then stages, problems, teachers and people down
    to the roots.

    For instance: `limbeck why quickstart/r1`, `limbeck why smollm2-135m`
    """
    from ..pipeline.provenance.lineage import find, rows_behind

    lineage = find(model, runs)
    if row:
        matches = [source for source in rows_behind(lineage) if source["id"] == row]
        if not matches:
            raise usage_error(
                f"{row}: no row of that id trained {lineage.head['stage']}; "
                f"`limbeck why {model} --rows` lists those that did"
            )
        _print_rows(matches, as_json, _full_row)
    elif fingerprints or corpus:
        _print_fingerprints(lineage, corpus, as_json)
    elif rows:
        sources = []
        for source in rows_behind(lineage):
            sources.append({key: value for key, value in source.items() if key != "row"})
        _print_rows(sources, as_json, _row_line)
    elif as_json:
        print(json.dumps({"ok": True, "data": lineage.tell(), "schema": 1}, ensure_ascii=False))
    else:
        _print_lineage(lineage)


def _print_rows(rows: list[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    """Print rows of a table without control characters: as one JSON result with `as_json`, else each as the
    text that `line` returns for it.
    """
    from .display import printable

    print_rows(rows, as_json, lambda row: printable(line(row)))


def _row_line(row: dict[str, Any]) -> str:
    """Return one line of the list of training rows: id, the stage that learned the row, the stage that gave
    it, the number of times it was learned, and its origin.
    """
    return f"{row['id']:36} {row['learned_by']:14} {row['given_by']:14} x{row['times']}  {_origin(row)}"


def _full_row(row: dict[str, Any]) -> str:
    """Return all that is known of a training row as text: its origin, prompt and response."""
    from ..pipeline.dataset_rows import response_text

    lines = [f"{row['id']}, given by {row['given_by']}, learned by {row['learned_by']}", _origin(row)]
    if "row" in row:
        lines += ["", row["row"]["prompt"], "", response_text(row["row"])]
    return "\n".join(lines)


def _origin(row: dict[str, Any]) -> str:
    """Return the origin of a training row (such as its problem or teacher) and, if a reviewer changed it,
    who did.
    """
    origin = ", ".join(f"{key} {str(value)[:40]}" for key, value in row["origin"].items())
    if row["editor"]:
        origin += f"; desk: {row['editor']}"
    return origin


def _print_fingerprints(lineage: Lineage, corpus: Path | None, as_json: bool) -> None:
    """Print the traces of other models that are found in the training rows behind a model.

    `corpus` is a file with another model's outputs to compare the rows with; None for none.
    """
    from dataclasses import asdict

    from ..pipeline.provenance.fingerprints import traces
    from ..pipeline.provenance.lineage import rows_behind

    rows = (source["row"] for source in rows_behind(lineage) if "row" in source)
    _print_rows([asdict(trace) for trace in traces(rows, corpus)], as_json, _trace_lines)
    if not as_json:
        print("This is evidence, never proof: people quote, and common phrases are common.")


def _trace_lines(trace: dict[str, Any]) -> str:
    """Return one kind of trace as text: how many of the rows have it, then examples with the rows' ids."""
    lines = [f"{trace['rows']} of {trace['of']} rows: {trace['kind']}"]
    lines += [f"    {row_id}: {text}" for row_id, text in trace["examples"]]
    return "\n".join(lines)


def _print_lineage(lineage: Lineage) -> None:
    """Print the lineage of a model: the conclusion on its licence, the licences, the sources, and the tree of
    artifacts.
    """
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from .display import printable

    width = {} if sys.stdout.isatty() else {"width": 10_000}  # no line is cut in a pipe
    console = Console(highlight=False, **width)
    head = lineage.head
    lines = [f"{head['stage']} ({head['artifact']}): {lineage.conclusion}", *_licence_lines(lineage)]
    for kind, names in lineage.sources().items():
        lines.append(f"{kind}: {', '.join(names) or 'none'}")
    for line in lines:
        console.print(Text(printable(line)))
    tree = Tree("", hide_root=True)
    _grow(tree, lineage, lineage.root, head["stage"], set())
    console.print(tree)


def _licence_lines(lineage: Lineage) -> list[str]:
    """Return one line for each licence that binds a model, and one for each right that somebody claimed in
    order to do what a licence forbids.
    """
    from ..pipeline.provenance.licences import bind, terms

    lines = []
    for licence in bind(lineage.licences).licences:
        entry = terms(licence)
        title = f"{entry.title}, {entry.dated}" if entry.dated else entry.title
        note = "" if entry.read == "primary" else " (quoted by others)"
        lines.append(f"  {licence}: {title}; {entry.source}{note}")
    for right in lineage.head.get("rights", []):
        claimed = f"claimed by {right.get('by', 'somebody')} on {right.get('date', 'some day')}"
        lines.append(f"  {claimed}: {right['reason']} (against {right['clause']})")
    return lines


def _grow(tree: Tree, lineage: Lineage, key: str, name: str, drawn: set[str]) -> None:
    """Add an artifact to the printed tree, and recursively the artifacts that it was made from.

    `key` is the artifact's key in `lineage`, `name` the name that its reader gives it. `drawn` holds the keys
    that the tree has already: such an artifact is added again without its parents.
    """
    from rich.text import Text

    from .display import printable

    label = _label(lineage.entries[key], name)
    if key in drawn:
        tree.add(Text(printable(f"{label} (as above)")))
        return
    branch = tree.add(Text(printable(label)))
    drawn.add(key)
    for cited, parent in lineage.parents(key).items():
        _grow(branch, lineage, parent, cited, drawn)


def _label(entry: dict[str, Any], name: str) -> str:
    """Return an artifact's label in the tree: `dev1 (sft-2f31...): 120 rows, 34 edited, MIT`.

    `entry` is its entry in the lineage.
    """
    notes = entry.get("notes") or {}
    facts = [f"{notes[fact]:,} {fact}" for fact in FACTS if notes.get(fact)]
    if entry["kind"] == "curate":
        facts.append("desk: " + ", ".join(entry["sources"]["editors"]))
    check = entry.get("decontamination")
    if check:
        facts.append(f"{check['checked']:,} compared with the test, {len(check['dropped'])} left out")
    if entry["kind"] in ("load", "remote"):
        facts.append(" AND ".join(entry["licences"]))
    if entry.get("continued"):
        facts.append("continued from {artifact} at step {step}".format(**entry["continued"]))
    if notes.get("source"):
        facts.append(f"from {notes['source']}")
    label = f"{name} ({entry['artifact']})"
    return f"{label}: {', '.join(facts)}" if facts else label


# ---------------------------------------------------------------- recall


@app.command()
def recall(
    row: Annotated[
        str, typer.Argument(metavar="ROW-ID", help="a row's id, or a problem's: all rows that answer it")
    ],
    runs: Home = RUNS,
    given_by: Annotated[
        str,
        typer.Option(
            "--from", metavar="STAGE", help="only the rows that this stage gave", show_default=False
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Say what a withdrawn row has reached, also through models that learned from it, and what a rerun would
    redo.
    """
    from dataclasses import asdict

    from ..pipeline.provenance.lineage import recall as trace_row

    open_store(runs)
    recalled = trace_row(row, runs, given_by)
    if as_json:
        print_json(asdict(recalled))
    else:
        _print_recalled(recalled)


def _print_recalled(recalled: Recall) -> None:
    """Print the artifacts that a withdrawn row reached, and the stages, time and FLOPs of a rerun without the
    row.
    """
    reached = {
        "held by": recalled.holds,
        "learned by": recalled.learned,
        "reached through them": recalled.tainted,
        "may have been practised on by": recalled.unsure,
    }
    for title, artifacts in reached.items():
        if artifacts:
            names = [f"{stage} ({name})" for name, stage in artifacts.items()]
            print(f"{title}: {', '.join(names)}")
    for run, stages in recalled.again.items():
        print(f"a rerun of {run} without it: {', '.join(stages)}")
    if recalled.again:
        print(f"which took {recalled.seconds:.1f} s and {recalled.flops:.3g} FLOPs")
    else:
        print("nothing would have to be computed again")


# ---------------------------------------------------------------- release


@app.command()
def release(
    model: Annotated[str, typer.Argument(help=f"{MODEL}; a stage must have made it")],
    out: Annotated[Path, typer.Argument(help="the directory to write; it must not exist yet")],
    runs: Home = RUNS,
    name: Annotated[
        str, typer.Option(help="what the model is called; else as the directory", show_default=False)
    ] = "",
    gguf: Annotated[
        str,
        typer.Option(
            "--gguf", metavar="TYPE", help="f32, f16, q8_0, none; auto is f16 where the format holds it"
        ),
    ] = "auto",
) -> None:
    """Write a model that others can load: weights, tokenizer, card, lineage, checksums, and the recipe that
    makes it again.

    A licence that forbids it, or a name that breaks a naming duty, is refused with its clause.

    For instance: `limbeck release quickstart/r1 my-model`
    """
    from ..pipeline.provenance.release import release as write_release

    released = write_release(model, out, runs, name, gguf)
    print(released.folder)
    for note in released.notes:
        print(f"note: {note}", file=sys.stderr)
