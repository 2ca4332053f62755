"""The measured rates of this machine: the speed of Limbeck's engine and learner on it, kept on disk.

The engine decodes completions; the learner updates weights. A separate process measures both
(limbeck/runtime/probe.py), because it needs torch and the planner does not import it. A measurement is stored
by the model's shape, not its name. A large model is measured at two small depths and extrapolated to its own,
since each layer costs the same. A row is one completion that is being decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE
from typing import Any

from platformdirs import user_cache_path

from ..model.config import ModelConfig
from ..types import LimbeckError
from .stage_work import SMALL

Use = tuple[ModelConfig, str]  # a model's shape, and the optimiser that it is learned with
PROBE = "limbeck.runtime.probe"
FEW_LAYERS = 2  # layers at which a large model is measured first
MANY_LAYERS = (4, 10)  # least and most layers of the second measurement, of about MANY weights
MANY = 40_000_000  # weights
FEW = (64, 192)  # tokens of an update of a large model
SLOWING = (  # environment variables that slow a machine down
    "LIMBECK_KERNELS",
    "LIMBECK_MARCH",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
SPREAD = 1.25  # factor by which a shared machine's speed varies from one minute to the next


@dataclass(frozen=True)
class Asked:
    """A request to measure one model on this machine.

    Example: `Asked(config, "muon", (1024, 4096), 32, (8, 256), prompt=10, new=60)`. `learn` is two sizes of
    an update in tokens, with sequences of `length` tokens. `rows` are the numbers of rows to decode at once;
    each row decodes `new` tokens after a prompt of `prompt` tokens.
    """

    config: ModelConfig
    optimizer: str
    learn: tuple[int, int]
    length: int
    rows: tuple[int, ...]
    prompt: int
    new: int

    @property
    def layers(self) -> list[int]:
        """The depths in layers at which the model is measured.

        They are the model's own depth, or two smaller ones for a large model.
        """
        least, most = MANY_LAYERS
        if self.config.parameters <= SMALL or self.config.layers <= least:
            return [self.config.layers]
        many = max(least, int(MANY / _layer_weights(self.config)))
        return [FEW_LAYERS, min(many, most, self.config.layers)]

    def request(self) -> dict[str, Any]:
        """Return the request as a JSON object for the probe.

        For a large model, the update sizes and the lengths are replaced by small ones.
        """
        request = {
            "config": asdict(self.config),
            "layers": self.layers,
            "optimizer": self.optimizer,
            "learn": sorted(set(self.learn)),
            "length": self.length,
            "rows": sorted(set(self.rows)),
            "prompt": self.prompt,
            "new": self.new,
        }
        if len(self.layers) > 1:
            request["config"] = asdict(replace(self.config, layers=0))
            request |= {"learn": list(FEW), "length": 64, "prompt": 4, "new": 4}
        return request


@dataclass(frozen=True)
class Rates:
    """The measured rates of this machine.

    `gemm` is FLOP/s of a large matrix product, `memory` bytes a second, and `start` the seconds until a
    worker process has started. `worlds` has, for each miniature (a generated toy world of problems), the
    seconds to write one token of its corpus. `models` has the measurements of each model at each depth;
    `depth` is the model's layers, and `weights` the weights of one layer that a token is multiplied with.
    """

    gemm: float
    memory: float
    start: float
    worlds: dict[str, float]
    models: dict[Use, list[dict[str, Any]]]
    depth: dict[Use, int]
    weights: dict[Use, float]

    def learn(self, use: Use, tokens: float) -> float:
        """Return the seconds of an update on `tokens` tokens for the model and optimizer `use`."""
        return self._extrapolate(use, "learn", tokens, 6 * tokens)

    def step(self, use: Use, rows: float) -> float:
        """Return the seconds of one decode step of `rows` rows for the model of `use`."""
        return self._extrapolate(use, "roll", rows, 2 * rows)

    def _extrapolate(self, use: Use, figure: str, size: float, operations: float) -> float:
        """Return the seconds at `size` by straight lines through the measured sizes and depths.

        `figure` is "learn" (the size is in tokens) or "roll" (in rows). An additional layer takes at least
        the time that this machine needs to read its weights and to do `operations` FLOPs with each, because
        the difference of two measured depths may be lost in noise.
        """
        seconds = {entry["layers"]: _line(entry[figure], size) for entry in self.models[use]}
        few, many = min(seconds), max(seconds)
        if many == few:
            return seconds[few]
        weights = self.weights[use]
        least = max(4 * weights / self.memory, operations * weights / self.gemm)
        layer = max(least, (seconds[many] - seconds[few]) / (many - few))
        return seconds[few] + layer * (self.depth[use] - few)


def _layer_weights(config: ModelConfig) -> float:
    """Return the mean number of weights of one layer that a token is multiplied with."""
    return (config.active_parameters - config.vocab_size * config.hidden_size) / config.layers


def _line(points: Mapping[str, float], size: float) -> float:
    """Return the seconds at `size`, on a line through the smallest and the largest measured point.

    `points` maps a size to seconds. The line never falls with the size.
    """
    measured = sorted((float(n), seconds) for n, seconds in points.items())
    small, first = measured[0]
    large, last = measured[-1]
    slope = first / small
    if large > small:
        slope = max(0.0, last - first) / (large - small)
    least = 0.3 * first * min(1.0, size / small)
    return max(first + slope * (size - small), least)


def measure(
    models: Mapping[Use, Asked],
    worlds: Mapping[str, dict[str, Any]],
    threads: int,
    workers: int = 1,
    code: str = "",
    ask: bool = True,
) -> Rates | None:
    """Return the rates of these models while `workers` processes of `threads` threads are busy.

    `worlds` has the settings of each miniature whose corpus is to be written. Measurements are kept on disk,
    separately for each version `code` of the code, unless other programs were busy meanwhile (`_is_busy`).
    What is missing is measured now; if `ask` is False, the function returns None instead. Raises LimbeckError
    if the measurement fails.
    """
    requests = {use: asked.request() for use, asked in models.items()}
    path = _cache(threads, workers, code)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing_models = _missing(requests.values(), known)
    missing_worlds = _missing(worlds.values(), known)
    if missing_models or missing_worlds or "gemm" not in known:
        if not ask:
            return None
        request = {"threads": threads, "models": missing_models, "worlds": missing_worlds}
        busy = _is_busy(threads)
        answer = _probe(request, workers)
        known |= {key: answer[key] for key in ("gemm", "memory", "start")}
        known |= answer["models"] | answer["worlds"]
        if not busy:
            _keep(path, known)
    corpora = {name: known[_key(settings)] for name, settings in worlds.items()}
    measured = {use: known[_key(request)] for use, request in requests.items()}
    depth = {use: asked.config.layers for use, asked in models.items()}
    weights = {use: _layer_weights(asked.config) for use, asked in models.items()}
    return Rates(known["gemm"], known["memory"], known["start"], corpora, measured, depth, weights)


def _missing(requests: Iterable[dict[str, Any]], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the requests whose key (`_key`) has no measurement in `known`, by their keys."""
    missing = {_key(request): request for request in requests}
    return {key: request for key, request in missing.items() if key not in known}


def _is_busy(threads: int) -> bool:
    """Return True if other programs would spoil a measurement: half of the cores have had work for a minute.

    One thread's measurement is in CPU time, which they hardly affect (runtime/probe.py).
    """
    if threads == 1 or not hasattr(os, "getloadavg"):
        return False
    return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)


def _probe(request: dict[str, Any], workers: int) -> dict[str, Any]:
    """Run `workers` probes at the same time and return the mean of their answers.

    They run together because processes share memory bandwidth, and often cores. Raises LimbeckError if a
    probe fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(request["threads"])}
    processes = [_start_probe(environment) for _ in range(workers)]
    line = json.dumps(request) + "\n"
    with ThreadPoolExecutor(workers) as pool:
        outputs = list(pool.map(lambda process: process.communicate(line), processes))
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            lines = errors.strip().splitlines() or ["it said nothing"]
            raise LimbeckError(
                f"this machine could not be measured: {lines[-1]}; `limbeck doctor` says what it lacks"
            )
    answers = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    return _mean(answers)


def _start_probe(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a process that measures; it reads a request from stdin and answers on stdout."""
    command = [sys.executable, "-m", PROBE]
    return subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment)


def _mean(answers: list[Any]) -> Any:
    """Return the mean of nested answers of the same structure, number by number."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _mean([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_mean([answer[i] for answer in answers]) for i in range(len(first))]
    return sum(answers) / len(answers)


def _keep(path: Path, known: dict[str, Any]) -> None:
    """Write the measurements to `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(known), encoding="utf-8")
    partial.replace(path)


def _cache(threads: int, workers: int, code: str) -> Path:
    """Return the path of the file of measurements.

    There is one file for each machine, number of threads and workers, version of torch and of the code, and
    setting of the environment variables in SLOWING.
    """
    identity = (
        platform.node(),
        platform.machine(),
        _processor(),
        os.cpu_count(),
        threads,
        workers,
        version("torch"),
        code,
        tuple(os.environ.get(name) for name in SLOWING),
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return user_cache_path("limbeck") / "machine" / f"{digest}.json"


def _processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line
    return platform.processor()


def _key(request: dict[str, Any]) -> str:
    """Return the key of a measurement: a hash of its request."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]
