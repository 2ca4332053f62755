"""The kernels for ARM's NEON, run under an emulator, give what they give here, where torch is their oracle.

Debian's packages `g++-aarch64-linux-gnu` and `qemu-user` have what this needs; without them it is skipped:

    apt-get install g++-aarch64-linux-gnu qemu-user && python -m pytest tests/test_neon.py
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from itertools import groupby
from pathlib import Path

import pytest

from limbeck.model.kernels.build import FLAGS

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("neon") / "check.cpp"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (CROSS, EMULATOR, "g++") if not shutil.which(tool)]


def printed(compiler: str, options: list[str], run: list[str], folder: Path) -> list[tuple[str, float]]:
    """What the check prints: names and numbers."""
    program = folder / compiler
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(
        [compiler, *flags, *options, "-static", str(SOURCE), "-o", str(program)],
        check=True,
        capture_output=True,
        text=True,
    )
    out = subprocess.run([*run, str(program)], check=True, capture_output=True, text=True).stdout
    return [(name, float(number)) for name, _, number in (line.rpartition(" ") for line in out.splitlines())]


@pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)}")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="compares with kernels for x86"
)
def test_neon_gives_what_vectors_of_x86_give(tmp_path):
    there = printed(CROSS, [], [EMULATOR], tmp_path)
    here = printed("g++", ["-march=x86-64-v2"], [], tmp_path)
    assert there[0] == here[0] == ("lanes", 4.0)
    assert [name for name, _ in there] == [name for name, _ in here]
    for name, pairs in groupby(zip(there, here, strict=True), key=lambda pair: pair[0][0]):
        numbers = [(theirs, ours) for (_, theirs), (_, ours) in pairs]
        most = max(abs(ours) for _, ours in numbers)
        assert all(abs(theirs - ours) <= 2e-5 * max(most, 1.0) for theirs, ours in numbers), name
