"""The benchmark of a card, rehearsed without one: a mistake in a part is found here and not on the card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import __main__ as benchmark
from bench.gpu import peers, report
from bench.gpu.card import Card, Rehearsal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PEERS = {"trl": "trl", "transformers": "transformers"}  # parts that start other programs


@pytest.fixture(autouse=True)
def results(monkeypatch):
    """Results of this test alone."""
    monkeypatch.setattr(report, "RESULTS", {})


def test_every_part_runs_at_tiny_sizes_without_a_card(tmp_path):
    """All parts but the peers, in a process of its own; the file has each, and what is promised of it."""
    parts = [name for name in benchmark.PARTS if name not in PEERS]
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", *parts, "--rehearse", "--out", str(out)]
    run = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    told = json.loads(out.read_text())
    assert list(told) == parts
    lines = [line for part in told.values() for line in part]
    assert not [line for line in lines if "failed" in line]
    measured = {name for name, part in told.items() if any("kept" in line for line in part)}
    assert measured >= {"rollout", "resume", "exact", "workload", "learner", "lora", "attention", "products"}
    whole, resumed = ([line[key] for line in told["resume"] if key in line] for key in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize(("part", "package"), PEERS.items())
def test_a_peer_answers_in_its_own_process(part, package):
    pytest.importorskip(package)
    report.begin(120)
    benchmark.PARTS[part].run(Rehearsal(), True)
    lines = report.RESULTS[part]
    assert not [line for line in lines if "failed" in line], lines
    ratio = "trl_over_limbeck" if part == "trl" else "limbeck_over_transformers"
    assert any(line.get(ratio, 0) > 0 for line in lines)


def test_a_peer_that_does_not_answer_costs_its_time_and_no_more():
    assert peers.ask("transformers_batching", {}, 0.2) == [{"failed": "no more within 0 s"}]
    (line,) = peers.ask("no_such_module", {}, 60)
    assert "no_such_module" in line["failed"]


def test_a_failure_a_broken_promise_and_a_lack_of_time_are_told(monkeypatch, tmp_path, capsys):
    """A part that fails costs the others nothing; a promise that is not kept ends with exit code 1 on a card;
    what does not fit into the time is left out."""

    def fail(card, quick):
        raise RuntimeError("a kernel is missing")

    class Silent(Rehearsal):
        rehearsed = False

    parts = {
        "first": benchmark.Part(fail, 1),
        "second": benchmark.Part(lambda card, quick: report.promise("second", "equal", False), 1),
        "third": benchmark.Part(fail, 10**6),
    }
    monkeypatch.setattr(benchmark, "PARTS", parts)
    monkeypatch.setattr(benchmark, "Card", Silent)
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: True)
    out = tmp_path / "gpu.json"
    for arguments, code in ((["second"], 1), (["first"], 1), ([], 1)):
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments, "--out", str(out)])
        assert benchmark.main() == code
    assert "BROKEN: second: equal" in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert told["first"][0]["failed"] == "RuntimeError: a kernel is missing"
    assert report.RESULTS["third"][0]["left_out"] == "the part"
    monkeypatch.setattr(sys, "argv", ["gpu", "second", "--rehearse"])
    monkeypatch.setattr(report, "RESULTS", {})
    assert benchmark.main() == 0


def test_all_parts_together_have_five_minutes_and_need_no_more_than_limbeck():
    assert sum(part.seconds for part in benchmark.PARTS.values()) < benchmark.LIMIT == 300
    assert {name for name in dir(Card) if not name.startswith("_")} == {
        name for name in dir(Rehearsal) if not name.startswith("_")
    }
    code = "import sys, bench.gpu.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(run.stdout.split()) & {"transformers", "trl", "datasets", "triton", "pytest"}


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2 and "--rehearse" in capsys.readouterr().err
