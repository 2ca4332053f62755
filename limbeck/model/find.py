"""Where a model named in a recipe lies. No torch."""

from __future__ import annotations

from pathlib import Path

from ..types import LimbeckError


def find_model(name: str, base: Path, key: str = "") -> Path:
    """A directory or a GGUF file, beside the recipe or here; or the name of a model that was pulled.

    `key` is what an error begins with: where the name was given.
    """
    for place in (base / name, Path(name), Path("models") / name, base.parent / "models" / name):
        if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place
    raise LimbeckError(
        f"{key}model {name} is neither a directory nor a GGUF file; `limbeck pull smollm2-135m` fetches one"
    )
