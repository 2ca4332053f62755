"""Metrics for TensorBoard: event files in `runs/NAME/tensorboard/STAGE`; stages share their charts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardLogger:
    """Writes one event file for each stage. Opening it deletes the run's earlier event files."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        self._folder = folder / "tensorboard"
        self._writers: dict[str, EventFileWriter] = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of a stage as scalars, each under its own tag."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if stage not in self._writers:
            self._writers[stage] = EventFileWriter(str(self._folder / stage))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writers[stage].add_event(event)

    def flush(self) -> None:
        """Write the events so far to the files."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Write the rest of the events and close the files."""
        for writer in self._writers.values():
            writer.close()
