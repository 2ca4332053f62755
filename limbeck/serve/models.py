"""Find and load the models to serve.

A model's name is a directory, the name of a pulled model, a GGUF file, an artifact (a stage's result in the
store of a folder of runs), or a run, which stands for its last model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.request import Request
from ..engine.scheduler import Scheduler
from ..model import gguf, weights
from ..model.find import find_model
from ..pipeline.provenance.lineage import INDEX, find_artifact
from ..runtime.machine import usable_cores, usable_memory
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .service import Service
from .types import Price, ServedModel

KV_SHARE = 0.4  # of the free memory, for the KV cache
PREFIX_SHARE = 0.1  # of the free memory, for the prefix cache
FINAL_STAGE = "r1"  # the stage that makes a recipe's final model

# Directories of unpacked GGUF files, held until the process ends: each is removed with its object.
_UNPACKED: list[tempfile.TemporaryDirectory] = []


@dataclass(frozen=True)
class _SchedulerLimits:
    """Limits of each model's scheduler.

    `rows` is the number of sequences that are generated at once, `waiting` the number of requests that may be
    queued, `max_tokens` the default limit of a completion in tokens.
    """

    rows: int
    waiting: int
    max_tokens: int


def open_service(
    names: Sequence[str],
    runs: Path,
    prices: Sequence[str] = (),
    rows: int = 64,
    waiting: int = 256,
    max_tokens: int = 2048,
    threads: int = 0,
) -> Service:
    """Load models and return the service over them.

    Each of `names` is `[NAME=]MODEL`, where NAME is the served name. Each of `prices` is `[NAME=]READ/SAID`,
    as in `price_list`. `rows` sequences of a model are generated at once, `waiting` requests may be queued
    for it, and `max_tokens` is the default limit of a completion. `threads` is the number of CPU threads for
    PyTorch, 0 for all usable cores. The models are loaded in a thread that ends afterwards; the docstring of
    `EngineThread` tells why.

    Raises LimbeckError for a name that is no model, two models of one name, or a malformed price.
    """
    torch.set_num_threads(threads or max(1, int(usable_cores())))
    limits = _SchedulerLimits(rows, waiting, max_tokens)
    with ThreadPoolExecutor(1) as loader:
        return loader.submit(_load_service, names, runs, prices, limits).result()


def _load_service(
    names: Sequence[str], runs: Path, prices: Sequence[str], limits: _SchedulerLimits
) -> Service:
    """Load the models one after the other and return the service over them.

    Each model gets an equal share of the memory that is free when it is loaded.
    """
    folders = named(names, runs)
    priced = price_list(prices, list(folders))
    served: list[ServedModel] = []
    for name, folder in folders.items():
        scheduler = _load_scheduler(folder, len(folders) - len(served), limits)
        served.append(ServedModel(name, folder, scheduler, priced.get(name), limits.max_tokens))
    return Service(served)


def _load_scheduler(folder: Path, remaining: int, limits: _SchedulerLimits) -> Scheduler:
    """Load the model in `folder` and return its warmed-up scheduler.

    `remaining` is the number of models still to be loaded, this one included; they share the free memory
    equally.
    """
    tokenizer = Tokenizer.from_directory(folder)
    model = weights.load(folder)
    memory = usable_memory() / remaining  # bytes that are free once the weights are loaded, for this model
    bytes_per_token = model.config.kv_bytes_per_token(4)
    scheduler = Scheduler(
        model,
        tokenizer,
        limits.rows,
        limits.waiting,
        int(KV_SHARE * memory / bytes_per_token),
        int(PREFIX_SHARE * memory),
        _stop_token_ids(folder),
    )
    _warm_up(scheduler)
    return scheduler


def named(names: Sequence[str], runs: Path) -> dict[str, Path]:
    """Return the directory of each model by its served name.

    Each of `names` is `[NAME=]MODEL`. Raises LimbeckError if two models have the same served name.
    """
    folders: dict[str, Path] = {}
    for text in names:
        alias, equals, model = text.partition("=")
        name, folder = find(model if equals else text, runs)
        if equals:
            name = alias
        if name in folders:
            raise LimbeckError(f"two models would go by the name {name}; say NAME={model or text}")
        folders[name] = folder
    return folders


def find(name: str, runs: Path) -> tuple[str, Path]:
    """Return a model's default served name and its directory.

    Raises LimbeckError if `name` is no model, or is the name of both a run and a model.
    """
    path = Path(name)
    for run in (path, runs / name):
        if (run / INDEX).is_file():
            twin = Path("models") / name
            if run != path and twin.is_dir():
                raise LimbeckError(f"{name} is a run and a model; say {run} or {twin}")
            return _last_model(run)
    path, folder = _find_folder(name, runs)
    if folder.is_file():
        return folder.stem, _unpack(folder)
    directory = folder / "model"
    if not directory.is_dir():
        directory = folder
    if not (directory / "config.json").is_file():
        raise LimbeckError(
            f"{folder} holds no model: it has no config.json; name a model's directory, an artifact or a run"
        )
    return path.name or folder.resolve().name, directory


def _find_folder(name: str, runs: Path) -> tuple[Path, Path]:
    """Return a path whose last part is the model's default name, and the model's directory or GGUF file.

    For an artifact, the default name is the name of the stage that made it.
    """
    try:
        return Path(name), find_model(name, Path())
    except LimbeckError:
        if not (runs / "store").is_dir():
            raise
    artifact, _ = find_artifact(name, runs)
    return Path(artifact.manifest["stage"]), artifact.folder


def _last_model(run: Path) -> tuple[str, Path]:
    """Return the stage and the directory of the model that a run stands for.

    That is the model of the stage `FINAL_STAGE` if the run has one, else the last model that it trained, else
    the last one that it loaded. Raises LimbeckError if the run has no model yet.
    """
    artifacts = json.loads((run / INDEX).read_text(encoding="utf-8"))
    store = run.resolve().parent / "store"
    folders = {stage: store / artifact / "model" for stage, artifact in artifacts.items()}
    models = [stage for stage, folder in folders.items() if (folder / "config.json").is_file()]
    if not models:
        raise LimbeckError(f"{run} has no model yet; `limbeck status {run}` says how far it is")
    trained = [stage for stage in models if not artifacts[stage].startswith("load-")]
    stage = FINAL_STAGE
    if stage not in models:
        stage = (trained or models)[-1]
    return stage, folders[stage]


def _unpack(file: Path) -> Path:
    """Convert a GGUF file to a model directory, which is deleted when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="limbeck-gguf-")
    _UNPACKED.append(folder)
    directory = Path(folder.name) / "model"
    gguf.read(file, directory)
    return directory


def _stop_token_ids(folder: Path) -> tuple[int, ...]:
    """Return all ids of tokens that end a turn, if `generation_config.json` lists several; else none.

    A single such token is known from the tokenizer.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return ()
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return tuple(ids) if isinstance(ids, list) else ()


def _warm_up(scheduler: Scheduler) -> None:
    """Generate two tokens, which compiles the kernels and reads every weight before the first request."""
    prompt = scheduler.tokenizer.response("")
    with torch.inference_mode():
        output = scheduler.submit(Request(prompt, 1.0, 1.0, 2))
        while not output.done:
            scheduler.round()
    if output.error:
        raise output.error


def price_list(prices: Sequence[str], names: Sequence[str]) -> dict[str, Price]:
    """Return the price of each model that has one.

    Each of `prices` is `[NAME=]READ/SAID`: the price of a million prompt tokens and that of a million
    completion tokens. Without NAME, it is the price of every model; a later entry replaces an earlier one.

    Raises LimbeckError for a malformed price, and for a name that is not served.
    """
    priced: dict[str, Price] = {}
    for text in prices:
        name, equals, rest = text.partition("=")
        try:
            price = _parse_price(rest if equals else text)
        except ValueError:
            raise LimbeckError(
                f"--price {text}: say READ/SAID per million tokens, for instance 0.15/0.60"
            ) from None
        if equals and name not in names:
            raise LimbeckError(f"--price {text}: no model {name} is served; there are {', '.join(names)}")
        priced |= dict.fromkeys([name] if equals else names, price)
    return priced


def _parse_price(text: str) -> Price:
    """Return the price written as `0.15/0.60`: prompt tokens, then completion tokens, per million.

    Raises ValueError for anything but two numbers that are not negative.
    """
    prompt, completion = (float(part) for part in text.split("/"))
    if min(prompt, completion) < 0:
        raise ValueError(text)
    return Price(prompt, completion)
