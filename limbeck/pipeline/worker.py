"""A process that runs stages one after the other, so that torch is imported once.

Jobs arrive as JSON lines on standard input, events leave as JSON lines on standard output; what libraries
print goes to standard error. When the parent dies, standard input ends and so does the worker, at once:
nobody writes into a folder that a new run may take over.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import TypeAdapter

from ..config.recipe import AnyStage, Problems, Remote
from ..run_log import prepare
from ..runtime import allocator
from ..types import LimbeckError
from .job import Job
from .review.curate import Waiting
from .store import OUTCOME, Store, out_of_space, sweep, sync_below, write

KERNELS = "kernels.json"  # in a partial folder: the choice of kernels that the stage began with


def main(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which asks for a stop
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    jobs: SimpleQueue[dict[str, Any]] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(jobs, stop), daemon=True).start()
    allocator.keep_memory()

    import torch

    torch.set_num_threads(threads)
    while True:
        request = jobs.get()

        def tell(event: dict[str, Any], name: str = request["name"]) -> None:
            print(json.dumps({"name": name, **event}), file=events, flush=True)

        tell(perform(read_job(request, stop), lambda text: tell({"event": "told", "text": text})))


def _listen(jobs: SimpleQueue, stop: threading.Event) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            stop.set()
        else:
            jobs.put(message)
    os._exit(1)


def write_job(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    return {
        "name": job.name,
        "stage": job.stage.model_dump(mode="json"),
        "seed": job.seed,
        "inputs": {name: str(path) for name, path in job.inputs.items()},
        "problems": {name: problems.model_dump(mode="json") for name, problems in job.problems.items()},
        "folder": str(job.folder),
        "control": job.control,
        "queue": str(job.queue) if job.queue else None,
        "said": job.said,
        "endpoints": {name: endpoint.model_dump(mode="json") for name, endpoint in job.endpoints.items()},
        "dropped": sorted(job.dropped),
    }


def read_job(request: dict[str, Any], stop: threading.Event) -> Job:
    return Job(
        name=request["name"],
        stage=TypeAdapter(AnyStage).validate_python(request["stage"]),
        seed=request["seed"],
        inputs={name: Path(path) for name, path in request["inputs"].items()},
        problems=TypeAdapter(dict[str, Problems]).validate_python(request["problems"]),
        folder=Path(request["folder"]),
        control=request["control"],
        queue=Path(request["queue"]) if request["queue"] else None,
        said=request["said"],
        endpoints={name: Remote(**settings) for name, settings in request["endpoints"].items()},
        dropped=frozenset(request["dropped"]),
        stopping=stop.is_set,
    )


def perform(job: Job, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run one stage; whatever happens becomes an event: done, found, waiting, or failed with code and sentence. `tell`
    takes sentences for people on the way."""
    store = Store(job.folder.parent.parent)
    try:
        with store.lock(job.folder):
            if store.open(store.root / job.folder.name):  # another run was faster
                return {"event": "found"}
            return {"event": "done", "outcome": _carry_out(job, tell)}
    except Waiting as waiting:
        return {"event": "waiting", "rows": waiting.open_rows}
    except LimbeckError as error:
        return {"event": "failed", "code": error.exit_code, "message": str(error)}
    except BaseException as error:  # noqa: BLE001 - a worker outlives its stage and tells what ended it
        if not out_of_space(error):
            return _crashed(error)
        left = "the same command goes on from the last checkpoint"
        return {
            "event": "failed",
            "code": 75,
            "message": f"no space left on {job.folder}; free some, and {left}",
        }


def _carry_out(job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """What the stage returned. It is written down once all else is on disk, and only then does the checkpoint go:
    a stage that had ended when it was killed does not begin again."""
    from .stages import STAGES

    path = job.folder / OUTCOME
    if not path.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        sweep(job.folder)
        prepare(job.folder, "at work")
        _forget()
        used = _kernels_of(job, tell)
        began, cpu = time.monotonic(), time.process_time()
        outcome = STAGES[job.stage.kind](job)
        sync_below(job.folder)
        write(path, json.dumps({**outcome, **_spent(began, cpu), "kernels": used}))
    job.checkpoint().clear()
    (job.folder / KERNELS).unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8"))


def _kernels_of(job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """Which kernels the stage computes with: from its first start to its end the same, for they round differently."""
    from ..model import kernels

    path = job.folder / KERNELS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if changed := kernels.adopt(before):
        tell(changed)
    elif before:
        return before
    used = {**kernels.record(), **({"before": before} if before else {})}
    write(path, json.dumps(used))
    return used


def _forget() -> None:
    """Give back what the stage before has left, and let the peak begin anew, where the system can (malloc_trim(3);
    proc(5), clear_refs)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Most resident bytes since then; elsewhere since the worker began."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _spent(began: float, cpu: float) -> dict[str, Any]:
    spent = {
        "seconds": round(time.monotonic() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
    }
    return {**spent, "peak_memory_bytes": _peak()}


def _crashed(error: BaseException) -> dict[str, Any]:
    return {
        "event": "failed",
        "code": 70,
        "message": f"{type(error).__name__}: {error}",
        "traceback": traceback.format_exc(),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
