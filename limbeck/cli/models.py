"""The commands for single models and artifacts: show, pull, export.

An artifact is the folder with a finished stage's results.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..model.find import MODELS_FOLDER
from .options import MODEL, RUNS, AsJson, Home, open_model, open_store, print_rows, read_config, usage_error

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..pipeline.model_name import NamedModel

app = typer.Typer()


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|ARTIFACT",
            help=f"{MODEL}; a config.json; or a name as deepseek-v3; none lists all artifacts",
        ),
    ] = "",
    runs: Home = RUNS,
    as_json: AsJson = False,
    context: Annotated[
        int, typer.Option(min=1, help="tokens of context that a model's figures are for")
    ] = 4096,
) -> None:
    """List the artifacts, print one's manifest, or tell what a model takes: weights, FLOPs, cache, memory.

    For instance: `limbeck show quickstart/r1`, `limbeck show deepseek-v3`
    """
    from ..model.config import ModelConfig

    if not name:
        _list_artifacts(runs, as_json)
        return
    model = _find(name, runs)
    if isinstance(model, ModelConfig):
        _show_model(model, None, context, as_json)
    elif model.artifact:
        print(json.dumps(model.artifact.manifest, indent=2, ensure_ascii=False))
    else:
        _show_model(read_config(model.path), model.path, context, as_json)


def _find(name: str, runs: Path) -> NamedModel | ModelConfig:
    """Return what `name` stands for, or the shapes in a config.json or of a published model.

    Raises a usage error for any other name.
    """
    from ..model.config import ModelConfig
    from ..pipeline.model_name import UnknownModel, find
    from ..plan.models import published, shipped

    if name.endswith(".json"):
        return ModelConfig.from_directory(Path(name))
    try:
        return find(name, runs, shipped())
    except UnknownModel:
        config = published(name)
        if config is None:
            raise
        return config


def _show_model(config: ModelConfig, path: Path | None, context: int, as_json: bool) -> None:
    """Print what a model needs: weights, FLOPs, KV cache and memory, for `context` tokens of context.

    `path` is the model's directory or GGUF file, None for a model of which only the shapes are known.
    """
    from ..model.footprint import describe, size_text, tell

    size = _weights_size(path) if path else 0
    if as_json:
        print(json.dumps({**describe(config, context), "weights_bytes": size}, indent=2))
        return
    print(tell(config, context))
    weights = f"{size_text(size)} in {path}" if size else "none here: only the shapes are known"
    print(f"{'weights':14} {weights}")


def _weights_size(path: Path) -> int:
    """Return the bytes of a model directory's safetensors files, or of a GGUF file."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _list_artifacts(runs: Path, as_json: bool) -> None:
    """Print one line for each artifact in the store of `runs`: its name, stage, seconds and size."""
    from ..pipeline.stage_device import changed_device

    rows = []
    for stored in open_store(runs).all():
        manifest = stored.manifest
        size = sum(output["bytes"] for output in manifest["outputs"].values())
        row = {"artifact": stored.folder.name, "stage": manifest["stage"], "seconds": manifest["seconds"]}
        unchanged = manifest["notes"].get("weights_changed") is False
        rows.append({**row, "bytes": size, "unchanged": unchanged, "devices": changed_device(manifest)})
    print_rows(rows, as_json, _artifact_line)


def _artifact_line(row: dict[str, Any]) -> str:
    """Return one line of the list of artifacts: name, stage, seconds, and size in MB."""
    megabytes = row["bytes"] / 1e6
    mark = "  weights unchanged" if row["unchanged"] else ""
    devices = f"\n  ! {row['devices']}" if row["devices"] else ""
    return (
        f"{row['artifact']:28} {row['stage']:28} {row['seconds']:8.1f} s {megabytes:9.2f} MB{mark}{devices}"
    )


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m, gemma3-270m, or hf:OWNER/NAME (extra hub)")],
    models: Annotated[Path, typer.Option(help="where models are kept")] = MODELS_FOLDER,
) -> None:
    """Fetch a base model and convert it to an HF directory.

    For instance: `limbeck pull smollm2-135m`
    """
    from ..model.footprint import size_text
    from ..model.pull import pull as fetch

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    directory = fetch(name, models, say)
    print(directory)
    size = sum(file.stat().st_size for file in directory.glob("*"))
    model = name if models == MODELS_FOLDER else directory
    say(f"{size_text(size)}; ask it something: limbeck ask {model} 'What is 7 times 8?'")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=MODEL)],
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

    For instance: `limbeck export smollm2-135m/r1 --gguf q8_0`
    """
    from ..model import gguf as ggml

    ggml.check_type(gguf)
    found = open_model(model, runs)
    if found.path.is_file():
        raise usage_error(f"{found.path} is a GGUF file already; name a model directory")
    path = out or Path(f"{found.title}-{gguf}.gguf")
    ggml.write(found.path, path, gguf)
    print(path)
