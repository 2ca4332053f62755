"""What was measured of Limbeck on one card, beside what the planner foresees for the same work: seconds as
the forecast of a recipe has them, and memory as the fit of a stage.

Nothing was fitted to these figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..config.parts import Optimizer
from ..model.config import ModelConfig
from . import cluster as clusters
from .cluster import Cluster
from .forecast import price_on
from .inference import Replica
from .micro_batch import MicroBatch
from .roofline import Roofline
from .stage_memory import GIB, Learning
from .stage_work import Rollout, StageWork

FILE = Path(__file__).with_name("card_runs.yaml")
CONTEXT = 1000  # tokens of a row whose steps were timed
KEPT = {False: "all kept", "keep_attention": "attention kept", True: "computed again"}
GROUPS = (32, 8, 120, 256)  # prompts of a rollout, completions of each, tokens of a prompt, of a completion


class CardRun(NamedTuple):
    """One measured figure and its forecast, both in `unit`."""

    name: str
    unit: str
    seen: float
    foreseen: float

    def tell(self) -> str:
        """Return the figure as one line of the table."""
        error = self.foreseen / self.seen - 1
        return f"{self.name[:46]:46} {self.unit:24} {self.seen:>12.5g} {self.foreseen:>12.5g} {error:>+7.1%}"


def lines() -> list[str]:
    """Return the table of all figures for `limbeck plan verify`, under a line that says what was measured."""
    return [f"Limbeck on {_tree()['seen']} (bench.gpu):", *(run.tell() for run in card_runs())]


def card_runs() -> Iterator[CardRun]:
    """Yield every measured figure with its forecast."""
    card = clusters.cluster(_tree()["card"])
    shapes = {name: ModelConfig(**sizes) for name, sizes in _tree()["shapes"].items()}
    for name, rate in _tree()["rollouts"].items():
        yield CardRun(f"{name} rollout of 256 x 256", "tokens/s", rate, _rollout(shapes[name], card))
    for name, steps in _tree()["steps"].items():
        for rows, ms in steps.items():
            step = Replica(shapes[name], card, 1, "bf16").decode(rows, CONTEXT)
            yield CardRun(f"{name} step, {rows} x {CONTEXT:,} tokens", "ms", ms, 1e3 * step.seconds)
    for row in _tree()["updates"]:
        yield from _update(row, shapes[row["shape"]], card)


def _rollout(config: ModelConfig, card: Cluster) -> float:
    """Return the tokens a second of a rollout."""
    prompts, group, prompt, length = GROUPS
    rollout = Rollout(1, prompts * group, length, length, prompt, prompts)
    work = StageWork("", "rl", "model", (rollout,), precision="bfloat16")
    return rollout.tokens / price_on(work, {"model": config}, card).parts["rollout"]


def _update(row: dict[str, Any], config: ModelConfig, card: Cluster) -> Iterator[CardRun]:
    """Yield the tokens a second of an update, and its memory if that was noted."""
    lengths = row["lengths"]
    tokens = sum(lengths)
    recompute = row["recompute"]
    work = StageWork(
        "", "sft", "model", updates=1, learned=tokens, length=max(lengths), precision="bfloat16",
        recompute=recompute,
    )  # fmt: skip
    seconds = price_on(work, {"model": config}, card).parts["learning"]
    name = f"{row['shape']} update of {len(lengths)} x {lengths[0]:,}, {KEPT[recompute]}"
    yield CardRun(name, "tokens/s", row["tokens_s"], tokens / seconds)
    if "gib" in row:
        batch = MicroBatch(tokens, tokens, max(lengths), len(lengths), tokens)
        units = Roofline(card.chip, "bf16").units
        peak = Learning(config, 2, batch, Optimizer(), recompute, units=units).peak()
        inputs = (row["inputs"] - 1) * 2 * config.layers * tokens * config.hidden_size
        yield CardRun(name, "GiB", row["gib"], (peak.total + inputs) / GIB)


@cache
def _tree() -> dict[str, Any]:
    """Return the parsed content of card_runs.yaml."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))
