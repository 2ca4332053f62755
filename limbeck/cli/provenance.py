"""The commands that tell where a model comes from, and hand it on: why, recall, release."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import RUNS, AsJson, Home, mistake, open_store

MODEL = "a released directory, RUN/STAGE, a stage's name, or the beginning of an artifact's name"
FACTS = ("rows", "pairs", "sampled", "kept", "accepted", "edited", "rejected", "parameters")


def why(
    model: Annotated[str, typer.Argument(help=MODEL)],
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
    """Tell what a model was made from: its licences first, then stages, problems, teachers and people down to the roots."""
    from ..pipeline.provenance.lineage import find, rows_behind

    lineage = find(model, runs)
    if row:
        found = [one for one in rows_behind(lineage) if one["id"] == row]
        if not found:
            raise mistake(
                f"{row}: no row of that id trained {lineage.head['stage']}; `limbeck why {model} --rows` lists those that did"
            )
        _emit(found, as_json, _tell_row)
    elif fingerprints or corpus:
        _trace(lineage, corpus, as_json)
    elif rows:
        listed = ({k: v for k, v in one.items() if k != "row"} for one in rows_behind(lineage))
        _emit(
            list(listed),
            as_json,
            lambda r: f"{r['id']:36} {r['learned_by']:14} {r['given_by']:14} x{r['times']}  {_hands(r)}",
        )
    elif as_json:
        print(json.dumps({"ok": True, "data": lineage.tell(), "schema": 1}, ensure_ascii=False))
    else:
        _show(lineage)


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
    """Say what a withdrawn row has reached, also through models that learned from it, and what a rerun would redo."""
    from dataclasses import asdict

    from ..pipeline.provenance.lineage import recall as follow

    open_store(runs)
    found = follow(row, runs, given_by)
    if as_json:
        print(json.dumps({"schema": 1, "ok": True, "data": asdict(found)}, ensure_ascii=False))
        return
    for title, artifacts in (
        ("held by", found.holds),
        ("learned by", found.learned),
        ("reached through them", found.tainted),
        ("may have been practised on by", found.unsure),
    ):
        if artifacts:
            print(f"{title}: {', '.join(f'{stage} ({name})' for name, stage in artifacts.items())}")
    for run, stages in found.again.items():
        print(f"a rerun of {run} without it: {', '.join(stages)}")
    print(
        f"which took {found.seconds:.1f} s and {found.flops:.3g} FLOPs"
        if found.again
        else "nothing would have to be computed again"
    )


def release(
    model: Annotated[str, typer.Argument(help=MODEL.removeprefix("a released directory, "))],
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
    """Write a model that others can load: weights, tokenizer, card, lineage, checksums, and the recipe that makes it again.

    A licence that forbids it, or a name that breaks a naming duty, is refused with its clause.
    """
    from ..pipeline.provenance.release import release as hand_on

    released = hand_on(model, out, runs, name, gguf)
    print(released.folder)
    for note in released.notes:
        print(f"note: {note}", file=sys.stderr)


# ---------------------------------------------------------------- for people


def _emit(rows: list[dict[str, Any]], as_json: bool, line: Any) -> None:
    from .display import printable

    if as_json:
        print(json.dumps({"schema": 1, "ok": True, "data": rows}, ensure_ascii=False))
    for one in rows if not as_json else ():
        print(printable(line(one)).rstrip())


def _trace(lineage: Any, corpus: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from ..pipeline.provenance.fingerprints import traces
    from ..pipeline.provenance.lineage import rows_behind

    found = [
        asdict(trace)
        for trace in traces((one["row"] for one in rows_behind(lineage) if "row" in one), corpus)
    ]
    _emit(
        found,
        as_json,
        lambda t: (
            f"{t['rows']} of {t['of']} rows: {t['kind']}"
            + "".join(f"\n    {id}: {text}" for id, text in t["examples"])
        ),
    )
    if not as_json:
        print("This is evidence, never proof: people quote, and common phrases are common.")


def _hands(row: dict[str, Any]) -> str:
    origin = ", ".join(f"{key} {str(value)[:40]}" for key, value in row["origin"].items())
    return origin + (f"; desk: {row['editor']}" if row["editor"] else "")


def _tell_row(row: dict[str, Any]) -> str:
    from ..pipeline.dataset_rows import said

    text = [f"{row['id']}, given by {row['given_by']}, learned by {row['learned_by']}", _hands(row)]
    if "row" in row:
        text += ["", row["row"]["prompt"], "", said(row["row"])]
    return "\n".join(text)


def _show(lineage: Any) -> None:
    """The conclusion, the sources, and the tree."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from ..pipeline.provenance.licences import bind, terms
    from .display import printable

    head = lineage.head
    console = Console(
        highlight=False, **({} if sys.stdout.isatty() else {"width": 10_000})
    )  # nothing is cut in a pipe

    def say(text: str) -> None:
        console.print(Text(printable(text)))

    say(f"{head['stage']} ({head['artifact']}): {lineage.conclusion}")
    for licence in bind(lineage.licences).licences:
        said = terms(licence)
        say(
            f"  {licence}: {said.title}{f', {said.dated}' if said.dated else ''}; {said.source}"
            + (" (quoted by others)" if said.read != "primary" else "")
        )
    for right in head.get("rights", []):
        say(
            f"  claimed by {right.get('by', 'somebody')} on {right.get('date', 'some day')}: {right['reason']} (against {right['clause']})"
        )
    for kind, names in lineage.sources().items():
        say(f"{kind}: {', '.join(names) or 'none'}")
    seen: set[str] = set()

    def grow(tree: Tree, key: str, name: str) -> None:
        entry = lineage.entries[key]
        told = key in seen
        branch = tree.add(Text(printable(_label(entry, name) + (" (as above)" if told else ""))))
        seen.add(key)
        for cited, parent in () if told else lineage.parents(key).items():
            grow(branch, parent, cited)

    tree = Tree("", hide_root=True)
    grow(tree, lineage.root, head["stage"])
    console.print(tree)


def _label(entry: Any, name: str) -> str:
    """`dev1 (sft-2f31...): 120 rows, 34 edited by Ada, MIT`."""
    notes = entry.get("notes") or {}
    facts = [f"{notes[fact]:,} {fact}" for fact in FACTS if notes.get(fact)]
    if entry["kind"] == "curate":
        facts.append("desk: " + ", ".join(entry["sources"]["editors"]))
    if finding := entry.get("decontamination"):
        facts.append(f"{finding['checked']:,} compared with the test, {len(finding['dropped'])} left out")
    facts += [" AND ".join(entry["licences"])] if entry["kind"] in ("load", "remote") else []
    if source := notes.get("source"):
        facts.append(f"from {source}")
    return f"{name} ({entry['artifact']})" + (f": {', '.join(facts)}" if facts else "")
