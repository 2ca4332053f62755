"""Serving beside llama.cpp's server: time to the first token, and tokens a second, at 1, 16 and 64 streams.

    LIMBECK_LLAMA_SERVER=/path/to/llama-server python -m bench.serving --model models/smollm2-135m

Both read the same weights (llama.cpp a GGUF file that `limbeck export` writes, of type f32 unless told
otherwise), the same number of threads, greedy, the end of turn ignored; every stream has a prompt of its
own, so that none is read twice. Servers take turns. Without llama.cpp's, Limbeck is measured alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from limbeck.model import gguf
from limbeck.text.tokenizer import Tokenizer
from limbeck.types import generator

from .workers.stream import Heard, listen

PATIENCE = 300  # seconds for a server to start
WORDS = (
    "river", "stone", "lamp", "garden", "winter", "letter", "bread", "music",
    "window", "paper", "silver", "cloud", "market", "bridge",
)  # fmt: skip


@contextmanager
def running(command: list[str], port: int, environment: dict[str, str]) -> Iterator[None]:
    """A server, from when it answers until it is told to stop."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment}) as process,
    ):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(
                        f"{command[0]} did not start:\n{log.read().decode(errors='replace')[-2000:]}"
                    ) from None
                time.sleep(0.1)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def limbeck(model: Path, port: int, threads: int) -> list[str]:
    """The command that serves the model with Limbeck."""
    main = "from limbeck.cli import main; main()"
    return [
        sys.executable,
        "-c",
        main,
        "serve",
        f"model={model}",
        "--port",
        str(port),
        "--threads",
        str(threads),
        "--runs",
        tempfile.gettempdir(),
    ]


def llama(server: str, file: Path, port: int, threads: int, rows: int, room: int) -> list[str]:
    """The command that serves the model with llama.cpp's server."""
    return [
        server,
        "-m",
        str(file),
        "--port",
        str(port),
        "-t",
        str(threads),
        "-tb",
        str(threads),
        "-np",
        str(rows),
        "-c",
        str(rows * room),
        "--no-webui",
    ]


def prompts(tokenizer: Tokenizer, count: int, tokens: int, seed: object) -> list[str]:
    """So many texts of so many tokens, different from their first word on."""
    found = []
    for i in range(count):
        words = generator("bench.serving", seed, i).choice(WORDS, tokens)
        found.append(tokenizer.decode(tokenizer.encode(f"{seed} {i} " + " ".join(words))[:tokens]))
    return found


def measure(port: int, texts: list[str], new: int) -> dict[str, float]:
    """All streams at once: median and worst time to the first token, and tokens a second overall."""

    async def all_of_them() -> list[Heard]:
        body = {"model": "model", "max_tokens": new, "temperature": 0, "ignore_eos": True}
        return await asyncio.gather(*(listen("127.0.0.1", port, {**body, "prompt": text}) for text in texts))

    begin = time.monotonic()
    heard = asyncio.run(all_of_them())
    wrong = [one.error for one in heard if one.error]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(heard)} streams failed: {wrong[0]}")
    first = [one.events[0] - one.asked for one in heard]
    return {
        "first_median": statistics.median(first),
        "first_worst": max(first),
        "tokens_per_second": len(texts) * new / (max(one.ended for one in heard) - begin),
    }


def main() -> None:
    """Serve with both sides in turn and print their latency and throughput."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--type", default="f32", help="of the GGUF file")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peer, found = os.environ.get("LIMBECK_LLAMA_SERVER"), {}
    tokenizer = Tokenizer.from_directory(options.model)
    with tempfile.TemporaryDirectory() as folder:
        commands = {"limbeck": lambda port: limbeck(options.model, port, options.threads)}
        if peer:
            file = Path(folder) / "model.gguf"
            gguf.write(options.model, file, options.type)
            room = options.prompt + options.new + 16
            commands["llama.cpp"] = lambda port: llama(
                peer, file, port, options.threads, max(options.streams), room
            )
        for name, command in commands.items():
            port = free_port()
            with running(command(port), port, {"OMP_NUM_THREADS": str(options.threads)}):
                measure(port, prompts(tokenizer, 2, options.prompt, "warm"), 4)
                for streams in options.streams:
                    found[name, streams] = told = measure(
                        port, prompts(tokenizer, streams, options.prompt, streams), options.new
                    )
                    print(
                        f"{name:10} {streams:3} streams: "
                        f"first token after {told['first_median']:.2f} s (median), "
                        f"{told['first_worst']:.2f} s (worst), "
                        f"{told['tokens_per_second']:7.1f} tokens/s",
                        flush=True,
                    )
    for streams in options.streams if peer else ():
        ours, theirs = found["limbeck", streams], found["llama.cpp", streams]
        print(
            f"{streams:3} streams, Limbeck over llama.cpp ({options.type}): "
            f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.2f} x the tokens, "
            f"{ours['first_median'] / theirs['first_median']:.2f} x the wait for the first"
        )
    if options.json:
        options.json.write_text(
            json.dumps(
                [{"server": name, "streams": n, **told} for (name, n), told in found.items()], indent=2
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
