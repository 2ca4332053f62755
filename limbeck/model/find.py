"""Finds the files of a model that a recipe names. Does not import torch."""

from __future__ import annotations

from pathlib import Path

from ..types import LimbeckError


def find_model(name: str, base: Path, key: str = "") -> Path:
    """Return the path of the model `name`: a directory or a GGUF file.

    It is searched for in `base`, which is the recipe's folder, then in the working directory, then among the
    models that `limbeck pull` fetched. `key` is the recipe's setting that names the model; error messages
    begin with it.

    Raises:
        LimbeckError: there is no such model.
    """
    pulled = Path("models")
    for place in (base / name, Path(name), pulled / name, base.parent / pulled / name):
        if place.is_dir():
            return place
        if place.is_file() and place.suffix == ".gguf":
            return place
    raise LimbeckError(
        f"{key}model {name} is neither a directory nor a GGUF file; `limbeck pull smollm2-135m` fetches one"
    )
