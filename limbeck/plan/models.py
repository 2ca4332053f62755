"""Models to plan for: the name of a model in models.yaml, a Hugging Face directory, or a config.json."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import yaml

from ..model.config import ModelConfig
from ..types import LimbeckError

OWNED = re.compile(r"(hf:)?[\w.-]+/[\w.-]+")
FILE = Path(__file__).with_name("models.yaml")


def find(name: str) -> ModelConfig:
    """Return a model's configuration by name or path: `find("deepseek-v3").parameters` is 671 billion.

    Raises LimbeckError for an unknown name, and suggests the nearest known one.
    """
    config = published(name)
    if config:
        return config
    path = Path(name)
    if path.suffix == ".json" or (path / "config.json").exists():
        return ModelConfig.from_directory(path)
    models = shipped()
    close = get_close_matches(_key(name), models, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(models)}"
    raise LimbeckError(
        f"{name}: no recipe, no model directory with a config.json, and no model of the plan's table; {hint}"
    )


def published(name: str) -> ModelConfig | None:
    """Return the configuration of a published model by its name in models.yaml, None for another name."""
    key = _key(name)
    models = shipped()
    return ModelConfig.from_hf(models[key], f"{FILE.name}: {key}") if key in models else None


def _key(name: str) -> str:
    """Return the key in models.yaml of a model name, which may be in any case and have an owner: `Qwen/`,
    `hf:Qwen/`."""
    key = name.strip().lower().replace("_", "-")
    if OWNED.fullmatch(key):
        key = key.partition("/")[2]
    return key.replace("deepseek-r1-distill", "r1-distill")


@cache
def shipped() -> dict[str, dict]:
    """Return the models of models.yaml: name -> Hugging Face configuration."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))
