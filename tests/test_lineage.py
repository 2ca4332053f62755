"""From a model back to what made it, and from a withdrawn row forward to what it reached."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from stub import Stub, completion
from tiny import answer

from limbeck.pipeline.dataset_rows import take_share
from limbeck.pipeline.provenance.lineage import find, recall, rows_behind
from limbeck.pipeline.review import queue_list, review_queue
from limbeck.pipeline.store import Store
from limbeck.run_log import read
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow


@pytest.fixture
def why(call, finished):
    return lambda *arguments: call("why", *arguments, "--runs", finished.home)


def test_a_model_is_found_by_stage_run_folder_and_artifact(why, finished):
    folder = next(a.folder for a in Store(finished.home / "store").all() if a.manifest["stage"] == "dev1")
    told = {
        why(name).out
        for name in ("dev1", "tiny/dev1", finished.home / "tiny" / "dev1", folder, folder.name, "sft-")
    }
    assert len(told) == 1
    assert why("tiny/evaluation/zero").out.startswith("evaluation/zero (evaluate-")
    assert "tiny has no finished stage zerro; it has" in why("tiny/zerro").err
    assert why("tiny/zerro").code == 2
    shutil.copytree(finished.home / "tiny", finished.home / "twin")
    other = json.loads((finished.home / "twin" / "stages.json").read_text())
    (finished.home / "twin" / "stages.json").write_text(json.dumps({**other, "dev1": other["base"]}))
    assert (
        f"dev1 is 2 things; write one of {finished.home / 'tiny/dev1'} (stage), "
        f"{finished.home / 'twin/dev1'} (stage)" in why("dev1").err
    )
    shutil.rmtree(finished.home / "twin")


def test_why_begins_with_the_conclusion_and_walks_to_the_roots(why):
    lines = why("dev1").out.splitlines()
    assert re.fullmatch(r"dev1 \(sft-\w+\): bound by no licence", lines[0])
    assert "editors: policy: translate" in lines
    assert "teachers: none" in lines
    assert "problems: chat (miniature clock), clock (miniature clock)" in lines
    shape = [re.sub(r" \(.*", "", line) for line in lines if "─" in line]
    assert shape == ["├── base", "├── coldstart", "│   └── traces", "│       └── base", "└── general"]
    assert any("coldstart" in line and "desk: policy: translate" in line for line in lines)
    assert any("base" in line and line.endswith("(as above)") for line in lines)


def test_a_model_brought_in_undeclared_says_so_first(why):
    assert (
        "undeclared: outputs may train no other model; release is forbidden"
        in why("brought").out.splitlines()[0]
    )


def test_why_tells_programs_everything(why):
    told = json.loads(why("dev1", "--json").out)["data"]
    stages = {entry["stage"]: entry for entry in told["artifacts"].values()}
    assert set(stages) == {"dev1", "base", "coldstart", "traces", "general"}
    assert told["conclusion"] == "bound by no licence"
    assert stages["dev1"]["inputs"]["coldstart"] == stages["coldstart"]["key"]
    assert stages["dev1"]["key"] == told["root"]


def test_the_rows_listed_are_those_that_were_drawn(why, finished):
    """The recipe's `coldstart: 0.5` takes half of the desk's rows: those, and all general ones, are
    listed."""
    lineage = find("dev1", finished.home)
    listed = list(rows_behind(lineage))
    coldstart, general = (
        list(
            read(
                find(name, finished.home).store.root
                / find(name, finished.home).head["artifact"]
                / "rows.jsonl"
            )
        )
        for name in ("coldstart", "general")
    )
    drawn = take_share(coldstart, 0.5, ("0/dev1", "coldstart"))
    assert 0 < len(drawn) < len(coldstart)
    assert {(r["id"], r["given_by"]) for r in listed} == {(r["id"], "coldstart") for r in drawn} | {
        (r["id"], "general") for r in general
    }
    assert sum(r["times"] for r in listed) == len(drawn) + len(general) == lineage.head["notes"]["rows"]
    row = next(r for r in listed if r["given_by"] == "coldstart")
    assert row["editor"] == "policy: translate"
    assert row["origin"]["problem"] == "miniature/countdown"
    plain = why("dev1", "--rows").out.splitlines()
    assert len(plain) == len(listed)
    assert "row" not in json.loads(why("dev1", "--rows", "--json").out)["data"][0]
    shown = why("dev1", "--row", row["id"]).out
    assert row["row"]["prompt"] in shown
    assert row["row"]["completion"].strip() in shown
    assert "policy: translate" in shown
    assert "nothing-1: no row of that id trained dev1" in why("dev1", "--row", "nothing-1").err


def test_reinforcement_lists_the_problems_that_it_learned_from(finished):
    """Of each step the first group is on record: it is listed if its rewards differ, which is what teaches,
    and else not."""
    zero = find("zero", finished.home)
    folder = zero.store.root / zero.head["artifact"]
    listed = {row["id"]: row for row in rows_behind(zero)}
    assert {row["learned_by"] for row in listed.values()} == {"zero"}
    steps = {row["step"]: row["problems"] for row in read(folder / "asked.jsonl")}
    assert (
        sum(row["times"] for row in listed.values())
        == sum(len(set(problems)) for problems in steps.values())
        > 0
    )
    groups = list(read(folder / "rollouts.jsonl"))
    taught = {(g["step"], g["problem"]): len({c["reward"] for c in g["completions"]}) > 1 for g in groups}
    assert len(groups) == 8
    assert all((problem in steps.get(step, [])) == told for (step, problem), told in taught.items())


# ---------------------------------------------------------------- recall


def stages(found: dict[str, str]) -> set[str]:
    return set(found.values())


def test_a_withdrawn_row_taints_who_learned_from_it_and_nobody_else(finished):
    drawn = next(r["id"] for r in rows_behind(find("dev1", finished.home)) if r["given_by"] == "coldstart")
    found = recall(drawn, finished.home)
    assert stages(found.holds) == {"traces", "coldstart"}
    assert stages(found.learned) == {"dev1"}
    assert not found.tainted
    assert found.again == {"tiny": ["dev1"]}
    assert found.flops > 0
    coldstart = find("coldstart", finished.home)
    kept = {r["id"] for r in rows_behind(find("dev1", finished.home))}
    left = next(
        r["id"]
        for r in read(coldstart.store.root / coldstart.head["artifact"] / "rows.jsonl")
        if r["id"] not in kept
    )
    found = recall(left, finished.home)
    assert stages(found.holds) == {"traces", "coldstart"}
    assert not found.learned
    assert not found.again  # the share left it out


def test_a_withdrawn_problem_reaches_through_the_model_that_practised_on_it(finished):
    problem = next(rows_behind(find("zero", finished.home)))["id"]
    found = recall(problem, finished.home)
    assert "zero" in stages(found.learned)
    assert {"evaluation/zero"} <= stages(found.tainted)
    assert "zero" in found.again["tiny"]
    assert "base" not in found.again["tiny"]
    with pytest.raises(LimbeckError, match="clock/none: no artifact in .* has a row or a problem of that id"):
        recall("clock/none", finished.home)


def artifact(
    store: Store, kind: str, stage: str, inputs: dict[str, object], kept: list[str] = (), **settings
) -> object:
    """An artifact made by hand: of a long chain, in no time."""
    folder = store.partial(kind, stage)
    if kind in ("sample", "curate"):
        (folder / "rows.jsonl").write_text("".join(json.dumps({"id": row}) + "\n" for row in kept))
    given = {
        name: {"key": a.manifest["key"], "digest": a.digest, "kind": a.manifest["kind"]}
        for name, a in inputs.items()
    }
    told = {
        "settings": {"kind": kind, **settings},
        "seed": f"0/{stage}",
        "licences": [],
        "sources": {"problems": ["clock (miniature clock)"]},
    }
    return store.finish(
        folder,
        {"kind": kind, "key": stage, "stage": stage, "inputs": given, "seconds": 1.0, "flops": 10, **told},
    )


def test_taint_passes_through_models_that_sampled_what_others_learned(tmp_path):
    """a -> rows -> b -> rows -> c, and d that only compares its FLOPs with b."""
    store = Store(tmp_path / "store")
    a = artifact(store, "pretrain", "a", {})
    first = artifact(store, "sample", "first", {"a": a}, ["p#0", "q#0"], model="a")
    b = artifact(store, "sft", "b", {"a": a, "first": first}, model="a", rows={"first": 1.0})
    second = artifact(store, "sample", "second", {"b": b}, ["r#0", "p#0"], model="b")
    desk = artifact(store, "curate", "desk", {"second": second}, ["r#0", "p#0"], rows="second")
    c = artifact(store, "sft", "c", {"a": a, "desk": desk}, model="a", rows={"desk": 1.0})
    d = artifact(store, "rl", "d", {"a": a, "b": b}, model="a", flops_of="b", problems={"clock": 1})
    (tmp_path / "r").mkdir()
    index = {one.manifest["stage"]: one.folder.name for one in (a, first, b, second, desk, c, d)}
    (tmp_path / "r" / "stages.json").write_text(json.dumps(index))
    found = recall("q#0", tmp_path)
    assert stages(found.holds) == {"first"}
    assert stages(found.learned) == {"b"}
    assert stages(found.tainted) == {"second", "desk", "c"}
    assert found.again == {"r": ["b", "second", "desk", "c"]}
    assert (found.seconds, found.flops) == (4.0, 40)
    found = recall("r#0", tmp_path)
    assert stages(found.holds) == {"second", "desk"}
    assert stages(found.learned) == {"c"}
    assert not found.tainted
    # two stages gave a row of that id: one of them alone
    assert stages(recall("p#0", tmp_path, "second").learned) == {"c"}
    assert stages(recall("p#0", tmp_path).learned) == {"b", "c"}
    assert stages(recall("clock/1", tmp_path).unsure) == {"d"}  # it is older than the list of what was asked


def test_recall_tells_people_and_programs(call, finished):
    drawn = next(r["id"] for r in rows_behind(find("dev1", finished.home)) if r["given_by"] == "coldstart")
    plain = call("recall", drawn, "--runs", finished.home)
    assert plain.code == 0
    assert re.search(r"^learned by: dev1 \(sft-\w+\)$", plain.out, re.MULTILINE)
    assert "a rerun of tiny without it: dev1" in plain.out
    told = json.loads(call("recall", drawn, "--runs", finished.home, "--json").out)["data"]
    assert told["again"] == {"tiny": ["dev1"]}
    assert set(told["learned"].values()) == {"dev1"}
    assert call("recall", "none", "--runs", finished.home).code == 2


def test_origins_are_told_without_torch(finished):
    program = (
        "import sys; sys.argv = ['limbeck', *sys.argv[1:]]; from limbeck import cli\n"
        "try: cli.main()\nfinally: assert 'torch' not in sys.modules"
    )
    for command in (["why", "dev1"], ["why", "dev1", "--rows"], ["recall", "clock/none"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--runs", str(finished.home)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "AssertionError" not in done.stderr
        assert done.returncode in (0, 2)


# ---------------------------------------------------------------- a policy that rewrites rows

SUMS = """
name: sums
problems: {{sums: {{source: files, path: sums.jsonl, held_out: 2, answer: final, licence: own}}}}
stages:
  teacher: {{kind: remote, url: "{url}", model: wise, licence: MIT}}
  traces: {{kind: sample, model: teacher, problems: {{sums: 1}}, prompts: 6, samples: 1, correct: false,
           wellformed: false}}
  coldstart: {{kind: curate, rows: traces, policy: steps}}
"""


def test_a_policy_that_writes_steps_is_named_and_its_edits_are_kept(call, tmp_path):
    pytest.importorskip("openai")
    rows = [{"question": f"What is {n} - 9 + 2?", "answer": str(n - 7)} for n in range(7)]
    rows += [{"question": "Ann has 2 and gets 3. How many?", "answer": "5"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe, home = tmp_path / "sums.yaml", tmp_path / "runs"
    gold = {row["question"]: row["answer"] for row in rows}
    with Stub(
        lambda body, n: (200, {}, completion(f"I say {gold[body['messages'][-1]['content']]}."))
    ) as stub:
        recipe.write_text(SUMS.format(url=stub.url))
        assert answer("run", recipe, "--runs", home)[0] == 75
    desk = queue_list.find_queue(home, "sums", "coldstart")
    asked = list(read(desk.queue / review_queue.QUEUE))
    proposals = {row["id"]: queue_list.propose_steps(desk, row) for row in asked}
    code, _, err = answer("run", recipe, "--auto", "--runs", home)
    assert code == 0, err
    artifact = next(a for a in Store(home / "store").all() if a.manifest["stage"] == "coldstart")
    edits = list(read(artifact.folder / "edits.jsonl"))
    kept = list(read(artifact.folder / "rows.jsonl"))
    edited = [row for row in kept if row["origin"].get("editor") == "policy: steps"]
    assert edits and {edit["id"]: edit["after"] for edit in edits} == {
        name: text for name, text in proposals.items() if text
    }
    assert [(row["id"], row["completion"]) for row in edited] == [(e["id"], e["after"]) for e in edits]
    assert all(edit["accuracy"] == 1 and edit["verdict"] == "edit" for edit in edits)
    notes = artifact.manifest["notes"]
    assert (notes["accepted"], notes["edited"], notes["rejected"]) == (6 - len(edits), len(edits), 0)
    lines = call("why", "sums/coldstart", "--runs", home).out.splitlines()
    assert "editors: policy: steps" in lines
    assert any(f"{len(edits)} edited" in line and "desk: policy: steps" in line for line in lines)
