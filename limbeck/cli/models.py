"""The commands for single models and artifacts: show, pull, export.

An artifact is the folder with a finished stage's results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import RUNS, AsJson, Home, open_store, print_rows, usage_error

app = typer.Typer()


@app.command()
def show(
    artifact: Annotated[
        str,
        typer.Argument(
            help="the beginning of an artifact's name, or a model's directory or config.json; "
            "none lists all artifacts"
        ),
    ] = "",
    runs: Home = RUNS,
    as_json: AsJson = False,
    context: Annotated[
        int, typer.Option(min=1, help="tokens of context that a model's figures are for")
    ] = 4096,
) -> None:
    """List the artifacts, print one's manifest, or tell what a model takes: weights, FLOPs, cache, memory."""
    if artifact and _is_model(Path(artifact)):
        _show_model(Path(artifact), context, as_json)
        return
    store = open_store(runs)
    if artifact:
        print(json.dumps(store.resolve(artifact).manifest, indent=2, ensure_ascii=False))
        return
    rows = []
    for stored in store.all():
        manifest = stored.manifest
        size = sum(output["bytes"] for output in manifest["outputs"].values())
        row = {"artifact": stored.folder.name, "stage": manifest["stage"], "seconds": manifest["seconds"]}
        rows.append({**row, "bytes": size, "unchanged": manifest["notes"].get("weights_changed") is False})
    print_rows(rows, as_json, _artifact_line)


def _is_model(path: Path) -> bool:
    """Return True if `path` is a config.json or a directory that holds one."""
    return path.suffix == ".json" or (path / "config.json").exists()


def _show_model(path: Path, context: int, as_json: bool) -> None:
    """Print what a model needs: weights, FLOPs, KV cache and memory.

    `path` is the model's directory or config.json; the figures are for `context` tokens of context.
    """
    from ..model.config import ModelConfig
    from ..model.footprint import describe, tell

    config = ModelConfig.from_directory(path)
    if as_json:
        print(json.dumps(describe(config, context), indent=2))
    else:
        print(tell(config, context))


def _artifact_line(row: dict[str, Any]) -> str:
    """Return one line of the list of artifacts: name, stage, seconds, and size in MB."""
    megabytes = row["bytes"] / 1e6
    mark = "  weights unchanged" if row["unchanged"] else ""
    return f"{row['artifact']:28} {row['stage']:28} {row['seconds']:8.1f} s {megabytes:9.2f} MB{mark}"


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, or hf:OWNER/NAME (extra hub)")],
    models: Annotated[Path, typer.Option(help="where models are kept")] = Path("models"),
) -> None:
    """Fetch a base model and convert it to an HF directory."""
    from ..model.pull import pull as fetch

    print(fetch(name, models))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="a model directory, a model that was pulled, or the beginning of an artifact's name"
        ),
    ],
    gguf: Annotated[
        str, typer.Option("--gguf", metavar="TYPE", help="f32 is exact, f16 half its size, q8_0 a quarter")
    ] = "f16",
    out: Annotated[
        Path | None, typer.Option(help="the file to write; else MODEL-TYPE.gguf, here", show_default=False)
    ] = None,
    runs: Home = RUNS,
) -> None:
    """Write a model, tokenizer and chat template included, as one GGUF file for llama.cpp and what builds
    on it.

    Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, DeepSeek-V2 and V3 with a byte-level BPE tokenizer. The file
    appears whole or not at all. Run it with `llama-cli -m FILE` or `llama-server -m FILE`.
    """
    from ..model import gguf as ggml

    folder = _find_model(model, runs)
    path = out or Path(f"{folder.resolve().name}-{gguf}.gguf")
    if (folder / "model").is_dir():
        folder = folder / "model"
    ggml.write(folder, path, gguf)
    print(path)


def _find_model(name: str, runs: Path) -> Path:
    """Return the folder of a model or artifact.

    `name` is a model directory, the name of one in `models/`, or the beginning of the name of an artifact in
    `runs`. Raises a usage error for a file that is in GGUF format already.
    """
    from ..model.find import find_model

    is_directory = Path(name).exists() or (Path("models") / name).exists()
    if (runs / "store").exists() and not is_directory:
        return open_store(runs).resolve(name).folder
    folder = find_model(name, Path())
    if folder.is_file():
        raise usage_error(f"{folder} is a GGUF file already; name a model directory")
    return folder
