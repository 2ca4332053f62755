"""Models by name: a directory, a pulled name, a GGUF file, an artifact, or a run, whose last model it is then."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from .service import Price, Served, Service

SHARE = 0.4  # of the memory that is left, for what rows keep of their tokens
PREFIX_SHARE = 0.1  # and for what is remembered of texts that were read
LAST = "r1"  # the model that a recipe leads to


def open_service(
    names: Sequence[str],
    runs: Path,
    prices: Sequence[str] = (),
    rows: int = 64,
    waiting: int = 256,
    longest: int = 2048,
    threads: int = 0,
) -> Service:
    """The models, each `[NAME=]MODEL`, read into memory by a thread that ends with that: see `EngineThread` for why."""
    torch.set_num_threads(threads or max(1, int(usable_cores())))
    with ThreadPoolExecutor(1) as reader:
        return reader.submit(_open, names, runs, prices, rows, waiting, longest).result()


def _open(
    names: Sequence[str], runs: Path, prices: Sequence[str], rows: int, waiting: int, longest: int
) -> Service:
    places = named(names, runs)
    priced, served = price_list(prices, list(places)), []
    for name, folder in places.items():
        tokenizer, model = Tokenizer.from_directory(folder), weights.load(folder)
        config = model.config
        left = usable_memory() / (len(places) - len(served))
        kept = config.kv_bytes_per_token(4)
        scheduler = Scheduler(
            model, tokenizer, rows, waiting, int(SHARE * left / kept), int(PREFIX_SHARE * left), _ends(folder)
        )
        _warm(scheduler)
        served.append(Served(name, folder, scheduler, priced.get(name), longest))
    return Service(served)


def named(names: Sequence[str], runs: Path) -> dict[str, Path]:
    """Where each of them lies, under the name that it is asked for by."""
    places: dict[str, Path] = {}
    for asked in names:
        given, equals, rest = asked.partition("=")
        name, folder = find(rest if equals else asked, runs)
        name = given if equals else name
        if name in places:
            raise LimbeckError(f"two models would go by the name {name}; say NAME={rest or asked}")
        places[name] = folder
    return places


def find(name: str, runs: Path) -> tuple[str, Path]:
    """What a model is called if nothing else is said, and its directory. Raises LimbeckError for what is no model, and
    for what is a run and a model."""
    path = Path(name)
    for run in (path, runs / name):
        if (run / INDEX).is_file():
            if run != path and (twin := Path("models") / name).is_dir():
                raise LimbeckError(f"{name} is a run and a model; say {run} or {twin}")
            return _last_of(run)
    try:
        folder = find_model(name, Path())
    except LimbeckError:
        if not (runs / "store").is_dir():
            raise
        artifact, _ = find_artifact(name, runs)
        folder = artifact.folder
        path = Path(artifact.manifest["stage"])
    if folder.is_file():
        return folder.stem, _unpacked(folder)
    directory = folder / "model" if (folder / "model").is_dir() else folder
    if not (directory / "config.json").is_file():
        raise LimbeckError(
            f"{folder} holds no model: it has no config.json; name a model's directory, an artifact or a run"
        )
    return path.name or folder.resolve().name, directory


def _last_of(run: Path) -> tuple[str, Path]:
    """The model that a run has led to so far; one that was merely loaded where none has learned yet."""
    stages = json.loads((run / INDEX).read_text(encoding="utf-8"))
    folders = {
        stage: run.resolve().parent / "store" / artifact / "model" for stage, artifact in stages.items()
    }
    models = [stage for stage, folder in folders.items() if (folder / "config.json").is_file()]
    if not models:
        raise LimbeckError(f"{run} has no model yet; `limbeck status {run}` says how far it is")
    learned = [stage for stage in models if not stages[stage].startswith("load-")]
    stage = LAST if LAST in models else (learned or models)[-1]
    return stage, folders[stage]


def _unpacked(file: Path) -> Path:
    """A GGUF file as a directory, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="limbeck-gguf-")
    _KEPT.append(folder)
    gguf.read(file, Path(folder.name) / "model")
    return Path(folder.name) / "model"


_KEPT: list[tempfile.TemporaryDirectory] = []


def _ends(folder: Path) -> tuple[int, ...]:
    """Further tokens that end a turn: some families have several."""
    path = folder / "generation_config.json"
    told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    return tuple(told) if isinstance(told, list) else ()


def _warm(scheduler: Scheduler) -> None:
    """Make the kernels and touch every weight before the first request does."""
    with torch.inference_mode():
        answer = scheduler.submit(Request(scheduler.tokenizer.response(""), 1.0, 1.0, 2))
        while not answer.done:
            scheduler.round()
    if answer.error:
        raise answer.error


def price_list(prices: Sequence[str], names: Sequence[str]) -> dict[str, Price]:
    """`[NAME=]READ/SAID` per million tokens; without a name, of every model."""
    priced: dict[str, Price] = {}
    for text in prices:
        name, equals, rest = text.partition("=")
        try:
            read, said = (float(part) for part in (rest if equals else text).split("/"))
            if min(read, said) < 0:
                raise ValueError
        except ValueError:
            raise LimbeckError(
                f"--price {text}: say READ/SAID per million tokens, for instance 0.15/0.60"
            ) from None
        if equals and name not in names:
            raise LimbeckError(f"--price {text}: no model {name} is served; there are {', '.join(names)}")
        priced |= dict.fromkeys([name] if equals else names, Price(read, said))
    return priced
