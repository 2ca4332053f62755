"""The time of a recipe on this machine, or on chips elsewhere.

stage_work.py counts the tokens of each stage. Here they are turned into seconds at this machine's measured
rates (machine_rates.py), and the stages are scheduled on the recipe's workers (parallel processes) by the
dependencies of the recipe's graph. A row is one completion that is being decoded.
"""

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
from .rl import HOST_LINK, LEARNER_MFU, Lengths, decode_seconds
from .stage_work import SMALL, Rollout, StageWork

STAGE = 0.4  # seconds of any stage for reading problems, scoring, records and syncing files
PARAMETER = 3e-8  # seconds for each weight that is loaded, saved, synced and hashed
LEAD = 2  # rows that an engine still decodes at the end of a rollout
# seconds for a sampled token beside the engine: text, scores, packing, records; fitted to the quickstart's
# records
HANDLING = 18e-6
DESK_SECONDS = 60  # seconds that a person takes to review a row: guessed
# share of a large square product's FLOP/s that learning of a large model with many tokens reaches:
# SmolLM2's fine-tuning
REACHED = 0.75
FLOAT32_MFU = 0.5  # share of the peak in float32 that learning reaches: guessed
HOST_BYTES = 32  # bytes of a weight that the host reads and writes for an update of AdamW in its memory
HOST_MEMORY = 20e9  # bytes a second of the host's memory: guessed
ELSEWHERE = 2.0  # factor within which a stage's time on other chips is known
START = 30.0  # seconds to start a stage on other chips: processes, weights, compiling
OPERATIONS = 20  # operations that the host starts for a layer, forward
PREFILL_TOKENS = (1024, 2048)  # tokens of the two updates from which the cost of prefill is taken
LEARNING_ROWS = 256  # rows that an RL stage decodes at once
MOST_DRAWN = 512  # lengths that are simulated for one replica
REPLICA_CHIPS = (1, 2, 4, 8, 16, 32, 64)  # chips of a replica that are tried


@dataclass(frozen=True)
class Forecast:
    """The forecast of one stage.

    `seconds` lies between `low` and `high`; `parts` has the seconds of each part, and `binds` names the
    longest part with its share. `tokens` is sampled and learned tokens, `people` the number of rows that a
    person reviews, and `inputs` the stages that must be done before. Example: `Forecast("zero", "rl", 70.0,
    45.0, 105.0, {"rollout": 38.0, "learning": 24.0, ...}, "rollout: 54 %", 1.7e6, 1.2e12)`.
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
        """Return the forecast as a JSON object, as it is written to a run's `forecast.json`."""
        parts = {name: round(seconds, 2) for name, seconds in self.parts.items() if seconds >= 0.01}
        return {
            "stage": self.stage,
            "kind": self.kind,
            "seconds": round(self.seconds, 2),
            "low": round(self.low, 2),
            "high": round(self.high, 2),
            "parts": parts,
            "binds": self.binds,
            "tokens": round(self.tokens),
            "flops": float(f"{self.flops:.3g}"),
            "people": self.people,
        }


# ---------------------------------------------------------------- measurements


def asked_of(works: Iterable[StageWork], configs: Mapping[str, ModelConfig]) -> dict[Use, Asked]:
    """Return the measurements that the forecasts of `works` need, by model shape and optimizer.

    `configs` maps the name of each stage's model to its shape. Models of one shape and optimizer share a
    measurement.
    """
    measurements: dict[Use, Asked] = {}
    for config, group in _by_shape(works, configs).items():
        optimizers = sorted({work.optimizer for work in group if work.learned})
        for i, optimizer in enumerate(optimizers or ["adamw"]):
            rows = (8, _in_flight(config)) if i == 0 else ()
            measurements[config, optimizer] = _measurement(config, optimizer, group, rows)
    return measurements


def _by_shape(
    works: Iterable[StageWork], configs: Mapping[str, ModelConfig]
) -> dict[ModelConfig, list[StageWork]]:
    """Group the stages' work by the shape of their models.

    A model that only reads text (a teacher or a reference) gets an empty group if it has no work of its own.
    """
    groups: dict[ModelConfig, list[StageWork]] = {}
    for work in works:
        busy = work.rollouts or work.learned or work.read
        if work.model and busy:
            groups.setdefault(configs[work.model], []).append(work)
        if work.reader:
            groups.setdefault(configs[work.reader], [])
    return groups


def _measurement(config: ModelConfig, optimizer: str, group: list[StageWork], rows: tuple[int, ...]) -> Asked:
    """Return the measurement of one model with one optimizer.

    `group` has the work of the stages with this model; its mean lengths and sizes are measured. `rows` are
    the numbers of rows to decode at once.
    """
    learning = [work for work in group if work.learned and work.optimizer == optimizer]
    lengths = [work.length for work in learning if work.length] or [64]
    rollouts = [rollout for work in group for rollout in work.rollouts]
    prompt = _round_mean([rollout.prompt for rollout in rollouts] or [32])
    new = _round_mean([rollout.length for rollout in rollouts] or [16])
    return Asked(config, optimizer, _update_sizes(learning), _round_mean(lengths), rows, prompt, new)


def _update_sizes(learning: list[StageWork]) -> tuple[int, int]:
    """Return the smallest and the largest update of the stages in tokens, at least a factor of two apart."""
    sizes = [work.learned / max(1, work.updates) for work in learning] or [1024]
    smallest = min(sizes)
    return _round(smallest), _round(max(*sizes, 2 * smallest))


def _round_mean(values: list[float]) -> int:
    """Return the mean of `values`, rounded by `_round`."""
    return _round(sum(values) / len(values))


def _round(value: float) -> int:
    """Return the nearest power of 2 ** 0.25, as an integer of at least 2.

    Thus a small change of a recipe needs no new measurement.
    """
    exponent = round(4 * log2(max(2.0, value))) / 4
    return max(2, round(2**exponent))


def _in_flight(config: ModelConfig) -> int:
    """Return the number of rows that an engine decodes at once for this model."""
    return 256 if config.parameters < SMALL else 64


# ---------------------------------------------------------------- on this machine


def price(work: StageWork, configs: Mapping[str, ModelConfig], rates: Rates) -> Forecast:
    """Return the forecast of one stage on this machine, at its measured rates.

    `configs` maps the name of each stage's model to its shape.
    """
    config = configs.get(work.model)
    parts: dict[str, float] = {}
    if config is not None and work.rollouts:
        parts["rollout"] = _rollouts(work, config, rates)
    if config is not None and work.learned:
        parts["learning"] = work.updates * _update(work, config, rates)
    if work.read:
        reader = next(use for use in rates.models if use[0] == configs[work.reader])
        parts["teacher and reference"] = work.read / 1024 * rates.learn(reader, 1024) / 3
    if work.written:
        parts["writing the corpus"] = work.written * max(rates.worlds.values(), default=0.0)
    startup = STAGE * _has_files(work)
    parts["loading and saving"] = startup + PARAMETER * _moved_weights(work, config)
    doubt = hypot(log(SPREAD), log(work.sure) * _uncertain_share(parts))
    return _sum_up(work, config, parts, doubt)


def _sum_up(work: StageWork, config: ModelConfig | None, parts: dict[str, float], doubt: float) -> Forecast:
    """Build the forecast of a stage from the seconds of its `parts`.

    `doubt` is the natural logarithm of the factor between the forecast and the ends of its interval.
    """
    seconds = sum(parts.values())
    factor = exp(doubt)
    longest = max(parts, key=parts.get)
    share = parts[longest] / max(seconds, 1e-9)
    tokens = work.sampled + work.learned
    flops = work.flops(config) if config else 0.0
    return Forecast(
        work.stage,
        work.kind,
        seconds,
        seconds / factor,
        seconds * factor,
        parts,
        f"{longest}: {share:.0%}",
        tokens,
        flops,
        work.people,
        work.inputs,
    )


def _has_files(work: StageWork) -> bool:
    """Return True if the stage loads or saves more than rows of text, such as a model."""
    return work.kind != "curate" and bool(work.model or work.kind != "general")


def _uncertain_share(parts: Mapping[str, float]) -> float:
    """Return the share of the time that depends on the length of completions, which is uncertain."""
    known = parts.get("writing the corpus", 0.0) + parts["loading and saving"]
    return 1 - known / max(1e-9, sum(parts.values()))


def _moved_weights(work: StageWork, config: ModelConfig | None) -> float:
    """Return the number of weights that are loaded and saved; a model that is only loaded counts half."""
    if not config:
        return 0.0
    return (1.0 if work.saved else 0.5) * config.parameters


def _update(work: StageWork, config: ModelConfig, rates: Rates) -> float:
    """Return the seconds of one update (optimizer step).

    A large model is measured with few tokens. More tokens make larger matrix products, which run at the share
    REACHED of the machine's measured FLOP/s.
    """
    uses = [use for use in rates.models if use[0] == config]
    use = next((use for use in uses if use[1] == work.optimizer), uses[0])
    tokens = work.learned / work.updates
    seconds = rates.learn(use, tokens)
    most_measured = FEW[1]
    if tokens <= most_measured or config.parameters <= SMALL:
        return seconds
    token_flops = config.flops_per_token(max(1.0, work.length / 2), backward=True)
    more = (tokens - most_measured) * token_flops
    return min(seconds, rates.learn(use, most_measured) + more / (REACHED * rates.gemm))


def _rollouts(work: StageWork, config: ModelConfig, rates: Rates) -> float:
    """Return the seconds of all rollouts of a stage, with the handling of the sampled text."""
    uses = [use for use in rates.models if use[0] == config]
    use = next(use for use in uses if rates.models[use][0]["roll"])
    slots = LEARNING_ROWS if work.kind == "rl" else _in_flight(config)
    seconds = sum(_rollout(rollout, slots, config, rates, use) for rollout in work.rollouts)
    return HANDLING * work.sampled + seconds


def _rollout(rollout: Rollout, slots: int, config: ModelConfig, rates: Rates, use: Use) -> float:
    """Return the seconds of one rollout with at most `slots` rows at a time.

    After the last prompt has started, fewer and fewer rows are decoded at once.
    """
    rows = min(rollout.rows, slots)
    fixed = rates.step(use, LEAD)
    full = rates.step(use, max(rows, LEAD + 1))
    row = max(0.0, full - fixed) / max(1.0, rows - LEAD)
    refills = rollout.rows * rollout.length / max(1.0, rows)
    steps = max(rollout.longest, refills + rollout.longest / 2)
    prefill = _prefill(rollout, config, rates, use)
    return rollout.calls * (steps * fixed + rollout.rows * rollout.length * row + prefill)


def _prefill(rollout: Rollout, config: ModelConfig, rates: Rates, use: Use) -> float:
    """Return the seconds of the prefill of a rollout's prompts.

    It is taken as a third of learning these tokens, without the optimizer and most of the output matrix.
    """
    body = 1 - config.vocab_size * config.hidden_size / config.active_parameters
    few, many = PREFILL_TOKENS
    difference = rates.learn(use, many) - rates.learn(use, few)
    return rollout.prompts * rollout.prompt * body * difference / (many - few) / 3


# ---------------------------------------------------------------- workers


def wall(forecasts: Mapping[str, Forecast], workers: int, start: float = 0.0, key: str = "seconds") -> float:
    """Return the wall-clock seconds until all stages are done by `workers` parallel workers.

    `start` is the second at which the first stage starts, and `key` the field of a forecast that counts as
    its time (`seconds`, `low` or `high`). As in `pipeline/run.py`, the stage with the most dependents starts
    first.
    """
    urgency = {name: -len(dependents) for name, dependents in _dependents(forecasts).items()}
    pending: dict[str, set[str]] = {}
    for name, forecast in forecasts.items():
        pending[name] = {cited for cited in forecast.inputs if cited in forecasts}
    now = start
    running: list[tuple[float, str]] = []
    done: set[str] = set()
    while pending or running:
        ready = [name for name, cited in pending.items() if cited <= done]
        ready.sort(key=urgency.get)
        for name in ready[: workers - len(running)]:
            heapq.heappush(running, (now + getattr(forecasts[name], key), name))
            del pending[name]
        if not running:
            break
        now, name = heapq.heappop(running)
        done.add(name)
    return now


def _dependents(forecasts: Mapping[str, Forecast]) -> dict[str, set[str]]:
    """Return, for each stage, all stages that depend on it directly or indirectly."""
    direct: dict[str, set[str]] = {name: set() for name in forecasts}
    for name, forecast in forecasts.items():
        for cited in forecast.inputs:
            if cited in direct:
                direct[cited].add(name)

    def collect(name: str, found: set[str]) -> set[str]:
        for other in direct[name] - found:
            found.add(other)
            collect(other, found)
        return found

    return {name: collect(name, set()) for name in forecasts}


# ---------------------------------------------------------------- on other chips


def price_on(
    work: StageWork, configs: Mapping[str, ModelConfig], cluster: Cluster, rows: int = 0
) -> Forecast:
    """Return the forecast of one stage on a cluster.

    Rollouts are simulated as decode steps, of at most `rows` rows at once (0: as many as the memory holds).
    Learning runs at the usual share of the peak FLOP/s, or, for a small model, as fast as the host can launch
    its operations. `configs` maps the name of each stage's model to its shape. Raises LimbeckError if the
    chips cannot hold the model.
    """
    config = configs.get(work.model)
    parts: dict[str, float] = {}
    if config is not None and work.rollouts:
        replica = _smallest_replica(config, cluster, _precision(work, cluster))
        parts["rollout"] = sum(_rollout_on(replica, rollout, cluster, rows) for rollout in work.rollouts)
    if config is not None and (work.learned or work.read):
        precision = _precision(work, cluster)
        peak = cluster.count * cluster.chip.rate(precision)
        mfu = FLOAT32_MFU if precision == "fp32" else LEARNER_MFU[1]
        middle = max(1.0, work.length / 2)
        launching = work.updates * config.layers * OPERATIONS * constants().launch * 3
        flops = config.flops_per_token(middle, backward=True) + _flops_again(work, config, middle)
        computing = work.learned * flops / peak / mfu
        parts["learning"] = max(computing, launching)
        if work.offload:
            moved = 4 / HOST_LINK + HOST_BYTES / HOST_MEMORY  # a gradient goes up, a weight comes back
            parts["update on the host"] = work.updates * config.parameters * moved
        if work.read:
            reader = configs[work.reader]
            parts["teacher and reference"] = work.read * reader.flops_per_token(middle) / peak / mfu
    parts["loading and saving"] = START * _has_files(work)
    return _sum_up(work, config, parts, hypot(log(ELSEWHERE), log(work.sure)))


def _precision(work: StageWork, cluster: Cluster) -> str:
    """Return the format that the stage computes in: "fp32", or the 16-bit format of the cluster's chips."""
    if work.precision == "float32":
        return "fp32"
    return "bf16" if "bf16" in cluster.chip.figures else "fp16"


def _flops_again(work: StageWork, config: ModelConfig, middle: float) -> float:
    """Return the FLOPs of a token that the backward pass computes again, for a sequence with `middle` keys
    on average: the forward pass, without attention's scores where its results are kept."""
    if not work.recompute:
        return 0.0
    return config.flops_per_token(1.0 if work.recompute == "keep_attention" else middle)


def _smallest_replica(config: ModelConfig, cluster: Cluster, precision: str) -> Replica:
    """Return a copy of the model on as few chips as hold it. Raises LimbeckError if none holds it.

    The number of chips of a copy divides the number of chips of the cluster.
    """
    refused: LimbeckError | None = None
    for chips in REPLICA_CHIPS:
        if chips > cluster.count or cluster.count % chips:
            continue
        try:
            return Replica(config, cluster, chips, precision)
        except LimbeckError as error:
            refused = error
    raise refused or LimbeckError(f"{cluster.name}: no group of its chips holds a copy of the model")


def _rollout_on(replica: Replica, rollout: Rollout, cluster: Cluster, most: int = 0) -> float:
    """Return the seconds of a rollout on a cluster that is divided into copies of `replica`.

    Each copy decodes at most `most` rows at once; 0 is no limit but its memory's.
    """
    rows = max(1, round(rollout.rows / (cluster.count // replica.chips)))
    mean = min(rollout.length, 0.95 * rollout.longest)
    lengths = Lengths(mean, rollout.longest).draw(min(rows, MOST_DRAWN))
    fitting = replica.chips * replica.most_rows(rollout.prompt + rollout.length)
    slots = max(1, min(rows, most or fitting))

    def step(alive: float, context: float) -> float:
        return replica.decode(alive / replica.chips, context).seconds

    seconds, _ = decode_seconds(lengths, min(slots, len(lengths)), step, rollout.prompt)
    return rollout.calls * seconds * max(1.0, rows / MOST_DRAWN)
