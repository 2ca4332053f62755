"""The built package: complete, and of use outside its checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


CLEAN = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def tracked(folder: str = ".") -> list[str]:
    """The files of the repository below a folder."""
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that `python -m build` makes of a copy of the repository, without a warning."""
    copy = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = [sys.executable, "-m", "build", copy]
    done = subprocess.run(build, capture_output=True, text=True, check=False, env=CLEAN, cwd=copy)
    assert done.returncode == 0, done.stderr
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert not [line for line in lines if "warning" in line.lower()]
    (built,) = copy.glob("dist/*.whl")
    return built


def test_everything_that_the_checkout_has_is_in_the_wheel(wheel):
    """Sources of kernels, templates, recipes and tables: every tracked file of limbeck/."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert set(tracked("limbeck")) <= packed
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

    def limbeck(*arguments: str) -> str:
        command = [python, "-m", "limbeck", *arguments]
        done = subprocess.run(command, cwd=empty, env=CLEAN, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = subprocess.run(
        [python, "-c", "import limbeck; print(limbeck.__file__)"],
        cwd=empty,
        env=CLEAN,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert place.startswith(str(environment))
    assert '"small_rl"' in limbeck("plan", "quickstart", "--auto", "--json")
    assert "The report is at" in limbeck("run", "smoke", "--auto")
    assert (empty / "runs" / "smoke" / "report" / "index.html").exists()
