"""Continuation of finished stages: a learning stage whose length was raised begins at the final checkpoint of
the shorter stage, with its log, and ends with the bytes of one long stage.

The key does not depend on it: the longer stage's artifact only notes in its manifest, under `continued`, the
artifact, the key, the digest and the step that it was continued from.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.learned_rewards import Reward
from ..config.recipe import RL, Pretrain, Stage
from ..run_log import ASKED, METRICS, ROLLOUTS, read_metrics
from .stage_device import DEVICES, devices_of
from .stage_seats import SEATS, seats_of
from .store import Artifact, Store, digest_of, write

if TYPE_CHECKING:
    from .job import Job

LENGTHS = {
    "pretrain": "tokens",
    "rl": "steps",
    "distill": "steps",
    "sft": "epochs",
    "dpo": "epochs",
    "reward": "epochs",
}  # kind of stage -> the setting that says how long it learns
CONTINUED = "continued.json"  # in a partial folder: the artifact that the stage was continued from
KERNELS = "kernels.json"  # in a partial folder: the choice of kernels that the stage began with


@dataclass(frozen=True)
class Shorter:
    """A finished stage with the settings of another one except for its length, which is smaller.

    `step` is the number of steps that it took, and `share` its length as a share of the other one's.
    `obstacle` is the reason why the other one cannot be continued from it, "" if it can.
    """

    artifact: Artifact
    step: int
    share: float
    obstacle: str = ""

    @property
    def sentence(self) -> str:
        """What a run does with it: `continues zero at step 20`, or why it trains anew."""
        place = f"{self.artifact.manifest['stage']} at step {self.step}"
        if self.obstacle:
            return f"trains anew and does not continue {place}: {self.obstacle}"
        return f"continues {place}"

    def told(self) -> dict[str, Any]:
        """Return it as a JSON object: artifact, step, and obstacle."""
        return {"artifact": self.artifact.folder.name, "step": self.step, "obstacle": self.obstacle}


def obstacle(stage: Stage) -> str:
    """Return the reason why a longer stage cannot be continued from the end of this one, "" if it can."""
    length = LENGTHS.get(stage.kind)
    if length is None:
        return "it does not learn"
    if isinstance(stage, Pretrain):
        return "the order of the whole corpus depends on tokens"
    schedule = stage.optimizer.schedule
    if schedule != "constant":
        return f"the {schedule} schedule of its learning rate depends on {length}; `constant` does not"
    if isinstance(stage, Reward) and stage.epochs % 1:
        return f"epochs: {stage.epochs:g} ends within a batch; whole epochs do not"
    learned = stage.learned_rewards or {} if isinstance(stage, RL) else {}
    for part, settings in learned.items():
        if settings.last_steps:
            return f"learned_rewards.{part}.last_steps counts from the end"
    return ""


def find_shorter(store: Store, stage: Stage, identity: dict[str, Any]) -> Shorter | None:
    """Return the finished stage to continue a stage from: the longest of those that are shorter and otherwise
    equal and can be continued; if none can, the longest with its obstacle; None if there are none.

    `identity` is what the stage's key hashes (graph.py).
    """
    length = LENGTHS[stage.kind]
    goal = identity["settings"][length]
    base = _base(identity, length)
    candidates = []
    for artifact in store.all():
        theirs = artifact.manifest["identity"]
        if artifact.kind != stage.kind or _base(theirs, length) != base:
            continue
        reached = theirs["settings"][length]
        step = _steps(artifact)
        if reached < goal and step:
            reason = _obstacle(store, stage.model_copy(update={length: reached}), artifact)
            candidates.append(Shorter(artifact, step, reached / goal, reason))
    return max(candidates, key=lambda shorter: (not shorter.obstacle, shorter.share), default=None)


def _steps(artifact: Artifact) -> int:
    """Return the number of steps that a finished stage took, from its log; 0 if that is gone."""
    rows = read_metrics(artifact.folder)
    return int(rows[-1]["step"]) + 1 if rows else 0


def _base(identity: dict[str, Any], length: str) -> str:
    """Return the hash of everything that determines a stage's result except its length."""
    settings = {name: value for name, value in identity["settings"].items() if name != length}
    return digest_of({**identity, "settings": settings})


def _obstacle(store: Store, stage: Stage, artifact: Artifact) -> str:
    """Return the reason why a stage cannot be continued from the artifact of a shorter one, "" if it can.
    `stage` has the length of the shorter one."""
    logged = artifact.manifest["settings"]["log_every"]
    if reason := obstacle(stage):
        return reason
    if logged != stage.log_every:
        return f"its log would not be that of one stage (log_every: {logged} -> {stage.log_every})"
    if not store.checkpoint(artifact.folder).exists():
        return "its final checkpoint is not in the store (any more)"
    return ""


# ---------------------------------------------------------------- in the worker


def begin(job: Job, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """Put the log, the kernels and the final checkpoint of the shorter stage that a job continues into the
    job's folder, unless the folder has a checkpoint already. The stage then resumes as after a kill.

    Returns the manifest's entry `continued`, None for a stage that begins at its beginning. The checkpoint is
    put last: killed before, the stage does all of this again.
    """
    note = job.folder / CONTINUED
    state = job.checkpoint().path
    if not state.exists():
        note.unlink(missing_ok=True)
        if job.continues:
            _copy(job, note, state, tell)
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else None


def _copy(job: Job, note: Path, state: Path, tell: Callable[[str], None]) -> None:
    """Copy what a stage continues from into its folder. `note` and `state` are the paths of its note and of
    its checkpoint."""
    store = Store(job.folder.parent.parent)
    shorter = store.open(job.continues)
    final = store.checkpoint(job.continues)
    if shorter is None or not _is_whole(final):
        tell(f"trains anew: {final} is missing or damaged")
        return
    manifest = shorter.manifest
    step = _steps(shorter)
    for name in (METRICS, ROLLOUTS, ASKED):
        if (shorter.folder / name).exists():
            shutil.copyfile(shorter.folder / name, job.folder / name)
    write(job.folder / KERNELS, json.dumps(manifest["kernels"]))
    write(job.folder / DEVICES, json.dumps(devices_of(manifest)))
    write(job.folder / SEATS, json.dumps(seats_of(manifest)))
    origin = {"artifact": shorter.folder.name, "key": manifest["key"], "digest": shorter.digest, "step": step}
    write(note, json.dumps(origin))
    _link(final, state)
    tell(f"continues {manifest['stage']} ({shorter.folder.name}) at step {step}")


def _is_whole(checkpoint: Path) -> bool:
    """Return True if a checkpoint exists and the checksums of its parts are right."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            return parts.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _link(checkpoint: Path, state: Path) -> None:
    """Give a checkpoint a second name, or a copy where the file system has no hard links. Saving a checkpoint
    replaces a file and never writes into it, so both names may share one."""
    beside = state.with_name(f"{state.name}.{os.getpid()}.partial")
    try:
        os.link(checkpoint, beside)
    except OSError:
        shutil.copyfile(checkpoint, beside)
    os.replace(beside, state)


def end(job: Job) -> None:
    """Move the final checkpoint of a finished stage out of its folder to the store's checkpoints, or delete
    it if no longer stage can be continued from it. Delete what else was noted for a resume."""
    checkpoint = job.checkpoint()
    if checkpoint.path.exists() and not obstacle(job.stage):
        place = Store(job.folder.parent.parent).checkpoint(job.folder)
        place.parent.mkdir(exist_ok=True)
        checkpoint.path.replace(place)
    checkpoint.clear()
    for name in (KERNELS, DEVICES, SEATS, CONTINUED):
        (job.folder / name).unlink(missing_ok=True)
