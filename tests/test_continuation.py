"""More steps go on: a longer stage continues a finished shorter one and ends with the bytes of one long
stage."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from tiny import child, open_run

from limbeck.cli import recipe_plan
from limbeck.cli.plan_text import Answer
from limbeck.cli.provenance import _label
from limbeck.cli.store import gc
from limbeck.config.learned_rewards import LearnedReward
from limbeck.pipeline import continuation
from limbeck.pipeline.provenance.lineage import lineage_of
from limbeck.pipeline.run import Run
from limbeck.pipeline.run_state import StageState
from limbeck.pipeline.run_view import Line
from limbeck.pipeline.store import Artifact, Store
from limbeck.pipeline.worker import read_job, run_job, write_job
from limbeck.report.history import History

OPTIMIZER = "{learning_rate: 0.002, warmup_steps: 3}"
RECIPE = f"""
name: longer
threads: 1
problems:
  clock: &clock {{source: miniature, modulus: 3, numbers: 3, largest: 2}}
  chat: {{<<: *clock, task: repeat}}
stages:
  base:
    kind: pretrain
    problems: clock
    corpus: {{textbook: 0, general: 0.9, plain: 0, tagged: 0.7, guessed: 0, slip: 0, misjudged: 0}}
    tokens: 12000
    batch_tokens: 512
    optimizer: {{name: muon, learning_rate: 0.02}}
    shape: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}}
  rows: {{kind: general, problems: chat, rows: 40}}
  zero:
    kind: rl
    model: base
    problems: {{clock: 1}}
    rewards: {{accuracy: 1, format: 0.2, language: 0.5}}
    steps: 4
    policy: {{prompts_per_step: 2, group_size: 4, kl_coef: 0.01, reference_every: 2}}
    sampling: {{max_new_tokens: 16}}
    optimizer: {OPTIMIZER}
    log_every: 2
  tuned: {{kind: sft, model: base, rows: {{rows: 1}}, epochs: 1.5, batch_tokens: 128, log_every: 4,
          optimizer: {{name: muon, learning_rate: 0.002}}}}
  aligned: {{kind: dpo, model: base, pairs: {{pairs.jsonl: 1}}, licence: own, epochs: 1, batch_tokens: 512,
            log_every: 3, optimizer: {OPTIMIZER}}}
  judge: {{kind: reward, model: base, rows: pairs.jsonl, licence: own, held_out: 0.4, epochs: 1,
          batch_pairs: 8, log_every: 3, optimizer: {OPTIMIZER}}}
  small:
    kind: distill
    model: base
    teachers: {{clock: base, chat: base}}
    on_policy: 0.5
    problems: {{clock: 1}}
    rows: {{rows: 1}}
    steps: 5
    prompts_per_step: 4
    sampling: {{max_new_tokens: 16}}
    optimizer: {OPTIMIZER}
    log_every: 3
"""
LONGER = {
    "zero": "steps=7",
    "tuned": "epochs=2.4",
    "aligned": "epochs=2",
    "judge": "epochs=2.5",
    "small": "steps=9",
}


def execute(run: Run, stage: str, stops: bool = False) -> tuple[Artifact, list[str]]:
    """Carry one stage out in this process, with `stops` interrupted after every step; the artifact and what
    was said of continuing it."""
    node = run.graph.nodes[stage]
    said: list[str] = []
    request = write_job(run._job(node, run.graph.shorter(node)))
    stop = threading.Event()
    if stops:
        stop.set()
    event = {"event": "failed", "code": 75}
    while event["event"] == "failed" and event["code"] == 75:
        event = run_job(read_job(request, stop), said.append)
    assert event["event"] == "done", event
    manifest = run._manifest(node, event["outcome"])
    artifact = run.store.finish(run.store.partial(node.kind, node.key), manifest)
    run.graph.refresh()
    return artifact, [line for line in said if line.startswith(("continues", "trains anew"))]


def settings(stage: str, *more: str) -> list[str]:
    return [f"stages.{stage}.{setting}" for setting in more]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("longer")
    words = random.Random(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(60):
            answer = " ".join(str(words.randrange(3)) for _ in range(3))
            row = {"prompt": f"say {i}", "chosen": answer, "rejected": f"{answer} {i % 3}"}
            file.write(json.dumps(row) + "\n")
    path = folder / "longer.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def begun(recipe) -> Path:
    """The folder of runs in which only the inputs of the learning stages are finished."""
    home = recipe.parent / "runs"
    run = open_run(recipe, home)
    execute(run, "base")
    execute(run, "rows")
    return home


@pytest.fixture
def home(begun, tmp_path) -> Path:
    return shutil.copytree(begun, tmp_path / "runs")


def state(run: Run, artifact: Artifact) -> dict:
    return torch.load(run.store.checkpoint(artifact.folder), weights_only=True)


def same(one, other) -> bool:
    """Whether two saved states are equal in every tensor and number."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("stage", LONGER)
@pytest.mark.parametrize("stops", [False, True], ids=["whole", "interrupted"])
def test_a_longer_stage_continues_the_shorter_one_and_equals_one_long_stage(
    recipe, begun, home, tmp_path, stage, stops
):
    first, said = execute(open_run(recipe, home), stage)
    assert "continued" not in first.manifest and not said
    run = open_run(recipe, home, *settings(stage, LONGER[stage]))
    longer, said = execute(run, stage, stops)
    step = longer.manifest["continued"]["step"]
    assert longer.manifest["continued"] == {
        "artifact": first.folder.name,
        "key": first.manifest["key"],
        "digest": first.digest,
        "step": step,
    }
    assert (step - 1) % first.manifest["settings"]["log_every"], "its last step is logged only as the last"
    assert step >= 3 and said[0] == f"continues {stage} ({first.folder.name}) at step {step}"

    shutil.copytree(begun, tmp_path / "other")
    other = open_run(recipe, tmp_path / "other", *settings(stage, LONGER[stage]))
    whole, said = execute(other, stage)
    assert "continued" not in whole.manifest and not said
    assert (longer.folder.name, longer.digest) == (whole.folder.name, whole.digest)
    assert {name: longer.manifest[name] for name in ("flops", "tokens", "notes")} == {
        name: whole.manifest[name] for name in ("flops", "tokens", "notes")
    }
    assert first.digest != longer.digest
    if LONGER[stage].endswith(".5"):
        assert not run.store.checkpoint(longer.folder).exists()
    else:
        assert same(state(run, longer), state(other, whole))


@pytest.mark.slow
def test_a_stage_killed_at_every_write_while_it_begins_to_continue_ends_with_the_same_bytes(
    nursery, recipe, begun, home, tmp_path
):
    run = open_run(recipe, home)
    execute(run, "tuned")
    run = open_run(recipe, home, *settings("tuned", LONGER["tuned"]))
    node = run.graph.nodes["tuned"]
    request = write_job(run._job(node, run.graph.shorter(node)))
    answer_to = tmp_path / "event.json"
    for fatal in range(1, 200):
        process = nursery.Process(target=child, args=(request, str(answer_to), fatal))
        process.start()
        process.join(200)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert 5 < fatal < 199
    outcome = json.loads(answer_to.read_text())["outcome"]
    longer = run.store.finish(run.store.partial(node.kind, node.key), run._manifest(node, outcome))
    assert longer.manifest["continued"]["step"] > 3
    shutil.copytree(begun, tmp_path / "other")
    whole, _ = execute(open_run(recipe, tmp_path / "other", *settings("tuned", LONGER["tuned"])), "tuned")
    assert longer.digest == whole.digest


def test_of_several_shorter_stages_the_longest_is_continued_and_a_lower_length_trains_anew(recipe, home):
    for steps in (2, 4):
        execute(open_run(recipe, home, f"stages.zero.steps={steps}"), "zero")
    run = open_run(recipe, home, "stages.zero.steps=5")
    assert run.graph.shorter(run.graph.nodes["zero"]).step == 4
    longest, said = execute(run, "zero")
    assert said[0].startswith("continues zero (rl-") and said[0].endswith(" at step 4")
    run = open_run(recipe, home, "stages.zero.steps=3")
    assert run.graph.shorter(run.graph.nodes["zero"]).step == 2
    run = open_run(recipe, home, "stages.zero.steps=1")
    assert run.graph.shorter(run.graph.nodes["zero"]) is None
    least, said = execute(run, "zero")
    assert not said and least.digest != longest.digest


@pytest.mark.parametrize("change", [
    "seed=1", "stages.zero.optimizer.learning_rate=0.5", "stages.zero.policy.group_size=2",
    "problems.clock.largest=3",
])  # fmt: skip
def test_a_stage_with_other_settings_continues_nothing(recipe, home, change):
    execute(open_run(recipe, home), "zero")
    run = open_run(recipe, home, "stages.zero.steps=7", change)
    for name in ("base", "rows"):
        if not run.graph.nodes[name].artifact:
            execute(run, name)
    assert run.graph.shorter(run.graph.nodes["zero"]) is None


@pytest.mark.parametrize("stage, before, after, reason", [
    ("zero", ["optimizer.schedule=linear"], ["optimizer.schedule=linear", "steps=7"],
     "the linear schedule of its learning rate depends on steps; `constant` does not"),
    ("tuned", ["optimizer.schedule=cosine"], ["optimizer.schedule=cosine", "epochs=3"],
     "the cosine schedule of its learning rate depends on epochs; `constant` does not"),
    ("judge", ["epochs=0.7"], ["epochs=2"], "epochs: 0.7 ends within a batch; whole epochs do not"),
    ("tuned", [], ["log_every=1", "epochs=3"], "its log would not be that of one stage (log_every: 4 -> 1)"),
    ("base", [], ["tokens=13000"], "the order of the whole corpus depends on tokens"),
])  # fmt: skip
def test_a_stage_that_cannot_be_continued_trains_anew_and_says_why(
    recipe, begun, home, tmp_path, stage, before, after, reason
):
    if stage != "base":
        first, _ = execute(open_run(recipe, home, *settings(stage, *before)), stage)
        kept = [path.stem for path, _ in Store(home / "store").checkpoints()]
        assert kept == ([first.folder.name] if "log_every" in reason else [])
    run = open_run(recipe, home, *settings(stage, *after))
    shorter = run.graph.shorter(run.graph.nodes[stage])
    assert shorter.obstacle == reason
    assert shorter.sentence.startswith(f"trains anew and does not continue {stage} at step ")
    longer, said = execute(run, stage)
    assert "continued" not in longer.manifest and not said
    shutil.copytree(begun, tmp_path / "other")
    whole, _ = execute(open_run(recipe, tmp_path / "other", *settings(stage, *after)), stage)
    assert longer.digest == whole.digest


def test_a_checkpoint_that_is_deleted_or_damaged_is_not_continued(recipe, home):
    first, _ = execute(open_run(recipe, home), "tuned")
    run = open_run(recipe, home, *settings("tuned", "epochs=2"))
    node = run.graph.nodes["tuned"]
    path = run.store.checkpoint(first.folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    shorter = run.graph.shorter(node)
    longer, said = execute(run, "tuned")
    assert said[0] == f"trains anew: {path} is missing or damaged"
    assert not shorter.obstacle and "continued" not in longer.manifest
    path.unlink()
    run = open_run(recipe, home, *settings("tuned", "epochs=1.8"))
    shorter = run.graph.shorter(run.graph.nodes["tuned"])
    assert shorter.obstacle == "its final checkpoint is not in the store (any more)"


def test_last_steps_of_a_learned_reward_count_from_the_end(recipe):
    stage = open_run(recipe, recipe.parent / "runs").graph.nodes["zero"].stage
    late = {"preference": LearnedReward(of="judge", last_steps=2)}
    assert not continuation.obstacle(stage)
    assert "last_steps counts from the end" in continuation.obstacle(
        stage.model_copy(update={"learned_rewards": late})
    )


# ---------------------------------------------------------------- what is told


def test_a_plan_names_the_step_and_foresees_only_the_steps_that_are_left(recipe, home):
    execute(open_run(recipe, home), "zero")
    graph = open_run(recipe, home, "stages.zero.steps=16").graph
    answer = Answer()
    recipe_plan._add_stages(answer, graph, recipe_plan.Forecasts({}), recipe_plan.Forecasts({}))
    line = next(line for line in answer.lines if " zero " in line)
    assert line.endswith("steps: 4 -> 16; continues zero at step 4")
    row = next(row for row in answer.data["data"] if row["stage"] == "zero")
    assert row["shorter"]["step"] == 4 and row["shorter"]["obstacle"] == ""
    left = recipe_plan._walk(graph, recipe_plan.model_configs(graph)).efforts["zero"]
    fresh = open_run(recipe, home, "stages.zero.steps=12", "seed=1").graph
    whole = recipe_plan._walk(fresh, recipe_plan.model_configs(fresh)).efforts["zero"]
    for name in ("sampled", "updates", "learned", "read"):
        assert getattr(left, name) == pytest.approx(getattr(whole, name))


def test_the_origin_is_told_by_why_the_report_and_the_studio(recipe, home):
    first, _ = execute(open_run(recipe, home), "zero")
    run = open_run(recipe, home, "stages.zero.steps=7")
    node = run.graph.nodes["zero"]
    request = write_job(run._job(node, run.graph.shorter(node)))
    stop = threading.Event()
    stop.set()
    assert run_job(read_job(request, stop))["code"] == 75
    folder = run.store.partial(node.kind, node.key)
    history = History(folder).look()
    assert history.steps == list(range(5)) and history.total == 7, "earlier steps are in the curves"
    begun = Line(StageState("zero", node.stage, node.inputs, "begun", folder), "begun", history)
    sentence = f"zero continues {first.folder.name} from step 4; its time is that of the later steps."
    assert sentence in [text.en for text in begun.said]
    longer, _ = execute(run, "zero")
    done = StageState("zero", node.stage, node.inputs, "done", longer.folder, longer.manifest)
    assert sentence in [text.en for text in Line(done, "done", History(longer.folder).look()).said]
    entry = lineage_of(longer, run.store).head
    assert f"continued from {first.folder.name} at step 4" in _label(entry, "zero")


def test_gc_deletes_a_checkpoint_with_its_artifact_and_those_in_use_only_when_told_to(recipe, home, capsys):
    run = open_run(recipe, home)
    first, _ = execute(run, "tuned")
    run = open_run(recipe, home, "stages.tuned.epochs=2")
    longer, _ = execute(run, "tuned")
    run._open_folder()
    old, new = (run.store.checkpoint(artifact.folder) for artifact in (first, longer))
    gc(home, yes=True)
    said = capsys.readouterr().out
    assert f"deleted {old} (" in said and not old.exists() and new.exists()
    assert "kept 1 final checkpoint (" in said
    gc(home, checkpoints=True)
    said = capsys.readouterr().out
    assert f"would delete {new} (" in said and new.exists()
    gc(home, yes=True, checkpoints=True)
    assert "tuned cannot be continued with more steps then" in capsys.readouterr().out and not new.exists()
