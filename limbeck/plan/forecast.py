"""How long a recipe takes on this machine: each stage's tokens (stage_work.py) at this machine's rates (machine_rates.py), and all of
them on its workers, one waiting for another as the graph says."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, hypot, log, log2
from typing import Any

from ..model.config import ModelConfig
from ..types import LimbeckError
from .cluster import Cluster
from .constants import constants
from .inference import Replica
from .machine_rates import FEW, SPREAD, Asked, Rates, Use
from .rl import LEARNER_MFU, Lengths, decode_seconds
from .stage_work import SMALL, Rollout, StageWork

STAGE = 0.4  # seconds that any stage takes: reading problems, scoring, records, syncing files
PARAMETER = 3e-8  # seconds for each weight that is loaded, saved, synced and hashed
LEAD = 2  # rows that an engine still has when the last ones end
HANDLING = 18e-6  # seconds for a sampled token beside the engine: text, scores, packing, records. Fitted to the quickstart's records
DESK_SECONDS = 60  # a person's, a row: guessed
REACHED = 0.75  # of a large square product's FLOP/s, learning of a large model with many tokens: from SmolLM2's fine-tuning
ELSEWHERE = 2.0  # how sure a stage's time on chips is that nobody has measured: a factor
START = 30.0  # seconds to start a stage there: processes, weights, compiling
OPERATIONS = 20  # that the host starts for a layer, forward


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
            "stage": self.stage,
            "kind": self.kind,
            "seconds": round(self.seconds, 2),
            "low": round(self.low, 2),
            "high": round(self.high, 2),
            "parts": rounded,
            "binds": self.binds,
            "tokens": round(self.tokens),
            "flops": float(f"{self.flops:.3g}"),
            "people": self.people,
        }


def asked_of(efforts: Iterable[StageWork], configs: Mapping[str, ModelConfig]) -> dict[Use, Asked]:
    """What of the stages' models has to be measured; models of one shape and use share their measurement."""
    shapes: dict[ModelConfig, list[StageWork]] = {}
    for effort in efforts:
        if effort.model and (effort.rollouts or effort.learned or effort.read):
            shapes.setdefault(configs[effort.model], []).append(effort)
        if effort.reader:
            shapes.setdefault(configs[effort.reader], [])
    found: dict[Use, Asked] = {}
    for config, group in shapes.items():
        learning = [e for e in group if e.learned]
        for i, optimizer in enumerate(sorted({e.optimizer for e in learning}) or ["adamw"]):
            mine = [e for e in learning if e.optimizer == optimizer]
            sizes = [e.learned / max(1, e.updates) for e in mine] or [1024]
            rollouts = [r for e in group for r in e.rollouts]
            lengths = [e.length for e in mine if e.length] or [64]
            found[config, optimizer] = Asked(
                config,
                optimizer,
                (_round(min(sizes)), _round(max(max(sizes), 2 * min(sizes)))),
                _round(sum(lengths) / len(lengths)),
                (8, _in_flight(config)) if i == 0 else (),
                _round(sum(r.prompt for r in rollouts) / len(rollouts)) if rollouts else 32,
                _round(sum(r.length for r in rollouts) / len(rollouts)) if rollouts else 16,
            )
    return found


def _round(value: float) -> int:
    """To a power of the fourth root of two, so that small changes of a recipe measure nothing anew."""
    return max(2, round(2 ** (round(4 * log2(max(2.0, value))) / 4)))


def _in_flight(config: ModelConfig) -> int:
    return 256 if config.parameters < SMALL else 64


def price(effort: StageWork, configs: Mapping[str, ModelConfig], rates: Rates) -> Forecast:
    """One stage at the measured rates."""
    parts: dict[str, float] = {}
    config = configs.get(effort.model)
    if config is not None and (effort.rollouts or effort.learned):
        uses = [use for use in rates.models if use[0] == config]
        mine = next((use for use in uses if use[1] == effort.optimizer), uses[0])
        speaks = next(use for use in uses if rates.models[use][0]["roll"])
        if effort.rollouts:
            parts["rollout"] = HANDLING * effort.sampled + sum(
                _rollout(r, effort, config, rates, speaks) for r in effort.rollouts
            )
        if effort.learned:
            parts["learning"] = effort.updates * _update(effort, config, rates, mine)
    if effort.read:
        reader = next(use for use in rates.models if use[0] == configs[effort.reader])
        parts["teacher and reference"] = effort.read / 1024 * rates.learn(reader, 1024) / 3
    if effort.written:
        parts["writing the corpus"] = effort.written * max(rates.worlds.values(), default=0.0)
    parts["loading and saving"] = STAGE * (effort.kind not in ("curate", "general")) + PARAMETER * _weights(
        effort, configs
    )
    return _foreseen(effort, config, parts, hypot(log(SPREAD), log(effort.sure) * _unsure(parts)))


def _foreseen(
    effort: StageWork, config: ModelConfig | None, parts: dict[str, float], doubt: float
) -> Forecast:
    """A stage's forecast of its parts; `doubt` is the logarithm of the interval's factor."""
    seconds, factor = sum(parts.values()), exp(doubt)
    name = max(parts, key=parts.get)
    return Forecast(
        effort.stage,
        effort.kind,
        seconds,
        seconds / factor,
        seconds * factor,
        parts,
        f"{name}: {parts[name] / max(seconds, 1e-9):.0%}",
        effort.sampled + effort.learned,
        effort.flops(config) if config else 0.0,
        effort.people,
        effort.inputs,
    )


def _update(effort: StageWork, config: ModelConfig, rates: Rates, use: Use) -> float:
    """Seconds of one update. A large model was measured with few tokens; many more make products that reach what this machine can."""
    tokens = effort.learned / effort.updates
    drawn_out = rates.learn(use, tokens)
    if tokens <= FEW[1] or config.parameters <= SMALL:
        return drawn_out
    more = (tokens - FEW[1]) * config.flops_per_token(max(1.0, effort.length / 2), backward=True)
    return min(drawn_out, rates.learn(use, FEW[1]) + more / (REACHED * rates.gemm))


def _unsure(parts: Mapping[str, float]) -> float:
    """The share of the time that depends on how long completions are."""
    known = parts.get("writing the corpus", 0.0) + parts["loading and saving"]
    return 1 - known / max(1e-9, sum(parts.values()))


def _weights(effort: StageWork, configs: Mapping[str, ModelConfig]) -> float:
    config = configs.get(effort.model)
    return (1.0 if effort.saved else 0.5) * config.parameters if config else 0.0


def _rollout(rollout: Rollout, effort: StageWork, config: ModelConfig, rates: Rates, use: Use) -> float:
    """Rows decode side by side; when all prompts are in, ever fewer of them, until the longest one ends."""
    flight = min(rollout.rows, _in_flight(config) if effort.kind != "rl" else 256)
    fixed = rates.step(use, LEAD)
    each = max(0.0, rates.step(use, max(flight, LEAD + 1)) - fixed) / max(1.0, flight - LEAD)
    steps = max(rollout.longest, rollout.rows * rollout.length / max(1.0, flight) + rollout.longest / 2)
    # reading is a third of learning, without the optimiser's share, and the head looks at a prompt's last token alone
    body = 1 - config.vocab_size * config.hidden_size / config.active_parameters
    prefill = (
        rollout.prompts * rollout.prompt * body * (rates.learn(use, 2048) - rates.learn(use, 1024)) / 1024 / 3
    )
    return rollout.calls * (steps * fixed + rollout.rows * rollout.length * each + prefill)


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


# ---------------------------------------------------------------- on other machines


def price_on(effort: StageWork, configs: Mapping[str, ModelConfig], cluster: Cluster) -> Forecast:
    """One stage on chips: rollouts step by step as they decode, learning at the learner's usual share of the peak, or as fast as
    the host can start its operations where the model is small."""
    parts: dict[str, float] = {}
    config = configs.get(effort.model)
    if config is not None and effort.rollouts:
        unit = _smallest(config, cluster)
        parts["rollout"] = sum(_on_chips(r, unit, cluster) for r in effort.rollouts)
    if config is not None and (effort.learned or effort.read):
        peak = cluster.count * cluster.chip.rate("bf16" if "bf16" in cluster.chip.figures else "fp16")
        seen = max(1.0, effort.length / 2)
        floor = effort.updates * config.layers * OPERATIONS * constants().launch * 3
        parts["learning"] = max(
            effort.learned * config.flops_per_token(seen, backward=True) / peak / LEARNER_MFU[1], floor
        )
        if effort.read:
            parts["teacher and reference"] = (
                effort.read * configs[effort.reader].flops_per_token(seen) / peak / LEARNER_MFU[1]
            )
    parts["loading and saving"] = START * (effort.kind not in ("curate", "general"))
    return _foreseen(effort, config, parts, hypot(log(ELSEWHERE), log(effort.sure)))


def _smallest(config: ModelConfig, cluster: Cluster) -> Replica:
    """The fewest chips that hold a copy."""
    precision = "bf16" if "bf16" in cluster.chip.figures else "fp16"
    refused: LimbeckError | None = None
    for chips in (n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cluster.count and cluster.count % n == 0):
        try:
            return Replica(config, cluster, chips, precision)
        except LimbeckError as error:
            refused = error
    raise refused or LimbeckError(f"{cluster.name}: no group of its chips holds a copy of the model")


def _on_chips(rollout: Rollout, unit: Replica, cluster: Cluster) -> float:
    copies = cluster.count // unit.chips
    mine = max(1, round(rollout.rows / copies))
    lengths = Lengths(min(rollout.length, 0.95 * rollout.longest), rollout.longest).draw(min(mine, 512))
    slots = max(1, min(mine, unit.chips * unit.most_rows(rollout.prompt + rollout.length)))

    def step(rows: float, context: float) -> float:
        return unit.decode(rows / unit.chips, context).seconds

    seconds, _ = decode_seconds(lengths, min(slots, len(lengths)), step, rollout.prompt)
    return rollout.calls * seconds * max(1.0, mine / 512)
