"""Students: rows that a model writes itself, half of its layers, and distillation of both, in a tiny run."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import Attempt

from limbeck.cli import recipe_plan
from limbeck.config.load import load
from limbeck.model import weights
from limbeck.model.pruning import block_influence, most_influential
from limbeck.pipeline.dataset_rows import take_share
from limbeck.pipeline.stages import distill
from limbeck.pipeline.stages.budget import budget_of
from limbeck.pipeline.stages.rows import to_sample
from limbeck.plan.stage_work import Walk
from limbeck.run_log import read, read_metrics
from limbeck.text.tokenizer import PLAIN, Tokenizer
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

RECIPE = """
name: students
threads: 1
licence: Apache-2.0
problems:
  clock: {source: miniature}
  chat: {source: miniature, task: repeat}
stages:
  base: {kind: load, path: model}
  general: {kind: general, model: base, rows: 150, sampling: {max_new_tokens: 24}}
  answers: {kind: sample, model: base, problems: {clock: 1}, prompts: 16, samples: 1, correct: false,
            wellformed: false, sampling: {max_new_tokens: 24}}
  half: {kind: load, path: model, layers: 2, rows: general}
  named: {kind: load, path: model, layers: [1, 3]}
  healed: &healed
    kind: distill
    model: half
    teachers: {general: base, clock: base}
    rows: {general: 1, answers: 1}
    on_policy: 0
    divergence: forward
    completion_only_loss: false
    steps: 30
    prompts_per_step: 16
    optimizer: {learning_rate: 0.01, warmup_steps: 3}
    log_every: 1
  responses: {<<: *healed, completion_only_loss: true, steps: 1}
  small: {kind: sft, model: base, rows: {general: 1}, epochs: 1, batch_tokens: 512}
  own: {kind: rl, model: base, problems: {clock: 1}, steps: 2, steps_without_signal: 0, flops_of: small,
        policy: {prompts_per_step: 2}, sampling: {max_new_tokens: 8}}
"""


@pytest.fixture(scope="module")
def students(tmp_path_factory, tokenizer):
    """Carried out once, from a model of four layers whose rows mostly end early."""
    from limbeck.model.config import ModelConfig
    from limbeck.model.decoder import Decoder

    folder = tmp_path_factory.mktemp("students")
    sizes = ModelConfig("llama", tokenizer.size, 32, 4, 4, 2, 8, 48, max_positions=128)
    model = Decoder(sizes).initialize(0)
    with torch.no_grad():
        model.head.weight.mul_(12)
        model.head.weight[tokenizer.end_id] *= 2.2
    weights.save(model, folder / "model", tokenizer)
    tokenizer.save(folder / "model")
    recipe = folder / "students.yaml"
    recipe.write_text(RECIPE)
    nodes = tiny.carry_out(tiny.open_run(recipe, folder / "runs"), "cpu")
    artifacts = {name: node.artifact for name, node in nodes.items()}
    assert all(artifacts.values())
    return SimpleNamespace(recipe=recipe, home=folder / "runs", artifacts=artifacts)


def rows_of(students, stage: str) -> list[dict]:
    return list(read(students.artifacts[stage].folder / "rows.jsonl"))


def model_of(students, stage: str):
    return weights.load(students.artifacts[stage].folder / "model")


# ---------------------------------------------------------------- rows that a model writes


def test_a_model_writes_instructions_after_its_users_opening_and_answers_them(students, tokenizer):
    rows = rows_of(students, "general")
    notes = students.artifacts["general"].manifest["notes"]
    assert 30 < len(rows) == notes["rows"] < notes["sampled"] == 150
    assert len({row["prompt"] for row in rows}) > 20 and all(row["prompt"].strip() for row in rows)
    assert {row["id"].partition("/")[0] for row in rows} == {"general"}
    assert len({row["id"] for row in rows}) == len(rows)
    ended = [row["tokens"][-1] == tokenizer.end_id for row in rows]
    assert any(ended) and max(len(row["tokens"]) for row in rows) <= 24
    for row, stopped in zip(rows, ended, strict=True):
        assert stopped or len(row["tokens"]) == 24
        assert tokenizer.decode(row["tokens"]) == row["completion"]
    steps = read_metrics(students.artifacts["general"].folder)
    assert [step["kept"] for step in steps] == pytest.approx([len(rows) / 3] * 3, abs=len(rows) / 4)
    manifest = students.artifacts["general"].manifest
    assert manifest["tokens"] == sum(step["sampled_tokens"] for step in steps) and manifest["flops"] > 0


def test_the_opening_is_what_stands_before_a_users_text(tokenizer):
    opening = tokenizer.user_opening()
    assert opening and tokenizer.render([{"role": "user", "content": "7 8"}]).startswith(opening + "7 8")
    plain = Tokenizer(tokenizer.backend, PLAIN, tokenizer.end, tokenizer.pad)
    assert plain.user_opening() == "" == plain.plain().user_opening()
    assert tokenizer.plain().prompt(opening).tolist() == tokenizer.encode(opening)


def test_a_model_without_a_chat_template_is_refused(students, tmp_path):
    (tmp_path / "model").symlink_to(students.recipe.parent / "model")
    (tmp_path / "students.yaml").write_text(
        RECIPE.replace("{kind: load, path: model}", "{kind: load, path: model, chat_template: plain}")
    )
    run = tiny.open_run(tmp_path / "students.yaml", tmp_path / "runs")
    with pytest.raises(LimbeckError, match="stages.general.model: base has no chat template that marks"):
        tiny.carry_out(run, "cpu", "general")


@pytest.mark.parametrize("stage", ["general", "half"])
def test_a_stage_killed_at_random_instants_ends_with_the_same_bytes(nursery, students, tmp_path, stage):
    attempt, instants = Attempt(nursery, students, tmp_path, stage), random.Random(stage)
    for _ in range(2):
        process = attempt.start()
        process.join(instants.uniform(0.02, 0.5))
        process.kill()
        process.join()
    assert attempt.end() == attempt.expected


# ---------------------------------------------------------------- half of the layers


def test_the_layers_with_the_greatest_influence_on_the_rows_are_kept(students):
    base, half = model_of(students, "base"), model_of(students, "half")
    notes = students.artifacts["half"].manifest["notes"]
    rows = take_share(rows_of(students, "general"), 1.0, ("0/half", "general"))
    tokenizer = Tokenizer.from_directory(students.artifacts["base"].folder / "model")
    texts = [to_sample(row, tokenizer, "keep").tokens for row in rows[:64]]
    assert notes["influence"] == pytest.approx(block_influence(base, texts), abs=1e-3)
    assert notes["layers"] == most_influential(notes["influence"], 2)
    for layer, block in zip(notes["layers"], half.blocks, strict=True):
        assert torch.equal(block.ffn.down.weight, base.blocks[layer].ffn.down.weight)


def test_layers_can_be_named(students):
    base, named = model_of(students, "base"), model_of(students, "named")
    for layer, block in zip([1, 3], named.blocks, strict=True):
        assert torch.equal(block.attention.out.weight, base.blocks[layer].attention.out.weight)


# ---------------------------------------------------------------- healing and its price


def test_distillation_on_rows_of_a_model_brings_the_half_nearer(students):
    losses = [step["loss"] for step in read_metrics(students.artifacts["healed"].folder)]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("stage, whole", [("healed", True), ("responses", False)])
def test_prompts_are_learned_where_the_loss_is_not_of_completions_only(students, stage, whole):
    run = tiny.open_run(students.recipe, students.home)
    job = run._job(run.graph.nodes[stage])
    tokenizer = job.tokenizer("half")
    learned = distill._rows(job, tokenizer)
    assert len(learned) == len(rows_of(students, "general") + rows_of(students, "answers"))
    for teacher, sample, question in learned:
        prompt = tokenizer.prompt(question).tolist()
        assert teacher == "base" and sample.tokens[: len(prompt)].tolist() == prompt
        assert sample.start == (0 if whole else len(prompt))


@pytest.mark.parametrize("counted", [None, False, True])
def test_a_budget_takes_in_what_the_rows_cost_if_it_is_told_to(students, counted):
    small, general = (students.artifacts[name].manifest for name in ("small", "general"))
    stage = load(students.recipe).stages["own"].model_copy(update={"flops_of_rows": counted})
    job = SimpleNamespace(name="own", stage=stage, manifest=lambda name: {"small": small}[name])
    assert general["flops"] == small["notes"]["data_flops"] > 0
    assert budget_of(job) == small["flops"] + (general["flops"] if counted else 0)


def test_a_plan_knows_what_a_model_writes_and_how_deep_students_are(students):
    graph = tiny.open_run(students.recipe, students.home).graph
    walk = Walk(graph.recipe, recipe_plan.model_configs(graph))
    for node in graph.nodes.values():
        walk.add(node.name, node.stage, node.inputs, node.control)
    assert [walk.configs[name].layers for name in ("base", "half", "named")] == [4, 2, 2]
    general = walk.efforts["general"]
    assert general.model == "base" and general.flops(walk.configs["base"]) > 0
    assert walk.outputs["general"].rows == 150


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "setting, said",
    [
        ("stages.general.problems=chat", "give either problems, a miniature, or model"),
        ("stages.general.model=null", "give either problems, a miniature, or model"),
        ("stages.general={problems: chat, kind: general, sampling: {top_k: 2}}", "leave sampling out"),
        ("stages.general.model=answers", "stages.general.model needs a model, but answers is a sample stage"),
        ("stages.half.layers=[1, 3]", "rows tell which layers to keep; give layers, how many"),
        ("stages.half.rows=base", "stages.half.rows needs rows, but base is a load stage"),
        ("stages.named.layers=[3, 1]", "name each once, from 0, in ascending order"),
        ("stages.named.layers=[-1, 3]", "name each once, from 0, in ascending order"),
        ("stages.named.layers=[]", "layers = []: keep at least one"),
        ("stages.named.layers=0", "layers = 0: keep at least one"),
        ("stages.healed.teachers={genral: base, clock: base}", "cites genral, which is not under problems"),
        ("stages.healed.divergence=text", "completion_only_loss: false is not for divergence text"),
        (
            "stages.own={kind: rl, model: base, problems: {clock: 1}, flops_of_rows: true}",
            "name a stage there",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, setting, said):
    (tmp_path / "students.yaml").write_text(RECIPE)
    with pytest.raises(LimbeckError, match="students.yaml: ") as error:
        load(tmp_path / "students.yaml", [setting])
    assert said in str(error.value)


def test_prompts_that_nobody_labelled_are_refused(tmp_path):
    labels = "  labels: {kind: label, model: base, rows: {general: 1}}\n"
    (tmp_path / "students.yaml").write_text(RECIPE + labels)
    with pytest.raises(LimbeckError, match="but labels labels no prompts; cite its rows and a teacher"):
        load(tmp_path / "students.yaml", ["stages.healed.rows={labels: 1}"])


def test_the_shipped_recipe_extends_the_chain_and_keeps_its_stages():
    chain, students = load("smollm2-135m"), load("smollm2-students")
    assert students.problems == chain.problems and students.seed == chain.seed
    for name in set(chain.stages) - {"evaluation", "report"}:
        assert students.stages[name] == chain.stages[name]
    assert json.loads(students.model_dump_json())["name"] == "smollm2-students"
