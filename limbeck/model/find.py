"""The place of a model that a recipe names. No torch."""

from __future__ import annotations

from pathlib import Path

from ..types import LimbeckError


def find_model(name: str, base: Path, key: str = "") -> Path:
    """The directory or GGUF file of a model: beside the recipe, here, or among the pulled ones.

    `base` is the recipe's folder; `key`, the setting that names the model, begins an error.

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
