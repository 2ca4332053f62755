"""The command `limbeck doctor`, which examines this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .options import AsJson, print_rows

app = typer.Typer()

_SIGNS = {True: "ok", False: "lacks", None: "note"}


@app.command()
def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="time the compiled kernels anew, on a quiet machine")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and lacks, and what to do about it.

    For instance: `limbeck doctor`, `limbeck doctor --measure`
    """
    from dataclasses import asdict

    from .doctor import examine

    rows = [asdict(finding) for finding in examine(measure=measure)]
    print_rows(rows, as_json, _finding_lines)


def _finding_lines(row: dict[str, Any]) -> str:
    """Return one finding (a `doctor.Finding` as a dict) as lines of text: its value, its advice, and its
    table.
    """
    lines = [f"{_SIGNS[row['ok']]:6} {row['name']:22} {row['value']}"]
    if row["advice"]:
        lines.append(f"{'':7}-> {row['advice']}")
    for timing in row["table"]:
        lines.append(f"{'':7}{_timing_line(timing)}")
    return "\n".join(lines)


def _timing_line(row: dict[str, Any]) -> str:
    """Return one line of the table of kernels: an operation at one shape, with the time in microseconds of
    Limbeck's kernel and of torch's.
    """
    ours = f"{1e6 * row['ours']:,.0f} us"
    torch = f"{1e6 * row['torch']:,.0f} us"
    return f"{row['operation']:10} {row['shape']:40} ours {ours:>11}  torch {torch:>11}  used: {row['used']}"
