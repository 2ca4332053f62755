"""What several commands take, and how they open what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Home = Annotated[Path, typer.Option("--runs", help="where runs and their artifacts live")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable, on standard output")]
RUNS = Path("runs")


def mistake(text: str) -> Exception:
    from ..types import LimbeckError

    return LimbeckError(text)


def open_store(runs: Path) -> Any:
    from ..pipeline.store import Store

    if not (runs / "store").exists():
        raise mistake(f"{runs}/store does not exist; nothing has been run there yet")
    return Store(runs / "store")
