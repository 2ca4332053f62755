"""Limbeck beside its peers, as a table: how many times as fast, for one instruction set.

    python -m bench.ratios                               # with all that this processor has
    python -m bench.ratios --instructions avx2           # both sides as on a processor without AVX-512
    python -m bench.ratios --only "GRPO" "SFT" --repeats 3

Each line is one of the comparisons beside this file, in processes of their own that take turns. Serving is
compared where LIMBECK_LLAMA_SERVER names llama.cpp's server, compiled for the same instruction set, and
models/smollm2-135m is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# What holds a machine with more back: our kernels, torch, MKL and oneDNN.
AVX2 = {
    "LIMBECK_MARCH": "x86-64-v3",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
SIZES = ("tiny", "10m", "135m")
TURNS = {"tiny": 5, "10m": 3, "135m": 2}

# name -> the comparison's module and options, by size
WORK: dict[str, list[str]] = {
    "GRPO step, fixed lengths": ["bench.grpo", "--lengths", "fixed"],
    "GRPO step, skewed lengths": ["bench.grpo", "--lengths", "skewed"],
    "rollouts, 8 rows": ["bench.rollout", "--rows", "8"],
    "rollouts, 64 rows": ["bench.rollout", "--rows", "64"],
    "SFT": ["bench.sft"],
}
STREAMS = (1, 16, 64)


def main() -> None:
    """Run all comparisons and print their ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instructions", choices=["native", "avx2"], default="native")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[""], help="comparisons whose names begin so")
    parser.add_argument("--repeats", type=int, help="turns of each side; by size, if left away")
    options = parser.parse_args()
    environment = {**os.environ, **(AVX2 if options.instructions == "avx2" else {})}
    print(f"{processor()}; {instructions(environment)}; one thread, serving two\n")
    print(f"| work | {' | '.join(options.sizes)} |\n|---|{'---|' * len(options.sizes)}")
    for name, command in WORK.items():
        if name.startswith(tuple(options.only)):
            found = [
                ratio(command, size, options.repeats or TURNS[size], environment) for size in options.sizes
            ]
            print(f"| {name} | {' | '.join(f'{x:.2f}x' for x in found)} |", flush=True)
    if os.environ.get("LIMBECK_LLAMA_SERVER") and "serving".startswith(tuple(options.only)):
        print(f"\n| serving, streams | {' | '.join(map(str, STREAMS))} |\n|---|{'---|' * len(STREAMS)}")
        print(f"| against llama.cpp | {' | '.join(f'{x:.2f}x' for x in serving(environment))} |")


def ratio(command: list[str], size: str, repeats: int, environment: dict[str, str]) -> float:
    """Time of the fastest other side over Limbeck's; per token where tokens are counted."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ratios.jsonl"
        run = [sys.executable, "-m", *command, "--size", size, "--repeats", str(repeats), "--json", str(out)]
        subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
        told = json.loads(out.read_text().splitlines()[-1])
    ours, *others = told["sides"].values()
    if "tokens_per_second" in ours:
        return ours["tokens_per_second"] / max(other["tokens_per_second"] for other in others)
    return min(told["ratios"].values())


def serving(environment: dict[str, str]) -> list[float]:
    """How many times the tokens a second of llama.cpp's server, by streams."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "serving.json"
        run = [sys.executable, "-m", "bench.serving", "--streams", *map(str, STREAMS), "--json", str(out)]
        subprocess.run(run, check=True, capture_output=True, text=True, env=environment)
        speed = {
            (row["server"], row["streams"]): row["tokens_per_second"] for row in json.loads(out.read_text())
        }
    return [speed["limbeck", n] / speed["llama.cpp", n] for n in STREAMS]


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown processor",
    )


def instructions(environment: dict[str, str]) -> str:
    """The instruction sets that the kernels and torch use in an environment."""
    code = (
        "import torch; from limbeck.model import kernels\n"
        "print(f'kernels for {kernels.instructions()}, torch for {torch.backends.cpu.get_cpu_capability()}')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


if __name__ == "__main__":
    main()
