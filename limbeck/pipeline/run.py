"""Execution of a recipe: stages start as soon as their inputs are finished, and their results are stored,
until none is left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..config.aliases import stored, stored_kind
from ..config.hosts import Hosts
from ..config.load import dump
from ..config.parts import Budgeted
from ..config.recipe import Curate, Recipe, Remote
from ..engine.openai_client import key_of
from ..run_log import TIMING, read
from ..runtime.machine import machine
from ..runtime.worker_pool import WorkerPool
from ..types import LimbeckError, Resumable
from . import preview
from .continuation import Shorter
from .dataset_rows import ROWS
from .graph import Graph, Node, report_nodes, seed_of
from .job import Job
from .progress import Progress
from .provenance.propagate import check_licences, merged_provenance, origin_of
from .review import curate, review_queue
from .run_folder import FORECAST, INDEX, RECIPE, add_interval, read_json
from .run_state import look
from .run_status import RunStatus, was_killed
from .run_status import status as read_status
from .run_view import against_clock
from .store import Artifact, Store, out_of_space, write
from .worker import SOFTWARE_FAILURE, TEMPORARY_FAILURE, write_job

TICK = 0.25  # seconds between two looks at the workers
GRACE = 20.0  # seconds that running stages have to checkpoint after another one has failed


class Display(Protocol):
    """The interface through which a run reports to its user. Implementations print a tree in a terminal,
    plain lines, or JSON events."""

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Show the state of all stages; called several times a second. `running` maps running stages to their
        progress."""

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Show that the stage `node` has finished with the result `artifact`."""

    def say(self, text: str) -> None:
        """Show the message `text`."""


class Quiet:
    """A display that prints nothing."""

    def show(self, graph: Graph, running: dict[str, Progress]) -> None:
        """Do nothing."""

    def finished(self, node: Node, artifact: Artifact) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""


class Run:
    """One run of a recipe: its graph of stages, its folder (`runs/NAME`), its worker processes and its
    display."""

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        home: Path,
        display: Display,
        right: str | None = None,
        device: str = "cpu",
        given: Mapping[str, Artifact] | None = None,
        hosts: Hosts | None = None,
    ):
        """Prepare a run. `base` is the folder that relative paths in the recipe are resolved against, `home`
        the folder of all runs. `right` is the user's reason for a claim to be exempt from a licence's terms.
        `device` is what models are placed on (model/ops/devices.py). `given` has the results of stages that
        need not run, by name (`Graph`). `hosts` is what samples and grades, if not the workers themselves.
        Raises LimbeckError if a licence forbids a stage and no `right` is given, or if there is no such
        device here."""
        self.recipe = recipe
        self.device = _checked(device, hosts)
        self.hosts = hosts
        self.home = home
        self.display = display
        self.store = Store(home / "store")
        self.folder = home / recipe.name
        self.graph = Graph(recipe, self.store, base, given=given)
        self.licence_traces, self.claims = check_licences(self.graph, right)
        self.host = WorkerPool(recipe.workers, recipe.threads)
        self.status = RunStatus(self.folder, right)
        self.running: dict[str, Progress] = {}
        self.broken: set[str] = set()  # stages whose card has failed
        self.previews = False  # True to preview each stage that samples, before it begins
        self.stopping = False
        self._stop_sent = False

    # ------------------------------------------------------------ the loop

    def execute(self, forecast: dict[str, Any] | None = None) -> Path | None:
        """Execute all stages. Return the path of the report's HTML page, None if the recipe has no report. A
        `forecast` of the stages' costs is saved in the run's folder.

        Raises Resumable if the run was stopped or waits for reviews.
        """
        self._refuse_keyless()
        self._open_folder()
        self._recover_clock()
        with self.status:
            self._keep_forecast(forecast)
            return self._run_stages()

    def _run_stages(self) -> Path | None:
        """Run all stages until none is left, then write the report and return its page."""
        self.graph.check_contamination()
        began = time.monotonic()
        try:
            while self._start() or self.running or self._was_reviewed():
                self._step()
        except (LimbeckError, OSError):
            self._drain_after_failure()
            raise
        except KeyboardInterrupt:  # of a program in Python; the command line handles the signal itself
            self._drain_after_interrupt()
            raise
        finally:
            self.host.close()
        if self.stopping:
            self.status.tell("paused")
            raise Resumable("stopped; the same command goes on from here")
        self._refuse_waiting()
        return self._report(time.monotonic() - began)

    def stop(self) -> None:
        """Make running stages write a checkpoint and end. Safe to call from a signal handler, because it only
        sets a flag."""
        self.stopping = True

    def _step(self) -> None:
        """Pass on a requested stop, wait at most `TICK` seconds for an event of a worker, and handle it."""
        if self.status.pause_requested():
            self.stop()
        if self.stopping and not self._stop_sent:
            self._stop_sent = True
            self.status.tell("pausing")
            self.display.say("stopping after a checkpoint; press Ctrl-C again to stop at once")
            self.host.stop()
        event = self.host.wait(TICK)
        self.display.show(self.graph, self.running)
        if event:
            self._handle(event)

    def _drain_after_failure(self) -> None:
        """After a stage has failed, give the other running stages up to `GRACE` seconds to write a
        checkpoint. Further failures are not reported."""
        self.stop()
        deadline = time.monotonic() + GRACE
        while self.running and time.monotonic() < deadline:
            with suppress(LimbeckError, OSError):
                self._step()

    def _drain_after_interrupt(self) -> None:
        """After Ctrl-C, wait until the running stages have written a checkpoint and ended. A second Ctrl-C
        ends the wait."""
        self.stop()
        while self.host.busy:
            with suppress(LimbeckError, OSError):
                self._step()
        self.status.tell("paused")

    def _was_reviewed(self) -> bool:
        """Return True if reviews have made a stage ready to run.

        The status `waits` is written before the final check. Somebody who saves a review and then reads the
        status `running` therefore knows that this run will see the review, and does not start another run.
        """
        if self.stopping:
            return False
        if any(node.state == "asks" for node in self.graph.nodes.values()):
            self.status.tell("waits")
        return any(node.state == "ready" for node in self.graph.nodes.values())

    # ------------------------------------------------------------ before the first stage

    def _refuse_keyless(self) -> None:
        """Raise LimbeckError if an endpoint that a stage will query has no API key."""
        for node in self.graph.nodes.values():
            if node.artifact:
                continue
            endpoints = {node.name: node.stage} if isinstance(node.stage, Remote) else node.endpoints
            for name, settings in endpoints.items():
                key_of(f"stages.{name}", settings)

    def _open_folder(self) -> None:
        """Create the run's folder, and write the recipe and the list of finished artifacts into it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / RECIPE, dump(self.graph.recipe))
            self._index()
        except OSError as error:
            if out_of_space(error):
                raise
            raise LimbeckError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from None

    def _recover_clock(self) -> None:
        """Note the time that an earlier process worked on its stages before it was killed, up to the last
        step that they logged."""
        if not was_killed(self.folder):
            return
        earlier = read_status(self.folder)
        for stage, name in earlier.begun.items():
            timing = self.store.root / ".partial" / name / TIMING
            if timing.exists() and stage in earlier.starts:
                add_interval(self.folder, name, earlier.starts[stage], timing.stat().st_mtime)

    def _keep_forecast(self, forecast: dict[str, Any] | None) -> None:
        """Write the forecast, if there is one. A finished stage keeps the forecast that was made before it
        ran."""
        if not forecast:
            return
        path = self.folder / FORECAST
        earlier = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
        stages = {}
        for name, forecast_of_stage in earlier.items():
            if name in self.graph.nodes and self.graph.nodes[name].artifact:
                stages[name] = forecast_of_stage
        for name, forecast_of_stage in forecast["stages"].items():
            if not self.graph.nodes[name].artifact:
                stages[name] = forecast_of_stage
        write(path, json.dumps({**forecast, "stages": stages}, indent=2) + "\n")

    # ------------------------------------------------------------ starting stages

    def _start(self) -> bool:
        """Start ready stages on free workers, first those that most other stages depend on. Return True if
        any was started."""
        if self.stopping:
            return False
        self._write_queues()
        self.graph.refresh()  # people may have reviewed, and other runs may have finished
        started = False
        for node in sorted(self.graph.nodes.values(), key=self._urgency):
            if node.state == "ready" and node.name not in self.running and self.host.free:
                self._start_stage(node)
                started = True
        if started:
            self.status.tell("running")
        return started

    def _start_stage(self, node: Node) -> None:
        """Send the job of a node to a free worker."""
        shorter = self.graph.shorter(node)
        job = self._job(node, shorter)
        self.running[node.name] = Progress(node, job.folder, time.monotonic(), self._forecast_of(node.name))
        self.status.begun[node.name] = job.folder.name
        self.status.starts[node.name] = time.time()
        self.host.start(write_job(job))
        if shorter and shorter.obstacle:
            self.display.say(f"{node.name}: {shorter.sentence}")
        if job.dropped:
            checked = node.contamination.checked
            self.display.say(f"{node.name}: leaves {len(job.dropped)} of {checked} out, too near to the test")

    def _forecast_of(self, stage: str) -> dict[str, float] | None:
        """Return the forecast of a stage, None if there is none."""
        return read_json(self.folder / FORECAST).get("stages", {}).get(stage)

    def _write_queues(self) -> None:
        """Write the queues of rows that people should review."""
        for node in self.graph.nodes.values():
            if node.queue and not node.artifact:
                curate.write_queue(
                    node.queue, partial(self._rows, node), node.stage.question, node.stage.second
                )

    def _rows(self, node: Node) -> list[dict[str, Any]]:
        """Return the rows that a curate stage asks people to review."""
        assert isinstance(node.stage, Curate)
        artifact = self.graph.nodes[node.stage.rows].artifact
        return list(read(artifact.folder / ROWS))

    def _urgency(self, node: Node) -> int:
        """Return the sort key for starting nodes, smallest first: the negated number of stages that depend on
        the node."""
        return -len(self.graph.dependents(node.name))

    def _job(self, node: Node, shorter: Shorter | None = None) -> Job:
        """Return the job that a worker needs to run a node. `shorter` is the finished stage that it is
        continued from, if it can be."""
        return Job(
            name=node.name,
            stage=node.stage,
            seed=seed_of(self.recipe, node),
            inputs={name: artifact.folder for name, artifact in self.graph.artifacts_of(node).items()},
            problems=node.problems,
            folder=self.store.partial(node.kind, node.key),
            control=node.control,
            queue=node.queue,
            review_bytes=node.review_bytes,
            endpoints=node.endpoints,
            dropped=frozenset(node.dropped),
            device=self.device,
            continues=shorter.artifact.folder if shorter and not shorter.obstacle else None,
            preview=self._preview(node),
            hosts=self.hosts,
        )

    def _preview(self, node: Node) -> Path | None:
        """Return the file for the preview of a stage; None if there is to be none, as for an evaluation and
        for a remote model, whose responses cost money."""
        wanted = self.previews and node.kind in preview.LEARNING and preview.previewable(node.stage)
        if not wanted or node.stage.model in node.endpoints:
            return None
        return preview.path_of(self.folder.resolve(), node.name)

    # ------------------------------------------------------------ events of workers

    def _handle(self, event: dict[str, Any]) -> None:
        """Handle one event of a worker. Raises LimbeckError if the stage failed, and Resumable if its process
        died."""
        kind = event["event"]
        if kind == "told":
            self.display.say(f"{event['name']}: {event['text']}")
            return
        progress = self.running.pop(event["name"])
        add_interval(self.folder, progress.folder.name, self.status.starts[event["name"]], time.time())
        if kind in ("done", "found", "waiting"):
            self.status.begun.pop(event["name"])
            self.status.starts.pop(event["name"])
        if kind in ("done", "found"):
            self._finish_stage(progress, event)
        elif kind == "died":
            raise Resumable(
                f"stage {event['name']}: its process {_end(event['status'])}; "
                "run again to go on from its last checkpoint"
            )
        elif kind == "broken":
            self._go_on_elsewhere(event)
        elif kind == "failed" and not (event["code"] == TEMPORARY_FAILURE and self.stopping):
            raise _failure(event, self.folder)

    def _go_on_elsewhere(self, event: dict[str, Any]) -> None:
        """Let a stage whose card failed go on in a new process, from its last checkpoint. Raises Resumable if
        it has failed there as well."""
        name = event["name"]
        if name in self.broken:
            raise Resumable(
                f"stage {name}: its card failed again in a new process ({event['message']}); look at the "
                "card (dmesg), then run again to go on from the last checkpoint"
            )
        self.broken.add(name)
        self.display.say(f"{name}: its card failed ({event['message']}); it goes on in a new process")

    def _finish_stage(self, progress: Progress, event: dict[str, Any]) -> None:
        """Store the artifact of a finished stage, or use the one that another run stored meanwhile."""
        node = progress.node
        if event["event"] == "done":
            self.store.finish(progress.folder, self._manifest(node, event["outcome"]))
        self.graph.refresh()
        self._index()
        self.status.tell(self.status.state)
        # found by the key it had: reviews given meanwhile have changed the key of the graph's node
        self.display.finished(node, self.store.find(node.kind, node.key))

    # ------------------------------------------------------------ manifests

    def _manifest(self, node: Node, outcome: dict[str, Any]) -> dict[str, Any]:
        """Return the manifest of a finished stage. `outcome` is what the stage returned."""
        artifacts = self.graph.artifacts_of(node)
        inputs = {}
        for name, artifact in artifacts.items():
            manifest = artifact.manifest
            inputs[name] = {"key": manifest["key"], "digest": artifact.digest, "kind": manifest["kind"]}
        manifest = {
            "kind": stored_kind(node.kind),
            "key": node.key,
            "stage": node.name,
            "title": node.stage.title,
            "settings": stored(node.stage.model_dump(mode="json")),
            "identity": self.graph.identity(node),
            "inputs": inputs,
            "code_version": __version__,
            "seed": seed_of(self.recipe, node),
            "joules": None,
        }
        manifest |= origin_of(node, outcome, artifacts, self.licence_traces, self.claims)
        if node.contamination:
            manifest["decontamination"] = asdict(node.contamination)
        return {**manifest, **outcome}

    def _index(self) -> None:
        """Write `stages.json`, which maps finished stages to artifact folders; `limbeck gc` does not delete
        those. Called after each stage, because a run may be killed at any time."""
        stages = {}
        for name, node in self.graph.nodes.items():
            if node.artifact:
                if name not in self.graph.given:
                    self._update_manifest(node)
                stages[name] = node.artifact.folder.name
        write(self.folder / INDEX, json.dumps(stages, indent=2) + "\n")

    def _update_manifest(self, node: Node) -> None:
        """Add licences, sources and decontamination results that follow from the current recipe to the
        manifest of an artifact that was made earlier, and note whether training changed the weights."""
        manifest = node.artifact.manifest
        artifacts = self.graph.artifacts_of(node)
        origin = origin_of(node, manifest, artifacts, self.licence_traces, self.claims)
        news = merged_provenance(manifest, origin) or {}
        if node.contamination and asdict(node.contamination) != manifest.get("decontamination"):
            news["decontamination"] = asdict(node.contamination)
        initial = artifacts.get(getattr(node.stage, "model", None))
        if isinstance(node.stage, Budgeted) and initial and "weights_changed" not in manifest["notes"]:
            news["notes"] = {**manifest["notes"], "weights_changed": node.artifact.weights != initial.weights}
        if news:
            self.store.amend(node.artifact, news)

    # ------------------------------------------------------------ after the last stage

    def _refuse_waiting(self) -> None:
        """Raise Resumable if a stage waits for reviews."""
        for node in self.graph.nodes.values():
            if node.queue and not node.artifact:
                rows = len(review_queue.pending(node.queue))
                raise Resumable(
                    f"stage {node.name} waits for a person: {rows} rows to review; "
                    f"`limbeck curate {self.folder} {node.name}`, then run again (or run with --auto)"
                )

    def _report(self, seconds: float) -> Path | None:
        """Write the recipe's report and return the path of its page; None if the recipe has no report.
        `seconds` is the duration of this run."""
        from ..report.report import StageView
        from ..report.report import write as write_report

        reports = report_nodes(self.recipe)
        if not reports:
            return None
        name, _ = reports[0]
        views = []
        for node in self.graph.nodes.values():
            artifact = node.artifact
            title = node.stage.title
            views.append(
                StageView(node.name, node.kind, title, artifact.folder, artifact.manifest, node.inputs)
            )
        summary = self._summary(seconds)
        summary["previews"] = {view.name: preview.read(self.folder, view.name) for view in views}
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        self.display.say(f"writing {folder}")
        return write_report(folder, views, self.recipe.model_dump(mode="json"), summary)

    def _summary(self, seconds: float) -> dict[str, Any]:
        """Return the time, memory and machine of the whole run, which are also written to `summary.json`.
        `seconds` is the duration of this call of `execute`; the longest one so far is kept."""
        path = self.folder / "summary.json"
        earlier = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0}
        manifests = [node.artifact.manifest for node in self.graph.nodes.values()]
        peaks = sorted((manifest["peak_memory_bytes"] for manifest in manifests), reverse=True)
        summary = {
            "seconds": round(max(seconds, earlier["seconds"]), 1),
            "stage_seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
            # workers run side by side: their peaks add up
            "peak_memory_bytes": sum(peaks[: self.host.size]),
            "workers": self.host.size,
            "threads": self.host.threads,
            "machine": machine(),
        }
        if (self.folder / FORECAST).exists():
            summary["forecast"] = read_json(self.folder / FORECAST)
            summary["clock"] = against_clock(look(self.folder))
        write(path, json.dumps(summary, indent=2) + "\n")
        return summary


def _checked(device: str, hosts: Hosts | None) -> str:
    """Return the name of a device; raise LimbeckError if it is not here, or none for seats. What `auto`
    stands for is left to the workers, so that this process need not import torch."""
    if hosts and device != "cpu":
        raise LimbeckError(f"--hosts: seats compute on processors; leave out --device {device}, or --hosts")
    if device in ("auto", "cpu"):
        return device
    from ..model.ops.devices import resolve

    return resolve(device)


def _failure(event: dict[str, Any], folder: Path) -> LimbeckError:
    """Return the exception for a failed stage. If the cause is a bug in Limbeck, its traceback is written to
    `traceback.txt` in `folder`."""
    if "traceback" in event:
        path = folder / "traceback.txt"
        write(path, event["traceback"])
        error = LimbeckError(f"stage {event['name']} failed: {event['message']} (the traceback is in {path})")
        error.exit_code = SOFTWARE_FAILURE
        return error
    kind = Resumable if event["code"] == TEMPORARY_FAILURE else LimbeckError
    return kind(f"stage {event['name']}: {event['message']}")


def _end(status: int) -> str:
    """Describe in words how a process with this exit status ended."""
    if status < 0:
        return f"was killed (signal {-status}; out of memory?)"
    return f"ended with code {status}"
