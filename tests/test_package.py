"""The built package: complete, and of use outside its checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a source distribution as `python -m build` does."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warnings = [
        line for line in done.stdout.splitlines() + done.stderr.splitlines() if "warning" in line.lower()
    ]
    assert not warnings
    (built,) = folder.glob("*.whl")
    return built


def test_everything_that_the_checkout_has_is_in_the_wheel(wheel):
    """Sources of kernels, templates, recipes and tables: every tracked file of limbeck/."""
    tracked = subprocess.run(
        ["git", "ls-files", "limbeck"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert set(tracked) <= packed
    assert {"limbeck/recipes/quickstart.yaml", "limbeck/py.typed"} <= packed


@pytest.mark.timeout(600)
def test_a_shipped_recipe_runs_from_an_empty_folder(wheel, tmp_path):
    """In an environment that has the wheel and its dependencies, and no checkout."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # the dependencies of this environment; its editable install of the checkout is not among them
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def limbeck(*arguments: str) -> str:
        command = [python, "-m", "limbeck", *arguments]
        done = subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = subprocess.run(
        [python, "-c", "import limbeck; print(limbeck.__file__)"],
        cwd=empty,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert place.startswith(str(environment))
    assert "quickstart" in limbeck("plan", "quickstart", "--auto", "--json")
    assert "The report is at" in limbeck("run", "smoke", "--auto")
    assert (empty / "runs" / "smoke" / "report" / "index.html").exists()
