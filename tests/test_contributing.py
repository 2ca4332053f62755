"""The guides of CONTRIBUTING.md: applied to a copy of the package, whose new tests then run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDES = dict(
    re.findall(r"(?ms)^## (Add a [\w ]+)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
)
BLOCK = re.compile(
    r"(?ms)^```python\n"
    r'# (?P<path>\S+), (?P<how>a new file|before|instead of)(?: "(?P<mark>[^\n]+)")?\n'
    r"(?P<code>.*?)^```$"
)


def apply(block: re.Match, root: Path) -> None:
    """Apply one block: a new file, lines before the line with the mark, or a replacement of the mark."""
    path = root / block["path"]
    if block["how"] == "a new file":
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)
        path.write_text(block["code"], encoding="utf-8")
        return
    text = path.read_text(encoding="utf-8")
    before, mark, after = text.partition(block["mark"])
    assert mark, f"{block['path']} has no {block['mark']}"
    start = before.rfind("\n") + 1
    lead = re.match(r" *", text[start:])[0]
    code = textwrap.indent(block["code"], lead)
    if block["how"] == "before":
        text = text[:start] + code + text[start:]
    else:
        text = before + code.removeprefix(lead).removesuffix("\n") + after
    path.write_text(text, encoding="utf-8")


def test_every_block_of_python_says_where_it_goes():
    for guide in GUIDES.values():
        assert guide.count("```python\n") == len(BLOCK.findall(guide)) > 0


@pytest.mark.parametrize("guide", ["Add a loss", "Add a stage", "Add a model family", "Add a task"])
def test_the_guide_works(guide, tmp_path):
    shutil.copytree(ROOT / "limbeck", tmp_path / "limbeck", ignore=shutil.ignore_patterns("__pycache__"))
    for block in BLOCK.finditer(GUIDES[guide]):
        apply(block, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_the_page_names_files_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tests|docs|bench|pipeline|plan|model|tasks)/[\w/]+\.\w+)`", page))
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists() or (ROOT / "limbeck" / path).exists(), path
