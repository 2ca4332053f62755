"""The device of a stage: taken and made ready before the stage, told in its manifest, and what is said when
the device fails."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .store import write

if TYPE_CHECKING:
    from .job import Job

DEVICES = "devices.json"  # in a partial folder: the devices that the stage has computed on, in order
CPU = {"name": "cpu"}

Tell = Callable[[str], None]


@contextmanager
def ready_device(job: Job, tell: Tell) -> Iterator[Job]:
    """Yield the job with the name of its device resolved, and with the device ready for it.

    A stage is alone on a card; it waits for others and tells so with `tell`. Stages that compute with no
    model take no device. Raises LimbeckError if there is no such device here.
    """
    from ..model.ops import devices
    from ..runtime.card_lock import device_lock

    job = replace(job, device=devices.resolve(job.device) if job.needs_device else "cpu")
    owner = f"stage {job.name} in {job.folder.parents[2]}"
    with device_lock(job.device, owner, tell, job.stopping):
        yield job


def note_device(job: Job, tell: Tell) -> dict[str, Any]:
    """Note in the stage's folder what it computes on, and return what its manifest says of that: nothing
    where it was the CPU from beginning to end.

    Where a killed stage goes on on another kind of device, `tell` is called: the two round differently.
    """
    from ..model.ops import devices

    if not job.needs_device:
        return {}
    path = job.folder / DEVICES
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    device = CPU if job.device == "cpu" else devices.describe(job.device)
    if earlier[-1:] != [device]:
        if earlier:
            tell(
                f"it began on {_in_words(earlier[-1])} and goes on on {_in_words(device)}; the two round "
                "differently, so its files will not be those of a run on one of them"
            )
        write(path, json.dumps([*earlier, device]))
    else:
        earlier = earlier[:-1]
    if earlier:
        return {"device": {**device, "before": earlier}}
    return {} if device == CPU else {"device": device}


def device_memory(job: Job) -> dict[str, int]:
    """Return the most bytes of a card's memory that the stage had in use, for its manifest; nothing without a
    card."""
    from ..model.ops import devices

    return {"device_memory_bytes": devices.peak_bytes(job.device)} if devices.is_card(job.device) else {}


def devices_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the devices that an artifact was computed on, in order, from its manifest."""
    device = dict(manifest.get("device", CPU))
    return [*device.pop("before", []), device]


def changed_device(manifest: Mapping[str, Any], partial: Path | None = None) -> str:
    """Return the sentence about a stage that went on on another kind of device, empty for any other stage.

    `manifest` is that of its artifact; for a stage that is not done, `partial` is the folder it works in.
    """
    computed = devices_of(manifest)
    if partial and (partial / DEVICES).exists():
        computed = json.loads((partial / DEVICES).read_text(encoding="utf-8"))
    if len(computed) < 2:
        return ""
    names = ", then on ".join(_in_words(device) for device in computed)
    return f"computed on {names}, which round differently: its files are not those of a run on one of them"


def _in_words(device: dict[str, Any]) -> str:
    """Return a device in words, such as "NVIDIA H100 (driver 580.95, torch 2.13.0, triton 3.6.0)"."""
    details = [f"{key} {device[key]}" for key in ("driver", "torch", "triton") if device.get(key)]
    return f"{device['name']} ({', '.join(details)})" if details else device["name"]


# ---------------------------------------------------------------- failures


def device_failure(job: Job, error: BaseException) -> dict[str, Any] | None:
    """Return the event of an error of the device: `full` if its memory did not suffice, `broken` if this
    process cannot use it any more; None for any other error. Both have a `message`."""
    from ..model.ops import devices

    if devices.out_of_memory(error):
        return {"event": "full", "message": f"{devices.shortage(error)}; {', or '.join(remedies(job))}"}
    if devices.poisoned(error):
        return {"event": "broken", "message": str(error).splitlines()[0]}
    return None


def remedies(job: Job) -> list[str]:
    """Return what makes a stage need less memory of a card, the gentlest first, as parts of a sentence."""
    stage = job.stage
    name = f"stages.{job.name.split('/')[0]}"
    found = []
    recompute = getattr(stage, "recompute", True)
    if recompute is not True:
        found.append(f"set {name}.recompute: true, with which the same command goes on from its checkpoint")
    moved, smaller = _optimizer_remedies(stage, f"{name}.optimizer")
    found += moved
    if getattr(stage, "precision", None) != "bfloat16":
        found.append(f"set {name}.precision: bfloat16")
    found += smaller
    lower = []
    if hasattr(stage, "batch_tokens"):
        lower.append(f"{name}.batch_tokens ({stage.batch_tokens})")
    if hasattr(stage, "policy"):
        lower.append(f"{name}.policy.group_size ({stage.policy.group_size})")
    if hasattr(stage, "sampling"):
        lower.append(f"{name}.sampling.max_new_tokens ({stage.sampling.max_new_tokens})")
    elif hasattr(stage, "max_new_tokens"):
        lower.append(f"{name}.max_new_tokens ({stage.max_new_tokens})")
    if lower:
        found.append(f"lower {' or '.join(lower)}")
    return found


def _optimizer_remedies(stage: Any, key: str) -> tuple[list[str], list[str]]:
    """Return what makes AdamW need less memory of a card, as parts of a sentence: what changes no key, and
    what does. `key` is where the optimizer is set. The moments of adapters are small."""
    optimizer = getattr(stage, "optimizer", None)
    if optimizer is None or optimizer.name != "adamw" or getattr(stage, "lora", None):
        return [], []
    moved = [] if optimizer.offload else [f"set {key}.offload: true, with which it goes on from there too"]
    smaller = [] if optimizer.moments == "int8" else [f"set {key}.moments: int8"]
    if optimizer.masters is not False:
        smaller.append(f"set {key}.masters: false with precision: bfloat16")
    return moved, smaller
