"""No ratio to a peer may fall by a quarter: the short form of bench/."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from limbeck.model import kernels

PEERS = ("trl", "transformers")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, PEERS)), reason="the peers are not installed")
@pytest.mark.skipif(kernels.library() is None, reason="the ratios on record are those with compiled kernels")
@pytest.mark.timeout(1200)
def test_no_ratio_to_a_peer_has_fallen_by_a_quarter():
    here = {f"LIMBECK_BENCH_{peer.upper()}": sys.executable for peer in PEERS}
    command = [sys.executable, "-m", "bench.short"]
    run = subprocess.run(command, check=False, cwd=Path(__file__).parent.parent, env={**os.environ, **here}, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-2000:]}"
