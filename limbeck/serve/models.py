"""Load the models to serve, which `pipeline.model_name` finds by their names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.device_scheduler import DeviceScheduler
from ..engine.request import DeviceFull, Request
from ..engine.scheduler import Scheduler
from ..model import weights
from ..model.decoder import Decoder
from ..model.ops import devices
from ..model.ops.table import BLOCK
from ..model.paged import PagedCache
from ..pipeline.model_name import find_model
from ..runtime.machine import usable_cores, usable_memory
from ..text.tokenizer import Tokenizer
from ..types import LimbeckError
from .service import Service
from .types import Price, ServedModel

KV_SHARE = 0.4  # of the free memory, for the KV cache
PREFIX_SHARE = 0.1  # of the free memory, for the prefix cache
CARD_SHARE = 0.8  # of a card's free memory, for keys and values; the rest is for what a step computes
PREFIX_ROOM = 2  # times the blocks that all rows can need, at most: the rest keeps beginnings of prompts


@dataclass(frozen=True)
class _SchedulerLimits:
    """Limits of each model's scheduler, and the resolved name of the device that the model lies on.

    `rows` is the number of sequences that are generated at once, `waiting` the number of requests that may be
    queued, `max_tokens` the default limit of a completion in tokens.
    """

    rows: int
    waiting: int
    max_tokens: int
    device: str


def open_service(
    names: Sequence[str],
    runs: Path,
    prices: Sequence[str] = (),
    rows: int = 64,
    waiting: int = 256,
    max_tokens: int = 2048,
    threads: int = 0,
    device: str = "cpu",
) -> Service:
    """Load models and return the service over them.

    Each of `names` is `[NAME=]MODEL`, where NAME is the served name. Each of `prices` is `[NAME=]READ/SAID`,
    as in `price_list`. `rows` sequences of a model are generated at once, `waiting` requests may be queued
    for it, and `max_tokens` is the default limit of a completion. `threads` is the number of CPU threads for
    PyTorch, 0 for all usable cores. `device` is the resolved name of what the models are placed on
    (model/ops/devices.py). The models are loaded in a thread that ends afterwards; the docstring of
    `EngineThread` tells why.

    Raises LimbeckError for a name that is no model, two models of one name, a malformed price, or a device
    that has no room for any of the models. Those that have none beside the others are in `unavailable` of
    the service.
    """
    torch.set_num_threads(threads or max(1, int(usable_cores())))
    limits = _SchedulerLimits(rows, waiting, max_tokens, device)
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
    unavailable: dict[str, str] = {}
    devices.prepare(limits.device)
    for name, folder in folders.items():
        remaining = len(folders) - len(served) - len(unavailable)
        try:
            scheduler = _load_scheduler(folder, remaining, limits)
        except (torch.OutOfMemoryError, DeviceFull) as error:
            reason = error.shortage if isinstance(error, DeviceFull) else devices.shortage(error)
            unavailable[name] = f"{name} is not served: {reason}; serve fewer models at once"
        else:
            served.append(ServedModel(name, folder, scheduler, priced.get(name), limits.max_tokens))
            continue
        devices.release()
    if unavailable and not served:
        raise LimbeckError(next(iter(unavailable.values())))
    return Service(served, limits.device, unavailable)


def _load_scheduler(folder: Path, remaining: int, limits: _SchedulerLimits) -> Scheduler:
    """Load the model in `folder` and return its warmed-up scheduler.

    `remaining` is the number of models still to be loaded, this one included; they share the free memory
    equally.
    """
    tokenizer = Tokenizer.from_directory(folder)
    model = weights.load_onto(folder, limits.device)
    stop_token_ids = _stop_token_ids(folder)
    if model.ops.on_host:
        scheduler = _host_scheduler(model, tokenizer, remaining, limits, stop_token_ids)
    else:
        blocks = _blocks(model, remaining, limits)
        scheduler = DeviceScheduler(model, tokenizer, limits.rows, limits.waiting, blocks, stop_token_ids)
    _warm_up(scheduler)
    return scheduler


def _host_scheduler(
    model: Decoder,
    tokenizer: Tokenizer,
    remaining: int,
    limits: _SchedulerLimits,
    stop_token_ids: tuple[int, ...],
) -> Scheduler:
    """Return the scheduler of a model on the CPU, which takes a part of the free memory."""
    memory = usable_memory() / remaining  # bytes that are free once the weights are loaded, for this model
    bytes_per_token = model.config.kv_bytes_per_token(4)
    return Scheduler(
        model,
        tokenizer,
        limits.rows,
        limits.waiting,
        int(KV_SHARE * memory / bytes_per_token),
        int(PREFIX_SHARE * memory),
        stop_token_ids,
    )


def _blocks(model: Decoder, remaining: int, limits: _SchedulerLimits) -> int:
    """Return the number of blocks of keys and values that a model on a device gets.

    Raises DeviceFull if one answer of the default length does not fit into them.
    """
    weight = model.embed.weight
    each = PagedCache.block_bytes(model.config, weight.dtype)
    free = model.ops.free_bytes(weight.device)
    room = KV_SHARE * usable_memory() if free is None else CARD_SHARE * free
    positions = model.config.max_positions
    blocks = min(int(room / remaining) // each, PREFIX_ROOM * limits.rows * -(-positions // BLOCK))
    needed = -(-min(limits.max_tokens, positions) // BLOCK)
    if blocks < needed:
        raise DeviceFull(
            f"an answer of {min(limits.max_tokens, positions)} tokens needs {needed * each / 2**30:.3f} GiB "
            f"for keys and values, and there is room for {blocks * each / 2**30:.3f} GiB"
        )
    return blocks


def named(names: Sequence[str], runs: Path) -> dict[str, Path]:
    """Return the directory of each model by its served name.

    Each of `names` is `[NAME=]MODEL`. Raises LimbeckError if two models have the same served name.
    """
    folders: dict[str, Path] = {}
    for text in names:
        alias, equals, model = text.partition("=")
        found = find_model(model if equals else text, runs)
        name = alias if equals else found.title
        if name in folders:
            raise LimbeckError(f"two models would go by the name {name}; say NAME={model or text}")
        folders[name] = found.directory()
    return folders


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
