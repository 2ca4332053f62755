"""What licences ask, how it reaches a model through others, what is refused, and what is recorded for
ever."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import answer

from limbeck.config.load import load
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.provenance.licences import _table, bind, licences_of_model, parse_licences, terms
from limbeck.pipeline.provenance.propagate import check_licences, merged_provenance, teachers_of, trace
from limbeck.pipeline.store import Store
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------- the table

# teacher or source, licences, may outputs train other models, what else is asked
CASES = [
    ("deepseek-ai/DeepSeek-R1", ["MIT"], "free", {"users": None, "prefixes": ()}),
    ("deepseek-ai/DeepSeek-R1-Zero", ["MIT"], "free", {"release": "conditions"}),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", ["Apache-2.0", "MIT"], "free", {}),
    (
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        ["Llama-3.1", "MIT"],
        "passes on",
        {"prefixes": ("Llama",), "display": ("Built with Llama",)},
    ),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", ["Llama-3.3", "MIT"], "passes on", {"users": 700_000_000}),
    ("deepseek-ai/DeepSeek-V2", ["DeepSeek-Model"], "passes on", {"release": "conditions"}),
    ("deepseek-ai/DeepSeek-V3", ["DeepSeek-Model"], "passes on", {}),
    ("gpt-4o", ["OpenAI-Terms"], "no", {"release": "no"}),
    ("claude-3-5-sonnet", ["Anthropic-Commercial"], "no", {"release": "no"}),
    ("meta-llama/Llama-2-7b-hf", ["Llama-2"], "own kind", {"users": 700_000_000}),
    ("meta-llama/Meta-Llama-3-8B", ["Llama-3"], "own kind", {"prefixes": ("Llama 3",)}),
    (
        "meta-llama/Llama-3.1-8B",
        ["Llama-3.1"],
        "passes on",
        {"prefixes": ("Llama",), "users": 700_000_000, "release": "conditions"},
    ),
    ("meta-llama/Llama-4-Scout-17B-16E", ["Llama-4"], "passes on", {"prefixes": ("Llama",)}),
    *(
        (f"Qwen/Qwen2.5-{size}B", ["Apache-2.0"], "free", {"display": ()})
        for size in ("1.5", "7", "14", "32")
    ),
    ("Qwen/Qwen2.5-3B", ["Qwen-Research"], "passes on", {"commercial": False}),
    (
        "Qwen/Qwen2.5-72B-Instruct",
        ["Qwen"],
        "passes on",
        {"users": 100_000_000, "display": ("Built with Qwen or Improved using Qwen",)},
    ),
    ("google/gemma-2-9b-it", ["Gemma"], "passes on", {"release": "conditions"}),
    ("google/gemma-3-270m", ["Gemma"], "passes on", {"release": "conditions"}),
    (
        "Tencent-Hunyuan-Large",
        ["Tencent-Hunyuan"],
        "own kind",
        {"excluded": ("the European Union",), "users": 100_000_000},
    ),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", ["Apache-2.0"], "free", {"commercial": True}),
]


@pytest.mark.parametrize(
    "model, licences, outputs, more", CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_model_is_bound_by_what_its_size_and_version_say(model, licences, outputs, more):
    bonds = bind(licences_of_model(model))
    assert list(bonds.licences) == licences
    assert bonds.outputs == outputs
    assert {name: getattr(bonds, name) for name in more} == more


def test_a_model_that_the_table_does_not_know_has_no_licence():
    assert (
        licences_of_model("somebody/their-model")
        == licences_of_model("Qwen/Qwen2.5-8B")
        == licences_of_model("gemma")
        == []
    )


def test_every_entry_says_where_it_was_read():
    table, _, models = _table()
    assert all(t.source for t in table.values())
    assert all(row["source"] for row in models)
    assert {licence for row in models for licence in row["licences"]} <= set(table)
    for name, entry in table.items():
        assert entry.outputs not in ("own kind", "no") or entry.clauses["outputs"], name
        assert entry.release != "no" or entry.clauses["release"], name
        assert not entry.prefix or entry.clauses["prefix"], name


def test_licences_are_read_as_people_and_model_cards_write_them():
    assert parse_licences("mit AND Apache-2.0") == ["MIT", "Apache-2.0"]
    assert parse_licences("cc-by-nc-4.0") == ["CC-BY-NC-4.0"]
    assert parse_licences("llama3.1") == ["Llama-3.1"]
    assert parse_licences("ACME-1") == ["ACME-1"]
    assert parse_licences("other") == parse_licences("unknown") == parse_licences(None) == []


def test_of_several_licences_the_stricter_one_decides_question_by_question():
    bonds = bind(["MIT", "Qwen", "Llama-3.1", "CC-BY-NC-4.0", "Tencent-Hunyuan"])
    assert (bonds.outputs, bonds.release, bonds.commercial, bonds.users) == (
        "own kind",
        "conditions",
        False,
        100_000_000,
    )
    assert bonds.prefixes == ("Llama",)
    assert set(bonds.display) == {
        "Built with Llama",
        "Built with Qwen or Improved using Qwen",
    }
    assert bind(["Llama-3", "Llama-3.1"]).prefixes == (
        "Llama 3",
    )  # whoever begins with the longer begins with the shorter
    assert bind(["MIT", "internal"]).release == bind(["ACME-1"]).release == "no"
    assert bind([]).sentence() == "bound by no licence"


# ---------------------------------------------------------------- through a recipe

HOPS = """
name: hops
problems: {clock: {source: miniature}}
stages:
  far: {kind: load, path: far%(far)s}
  far_rows: {kind: sample, model: far, problems: {clock: 1}}
  near_base: {kind: pretrain, problems: clock}
  near: {kind: sft, model: near_base, rows: {far_rows: 1}}
  near_rl: {kind: rl, model: near, problems: {clock: 1}}
  near_rows: {kind: sample, model: near_rl, problems: {clock: 1}}
  desk: {kind: curate, rows: near_rows, auto: true}
  small_base: {kind: load, path: small, licence: Apache-2.0}
  small: {kind: sft, model: small_base, rows: {desk: 1}}
  other_rl: {kind: rl, model: near_base, problems: {clock: 1}}
"""


@pytest.fixture
def graph(tmp_path):
    """`graph(text, {"far": "hf:meta-llama/Llama-3.1-8B"})`: a recipe's graph; models are named with their
    source."""

    def build(text: str, sources: dict[str, str]) -> Graph:
        for name, source in sources.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "provenance.json").write_text(json.dumps({"source": source}))
        (tmp_path / "r.yaml").write_text(text)
        return Graph(load(tmp_path / "r.yaml"), Store(tmp_path / "store"), tmp_path)

    return build


def hops(far: str = "") -> str:
    return HOPS % {"far": far}


def test_restrictions_pass_three_hops_and_stop_at_what_learned_nothing(graph):
    found, breaches = trace(graph(hops(), {"far": "hf:meta-llama/Llama-3.1-8B", "small": "disk"}))
    assert not breaches
    for name in ("near", "near_rl", "near_rows", "desk"):
        assert set(found[name].bound) == {"Llama-3.1"}, name
    assert set(found["small"].bound) == {"Llama-3.1", "Apache-2.0"}
    assert set(found["small"].own) == {"Apache-2.0"}
    assert bind(found["small"].bound).prefixes == ("Llama",)
    assert not found["near_base"].bound
    assert not found["other_rl"].bound
    assert teachers_of("near", found) == ["far"]
    assert teachers_of("small", found) == ["far", "near_rl"]
    assert teachers_of("near_base", found) == teachers_of("other_rl", found) == []


def refusal(graph: Graph, right: str | None = None) -> str:
    with pytest.raises(LimbeckError) as caught:
        check_licences(graph, right)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_teacher_whose_terms_forbid_it_is_refused_with_clause_and_source(graph):
    sentence = refusal(graph(hops(), {"far": "hf:meta-llama/Meta-Llama-3-8B", "small": "disk"}))
    assert sentence.startswith(
        "stages.near learns from outputs of stages.far, whose terms forbid that for any model but one "
        "under the same licence"
    )
    assert "section 1.b.v" in sentence
    assert "https://github.com/meta-llama/llama3" in sentence
    assert "--i-have-the-right" in sentence


def test_a_forbidden_teacher_is_forbidden_three_hops_on(graph):
    """OpenAI's rows made `far`, which somebody brings in with their terms declared: `small` is refused
    too."""
    breaches = trace(graph(hops(", licence: MIT AND OpenAI"), {"far": "disk", "small": "disk"}))[1]
    assert [breach.stage for breach in breaches] == ["near", "small"]
    assert all("stages.far" in b.sentence and "compete with OpenAI" in b.sentence for b in breaches)


@pytest.mark.parametrize("far, words", [
    ("", ("stages.near learns from stages.far, whose licence is undeclared", "set stages.far.licence")),
    (", licence: unknown", ("undeclared",)),
    (", licence: ACME-1", ("'ACME-1' is not among those that Limbeck knows", "Apache-2.0")),
])  # fmt: skip
def test_what_nobody_declared_is_refused_with_the_remedy(graph, far, words):
    sentence = refusal(graph(hops(far), {"far": "disk", "small": "disk"}))
    assert all(word in sentence for word in words)


def test_a_model_that_is_only_looked_at_needs_no_licence(graph):
    text = "name: a\nproblems: {clock: {source: miniature}}\nstages:\n  far: {kind: load, path: far}\n"
    text += "  e: {kind: evaluate, models: [far], problems: [clock]}\n"
    assert check_licences(graph(text, {"far": "disk"}))
    assert trace(graph(text, {"far": "disk"}))[1] == []


def test_a_model_may_learn_from_what_its_own_base_wrote(graph):
    """zero -> traces -> dev1 on one base stays under that base's licence, whatever it says of other
    models."""
    text = "name: own\nproblems: {clock: {source: miniature}}\nstages:\n  base: {kind: load, path: base}\n"
    text += (
        "  zero: {kind: rl, model: base, problems: {clock: 1}}\n"
        "  traces: {kind: sample, model: zero, problems: {clock: 1}}\n"
    )
    text += "  dev1: {kind: sft, model: base, rows: {traces: 1}}\n"
    found, breaches = trace(graph(text, {"base": "hf:Tencent/Tencent-Hunyuan-Large"}))
    assert not breaches
    assert set(found["dev1"].bound) == {"Tencent-Hunyuan"}
    assert teachers_of("dev1", found) == []


def test_scores_teach_as_well_as_rows(graph):
    """A model that chooses which problems another one learns is its teacher; one to compare FLOPs with is
    not."""
    text = (
        "name: s\nproblems: {clock: {source: miniature}}\nstages:\n"
        "  far: {kind: load, path: far, licence: openai}\n"
    )
    text += (
        "  base: {kind: pretrain, problems: clock}\n"
        "  chosen: {kind: screen, model: far, problems: {clock: 1}}\n"
    )
    rl = "  zero: {kind: rl, model: base, problems: {%s: 1}%s}\n"
    assert "stages.zero learns from outputs of stages.far" in refusal(
        graph(text + rl % ("chosen", ""), {"far": "disk"})
    )
    assert trace(graph(text + rl % ("clock", ", flops_of: far"), {"far": "disk"}))[1] == []


@pytest.mark.parametrize("stages", [
    "  student: {kind: distill, model: base, teachers: {clock: far}, problems: {clock: 1}}\n",
    (
        "  rows: {kind: sample, model: base, problems: {clock: 1}}\n"
        "  marked: {kind: label, model: far, rows: {rows: 1}}\n"
        "  student: {kind: distill, model: base, rows: {marked: 1}, on_policy: 0}\n"
    ),
    (
        "  best: {kind: pairs, model: base, problems: {clock: 1}, scored_by: far}\n"
        "  student: {kind: dpo, model: base, pairs: {best: 1}}\n"
    ),
    (
        "  best: {kind: sample, model: base, problems: {clock: 1}, keep: best, scored_by: far}\n"
        "  student: {kind: sft, model: base, rows: {best: 1}}\n"
    ),
], ids=["logits", "labels", "preferences", "best of k"])  # fmt: skip
def test_whichever_way_a_teacher_teaches_its_terms_bind(graph, stages):
    head = (
        "name: w\nproblems: {clock: {source: miniature}}\nstages:\n"
        "  base: {kind: pretrain, problems: clock}\n  far: {kind: load, path: far, licence: %s}\n"
    )
    assert "stages.student learns from outputs of stages.far" in refusal(
        graph(head % "openai" + stages, {"far": "disk"})
    )
    found, _ = check_licences(graph(head % "Gemma" + stages, {"far": "disk"}))
    assert set(found["student"].bound) == {"Gemma"}
    assert teachers_of("student", found) == ["far"]


@pytest.mark.parametrize("told, words", [
    ("", "learns from problems.mine, whose licence is undeclared; set problems.mine.licence"),
    (
        ", licence: own, teachers: [gpt-4o]",
        "learns from outputs of problems.mine.teachers (gpt-4o), whose terms forbid that",
    ),
    (
        ", licence: MIT, teachers: [nobody-9b]",
        "learns from problems.mine.teachers (nobody-9b), whose licence is undeclared; name a model",
    ),
])  # fmt: skip
def test_rows_of_a_file_are_bound_by_their_licence_and_by_whoever_wrote_or_judged_them(
    graph, tmp_path, told, words
):
    (tmp_path / "mine.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
    text = (
        "name: f\nproblems: {mine: {source: files, path: mine.jsonl%s}, clock: {source: miniature}}\n"
        "stages:\n"
    )
    text += (
        "  base: {kind: pretrain, problems: clock}\n  zero: {kind: rl, model: base, problems: {mine: 1}}\n"
    )
    assert words in refusal(graph(text % told, {}))
    found, _ = check_licences(graph(text % ", licence: CC-BY-NC-4.0, teachers: [Llama-3.3-70B-Instruct]", {}))
    assert set(found["zero"].bound) == {"CC-BY-NC-4.0", "Llama-3.3"}
    assert not bind(found["zero"].bound).commercial


def test_a_table_of_preferences_is_somebodys_too(graph, tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    text = (
        "name: t\nproblems: {clock: {source: miniature}}\nstages:\n"
        "  base: {kind: pretrain, problems: clock}\n"
    )
    text += "  helpful: {kind: reward, model: base, rows: labels.jsonl%s}\n"
    assert (
        "stages.helpful learns from stages.helpful.rows, whose licence is undeclared; set "
        "stages.helpful.licence" in refusal(graph(text % "", {}))
    )
    dpo = "  helpful: {kind: dpo, model: base, pairs: {labels.jsonl: 1}}\n"
    assert (
        "stages.helpful learns from stages.helpful.pairs, whose licence is undeclared; set "
        "stages.helpful.licence" in refusal(graph(text.rpartition("  helpful")[0] + dpo, {}))
    )
    declared_ = {licence: graph(text % f", licence: {licence}", {}) for licence in ("own", "CC-BY-NC-4.0")}
    assert set(check_licences(declared_["CC-BY-NC-4.0"])[0]["helpful"].bound) == {"CC-BY-NC-4.0"}
    assert len({str(g.identity(g.nodes["base"])) for g in declared_.values()}) == 1


def test_what_may_be_done_with_a_model_is_not_in_its_key(graph):
    text = "name: k\nstages: {base: {kind: load, path: base%s}}\n"
    keys = {
        graph(text % said, {"base": "disk"}).nodes["base"].key
        for said in ("", ", licence: MIT", ", licence: openai")
    }
    assert len(keys) == 1
    assert None not in keys


def test_shipped_recipes_pass(tmp_path, monkeypatch):
    from test_docs import ROOT

    monkeypatch.chdir(tmp_path)
    bound = dict.fromkeys(("smollm2-135m", "smollm2-start", "smollm2-students"), "Apache-2.0")
    bound["gemma3-270m"] = "Gemma"
    for model in ("smollm2-135m", "gemma3-270m"):
        (tmp_path / "models" / model).mkdir(parents=True)
    for path in sorted((ROOT / "limbeck" / "recipes").glob("*.yaml")):
        found, claims = check_licences(Graph(load(path), Store(tmp_path / "store"), path.parent))
        licences = {licence for descent in found.values() for licence in descent.bound}
        assert claims == {} and licences == ({bound[path.stem]} if path.stem in bound else set()), path


# ---------------------------------------------------------------- the right that somebody claims

CLAIMED = """
name: claimed
threads: 1
problems: {clock: {source: miniature}}
stages:
  brought: {kind: load, path: model, licence: %s}
  free: {kind: load, path: model, licence: own}
  heard:
    {kind: sample, model: brought, problems: {clock: 1}, prompts: 8, samples: 1, correct: false,
     wellformed: false, sampling: &s {max_new_tokens: 100}}
  taught: {kind: sft, model: free, rows: {heard: 1}, epochs: 1}
  later:
    {kind: sample, model: taught, problems: {clock: 1}, prompts: 4, samples: 1, correct: false,
     wellformed: false, sampling: *s}
  alone:
    {kind: sample, model: free, problems: {clock: 1}, prompts: 4, samples: 1, correct: false,
     wellformed: false, sampling: *s}
"""


def test_a_run_is_refused_before_anything_runs_and_a_claimed_right_is_inherited_for_ever(finished, tmp_path):
    """A model is taught by one under OpenAI's terms: first refused, then claimed, and every heir carries the
    claim."""
    shutil.copytree(finished.recipe.parent / "model", tmp_path / "model")
    recipe = tmp_path / "claimed.yaml"
    runs = tmp_path / "runs"
    recipe.write_text(CLAIMED % "openai")
    code, out, err = answer("run", recipe, "--runs", runs)
    assert (code, out) == (2, "")
    assert "stages.taught learns from outputs of stages.brought" in err
    assert not runs.exists()
    assert "a run would refuse this: stages.taught learns" in answer("plan", recipe, "--runs", runs)[2]
    code, _, err = answer("run", recipe, "--runs", runs, "--i-have-the-right", "we wrote the terms")
    assert code == 0, err
    manifests = {a.manifest["stage"]: a.manifest for a in Store(runs / "store").all()}
    assert {name for name, manifest in manifests.items() if manifest["rights"]} == {"taught", "later"}
    for name in ("taught", "later"):
        (right,) = manifests[name]["rights"]
        assert right["reason"] == "we wrote the terms"
        assert right["licence"] == "OpenAI-Terms"
        assert "compete with OpenAI" in right["clause"]
        assert manifests[name]["licences"] == ["OpenAI-Terms", "own"]
        assert [teacher.split()[0] for teacher in manifests[name]["sources"]["teachers"]] == ["brought"]
    assert manifests["alone"]["licences"] == ["own"]
    assert manifests["brought"]["licences"] == ["OpenAI-Terms"]
    # declared otherwise, later, when all is done already: what was known is not forgotten
    recipe.write_text(CLAIMED % "MIT")
    code, _, err = answer("run", recipe, "--runs", runs)
    assert code == 0 and "begins" not in err, err
    again = {a.manifest["stage"]: a.manifest for a in Store(runs / "store").all()}
    assert again["taught"]["rights"] == manifests["taught"]["rights"]
    assert again["taught"]["digest"] == manifests["taught"]["digest"]
    assert again["later"]["licences"] == ["MIT", "OpenAI-Terms", "own"]
    assert answer("verify", "--runs", runs)[0] == 0


def test_an_origin_only_grows():
    sources = {"problems": ["p"], "models": [], "teachers": [], "editors": []}
    before = {
        "licences": ["undeclared"],
        "rights": [{"reason": "a", "date": "2026-01-01"}],
        "sources": {"problems": ["p"], "models": []},
    }
    origin = {
        "licences": ["MIT"],
        "rights": [{"reason": "a", "date": "2026-02-02"}],
        "sources": {**sources, "editors": ["Ada"]},
    }
    after = merged_provenance(before, origin)
    assert after["licences"] == ["MIT"]
    assert after["rights"] == before["rights"]
    assert after["sources"] == {"problems": ["p"], "models": [], "teachers": [], "editors": ["Ada"]}
    assert merged_provenance(after, origin) is None
    assert merged_provenance(after, {**origin, "licences": []}) is None


def test_unknown_terms_forbid():
    assert terms("ACME-1").outputs == terms("undeclared").release == "no"
