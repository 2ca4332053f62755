"""Models to plan for: a name of models.yaml, an HF directory, or a config.json."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

from ..model.config import ModelConfig
from ..types import LimbeckError

FILE = Path(__file__).with_name("models.yaml")


def find(name: str) -> ModelConfig:
    """`find("deepseek-v3").parameters` is 671 billion; an unknown name is answered with the nearest known one."""
    key = (
        name.strip()
        .lower()
        .replace("_", "-")
        .removeprefix("deepseek-ai/")
        .replace("deepseek-r1-distill", "r1-distill")
    )
    if key in shipped():
        return ModelConfig.from_hf(shipped()[key], f"{FILE.name}: {key}")
    path = Path(name)
    if path.suffix == ".json" or (path / "config.json").exists():
        return ModelConfig.from_directory(path)
    close = get_close_matches(key, shipped(), n=1)
    meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(shipped())}"
    raise LimbeckError(
        f"{name}: no recipe, no model directory with a config.json, and no model of the plan's table; {meant}"
    )


@cache
def shipped() -> dict[str, dict]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))
