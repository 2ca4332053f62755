"""The ledger of a recipe's generations, one JSON line each: what it made, what the gate decided, what it
cost.

runs/NAME-generations/ledger.jsonl    the lines; the first has the digest of the recipe
runs/NAME-generations/index.html      the page
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...config.recipe import Recipe
from ...eval.gate import Check, Decision, family_rate
from ...eval.statistics import Interval
from ...run_log import read
from ...types import LimbeckError
from ..store import digest_of, write
from .evidence import Measured

FILE = "ledger.jsonl"
PAGE = "index.html"
SUFFIX = "-generations"  # of a ledger's folder
SCHEMA = 1  # version of a line's layout
UNCOMPARED = {"description", "workers", "threads"}  # settings that may change between two calls


@dataclass(frozen=True)
class Entry:
    """One generation: `Entry(2, "quickstart-g2", candidate, champion, decision, True, {"seconds": 61.0})`.

    `run` is the run's name. `candidate` is the model that it made and `champion` the best one before it: the
    base for the first generation, which is promoted in any case. `training` has the seconds, FLOPs and tokens
    of the stages that this generation added, evaluations aside.
    """

    generation: int
    run: str
    candidate: Measured
    champion: Measured
    decision: Decision
    promoted: bool
    training: Mapping[str, float]

    @property
    def first(self) -> bool:
        """True for the first generation, whose model has no model before it."""
        return self.generation == 1


@dataclass(frozen=True)
class Ledger:
    """The decided generations of the recipe `name`, in order, in the folder `folder`."""

    name: str
    folder: Path
    recipe: str
    entries: tuple[Entry, ...] = ()

    @property
    def promoted(self) -> list[bool]:
        """For each generation, whether its model was promoted."""
        return [entry.promoted for entry in self.entries]

    @property
    def best(self) -> Entry:
        """The generation whose model is the champion now."""
        return [entry for entry in self.entries if entry.promoted][-1]

    @property
    def gates(self) -> int:
        """The number of decisions that could have been false."""
        return max(0, len(self.entries) - 1)

    def rate(self) -> float:
        """Return the probability, at most, that any of the decisions promoted falsely."""
        return family_rate(self.entries[-1].decision.alpha, self.gates) if self.entries else 0.0

    def with_entry(self, entry: Entry) -> Ledger:
        """Return the ledger with another generation, and write it to disk."""
        ledger = Ledger(self.name, self.folder, self.recipe, (*self.entries, entry))
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [_to_line(one, self.recipe) for one in ledger.entries]
        write(self.folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return ledger


def folder_of(name: str, runs: Path) -> Path:
    """Return the folder of the ledger of the recipe `name`."""
    return runs / f"{name}{SUFFIX}"


def ledger_pages(runs: Path) -> dict[str, Path]:
    """Return the pages of all ledgers in a folder of runs, by the names of their recipes."""
    pages = sorted(runs.glob(f"*{SUFFIX}/{PAGE}"))
    return {page.parent.name.removesuffix(SUFFIX): page for page in pages}


def open_ledger(recipe: Recipe, runs: Path) -> Ledger:
    """Return the ledger of a recipe; empty before its first generation is decided.

    Raises LimbeckError if it was written for other settings of the recipe."""
    folder = folder_of(recipe.name, runs)
    # without what is not set: a setting that a later version adds does not make another recipe of this one
    digest = digest_of(recipe.model_dump(mode="json", exclude=UNCOMPARED, exclude_none=True))
    lines = list(read(folder / FILE))
    if lines and lines[0]["recipe"] != digest:
        raise LimbeckError(
            f"{folder / FILE} is of other settings of {recipe.name}; give this recipe another name (--set "
            f"name=...), or remove {folder} to begin again"
        )
    return Ledger(recipe.name, folder, digest, tuple(_from_line(line) for line in lines))


def to_json(entry: Entry, price: float | None = None) -> dict[str, Any]:
    """Return a generation as a JSON object; `price` is in dollars an hour of the machine."""
    value = asdict(entry)
    for side in ("candidate", "champion"):
        measured: Measured = getattr(entry, side)
        value[side] |= {
            "seconds_per_right": measured.seconds_per_right,
            "flops_per_right": measured.flops_per_right,
            "dollars_per_right": dollars(measured.seconds_per_right, price),
        }
    value["dollars"] = dollars(entry.training["seconds"], price)
    return value


def dollars(seconds: float | None, price: float | None) -> float | None:
    """Return the dollars of seconds at a price an hour; None if either is not known."""
    return None if seconds is None or price is None else seconds / 3600 * price


def _to_line(entry: Entry, recipe: str) -> dict[str, Any]:
    """Return a generation as the JSON object of its line."""
    return {"schema": SCHEMA, "recipe": recipe, **asdict(entry)}


def _from_line(line: Mapping[str, Any]) -> Entry:
    """Return the generation in a line."""
    decision = line["decision"]
    return Entry(
        line["generation"],
        line["run"],
        _measured(line["candidate"]),
        _measured(line["champion"]),
        Decision(decision["alpha"], tuple(Check(**check) for check in decision["checks"])),
        line["promoted"],
        line["training"],
    )


def _measured(value: Mapping[str, Any]) -> Measured:
    """Return a model in a line."""
    return Measured(**{**value, "accuracy": Interval(**value["accuracy"])})


def training_costs(manifests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the sums of seconds, FLOPs and tokens over stages' manifests."""
    return {
        cost: sum(manifest.get(cost) or 0.0 for manifest in manifests)
        for cost in ("seconds", "flops", "tokens")
    }
