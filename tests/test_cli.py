"""The command line: what it prints where, its exit codes, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny
from tiny import Output, answer, digests, environment

import limbeck
from limbeck.pipeline.review import curate, review_queue
from limbeck.pipeline.store import Store
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

COMMANDS = (
    "init", "run", "status", "watch", "plan", "show", "pull", "export", "why", "recall", "release", "serve",
    "gc", "verify", "curate", "arena", "doctor", "ask", "eval", "results", "compare",
)  # fmt: skip


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The finished run, to be spoiled."""
    return Path(shutil.copytree(finished.home, tmp_path / "runs"))


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    said = call(command, "--help")
    assert said.code == 0 and "Usage:" in said.out and not said.err
    assert command in call("--help").out


def test_the_version_is_the_installed_one(call):
    said = call("--version")
    assert (said.code, said.out, said.err) == (0, f"limbeck {version('limbeck')}\n", "")
    assert said.out == f"limbeck {limbeck.__version__}\n"


def test_the_package_is_the_command():
    """`python -m limbeck` does what `limbeck` does."""
    done = subprocess.run(
        [sys.executable, "-m", "limbeck", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"limbeck {limbeck.__version__}\n"


def test_help_and_mistakes_are_answered_without_torch(tmp_path):
    program = (
        "import sys; sys.argv = ['limbeck', *sys.argv[1:]]; from limbeck import cli\n"
        "try: cli.main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for arguments, code in ((["--help"], 0), (["run", "none.yaml"], 2), (["status", str(tmp_path)], 2)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
        )
        assert (done.returncode, "AssertionError" in done.stderr) == (code, False)


# ---------------------------------------------------------------- mistakes


def refused(said: Output, *words: str) -> None:
    assert said.code == 2 and said.out == ""
    assert re.fullmatch(r"limbeck: [^\n]+\n", said.err), said.err
    assert all(word in said.err for word in words), said.err


def test_a_mistake_in_a_recipe_is_one_line_and_nothing_is_written(call, finished, tmp_path):
    runs = ("--runs", tmp_path / "runs")
    refused(call("run", tmp_path / "none.yaml", *runs), "no such recipe", "quickstart")
    refused(call("run", finished.recipe, *runs, "--set", "nonsense"), "--set nonsense: write key.path=value")
    refused(
        call("run", finished.recipe, *runs, "--set", "stages.zero.stps=3"),
        str(finished.recipe),
        "did you mean steps?",
    )
    refused(
        call("run", finished.recipe, *runs, "--set", "stages.zero.model=bse"),
        "stages.zero.model",
        "did you mean base?",
    )
    refused(
        call("run", finished.recipe, *runs, "--set", "stages.zero.rewards.acuracy=1"),
        "rewards.acuracy",
        "did you mean accuracy?",
    )
    refused(
        call("run", finished.recipe, *runs, "--set", "stages.base.corpus.slips=0.1"),
        "corpus.slips",
        "did you mean slip?",
    )
    refused(
        call(
            "plan",
            finished.recipe,
            *runs,
            "--set",
            "stages.base={kind: rl, model: zero, problems: {clock: 1}}",
        ),
        "stages go in a circle",
    )
    refused(
        call("run", finished.recipe, *runs, "--set", "stages.brought.path=nowhere"),
        "stages.brought.path: model nowhere",
        "limbeck pull",
    )
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written_is_named(call, finished, tmp_path):
    (tmp_path / "file").write_text("")
    refused(call("run", finished.recipe, "--runs", tmp_path / "file"), str(tmp_path / "file"), "--runs")


def test_what_is_no_run_and_no_artifact_is_named(call, finished, tmp_path):
    refused(call("status", tmp_path), f"{tmp_path} is no run: it has no recipe.yaml")
    refused(call("curate", tmp_path, "coldstart"), "is no run")
    refused(call("curate", finished.home / "tiny", "zero"), "zero is not a stage of", "that waits for people")
    refused(call("show", "sft-000", "--runs", finished.home), "sft-000: no model or artifact", "tiny/dev1")
    refused(call("why", "s", "--runs", finished.home), "s is 3 things; write one of sample-", "(dev1)")
    for command in ("show", "gc", "verify"):
        refused(call(command, "--runs", tmp_path), f"{tmp_path}/store does not exist")


MODELS = """
name: one
threads: 1
problems: {mine: {source: files, path: mine.jsonl, held_out: 1, licence: own}}
stages:
  brought: {kind: load, path: model, licence: own}
  zero: {kind: rl, model: brought, problems: {mine: 1}, steps: 1}
"""


def cut_short(path: Path) -> None:
    """Drop the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("spoil, words", [
    (lambda d: (d / "model/config.json").unlink(), ("model/config.json is missing",)),
    (
        lambda d: (d / "model/config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}'),
        ("GPT2LMHeadModel is not supported; supported are LlamaForCausalLM",),
    ),
    (lambda d: cut_short(d / "model/model.safetensors"), ("model.safetensors",)),
    (lambda d: (d / "mine.jsonl").write_text(""), ("mine.jsonl: the file has no rows",)),
    (
        lambda d: (d / "mine.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": \n'),
        ("mine.jsonl, line 2: not valid JSON",),
    ),
    (lambda d: (d / "mine.jsonl").unlink(), ("problems.mine.path: mine.jsonl is no file",)),
])  # fmt: skip
def test_a_spoiled_file_is_one_line_that_names_it(finished, tmp_path, spoil, words):
    """The stages run in this process: what a worker would say is what the run says."""
    from limbeck.pipeline.run import _failure
    from limbeck.pipeline.worker import run_job

    shutil.copytree(finished.recipe.parent / "model", tmp_path / "model")
    (tmp_path / "mine.jsonl").write_text(
        "".join(f'{{"problem": "1+{i}", "answer": "{1 + i}"}}\n' for i in range(9))
    )
    (tmp_path / "one.yaml").write_text(MODELS)
    spoil(tmp_path)
    with pytest.raises(LimbeckError) as caught:
        run = tiny.open_run(tmp_path / "one.yaml", tmp_path / "runs")
        for name in run.graph.nodes:
            node = run.graph.nodes[name]
            event = run_job(run._job(node))
            if event["event"] == "failed":
                raise _failure({**event, "name": name}, tmp_path)
            run.store.finish(run.store.partial(node.kind, node.key), run._manifest(node, event["outcome"]))
            run.graph.refresh()
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_our_own_bug_is_a_short_sentence_and_a_saved_traceback(call, finished, monkeypatch):
    monkeypatch.setattr(Store, "all", lambda self: 1 / 0)
    said = call("show", "--runs", finished.home)
    assert said.code == 70 and "ZeroDivisionError" in said.err and "Traceback" not in said.err
    saved = Path(said.err.split()[-1])
    assert "Traceback" in saved.read_text()
    saved.unlink()


# ---------------------------------------------------------------- what is there


def test_a_run_as_events_ends_with_exactly_one_result(finished):
    events = [json.loads(line) for line in finished.out.splitlines()]
    assert finished.code == 0 and finished.err == ""
    assert all(event["schema"] == 1 for event in events)
    assert [e["ok"] for e in events if e["event"] == "result"] == [True] and events[-1]["event"] == "result"
    assert {e["stage"] for e in events if e["event"] == "finished"} >= {"base", "zero", "evaluation/zero"}
    assert Path(events[-1]["report"]).exists()


def test_a_run_that_fails_ends_its_events_with_a_result_too(call, finished, tmp_path):
    said = call("run", finished.recipe, "--runs", tmp_path, "--json", "--set", "seed=x")
    (event,) = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 2 and event["event"] == "result" and event["ok"] is False
    assert event["error"]["code"] == 2 and event["error"]["message"] in said.err


def test_lists_are_told_to_people_and_to_programs(call, finished):
    runs = ("--runs", finished.home)
    for command in (("plan", finished.recipe, *runs), ("status", finished.home / "tiny"), ("show", *runs)):
        plain, told = call(*command), call(*command, "--json")
        assert plain.code == told.code == 0 and not plain.err + told.err
        tree = json.loads(told.out)
        assert tree["schema"] == 1 and tree["ok"] and len(tree["data"]) == len(plain.out.splitlines()) == 9
        assert "\x1b" not in plain.out


def test_a_finished_run_is_done_and_its_artifacts_are_shown(call, finished):
    assert {
        row["state"] for row in json.loads(call("status", finished.home / "tiny", "--json").out)["data"]
    } == {"cached"}
    manifest = json.loads(call("show", "sft-", "--runs", finished.home).out)
    assert manifest["stage"] == "dev1"


def test_plan_says_why_a_stage_will_run(call, finished):
    said = call("plan", finished.recipe, "--runs", finished.home, "--set", "stages.zero.steps=2")
    assert re.search(r"will run +zero +rl .* steps: 8 -> 2", said.out)
    assert re.search(r"waits +evaluation/zero +evaluate .* zero must run first", said.out)


def test_verify_names_a_flipped_byte_and_leaves_with_4(call, copy):
    assert call("verify", "--runs", copy).code == 0
    path = next(copy.glob("store/sft-*/model/model.safetensors"))
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)
    said = call("verify", "--runs", copy)
    assert said.code == 4 and f"{path} has changed" in said.out
    next(copy.glob("store/rl-*/manifest.json")).write_text("{")
    assert call("show", "--runs", copy).code == 4


def test_gc_deletes_what_no_run_uses_and_only_when_told_to(call, copy, finished):
    store = Store(copy / "store")
    assert call("gc", "--runs", copy, "--yes").out == "nothing to delete\n"
    for key, text in (("dead", "left"), ("busy", "at work")):
        (store.partial("rl", key) / "state.pt").write_text(text)
    index = copy / "tiny" / "stages.json"
    used = json.loads(index.read_text())
    unused = used.pop("general")
    index.write_text(json.dumps(used))
    before = digests(copy)
    said = call("gc", "--runs", copy)
    assert digests(copy) == before and f"would delete {store.root / unused}" in said.out
    assert re.search(
        r"^would free \d+\.\d [kM]B in 3 folders and 0 checkpoints; --yes deletes them$",
        said.out,
        re.MULTILINE,
    )
    with store.lock(store.root / ".partial" / "rl-busy"):
        said = call("gc", "--runs", copy, "--yes")
    assert f"kept {store.root / '.partial/rl-busy'}: a stage is at work in it" in said.out
    assert re.search(r"^freed \d+\.\d [kM]B in 2 folders and 0 checkpoints\n\Z", said.out, re.MULTILINE)
    assert set(before) - set(digests(copy)) == {unused}
    assert [folder.name for folder in store.leftovers()] == ["rl-busy"]


def test_elsewhere_than_on_a_terminal_a_run_talks_in_plain_lines_on_standard_error(finished):
    code, out, err = answer(
        "run", finished.recipe, "--runs", finished.home, env=environment(NO_COLOR="1", FORCE_COLOR="")
    )
    assert code == 0 and out == f"The report is at {finished.home / 'tiny/report/index.html'}\n"
    assert "\x1b" not in err and err.splitlines() == [f"writing {finished.home / 'tiny/report'}"]


# ---------------------------------------------------------------- people


@pytest.fixture
def waiting(finished, tmp_path) -> Path:
    """A run's folder whose cold start waits for people; everything before it is done."""
    home = Path(shutil.copytree(finished.home, tmp_path / "runs"))
    code, out, err = answer("run", finished.recipe, "--runs", home, "--set", "stages.coldstart.auto=false")
    assert (code, out) == (75, "")
    rows = len(review_queue.pending(next(home.glob("store/.queues/*"))))
    assert err.splitlines()[-1].startswith(
        f"limbeck: stage coldstart waits for a person: {rows} rows to review; `limbeck curate {home / 'tiny'}"
    )
    return home / "tiny"


def test_rows_go_to_people_and_come_back_and_the_run_goes_on(call, finished, waiting, tmp_path):
    status = call("status", waiting).out
    assert re.search(
        rf"asks you +coldstart +\d+ rows wait for a person: limbeck curate {waiting} coldstart", status
    )
    sheet = tmp_path / "sheet.jsonl"
    assert call("curate", waiting, "coldstart", "--export", sheet).code == 0
    rows = [json.loads(line) for line in sheet.read_text().split("\n") if line]
    verdicts = ["accept", "edit", "reject"]
    for row, verdict in zip(rows, [*verdicts, *["accept"] * len(rows)], strict=False):
        row["verdict"] = verdict
    rows[1]["completion"] = "<think> mended </think> <answer> 1 + 1 </answer>"

    def bring(rows: list[dict]) -> Output:
        sheet.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return call("curate", waiting, "coldstart", "--import", sheet, "--reviewer", "Ada")

    for spoiled, sentence in (
        ({"verdict": "yes"}, "line 3: verdict 'yes' is none of accept, edit, reject"),
        ({"id": "x"}, "line 3: the queue has no row 'x'"),
        ({"verdict": "edit", "completion": ""}, "line 3: an edit needs the edited text under completion"),
        ({"verdict": "accept", "completion": "other"}, "line 3: the completion was changed and accepted"),
    ):
        refused(bring([*rows[:2], {**rows[2], **spoiled}]), f"{sheet}, {sentence}")
    refused(call("curate", waiting, "coldstart", "--import", tmp_path / "none.jsonl"), "none.jsonl")
    left = len(rows)
    assert (
        bring([{**row, "verdict": None} for row in rows]).out
        == f"took 0 verdicts over; {left} rows are still open\n"
    )
    assert bring(rows[:4]).out == f"took 4 verdicts over; {left - 4} rows are still open\n"
    assert bring(rows[4:]).out.endswith("0 rows are still open\n")
    home = waiting.parent
    code, _, err = answer("run", finished.recipe, "--runs", home, "--set", "stages.coldstart.auto=false")
    assert code == 0, err
    manifests = [a.manifest for a in Store(home / "store").all() if a.manifest["stage"] == "coldstart"]
    people = next(m for m in manifests if m["notes"]["policy"] == "people")
    notes = people["notes"]
    assert (notes["policy"], notes["reviewers"]) == ("people", ["Ada"])
    assert notes["accepted"] > notes["edited"] >= 1 and notes["rejected"] >= 1
    assert people["sources"]["editors"] == ["Ada"]
    assert next(m for m in manifests if m is not people)["notes"]["policy"] == "translate"
    assert {row["state"] for row in json.loads(call("status", waiting, "--json").out)["data"]} == {"cached"}


def read_until(terminal: int, text: str, seconds: float = 120) -> str:
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen


def test_a_person_reviews_rows_at_the_terminal(call, waiting):
    queue = next(waiting.parent.glob("store/.queues/*"))
    first, second, third = review_queue.pending(queue)[:3]
    ours, theirs = pty.openpty()
    editor = "sed -i s/.*/mended/"
    review = tiny.limbeck(
        "curate",
        waiting,
        "coldstart",
        "--reviewer",
        "Grace",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(EDITOR=editor),
    )
    asked = "(q)uit: "
    assert first["prompt"] in read_until(ours, asked)
    for keys, answered in (
        ("?\n", asked),
        ("a\n", asked),
        ("e\n", asked),
        ("r\n", "why? "),
        ("mixed\n", asked),
    ):
        os.write(ours, keys.encode())
        read_until(ours, answered)
    os.write(ours, b"q\n")
    read_until(ours, "rows are left")
    assert review.wait(10) == 0
    os.close(theirs), os.close(ours)
    said = {row.id: row.verdict for row in review_queue.review_states(queue) if row.verdict}
    assert all(entry.pop("seconds") >= 0 and entry.pop("at") for entry in said.values())
    assert said == {
        first["id"]: {"id": first["id"], "verdict": "accept", "reviewer": "Grace"},
        second["id"]: {"id": second["id"], "verdict": "edit", "reviewer": "Grace", "completion": "mended"},
        third["id"]: {"id": third["id"], "verdict": "reject", "reviewer": "Grace", "reason": "mixed"},
    }
    refused(call("curate", waiting, "coldstart"), "curate needs a terminal; use --export FILE")


def test_a_torn_verdict_is_dropped_and_no_other_is_lost(tmp_path):
    rows = [{"id": name, "completion": "x"} for name in "abc"]
    curate.write_queue(tmp_path, lambda: rows, "good?")
    review_queue.review(tmp_path, {"id": "a", "verdict": "accept"})
    with open(tmp_path / review_queue.REVIEWS, "a") as file:
        file.write('{"id": "b", "verd')  # the power went
    assert [row["id"] for row in review_queue.pending(tmp_path)] == ["b", "c"]
    review_queue.review(tmp_path, {"id": "c", "verdict": "reject"})
    assert [row["id"] for row in review_queue.pending(tmp_path)] == ["b"]


# ---------------------------------------------------------------- export


def test_export_finds_an_artifact_and_says_why_a_word_level_model_cannot_go(call, finished):
    """The miniature world's tokenizer knows whole words only, which llama.cpp cannot."""
    folder = next(a.folder for a in Store(finished.home / "store").all() if (a.folder / "model").is_dir())
    said = call("export", folder.name, "--runs", finished.home)
    assert said.code == 2 and "model.type = WordLevel has no place in a GGUF file" in said.err
    assert call("export", "nothing", "--runs", finished.home).code == 2
