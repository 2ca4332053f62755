"""No blind waiting: whatever a stage does, it counts at least every ten seconds, however slow the machine.

The clock is not the machine's. Every pass through a model, every verdict on an answer and every tensor of a
checkpoint takes some seconds of it.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from limbeck import activity, run_log
from limbeck.activity import ActivityReport, Phase, phase, reports, track
from limbeck.config.recipe import AnyStage, Miniature
from limbeck.engine.decode_batch import DecodeBatch
from limbeck.engine.rollout import Engine
from limbeck.model import weights
from limbeck.model.decoder import Decoder
from limbeck.pipeline.job import Job
from limbeck.pipeline.stages import STAGES
from limbeck.tasks.mixture import Mixture
from limbeck.types import LimbeckError

PASS_SECONDS = 4.0  # of a pass through a model
TENSOR_SECONDS = 1.0  # of a tensor that is read or written
VERDICT_SECONDS = 3.0  # of the answers to one problem
LONGEST_SECONDS = 10.0  # without a new number
SAMPLING = {"max_new_tokens": 6}
STEPS = {"log_every": 1, "batch_tokens": 64}
KINDS = {
    "load": {"path": "{home}/base/model"},
    "pretrain": {
        "problems": "clock",
        "tokens": 1000,
        "batch_tokens": 128,
        "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 16},
    },
    "rl": {
        "model": "base",
        "problems": {"clock": 1},
        "steps": 1,
        "policy": {"prompts_per_step": 12, "group_size": 4, "zero_variance": "keep", "kl_coef": 0.1},
        "sampling": SAMPLING,
        "batch_tokens": 64,
    },
    "screen": {"model": "base", "problems": {"clock": 1}, "limit": 16, "samples": 2, "sampling": SAMPLING},
    "sample": {
        "model": "base",
        "problems": {"clock": 1},
        "prompts": 16,
        "samples": 2,
        "correct": False,
        "wellformed": False,
        "sampling": SAMPLING,
    },
    "pairs": {"model": "base", "problems": {"clock": 1}, "prompts": 16, "samples": 2, "sampling": SAMPLING},
    "evaluate": {"models": ["base"], "problems": ["clock"], "prompts": 24, "max_new_tokens": 6},
    "sft": {"model": "base", "rows": {"rows": 1}, **STEPS},
    "dpo": {"model": "base", "pairs": {"{home}/pairs.jsonl": 1}, "licence": "own", **STEPS},
    "reward": {"model": "base", "rows": "{home}/pairs.jsonl", "held_out": 0.5, **STEPS},
    "calibrate": {
        "judge": "base",
        "rows": "{home}/pairs.jsonl",
        "judging": {"sampling": {"temperature": 0, "max_new_tokens": 6}, "reference": False},
    },
    "label": {"model": "base", "rows": {"rows": 1}, "top_k": 4, "batch_tokens": 64},
    "distill": {
        "model": "base",
        "teachers": {"clock": "base"},
        "problems": {"clock": 1},
        "steps": 1,
        "prompts_per_step": 24,
        "sampling": SAMPLING,
        "batch_tokens": 64,
    },
}


@pytest.fixture
def store(tmp_path, decoder, tokenizer, clock) -> Path:
    """Artifacts that stages read: a model with random weights, rows, and pairs of responses."""
    base = tmp_path / "base"
    weights.save(decoder(max_positions=4096), base / "model", tokenizer)
    rows = tmp_path / "rows"
    rows.mkdir()
    problems = clock.problems("train")[:48]
    texts = [f"<think> {problem.prompt} </think> <answer> 1 </answer>" for problem in problems]
    lines = [
        {"id": problem.id, "prompt": problem.prompt, "completion": text, "language": "en"}
        for problem, text in zip(problems, texts, strict=True)
    ]
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = [
        {"prompt": problem.prompt, "chosen": "<answer> 1 </answer>", "rejected": "<answer> 2 </answer>"}
        for problem in problems
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for folder, kind in ((base, "load"), (rows, "general")):
        (folder / "manifest.json").write_text(
            json.dumps({"kind": kind, "digest": "0", "notes": {}, "flops": 0})
        )
    return tmp_path


class Watched:
    """A clock that passes where work is done, and notes how long the counts of a stage stood still."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.now = 0.0
        self.root = Phase("")
        self.seen: object = None
        self.changed = 0.0
        self.longest = 0.0
        self.where: object = None

    def look(self) -> None:
        """Compare what a display would read with what it read before."""
        timing = self.folder / "timing.jsonl"
        steps = timing.read_text().count("\n") if timing.exists() else 0
        counts = [(one.name, one.unit, one.done, one.tokens) for one in reports(self.root)]
        if (steps, counts) != self.seen:
            self.seen = (steps, counts)
            self.changed = self.now
        elif self.now - self.changed > self.longest:
            self.longest = self.now - self.changed
            self.where = counts

    def slowly(self, function, seconds: float):
        """The function, which takes some seconds of this clock."""

        def slow(*arguments, **options):
            self.look()
            self.now += seconds
            result = function(*arguments, **options)
            self.look()
            return result

        return slow


def slow_down(monkeypatch, watched: Watched) -> None:
    """Make models, judges and checkpoints slow by the clock of `watched`."""
    monkeypatch.setattr(
        activity, "time", SimpleNamespace(monotonic=lambda: watched.now, time=lambda: watched.now)
    )
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: watched.now))
    for place, name, seconds in (
        (Decoder, "forward", PASS_SECONDS),
        (DecodeBatch, "step", PASS_SECONDS),
        (Mixture, "score", VERDICT_SECONDS),
        (weights, "_copy", TENSOR_SECONDS),
    ):
        monkeypatch.setattr(place, name, watched.slowly(getattr(place, name), seconds))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_stage_counts_within_its_longest_step(kind, store, monkeypatch):
    settings = json.loads(json.dumps({"kind": kind, **KINDS[kind]}).replace("{home}", str(store)))
    folder = store / "store" / ".partial" / kind
    folder.mkdir(parents=True)
    inputs = {"base": store / "base", "rows": store / "rows"}
    stage = TypeAdapter(AnyStage).validate_python(settings)
    job = Job(kind, stage, f"0/{kind}", inputs, {"clock": Miniature(source="miniature")}, folder)
    watched = Watched(folder)
    slow_down(monkeypatch, watched)
    activity._current.set(watched.root)
    try:
        STAGES[kind](job)
    except LimbeckError as error:  # random weights solve nothing
        assert kind == "screen" and "never" in str(error)
    finally:
        activity._current.set(None)
    assert watched.root.inner is None, "a phase was left open"
    assert watched.now >= 2 * LONGEST_SECONDS, "this stage was not slow, and tells nothing"
    assert watched.longest <= LONGEST_SECONDS, watched.where


def test_a_rollout_counts_its_problems_rows_and_tokens(decoder, tokenizer, clock, monkeypatch):
    """What is counted is what is returned, and that is the same as uncounted."""
    from limbeck.engine.sampling import SamplingParams

    problems = clock.problems("train")[:6]
    sampling = SamplingParams(1.0, 1.0, 12)
    bare = Engine(decoder(), tokenizer, rows=8).rollout(problems, 3, sampling, 0)
    root = Phase("")
    seen = []
    step = DecodeBatch.step
    monkeypatch.setattr(DecodeBatch, "step", lambda batch: seen.append(reports(root)) or step(batch))
    activity._current.set(root)
    try:
        counted = Engine(decoder(), tokenizer, rows=8).rollout(problems, 3, sampling, 0)
    finally:
        activity._current.set(None)
    texts = [[completion.text for completion in group.completions] for group in bare]
    assert texts == [[completion.text for completion in group.completions] for group in counted]
    assert root.inner is None and root.tokens == sum(
        len(completion.tokens) for group in counted for completion in group.completions
    )
    problems_seen = [(one[0].done, one[0].total) for one in seen]
    rows_seen = [(one[1].done, one[1].total) for one in seen]
    assert problems_seen[0] == (0, 6) and rows_seen[0] == (0, 18)
    assert rows_seen == sorted(rows_seen) and problems_seen == sorted(problems_seen)
    assert 0 < problems_seen[-1][0] < 6 and rows_seen[-1][0] >= 3 * problems_seen[-1][0]


def test_phases_nest_and_close_also_after_an_error():
    root = Phase("")
    activity._current.set(root)
    try:
        with pytest.raises(ZeroDivisionError), phase("outer"):
            for number in track([1, 0], "inner", "items"):
                activity.add_tokens(5)
                assert [one.name for one in reports(root)] == ["outer", "inner"]
                _ = 1 / number
        assert reports(root) == [] and activity._current.get() is root and root.tokens == 10
        tracked = track([1, 2, 3], "left early", "items")
        next(tracked)
        tracked.close()
        assert reports(root) == [] and activity._current.get() is root
    finally:
        activity._current.set(None)


def test_phases_of_several_threads_do_not_meet():
    """Two engines in one program: each thread has its own phases."""
    seen = []

    def work() -> None:
        with phase("alone") as opened:
            seen.append(opened.outer)

    with phase("main") as mine:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [None] and mine.inner is None


def test_a_report_is_read_whole_ages_and_is_gone_afterwards(tmp_path, monkeypatch):
    assert activity.read(tmp_path) == []
    with ActivityReport(tmp_path) as report, phase("sampling", "rows", 8) as rows:
        rows.advance(3)
        report.write()
        (one,) = activity.read(tmp_path)
        assert (one.name, one.unit, one.done, one.total) == ("sampling", "rows", 3, 8)
        record = json.loads((tmp_path / activity.ACTIVITY).read_text())
        monkeypatch.setattr(activity, "time", SimpleNamespace(time=lambda: record["at"] + 60))
        (older,) = activity.read(tmp_path)
        assert older.seconds >= 60 and older.idle >= 60
        monkeypatch.undo()
        report.path.write_text("{")
        assert activity.read(tmp_path) == []
    assert not list(tmp_path.iterdir())
