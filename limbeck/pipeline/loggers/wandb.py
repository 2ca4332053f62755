"""Metrics for Weights & Biases, as one of its runs, with names such as `zero/reward`.

Nothing leaves this machine unless the environment variable WANDB_MODE says so: the default is `offline`,
which writes files into `runs/NAME/wandb`; `wandb sync` uploads them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...types import LimbeckError


class WandbLogger:
    """Writes each step of a stage `STAGE` as `STAGE/METRIC` over the axis `STAGE/step`.

    Offline, opening it deletes the run's earlier files. Online, it continues the run of this folder after the
    steps that have been uploaded. Raises LimbeckError if wandb cannot begin, for instance without a key.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            shutil.rmtree(folder / "wandb", ignore_errors=True)
        place = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "limbeck"),
                name=recipe["name"],
                id=f"{recipe['name']}-{place}",
                resume=None if mode == "offline" else "allow",
                config=dict(recipe),
                dir=str(folder),
                mode=mode,
            )
        except wandb.Error as error:
            raise LimbeckError(f"--log wandb: {error}; WANDB_MODE=offline writes locally") from None
        self._uploaded: dict[str, float] = {}  # stage -> the last step that the run had when it was opened

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of a stage, unless the run has them already."""
        axis = f"{stage}/step"
        if stage not in self._uploaded:
            self._uploaded[stage] = self._run.summary.get(axis, -1)
            self._run.define_metric(f"{stage}/*", step_metric=axis)
        if step > self._uploaded[stage]:
            named = {f"{stage}/{name}": value for name, value in metrics.items()}
            self._run.log({axis: step, **named})

    def flush(self) -> None:
        """Do nothing: wandb writes by itself."""

    def close(self) -> None:
        """Finish the run of wandb, which writes the rest."""
        self._run.finish()
