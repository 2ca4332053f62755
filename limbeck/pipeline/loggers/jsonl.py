"""Metrics as one file of JSON lines: `runs/NAME/metrics.jsonl`, a row for each stage and step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...run_log import METRICS


class JsonlLogger:
    """Writes rows such as `{"stage": "zero", "step": 3, "reward": 0.5}`."""

    def __init__(self, folder: Path, recipe: Mapping[str, Any]):
        self._file = (folder / METRICS).open("w", encoding="utf-8")

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of a stage as one line."""
        self._file.write(json.dumps({"stage": stage, "step": step, **metrics}, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Hand the lines written so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
