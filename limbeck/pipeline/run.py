"""Carry a recipe out: start what is ready, wait, store what is done, until nothing is left to do."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..config.aliases import stored, stored_kind
from ..config.load import dump
from ..config.recipe import Curate, Recipe, Remote
from ..engine.openai_client import key_of
from ..run_log import METRICS, PREPARING, ROLLOUTS, TIMING, read
from ..runtime.machine import machine
from ..runtime.worker_pool import Host
from ..types import LimbeckError, Resumable
from .dataset_rows import ROWS
from .graph import Graph, Node, report_nodes, seed_of
from .job import Job
from .provenance.propagate import check, grown, origin_of
from .review import curate as desk
from .review import reviews
from .run_status import RunStatus
from .store import Artifact, Store, out_of_space, write
from .worker import write_job

TICK = 0.25  # seconds between two looks at what is going on
FORECAST = "forecast.json"  # in a run's folder: what its stages were expected to take
RECENT = 10  # rows of timing that the pace of a stage is taken from
GRACE = 20.0  # seconds that running stages have to checkpoint when another one has failed


class Display(Protocol):
    """Whoever watches: a terminal's tree, plain lines, or JSON events."""

    def show(self, graph: Graph, running: dict[str, Progress]) -> None: ...

    def finished(self, node: Node, artifact: Artifact) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Pace:
    """How fast a stage has been lately: `Pace(4, 40, 12.0, 40960, 0.7)` took four looks at 40 steps, 12 seconds and so
    many tokens, and the last one is 0.7 seconds old."""

    looks: int
    steps: int
    seconds: float
    tokens: int
    since: float


@dataclass(frozen=True)
class Progress:
    """A running stage as its record shows it."""

    node: Node
    folder: Path
    began: float

    def look(self) -> tuple[int, int | None, dict[str, Any]]:
        """Steps done, steps in all, and the latest metrics."""
        timing, metrics = _last(self.folder / TIMING), _last(self.folder / METRICS)
        return timing.get("step", -1) + 1, timing.get("of"), metrics

    def pace(self) -> Pace:
        """Measured over the latest rows. The first one of a process holds what it does once, and only marks a beginning."""
        rows = _tail(self.folder / TIMING)
        begins = max((i for i, row in enumerate(rows) if row["seconds"] is None), default=-1)
        rows = rows[begins + 1 :][-RECENT - 1 :]
        if len(rows) < 2:
            return Pace(0, 0, 0.0, 0, self._since())
        steps, seconds = rows[-1]["step"] - rows[0]["step"], sum(row["seconds"] for row in rows[1:])
        return Pace(
            len(rows) - 1, steps, seconds, sum(row.get("tokens", 0) for row in rows[1:]), self._since()
        )

    def _since(self) -> float:
        """Seconds since something was recorded."""
        path = self.folder / TIMING
        return min(self.spent, max(0.0, time.time() - path.stat().st_mtime)) if path.exists() else self.spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.began

    def preparing(self) -> str:
        """What it does before its first step, where it says so."""
        with suppress(FileNotFoundError):
            return (self.folder / PREPARING).read_text(encoding="utf-8")
        return ""

    def thought(self) -> dict[str, Any]:
        """The rollout that was written last."""
        return _last(self.folder / ROLLOUTS)


class Run:
    """One recipe's run: its graph, its folder (`runs/NAME`), its hosts and who watches."""

    def __init__(self, recipe: Recipe, base: Path, home: Path, display: Display, right: str | None = None):
        self.recipe, self.home, self.display = recipe, home, display
        self.store = Store(home / "store")
        self.folder = home / recipe.name
        self.graph = Graph(recipe, self.store, base)
        self.descent, self.claims = check(self.graph, right)
        self.host = Host(recipe.workers, recipe.threads)
        self.attendance = RunStatus(self.folder, right)
        self.running: dict[str, Progress] = {}
        self.stopping = self._asked_to_stop = False

    def carry_out(self, forecast: dict[str, Any] | None = None) -> Path | None:
        """Run all that can run; returns the report's page, if the recipe has one. A `forecast` made beforehand is kept with the run."""
        self._refuse_keyless()
        self._open_folder()
        with self.attendance:
            self._keep(forecast)
            return self._carry_out()

    def _carry_out(self) -> Path | None:
        self.graph.check_contamination()
        began = time.monotonic()
        try:
            while self._start() or self.running or self._reviewed():
                self._step()
        except (LimbeckError, OSError):
            self._let_go()
            raise
        finally:
            self.host.close()
        if self.stopping:
            self.attendance.tell("paused")
            raise Resumable("stopped; the same command goes on from here")
        self._refuse_waiting()
        return self._report(time.monotonic() - began)

    def stop(self) -> None:
        """Let running stages checkpoint and end; start nothing new. Safe in a signal handler: it only asks."""
        self.stopping = True

    def _refuse_keyless(self) -> None:
        """Before anything runs: every endpoint that will be asked has its key."""
        for node in self.graph.nodes.values():
            asked = {node.name: node.stage} if isinstance(node.stage, Remote) else node.endpoints
            for name, settings in {} if node.artifact else asked.items():
                key_of(f"stages.{name}", settings)

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / "recipe.yaml", dump(self.graph.recipe))
            self._index()
        except OSError as error:
            if out_of_space(error):
                raise
            raise LimbeckError(
                f"{self.folder}: cannot be written ({error.strerror}); choose another place with --runs"
            ) from None

    def _keep(self, forecast: dict[str, Any] | None) -> None:
        """What was foreseen, before it begins; of stages that are done already, what was foreseen before they began."""
        path = self.folder / FORECAST
        if forecast:
            earlier = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.exists() else {}
            done = {
                name: told
                for name, told in earlier.items()
                if name in self.graph.nodes and self.graph.nodes[name].artifact
            }
            coming = {
                name: told for name, told in forecast["stages"].items() if not self.graph.nodes[name].artifact
            }
            write(path, json.dumps({**forecast, "stages": {**done, **coming}}, indent=2) + "\n")

    def _step(self) -> None:
        """Wait a moment, and take in what has happened."""
        if self.attendance.asked_to_pause():
            self.stop()
        if self.stopping and not self._asked_to_stop:
            self._asked_to_stop = True
            self.attendance.tell("pausing")
            self.display.say("stopping after a checkpoint; press Ctrl-C again to stop at once")
            self.host.stop()
        event = self.host.wait(TICK)
        self.display.show(self.graph, self.running)
        if event:
            self._hear(event)

    def _let_go(self) -> None:
        """When one stage has failed the others may still checkpoint; what fails beside it is not told."""
        self.stop()
        deadline = time.monotonic() + GRACE
        while self.running and time.monotonic() < deadline:
            with suppress(LimbeckError, OSError):
                self._step()

    def _start(self) -> bool:
        """Hand ready stages to free workers; those that most others wait for go first."""
        if self.stopping:
            return False
        self._ask()
        self.graph.refresh()  # people may have reviewed, and other runs may have finished
        started = False
        for node in sorted(self.graph.nodes.values(), key=self._urgency):
            if node.state == "ready" and node.name not in self.running and self.host.free:
                job = self._job(node)
                self.running[node.name] = Progress(node, job.folder, time.monotonic())
                self.attendance.begun[node.name] = job.folder.name
                self.host.start(write_job(job))
                if job.dropped:
                    self.display.say(
                        f"{node.name}: leaves {len(job.dropped)} of {node.finding.checked} out, too near to the test"
                    )
                started = True
        if started:
            self.attendance.tell("running")
        return started

    def _reviewed(self) -> bool:
        """Says that people are waited for, and only then looks a last time whether they have reviewed: whoever reviews
        and afterwards reads `running` knows that it will be seen, and starts nobody else."""
        if self.stopping:
            return False
        if any(node.state == "asks" for node in self.graph.nodes.values()):
            self.attendance.tell("waits")
        return any(node.state == "ready" for node in self.graph.nodes.values())

    def _ask(self) -> None:
        """Lay out what people are to review."""
        for node in self.graph.nodes.values():
            if node.queue and not node.artifact:
                desk.ask(node.queue, partial(self._rows, node), node.stage.question, node.stage.second)

    def _urgency(self, node: Node) -> int:
        """Less is sooner: the number of stages behind this one, negated."""
        return -len(self.graph.dependents(node.name))

    def _rows(self, node: Node) -> list[dict[str, Any]]:
        assert isinstance(node.stage, Curate)
        return list(read(self.graph.nodes[node.stage.rows].artifact.folder / ROWS))

    def _job(self, node: Node) -> Job:
        return Job(
            name=node.name,
            stage=node.stage,
            seed=seed_of(self.recipe, node),
            inputs={name: self.graph.nodes[name].artifact.folder for name in node.inputs},
            problems=node.problems,
            folder=self.store.partial(node.kind, node.key),
            control=node.control,
            queue=node.queue,
            said=node.said,
            endpoints=node.endpoints,
            dropped=frozenset(node.finding.dropped if node.finding else ()),
        )

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "told":
            return self.display.say(f"{event['name']}: {event['text']}")
        progress = self.running.pop(event["name"])
        if event["event"] in ("done", "found", "waiting"):
            self.attendance.begun.pop(event["name"])
        if event["event"] in ("done", "found"):
            if event["event"] == "done":
                self.store.finish(progress.folder, self._manifest(progress.node, event["outcome"]))
            self.graph.refresh()
            self._index()
            self.attendance.tell(self.attendance.state)
            # by its own key: people who went on reviewing have given the stage another by now
            self.display.finished(progress.node, self.store.find(progress.node.kind, progress.node.key))
        elif event["event"] == "died":
            raise Resumable(
                f"stage {event['name']}: its process {_end(event['status'])}; "
                "run again to go on from its last checkpoint"
            )
        elif event["event"] == "failed" and not (event["code"] == 75 and self.stopping):
            raise _failure(event, self.folder)

    def _manifest(self, node: Node, outcome: dict[str, Any]) -> dict[str, Any]:
        given = {name: self.graph.nodes[name].artifact for name in node.inputs}
        return {
            "kind": stored_kind(node.kind),
            "key": node.key,
            "stage": node.name,
            "title": node.stage.title,
            "settings": stored(node.stage.model_dump(mode="json")),
            "identity": self.graph.identity(node),
            "inputs": {
                name: {"key": a.manifest["key"], "digest": a.digest, "kind": a.manifest["kind"]}
                for name, a in given.items()
            },
            "code_version": __version__,
            "seed": seed_of(self.recipe, node),
            "joules": None,
            **origin_of(node, outcome, given, self.descent, self.claims),
            **({"decontamination": asdict(node.finding)} if node.finding else {}),
            **outcome,
        }

    def _index(self) -> None:
        """Which artifact is which stage's, so that `gc` spares it. Written after each stage: a run may be killed."""
        for node in self.graph.nodes.values():
            if node.artifact:
                self._own_up(node)
        stages = {name: node.artifact.folder.name for name, node in self.graph.nodes.items() if node.artifact}
        write(self.folder / "stages.json", json.dumps(stages, indent=2) + "\n")

    def _own_up(self, node: Node) -> None:
        """An artifact that was made before says what the recipe knows of its origin by now."""
        given = {name: self.graph.nodes[name].artifact for name in node.inputs}
        manifest = node.artifact.manifest
        news = grown(manifest, origin_of(node, manifest, given, self.descent, self.claims)) or {}
        if node.finding and asdict(node.finding) != manifest.get("decontamination"):
            news["decontamination"] = asdict(node.finding)
        if news:
            self.store.amend(node.artifact, news)

    def _refuse_waiting(self) -> None:
        asked = [node for node in self.graph.nodes.values() if node.queue and not node.artifact]
        if asked:
            rows = len(reviews.pending(asked[0].queue))
            raise Resumable(
                f"stage {asked[0].name} waits for a person: {rows} rows to review; "
                f"`limbeck curate {self.folder} {asked[0].name}`, then run again (or run with --auto)"
            )

    def _report(self, seconds: float) -> Path | None:
        from ..report.report import StageView
        from ..report.report import write as write_report

        for name, stage in report_nodes(self.recipe):
            views = [
                StageView(n.name, n.kind, n.stage.title, n.artifact.folder, n.artifact.manifest, n.inputs)
                for n in self.graph.nodes.values()
            ]
            summary = self._summary(seconds)
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            self.display.say(f"writing {folder}")
            return write_report(folder, views, self.recipe.model_dump(mode="json"), summary)
        return None

    def _summary(self, seconds: float) -> dict[str, Any]:
        manifests = [n.artifact.manifest for n in self.graph.nodes.values()]
        path, foreseen = self.folder / "summary.json", self.folder / FORECAST
        earlier = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0}
        peaks = sorted((m["peak_memory_bytes"] for m in manifests), reverse=True)
        summary = {
            "seconds": round(max(seconds, earlier["seconds"]), 1),
            "stage_seconds": round(sum(m["seconds"] for m in manifests), 1),
            # workers run side by side: their peaks add up
            "peak_memory_bytes": sum(peaks[: self.host.size]),
            "workers": self.host.size,
            "threads": self.host.threads,
            "machine": machine(),
            **({"forecast": json.loads(foreseen.read_text(encoding="utf-8"))} if foreseen.exists() else {}),
        }
        write(path, json.dumps(summary, indent=2) + "\n")
        return summary


def _failure(event: dict[str, Any], folder: Path) -> LimbeckError:
    """A user's mistake as it is; our own as a short sentence, with the traceback in a file."""
    error = {75: Resumable}.get(event["code"], LimbeckError)(f"stage {event['name']}: {event['message']}")
    if "traceback" in event:
        path = folder / "traceback.txt"
        write(path, event["traceback"])
        error = LimbeckError(f"stage {event['name']} failed: {event['message']} (the traceback is in {path})")
        error.exit_code = 70
    return error


def _end(status: int) -> str:
    return f"was killed (signal {-status}; out of memory?)" if status < 0 else f"ended with code {status}"


def _last(path: Path) -> dict[str, Any]:
    """The last whole line of a JSONL file, without reading all of it."""
    return next(iter(_tail(path, 1)), {})


def _tail(path: Path, count: int = 4 * RECENT) -> list[dict[str, Any]]:
    """The last whole lines of a JSONL file, `count` at most."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 65536))
        lines = file.read().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines[-count:]]
    except ValueError:
        return []
