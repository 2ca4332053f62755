"""How long a recipe takes on this machine: each stage's tokens (recipes.py) at this machine's rates (machine.py), and all of
them on its workers, one waiting for another as the graph says."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

from ..model.config import ModelConfig
from .machine import SPREAD, Asked, Rates
from .recipes import SMALL, Effort, Rollout

STAGE = 0.4  # seconds that any stage takes: reading problems, scoring, records, syncing files
PARAMETER = 3e-8  # seconds for each weight that is loaded, saved, synced and hashed
LEAD = 2  # rows that an engine still has when the last ones end
GLUE = 1.12  # of what engine and learner take, scoring, packing and records beside them: from the quickstart's own records
NUCLEUS = 1.2  # sampling with top-p or greedily, of what it takes at temperature 1 alone
DESK_SECONDS = 60  # a person's, a row


@dataclass(frozen=True)
class Forecast:
    """A stage's seconds with their interval, its tokens and FLOPs, and what binds it.

    `Forecast("zero", "rl", 70.0, 45.0, 105.0, {"rollout": 38.0, "learning": 24.0, ...}, "rollout: 54 %", 1.7e6, 1.2e12)`
    """

    stage: str
    kind: str
    seconds: float
    low: float
    high: float
    parts: dict[str, float]
    binds: str
    tokens: float
    flops: float
    people: int = 0
    inputs: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """As a run's `forecast.json` has it."""
        rounded = {name: round(seconds, 2) for name, seconds in self.parts.items() if seconds >= 0.01}
        return {
            "stage": self.stage, "kind": self.kind, "seconds": round(self.seconds, 2), "low": round(self.low, 2), "high": round(self.high, 2),
            "parts": rounded, "binds": self.binds, "tokens": round(self.tokens), "flops": float(f"{self.flops:.3g}"), "people": self.people,
        }  # fmt: skip


def asked_of(efforts: Iterable[Effort], configs: Mapping[str, ModelConfig]) -> dict[str, Asked]:
    """What of each stage's model has to be measured, by stage; models of one shape and use share their measurement."""
    shapes: dict[tuple, list[Effort]] = {}
    for effort in efforts:
        if effort.model and (effort.rollouts or effort.learned or effort.read):
            shapes.setdefault((configs[effort.model],), []).append(effort)
        if effort.reader:
            shapes.setdefault((configs[effort.reader],), [])
    found: dict[str, Asked] = {}
    for (config,), group in shapes.items():
        learning = [e for e in group if e.learned]
        for i, optimizer in enumerate(sorted({e.optimizer for e in learning}) or ["adamw"]):
            mine = [e for e in learning if e.optimizer == optimizer]
            sizes = [e.learned / max(1, e.updates) for e in mine] or [1024]
            rollouts = [r for e in group for r in e.rollouts]
            lengths = [e.length for e in mine if e.length] or [64]
            found[_name(config, optimizer)] = Asked(
                config, optimizer, (_round(min(sizes)), _round(max(max(sizes), 2 * min(sizes)))), _round(sum(lengths) / len(lengths)),
                (8, _in_flight(config)) if i == 0 else (), _round(sum(r.prompt for r in rollouts) / len(rollouts)) if rollouts else 32,
                _round(sum(r.length for r in rollouts) / len(rollouts)) if rollouts else 16,
            )  # fmt: skip
    return found


def _name(config: ModelConfig, optimizer: str) -> str:
    return f"{hash(config)}/{optimizer}"


def _round(value: float) -> int:
    """To a power of the fourth root of two, so that small changes of a recipe measure nothing anew."""
    return max(2, round(2 ** (round(4 * log(max(2.0, value), 2)) / 4)))


def _in_flight(config: ModelConfig) -> int:
    return 256 if config.parameters < SMALL else 64


def price(effort: Effort, configs: Mapping[str, ModelConfig], rates: Rates) -> Forecast:
    """One stage at the measured rates."""
    parts: dict[str, float] = {}
    config = configs.get(effort.model)
    if config is not None and (effort.rollouts or effort.learned):
        names = [name for name in rates.models if name.startswith(f"{hash(config)}/")]
        mine = next((name for name in names if name.endswith(f"/{effort.optimizer}")), names[0])
        speaks = next(name for name in names if rates.models[name][0]["roll"])
        if effort.rollouts:
            parts["rollout"] = GLUE * sum(_rollout(r, effort, config, rates, speaks) for r in effort.rollouts)
        if effort.learned:
            parts["learning"] = (GLUE if effort.rollouts else 1.0) * effort.updates * rates.learn(mine, effort.learned / effort.updates)
    if effort.read:
        reader = next(name for name in rates.models if name.startswith(f"{hash(configs[effort.reader])}/"))
        parts["teacher and reference"] = effort.read / 1024 * rates.learn(reader, 1024) / 3
    if effort.written:
        parts["writing the corpus"] = effort.written * max(rates.worlds.values(), default=0.0)
    parts["loading and saving"] = STAGE * (effort.kind not in ("curate", "general")) + PARAMETER * _weights(effort, configs)
    seconds = sum(parts.values())
    doubt = exp(sqrt(log(SPREAD) ** 2 + (log(effort.sure) * _unsure(parts)) ** 2))
    name = max(parts, key=parts.get)
    flops = effort.flops(config) if config else 0.0
    return Forecast(
        effort.stage, effort.kind, seconds, seconds / doubt, seconds * doubt, parts, f"{name}: {parts[name] / max(seconds, 1e-9):.0%}",
        effort.sampled + effort.learned, flops, effort.people, effort.inputs,
    )  # fmt: skip


def _unsure(parts: Mapping[str, float]) -> float:
    """The share of the time that depends on how long completions are."""
    known = parts.get("writing the corpus", 0.0) + parts["loading and saving"]
    return 1 - known / max(1e-9, sum(parts.values()))


def _weights(effort: Effort, configs: Mapping[str, ModelConfig]) -> float:
    config = configs.get(effort.model)
    return (1.0 if effort.saved else 0.5) * config.parameters if config else 0.0


def _rollout(rollout: Rollout, effort: Effort, config: ModelConfig, rates: Rates, name: str) -> float:
    """Rows decode side by side; when all prompts are in, ever fewer of them, until the longest one ends."""
    flight = min(rollout.rows, _in_flight(config) if effort.kind != "rl" else 256)
    fixed = rates.step(name, LEAD)
    each = max(0.0, rates.step(name, max(flight, LEAD + 1)) - fixed) / max(1.0, flight - LEAD)
    steps = max(rollout.longest, rollout.rows * rollout.length / max(1.0, flight) + rollout.longest / 2)
    prefill = rollout.prompts * rollout.prompt * rates.learn(name, 1024) / 1024 / 3
    kind = NUCLEUS if effort.kind == "evaluate" else 1.0
    return rollout.calls * (kind * (steps * fixed + rollout.rows * rollout.length * each) + prefill)


def wall(forecasts: Mapping[str, Forecast], workers: int, start: float = 0.0, key: str = "seconds") -> float:
    """Seconds on the wall: stages on `workers`, those first that most others wait for (as `pipeline/run.py` does)."""
    after = {name: {other for other in forecasts if name in forecasts[other].inputs} for name in forecasts}

    def behind(name: str, seen: set[str]) -> set[str]:
        for other in after[name] - seen:
            seen |= {other}
            behind(other, seen)
        return seen

    urgency = {name: -len(behind(name, set())) for name in forecasts}
    waiting = {name: {cited for cited in f.inputs if cited in forecasts} for name, f in forecasts.items()}
    now, running, left = start, [], dict.fromkeys(forecasts)
    done: set[str] = set()
    while left or running:
        ready = sorted((n for n in left if waiting[n] <= done), key=lambda n: urgency[n])
        for name in ready[: workers - len(running)]:
            heapq.heappush(running, (now + getattr(forecasts[name], key), name))
            left.pop(name)
        if not running:
            break
        now, name = heapq.heappop(running)
        done.add(name)
    return now
