"""What makes a stage's key, what does not, and which recipes are refused with which sentence."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import yaml

from limbeck.config.load import dump, load
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.graph import _difference as difference
from limbeck.pipeline.store import Store
from limbeck.types import LimbeckError


@pytest.fixture
def plan(finished, tmp_path):
    """`plan("seed=1")`: the graph of the finished run's recipe with other settings."""

    def build(*overrides: str, text: str | None = None) -> Graph:
        recipe = finished.recipe
        if text is not None:
            recipe = finished.recipe.with_name(f"{tmp_path.name}.yaml")
            recipe.write_text(text)
        return Graph(load(recipe, overrides), Store(finished.home / "store"), recipe.parent)

    return build


def changed(graph: Graph) -> set[str]:
    return {node.name for node in graph.nodes.values() if not node.artifact}


# ---------------------------------------------------------------- keys


def test_nothing_is_done_twice(plan):
    assert changed(plan()) == set()


@pytest.mark.parametrize("quiet", [
    "workers=2", "threads=2", "description=other", "name=other", "stages.zero.title=other",
    "stages.zero.log_every=7", "stages.base.save_every=9", "stages.evaluation.title=x",
    "stages.zero.recompute=true",
])  # fmt: skip
def test_how_and_how_chattily_it_is_computed_changes_no_key(plan, quiet):
    assert changed(plan(quiet)) == set()


@pytest.mark.parametrize("setting, first, kept", [
    ("stages.zero.optimizer={learning_rate: 0.5}", {"zero"}, {"base", "traces", "dev1", "screened"}),
    ("stages.traces.samples=3", {"traces"}, {"base", "zero", "screened", "general"}),
    ("stages.coldstart.policy=accept", {"coldstart"}, {"base", "traces", "zero"}),
    ("stages.evaluation.prompts=8", {"evaluation/zero"}, {"base", "zero", "dev1"}),
    ("stages.general.rows=9", {"general"}, {"base", "coldstart"}),
])  # fmt: skip
def test_a_setting_changes_its_stage_and_what_depends_on_it_and_nothing_else(plan, setting, first, kept):
    graph = plan(setting)
    expected = first.union(*(graph.dependents(name) for name in first))
    assert changed(graph) == expected
    assert not kept & expected


def test_the_seed_changes_every_key_that_can_be_told(plan):
    graph = plan("seed=1")
    assert changed(graph) == set(graph.nodes)
    assert graph.why(graph.nodes["base"]) == ["seed: '0/base' -> '1/base'"]


def test_a_source_changes_what_draws_on_it(plan):
    assert changed(plan("problems.chat={source: miniature, modulus: 5, task: repeat}")) == {
        "coldstart",
        "general",
        "dev1",
        "screened",
    }


def test_an_evaluation_is_a_stage_for_each_model_and_each_control(plan):
    graph = plan(
        "stages.evaluation.models=[zero, dev1]",
        "stages.evaluation.forced=[base]",
        "stages.evaluation.retry={'no': wait}",
        "stages.evaluation.without_thought=[dev1]",
    )
    assert {n for n in graph.nodes if "/" in n} == {
        "evaluation/zero",
        "evaluation/dev1",
        "evaluation/base+forced",
        "evaluation/dev1+cut",
    }
    assert graph.nodes["evaluation/base+forced"].control == "forced"
    assert graph.nodes["evaluation/dev1+cut"].control == "cut"


def test_one_more_model_evaluates_that_model_alone(plan):
    assert changed(plan("stages.evaluation.models=[zero, dev1]")) == {"evaluation/dev1"}


def test_stages_come_after_what_they_need_in_whatever_order_they_are_written(plan, finished):
    tree = yaml.safe_load(finished.recipe.read_text())
    tree["stages"] = dict(reversed(tree["stages"].items()))
    graph = plan(text=yaml.safe_dump(tree, sort_keys=False))
    place = {name: i for i, name in enumerate(graph.nodes)}
    assert all(place[cited] < place[node.name] for node in graph.nodes.values() for cited in node.inputs)
    assert changed(graph) == set()


def test_why_names_the_setting_that_changed_and_the_input_that_is_missing(plan):
    graph = plan("stages.zero.optimizer={learning_rate: 0.5, warmup_steps: 0}")
    assert "optimizer.learning_rate: 0.001 -> 0.5" in graph.why(graph.nodes["zero"])
    assert graph.why(graph.nodes["evaluation/zero"]) == ["zero must run first"]
    before, now = ({"problems.own.instruction": text} for text in ("{problem}", "Now {problem}"))
    assert difference(now, before) == ["problems.own.template: '{problem}' -> 'Now {problem}'"]
    renamed = plan(text=tiny.RECIPE.replace("  general:", "  talk:").replace("general: 1}", "talk: 1}"))
    assert renamed.why(renamed.nodes["talk"]) == ["never run"]


def test_a_file_of_problems_counts_by_its_content_wherever_it_lies(tmp_path):
    text = "name: f\nproblems: {mine: {source: files, path: PATH, held_out: 1}}\nstages:\n"
    text += "  base: {kind: load, path: model}\n  zero: {kind: rl, model: base, problems: {mine: 1}}\n"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def identity(path: str) -> dict:
        (tmp_path / "f.yaml").write_text(text.replace("PATH", path))
        graph = Graph(load(tmp_path / "f.yaml"), Store(tmp_path / "store"), tmp_path)
        return graph._source(graph.nodes["zero"].problems["mine"])

    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"problem": "1+1", "answer": "2"}\n')
    assert identity("a.jsonl") == identity("b.jsonl") == identity(str(tmp_path / "a.jsonl"))
    before = identity("a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"problem": "1+2", "answer": "3"}\n')
    assert identity("a.jsonl") != before
    with pytest.raises(
        LimbeckError, match="problems.mine.path: none.jsonl is no file, neither beside the recipe nor here"
    ):
        identity("none.jsonl")


def test_a_model_counts_by_its_content_wherever_it_lies(plan, finished, tmp_path):
    import shutil

    shutil.copytree(finished.recipe.parent / "model", tmp_path / "elsewhere")
    assert changed(plan(f"stages.brought.path={tmp_path / 'elsewhere'}")) == set()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    graph = plan(f"stages.brought.path={tmp_path / 'elsewhere'}")
    assert changed(graph) == {"brought"}
    assert any("files.config.json" in reason for reason in graph.why(graph.nodes["brought"]))


def test_the_resolved_recipe_means_the_same_in_another_folder(plan, tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump(plan().recipe))
    graph = Graph(load(tmp_path / "recipe.yaml"), plan().store, tmp_path)
    assert changed(graph) == set()


def test_manifests_tell_what_made_them(finished):
    manifests = [json.loads(path.read_text()) for path in finished.home.glob("store/*/manifest.json")]
    dev1 = next(m for m in manifests if m["stage"] == "dev1")
    assert set(dev1["inputs"]) == {"base", "coldstart", "general"}
    assert dev1["sources"]["editors"] == ["policy: translate"]
    assert dev1["seed"] == "0/dev1"
    assert dev1["settings"]["kind"] == "sft"
    assert dev1["tokens"] > 0


# ---------------------------------------------------------------- refused


def change(old: str, new: str) -> str:
    assert old in tiny.RECIPE
    return tiny.RECIPE.replace(old, new, 1)


@pytest.mark.parametrize("text, sentence", [
    (change("name: tiny", "nmae: tiny"), "unknown key nmae; did you mean name?"),
    (
        change("{source: miniature, modulus: 3,", "{source: miniature, modulos: 3,"),
        "unknown key problems.clock.modulos; did you mean modulus?",
    ),
    (change("tokens: 24000", "tokns: 40000"), "unknown key stages.base.tokns; did you mean tokens?"),
    (
        change("hidden_size: 32", "hiden_size: 32"),
        "unknown key stages.base.shape.hiden_size; did you mean hidden_size?",
    ),
    (change("kl_coef: 0.01", "kl_cof: 0.01"), "unknown key stages.zero.policy.kl_cof; did you mean kl_coef?"),
    (
        change("steps: 8", "steps: 8\n    qqq: 8"),
        "unknown key stages.zero.qqq; known keys: batch_tokens, engine, exact, flops, flops_of, ",
    ),
    (
        change("steps: 8", "steps: 0"),
        "stages.zero.steps: input should be greater than or equal to 1, but it is 0",
    ),
    (change("steps: 8", "steps: many"), "stages.zero.steps: input should be a valid integer"),
    (
        change("kind: rl", "kind: lr"),
        "stages.zero.kind is missing or unknown; choose one of load, remote, pretrain, rl",
    ),
    (
        change("source: miniature", "source: mini"),
        "problems.clock.source is missing or unknown; choose one of miniature, gym, sums, files",
    ),
    (change("    kind: rl\n    model: base", "    kind: rl"), "stages.zero.model is missing"),
    (
        change("    kind: rl\n    model: base", "    kind: rl\n    model: bse"),
        "stages.zero.model cites bse, which is no stage; did you mean base?",
    ),
    (
        change("    kind: rl\n    model: base", "    kind: rl\n    model: traces"),
        "stages.zero.model needs a model, but traces is a sample stage",
    ),
    (change("rows: traces", "rows: zero"), "stages.coldstart.rows needs rows, but zero is a rl stage"),
    (
        change("evaluation: evaluation}", "evaluation: zero}"),
        "stages.report.evaluation needs an evaluation, but zero is a rl stage",
    ),
    (
        change("evaluation: evaluation}", "evaluation: evaluation, story: {zero: zer}}"),
        "stages.report.story.zero cites zer, which is no stage; did you mean zero?",
    ),
    (
        change("problems: {clock: 1}\n    rewards", "problems: {clok: 1}\n    rewards"),
        "stages.zero.problems cites clok, which is not under problems; did you mean clock?",
    ),
    (
        change("problems: [clock]", "problems: [screened]"),
        "stages.evaluation.problems cites screened, a screening, which keeps training problems only",
    ),
    (
        change("    kind: rl\n    model: base", "    kind: rl\n    model: zero"),
        "stages go in a circle: zero -> zero",
    ),
    (
        change(
            "model: base\n    rows: {coldstart: 0.5, general: 1}", "model: zero\n    rows: {coldstart: 0.5}"
        ).replace("rl\n    model: base", "rl\n    model: dev1"),
        "stages go in a circle: zero -> dev1 -> zero",
    ),
    (change("name: tiny", "name: tiny\nname: tiny"), "not valid YAML: key 'name' appears twice"),
    (change("steps: 8", "steps: 8\n    steps: 9"), "not valid YAML: key 'steps' appears twice"),
    (change("name: tiny", "name: ../tiny"), "name '../tiny' names a folder"),
    (change("name: tiny", "name: store"), "name 'store' names a folder"),
    (change("  zero:", "  ze/ro:"), "stages.ze/ro: a stage's name has no slash"),
    ("name: [", "not valid YAML: "),
    ("- a\n- b", "a recipe is a mapping with the keys name, problems and stages"),
    ("", "a recipe is a mapping with the keys name, problems and stages"),
    ("name: x\nstages: 3", "stages: input should be a valid dictionary"),
    (
        "name: x\nstages: {rl: {kind: rl, model: a, problems: {}, policy: {clip_lo: 1}}}",
        "unknown key stages.rl.policy.clip_lo; did you mean clip_low?",
    ),
])  # fmt: skip
def test_a_mistake_in_a_recipe_is_one_sentence_that_names_the_key(tmp_path, text, sentence):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(LimbeckError, match=re.escape(f"{path}: {sentence}")) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_recipe_that_is_not_there_names_those_that_are(tmp_path):
    with pytest.raises(LimbeckError, match=r"no such recipe; recipes that come with Limbeck: .*quickstart"):
        load(tmp_path / "none.yaml")
    with pytest.raises(LimbeckError, match="cannot be read as text"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LimbeckError, match="cannot be read as text"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override, sentence", [
    ("nonsense", "--set nonsense: write key.path=value, for instance stages.zero.steps=10"),
    ("=3", "--set =3: write key.path=value"),
    ("name.deeper=1", "--set name.deeper=1: name is not a mapping, so it has no key deeper"),
    ("seed=[", "--set seed=[: the value is not valid YAML"),
    ("seed=x", "seed: input should be a valid integer"),
    ("stages.zero.stps=3", "unknown key stages.zero.stps; did you mean steps?"),
    ("stages.nought.steps=3", "stages.nought.kind is missing or unknown"),
])  # fmt: skip
def test_a_mistake_in_an_override_is_one_sentence(finished, override, sentence):
    with pytest.raises(LimbeckError, match=re.escape(sentence)):
        load(finished.recipe, [override])


def test_overrides_reach_every_depth(finished):
    recipe = load(
        finished.recipe, ["seed=7", "stages.zero.policy.group_size=16", "stages.evaluation.modes=[greedy]"]
    )
    assert (recipe.seed, recipe.stages["zero"].policy.group_size, recipe.stages["evaluation"].modes) == (
        7,
        16,
        ["greedy"],
    )


def test_a_recipe_written_out_reads_back_as_itself(finished, tmp_path):
    recipe = load(finished.recipe)
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(tmp_path / "again.yaml") == recipe
