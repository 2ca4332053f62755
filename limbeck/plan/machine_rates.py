"""This machine, measured in seconds and remembered: how fast Limbeck's own engine and learner are on it.

The measuring is a process of its own (limbeck/runtime/probe.py), as it needs torch and the plan does not. A model is known
here by its shape; large ones are measured at two depths and drawn out, since each layer costs the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
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
DEPTHS = (
    2,
    (4, 10),
)  # layers at which a large model is measured: few; and as many as have MANY weights, within bounds
MANY = 40_000_000
FEW = (64, 192)  # tokens of an update then
HELD_BACK = (
    "LIMBECK_KERNELS",
    "LIMBECK_MARCH",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)  # what slows a machine down
SPREAD = 1.25  # a machine that others share is so much faster or slower from one minute to the next


@dataclass(frozen=True)
class Asked:
    """What is to be measured of a model: `Asked(config, "muon", learn=(1024, 4096), length=32, rows=(8, 256), prompt=10, new=60)`."""

    config: ModelConfig
    optimizer: str
    learn: tuple[int, int]
    length: int
    rows: tuple[int, ...]
    prompt: int
    new: int

    @property
    def layers(self) -> list[int]:
        few, (least, most) = DEPTHS
        large = self.config.parameters > SMALL and self.config.layers > least
        many = min(max(least, int(MANY / _weights(self.config))), most, self.config.layers)
        return [few, many] if large else [self.config.layers]

    def request(self) -> dict[str, Any]:
        """As the probe reads it; large models learn fewer tokens, and the cost of more is drawn out."""
        large = len(self.layers) > 1
        learn = list(FEW) if large else sorted(set(self.learn))
        return {
            "config": asdict(replace(self.config, layers=0) if large else self.config),
            "layers": self.layers,
            "optimizer": self.optimizer,
            "learn": learn,
            "length": 64 if large else self.length,
            "rows": sorted(set(self.rows)),
            "prompt": 4 if large else self.prompt,
            "new": 4 if large else self.new,
        }


@dataclass(frozen=True)
class Rates:
    """What was measured. `learn(use, tokens)` is an update's seconds, `step(use, rows)` that of one token for each row.

    `start` is a worker's, `worlds` a token of a miniature's corpus, `gemm` FLOP/s and `memory` bytes a second. `depth` is how
    many layers a model has, and `weights` how many of them a token meets in one.
    """

    gemm: float
    memory: float
    start: float
    worlds: dict[str, float]
    models: dict[Use, list[dict[str, Any]]]
    depth: dict[Use, int]
    weights: dict[Use, float]

    def learn(self, use: Use, tokens: float) -> float:
        return self._drawn_out(use, "learn", tokens, 6 * tokens)

    def step(self, use: Use, rows: float) -> float:
        return self._drawn_out(use, "roll", rows, 2 * rows)

    def _drawn_out(self, use: Use, what: str, size: float, operations: float) -> float:
        """Linear in the size, and in the number of layers. A layer takes no less than this machine needs to read its weights,
        and for so many `operations` with each: what is measured of few layers may be lost in the noise of the rest."""
        at = {entry["layers"]: _line(entry[what], size) for entry in self.models[use]}
        (few, cheap), (many, dear) = min(at.items()), max(at.items())
        if many == few:
            return cheap
        weights = self.weights[use]
        least = max(4 * weights / self.memory, operations * weights / self.gemm)
        return cheap + max(least, (dear - cheap) / (many - few)) * (self.depth[use] - few)


def _weights(config: ModelConfig) -> float:
    """That a token meets in one layer, on average."""
    return (config.active_parameters - config.vocab_size * config.hidden_size) / config.layers


def _line(points: Mapping[str, float], size: float) -> float:
    """Through the smallest and the largest measured point; flat where noise made the larger one cheaper."""
    measured = sorted((float(n), seconds) for n, seconds in points.items())
    (small, a), (large, b) = measured[0], measured[-1]
    slope = max(0.0, b - a) / (large - small) if large > small else a / small
    return max(a + slope * (size - small), 0.3 * a * min(1.0, size / small))


def measure(
    models: Mapping[Use, Asked],
    worlds: Mapping[str, dict[str, Any]],
    threads: int,
    workers: int = 1,
    code: str = "",
    ask: bool = True,
) -> Rates | None:
    """Rates of these models on this machine while `workers` of `threads` each are at work, as they will be. What was measured of
    this version of the `code` is remembered; what was not is measured now, or without `ask` is no answer (None)."""
    requests = {use: asked.request() for use, asked in models.items()}
    kept = _cache(threads, workers, code)
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    missing = {key: request for request in requests.values() if (key := _key(request)) not in known}
    strange = {key: settings for settings in worlds.values() if (key := _key(settings)) not in known}
    if missing or strange or "gemm" not in known:
        if not ask:
            return None
        answer = _probe({"threads": threads, "models": missing, "worlds": strange}, workers)
        known |= {key: answer[key] for key in ("gemm", "memory", "start")}
        known |= answer["models"] | answer["worlds"]
        _keep(kept, known)
    found = {use: known[_key(request)] for use, request in requests.items()}
    written = {name: known[_key(settings)] for name, settings in worlds.items()}
    depth = {use: asked.config.layers for use, asked in models.items()}
    return Rates(
        known["gemm"],
        known["memory"],
        known["start"],
        written,
        found,
        depth,
        {use: _weights(asked.config) for use, asked in models.items()},
    )


def _probe(request: dict[str, Any], workers: int) -> dict[str, Any]:
    """Ask as many processes at once as will work at once: cores share memory, and often more."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(request["threads"])}
    asked = [
        subprocess.Popen(
            [sys.executable, "-m", PROBE], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, env=environment
        )
        for _ in range(workers)
    ]
    with ThreadPoolExecutor(workers) as pool:
        told = list(pool.map(lambda process: process.communicate(json.dumps(request) + "\n"), asked))
    for process, (_, complaint) in zip(asked, told, strict=True):
        if process.returncode:
            last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
            raise LimbeckError(
                f"this machine could not be measured: {last}; `limbeck doctor` says what it lacks"
            )
    return _mean([json.loads(answer.splitlines()[-1]) for answer, _ in told])


def _mean(answers: list[Any]) -> Any:
    """Of answers of one form, number by number."""
    first = answers[0]
    if isinstance(first, dict):
        return {key: _mean([answer[key] for answer in answers]) for key in first}
    if isinstance(first, list):
        return [_mean([answer[i] for answer in answers]) for i in range(len(first))]
    return sum(answers) / len(answers)


def _keep(path: Path, known: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(known), encoding="utf-8")
    partial.replace(path)


def _cache(threads: int, workers: int, code: str) -> Path:
    """One file for each processor, number of threads, and version of torch and Limbeck."""
    held_back = tuple(os.environ.get(name) for name in HELD_BACK)
    told = (
        platform.node(),
        platform.machine(),
        _processor(),
        os.cpu_count(),
        threads,
        workers,
        version("torch"),
        code,
        held_back,
    )
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    return user_cache_path("limbeck") / "machine" / f"{digest}.json"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _key(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]
