"""The worker process, which runs one stage after another, so that torch is imported only once.

Jobs arrive as JSON lines on standard input; events leave as JSON lines on standard output. What libraries
print goes to standard error. When the parent process dies, standard input ends, and the worker exits at once,
so that it does not write into a folder that a new run may use.
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
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import TypeAdapter

from ..activity import ActivityReport, phase
from ..config.hosts import Hosts
from ..config.recipe import AnyStage, Problems, Remote
from ..runtime import allocator
from ..types import LimbeckError
from . import continuation
from .continuation import KERNELS
from .job import Job
from .review.curate import Waiting
from .stage_device import device_failure, device_memory, note_device, ready_device
from .stage_seats import ready_seats
from .store import OUTCOME, Store, out_of_space, sweep, sync_below, write

TEMPORARY_FAILURE = 75  # exit code (sysexits.h, EX_TEMPFAIL) of a stage that can go on
SOFTWARE_FAILURE = 70  # exit code (sysexits.h, EX_SOFTWARE) of a defect in Limbeck

Event = dict[str, Any]


def main(threads: int) -> None:
    """Run jobs until standard input ends. `threads` is the number of torch's CPU threads."""
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

        def tell(event: Event, name: str = request["name"]) -> None:
            print(json.dumps({"name": name, **event}), file=events, flush=True)

        job = read_job(request, stop)
        event = run_job(job, lambda text: tell({"event": "told", "text": text}))
        tell(event)
        if event["event"] == "broken":
            os._exit(SOFTWARE_FAILURE)


def _listen(jobs: SimpleQueue, stop: threading.Event) -> None:
    """Read jobs and stop requests from standard input until it ends, then end the process."""
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("stop"):
            stop.set()
        else:
            jobs.put(message)
    os._exit(1)


# ---------------------------------------------------------------- jobs as JSON


def write_job(job: Job) -> dict[str, Any]:
    """Return a job as a JSON object."""
    return {
        "name": job.name,
        "stage": job.stage.model_dump(mode="json"),
        "seed": job.seed,
        "inputs": {name: str(path) for name, path in job.inputs.items()},
        "problems": {name: problems.model_dump(mode="json") for name, problems in job.problems.items()},
        "folder": str(job.folder),
        "control": job.control,
        "queue": str(job.queue) if job.queue else None,
        "review_bytes": job.review_bytes,
        "endpoints": {name: endpoint.model_dump(mode="json") for name, endpoint in job.endpoints.items()},
        "dropped": sorted(job.dropped),
        "device": job.device,
        "continues": str(job.continues) if job.continues else None,
        "preview": str(job.preview) if job.preview else None,
        "hosts": job.hosts.model_dump(mode="json") if job.hosts else None,
    }


def read_job(request: dict[str, Any], stop: threading.Event) -> Job:
    """Return the job that `write_job` converted to JSON. Once `stop` is set, the job ends at its next
    checkpoint."""
    return Job(
        name=request["name"],
        stage=TypeAdapter(AnyStage).validate_python(request["stage"]),
        seed=request["seed"],
        inputs={name: Path(path) for name, path in request["inputs"].items()},
        problems=TypeAdapter(dict[str, Problems]).validate_python(request["problems"]),
        folder=Path(request["folder"]),
        control=request["control"],
        queue=Path(request["queue"]) if request["queue"] else None,
        review_bytes=request["review_bytes"],
        endpoints={name: Remote(**settings) for name, settings in request["endpoints"].items()},
        dropped=frozenset(request["dropped"]),
        device=request["device"],
        continues=Path(request["continues"]) if request["continues"] else None,
        preview=Path(request["preview"]) if request["preview"] else None,
        hosts=Hosts(**request["hosts"]) if request["hosts"] else None,
        stopping=stop.is_set,
    )


# ---------------------------------------------------------------- running a stage


def run_job(job: Job, tell: Callable[[str], None] = print) -> Event:
    """Run one stage and return the event of its end: `done` (with the outcome), `found` (another run had
    finished it), `waiting` (for reviews), `broken` (its card failed, so this process has to end), or `failed`
    (with exit code and message).

    `tell` is called with messages for the user during the stage. Exceptions of the stage are returned as
    `failed`, never raised.
    """
    store = Store(job.folder.parent.parent)
    try:
        with store.lock(job.folder):
            if store.open(store.root / job.folder.name):  # another run was faster
                return {"event": "found"}
            with ready_device(job, tell) as ready:
                return {"event": "done", "outcome": _execute(ready, tell)}
    except Waiting as waiting:
        return {"event": "waiting", "rows": waiting.open_rows}
    except LimbeckError as error:
        return _failed(error.exit_code, str(error))
    except BaseException as error:  # noqa: BLE001 - a worker outlives its stage and reports what ended it
        if event := device_failure(job, error):
            return event if event["event"] == "broken" else _failed(TEMPORARY_FAILURE, event["message"])
        if out_of_space(error):
            remedy = "the same command goes on from the last checkpoint"
            return _failed(TEMPORARY_FAILURE, f"no space left on {job.folder}; free some, and {remedy}")
        message = f"{type(error).__name__}: {error}"
        return {**_failed(SOFTWARE_FAILURE, message), "traceback": traceback.format_exc()}


def _failed(code: int, message: str) -> Event:
    """Return the event of a stage that failed. `code` is the exit code for the command line."""
    return {"event": "failed", "code": code, "message": message}


def _execute(job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the stage and return its outcome (costs and notes).

    The outcome is written to disk after all other files, and the checkpoint leaves the folder after that. A
    stage that is killed in between therefore does not run again.
    """
    from .stages import STAGES

    path = job.folder / OUTCOME
    if not path.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        sweep(job.folder)
        with ActivityReport(job.folder):
            continued = continuation.begin(job, tell)
            seats = ready_seats(job, tell)
            with phase("choosing kernels"):
                kernels = _choose_kernels(job, tell)
            device = note_device(job, tell)
            _preview(job, tell)
            _release_memory()
            began = time.monotonic()
            cpu_began = time.process_time()
            outcome = STAGES[job.stage.kind](replace(job, tell=tell))
            with phase("writing to disk"):
                sync_below(job.folder)
        usage = {**_usage(began, cpu_began), **device_memory(job)}
        outcome = {**outcome, **usage, "kernels": kernels, **device, **seats}
        if continued:
            outcome["continued"] = continued
        write(path, json.dumps(outcome))
    continuation.end(job)
    return json.loads(path.read_text(encoding="utf-8"))


def _preview(job: Job, tell: Callable[[str], None]) -> None:
    """Write the preview of a stage, if it is to have one, and tell what it counts. A mistake of the user's is
    left for the stage itself to report."""
    if not job.preview:
        return
    from ..report.preview import remedies, summary
    from .preview import write_once

    with suppress(LimbeckError), phase("previewing"):
        preview = write_once(job)
        for text in [summary(preview), *remedies(preview)] if preview else []:
            tell(text.en)


def _choose_kernels(job: Job, tell: Callable[[str], None]) -> dict[str, Any]:
    """Choose the compute kernels of the stage, and return them. A stage keeps its kernels when it is resumed,
    because different kernels round differently."""
    from ..model import kernels

    path = job.folder / KERNELS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    changed = kernels.adopt(before)
    if changed:
        tell(changed)
    elif before:
        return before
    chosen = kernels.record()
    if before:
        chosen = {**chosen, "before": before}
    write(path, json.dumps(chosen))
    return chosen


# ---------------------------------------------------------------- time and memory


def _release_memory() -> None:
    """Return freed memory of the previous stage to the operating system and reset the peak memory, where the
    system supports it (malloc_trim(3); proc(5), clear_refs)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Return the maximum of resident memory, in bytes, since `_release_memory`; on systems without /proc,
    since the worker started."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _usage(began: float, cpu_began: float) -> dict[str, Any]:
    """Return the wall time and the CPU time since the stage began, in seconds, and the peak memory in bytes.
    `began` and `cpu_began` are the clocks' values at the beginning."""
    return {
        "seconds": round(time.monotonic() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu_began, 3),
        "peak_memory_bytes": _peak_memory(),
    }


if __name__ == "__main__":
    main(int(sys.argv[1]))
