"""The still: every stage of distillation in a tiny recipe, what it learns, counts, refuses, and survives."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from tiny import Attempt

from limbeck.config.aliases import stored_kind
from limbeck.config.load import load
from limbeck.config.methods import Distill
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.pipeline.provenance.lineage import find, recall, rows_behind
from limbeck.pipeline.stages.budget import affordable
from limbeck.pipeline.stages.ranking import mean_logprob, ranked
from limbeck.pipeline.stages.rows import to_sample
from limbeck.run_log import read, read_metrics
from limbeck.tasks.clock_countdown import Countdown
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack
from limbeck.train.distill import LABELLED, Assigned, DistillSampler, Teacher, attach_teachers
from limbeck.train.dpo import to_pair
from limbeck.train.pairs import best_and_worst, plan_by_tokens
from limbeck.train.scorer import Scorer
from limbeck.types import Completion, Group, LimbeckError, Problem, Sample, Score

pytestmark = pytest.mark.slow

RECIPE = """
name: still
threads: 1
problems:
  clock: &clock {source: miniature, modulus: 3, numbers: 2, largest: 3}
  chat: {<<: *clock, task: repeat}
  elsewhere: {<<: *clock, modulus: 7}
stages:
  stranger: {kind: pretrain, problems: elsewhere, tokens: 12000, batch_tokens: 512,
             shape: &shape {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}}
  big:
    kind: pretrain
    problems: clock
    corpus: {textbook: 0, general: 0.5, plain: 0, tagged: 0.7, guessed: 0, slip: 0, misjudged: 0}
    tokens: 24000
    batch_tokens: 512
    optimizer: {name: muon, learning_rate: 0.02, warmup_steps: 5}
    shape: *shape
  general: {kind: general, problems: chat, rows: 60}
  talker: {kind: sft, model: big, rows: {general: 1}, epochs: 1}
  base: {kind: pretrain, problems: clock, tokens: 2000, batch_tokens: 512, shape: *shape}
  outputs:
    kind: sample
    model: big
    problems: {clock: 0.5, chat: 0.5}
    prompts: 128
    samples: 3
    keep: shortest
    longest: 20
    correct: false
    wellformed: false
    sampling: &brief {max_new_tokens: 24}
  labels: {kind: label, model: big, rows: {outputs: 1}, top_k: 8}
  offline: &offline
    kind: distill
    model: base
    rows: {labels: 1}
    on_policy: 0
    divergence: forward
    steps: 60
    prompts_per_step: 32
    optimizer: {learning_rate: 0.01}
    log_every: 1
    save_every: 0.01
  mixed: &mixed
    <<: *offline
    on_policy: 0.5
    divergence: jsd
    rows: {outputs: 1}
    problems: {clock: 1, chat: 1}
    teachers: {clock: big, chat: talker}
    sampling: *brief
    steps: 20
  own: {<<: *mixed, on_policy: 1, divergence: reverse, rows: {}, steps: 40}
  across: {<<: *mixed, divergence: text, teachers: {clock: stranger, chat: stranger}, steps: 30}
  pairs: {kind: pairs, model: base, problems: {chat: 1, clock: 1}, scored_by: big,
          prompts: 64, samples: 4, sampling: *brief}
  preferring:
    {kind: dpo, model: base, pairs: {pairs: 1}, beta: 0.5, epochs: 6, batch_tokens: 512,
     optimizer: {learning_rate: 0.003},
     log_every: 1, save_every: 0.01}
  best:
    {kind: sample, model: base, problems: {chat: 1}, keep: best, scored_by: big, prompts: 32,
     samples: 4, correct: false,
     wellformed: false, sampling: *brief}
  raised: {kind: sft, model: base, rows: {best: 1, outputs: 1}, system: {outputs: try wait}, epochs: 30,
           batch_tokens: 512, flops: 6.0e+8}
"""


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """Carried out once."""
    folder = tmp_path_factory.mktemp("still")
    recipe = folder / "still.yaml"
    recipe.write_text(RECIPE)
    code, _, err = tiny.answer("run", recipe, "--runs", folder / "runs", "--json")
    assert code == 0, err
    run = tiny.open_run(recipe, folder / "runs")
    return SimpleNamespace(
        recipe=recipe,
        home=folder / "runs",
        artifacts={n: node.artifact for n, node in run.graph.nodes.items()},
    )


def history(still, stage: str) -> list[dict]:
    return read_metrics(still.artifacts[stage].folder)


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize("stage", ["offline", "own"])
def test_a_student_comes_half_way_to_its_teacher(still, stage):
    losses = [row["loss"] for row in history(still, stage)]
    assert losses[0] > 0.5 and np.mean(losses[-5:]) < losses[0] / 2


def test_preferences_part_best_from_worst(still):
    first, *_, last = history(still, "preferring")
    assert (
        first["loss"] == pytest.approx(np.log(2), abs=1e-4)
        and last["loss"] < 0.4
        and last["preferred"] > 0.85
    )


def test_a_mixed_student_learns_from_itself_and_from_rows(still):
    rows = history(still, "mixed")
    own = [row for row in rows if row["on_policy"]]
    assert 4 < len(own) < 16 and all(
        ("accuracy" in row and "length" in row) == bool(row["on_policy"]) for row in rows
    )
    assert all(row["sampled_tokens"] == row["learned_tokens"] > 0 for row in own)  # one completion a problem
    assert all(row["sampled_tokens"] == 0 < row["teacher_flops"] for row in rows if not row["on_policy"])


def test_a_teacher_with_another_tokenizer_is_learned_from_by_its_text(still):
    rows = history(still, "across")
    assert np.mean([row["loss"] for row in rows[-5:]]) < np.mean([row["loss"] for row in rows[:5]]) / 2
    assert all(row["teacher_flops"] > 0 for row in rows)


def test_whatever_way_it_learns_what_it_learned_from_is_listed_and_can_be_recalled(still):
    """Labelled rows, pairs, and what a student practised on itself; a withdrawn row reaches through labels
    and pairs."""
    listed = {
        stage: list(rows_behind(find(f"still/{stage}", still.home)))
        for stage in ("offline", "preferring", "own", "mixed")
    }
    assert {row["given_by"] for row in listed["offline"]} == {"labels"} and {
        row["given_by"] for row in listed["preferring"]
    } == {"pairs"}
    assert {row["given_by"] for row in listed["own"]} == {"practice"}
    assert {row["given_by"] for row in listed["mixed"]} == {"practice", "outputs"}
    assert sum(row["times"] for row in listed["offline"]) == sum(
        1 for _ in read(still.artifacts["labels"].folder / "rows.jsonl")
    )
    found = recall(listed["offline"][0]["id"], still.home, "outputs")
    assert set(found.holds.values()) == {"outputs", "labels"} and {"offline", "mixed", "raised"} <= set(
        found.learned.values()
    )
    assert set(recall(listed["preferring"][0]["id"], still.home, "pairs").learned.values()) == {"preferring"}
    for stage, teachers in (
        ("offline", {"big"}),
        ("mixed", {"big", "talker"}),
        ("preferring", {"big"}),
        ("talker", set()),
    ):
        assert {
            name.split()[0] for name in still.artifacts[stage].manifest["sources"]["teachers"]
        } == teachers, stage


def test_labels_hold_nearly_all_of_the_teachers_mass(still):
    labels = still.artifacts["labels"]
    assert sorted(p.name for p in labels.folder.glob("labels-*")) == ["labels-00000.safetensors"]
    assert 0.5 < history(still, "labels")[0]["known_mass"] < 1
    assert labels.manifest["notes"]["rows"] == still.artifacts["outputs"].manifest["notes"]["kept"]


def test_pairs_have_trls_columns_and_the_better_half_is_the_likelier(still):
    rows = list(read(still.artifacts["pairs"].folder / "rows.jsonl"))
    assert len(rows) > 40 and {"prompt", "chosen", "rejected"} <= rows[0].keys()
    assert all(
        row["chosen_score"] > row["rejected_score"] and row["chosen_tokens"] != row["rejected_tokens"]
        for row in rows
    )


def test_outputs_are_the_shortest_and_short(still):
    rows = list(read(still.artifacts["outputs"].folder / "rows.jsonl"))
    assert (
        max(len(row["tokens"]) for row in rows) <= 20
        and still.artifacts["outputs"].manifest["notes"]["dropped"]["too long"] > 0
    )


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("stage", ["mixed", "own", "offline"])
def test_a_teachers_flops_are_counted_and_shown_apart(still, stage):
    manifest, rows = still.artifacts[stage].manifest, history(still, stage)
    assert manifest["flops"] == pytest.approx(sum(row["flops"] for row in rows))
    assert manifest["notes"]["teacher_flops"] == pytest.approx(sum(row["teacher_flops"] for row in rows))
    assert (
        0.2 < manifest["notes"]["teacher_flops"] / manifest["flops"] < 0.5
        if stage != "offline"
        else not manifest["notes"]["teacher_flops"]
    )


def test_what_rows_cost_goes_with_them(still):
    """Student's labels: the teacher sampled, then read; its bill is found from the student."""
    cost = {
        name: still.artifacts[name].manifest
        for name in ("outputs", "labels", "offline", "best", "raised", "pairs", "preferring")
    }
    assert cost["labels"]["notes"]["data_flops"] == cost["outputs"]["flops"] > 0
    assert cost["offline"]["notes"]["data_flops"] == pytest.approx(
        cost["outputs"]["flops"] + cost["labels"]["flops"]
    )
    assert (
        cost["preferring"]["notes"]["data_flops"]
        == cost["pairs"]["flops"]
        > cost["pairs"]["notes"]["teacher_flops"]
        > 0
    )
    spent = cost["raised"]["flops"] + cost["raised"]["notes"]["data_flops"]
    assert 0.85 * 6e8 < spent <= 1.01 * 6e8


def test_a_budget_stops_a_student_after_the_step_that_spends_it(still, tmp_path):
    first = history(still, "own")[0]["flops"]
    attempt = tiny.open_run(still.recipe, still.home, f"stages.own.flops={2.5 * first}")
    attempt.execute()
    manifest = attempt.graph.nodes["own"].artifact.manifest
    steps = read_metrics(attempt.graph.nodes["own"].artifact.folder)
    assert 2.5 * first <= manifest["flops"] < 2.5 * first + steps[-1]["flops"] * 1.001 and len(steps) < 5


def test_a_budget_that_the_rows_have_eaten_is_refused(still):
    run = tiny.open_run(still.recipe, still.home, "stages.raised.flops=1000")
    with pytest.raises(
        LimbeckError,
        match=r"stages\.raised\.flops: its rows alone took .* of 1e\+03; allow more, or sample less",
    ):
        run.execute()


def test_a_plan_is_cut_where_the_budget_ends(tokenizer):
    config = ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=128)
    samples, plan = [Sample(np.zeros(10, np.int64), 2)] * 4, [[0], [1, 2], [3]]
    one = 10 * config.flops_per_token(5, backward=True)
    assert [len(affordable(plan, samples, config, share * one)) for share in (0.1, 1, 2.9, 3, 4, np.inf)] == [
        1,
        1,
        1,
        2,
        3,
        3,
    ]


# ---------------------------------------------------------------- who teaches whom


class Stub:
    """Answers every problem with one token that is its number, and draws problems of two domains in turn."""

    def draw(self, count: int, seed: object) -> list[Problem]:
        return [Problem(f"{('clock', 'chat')[i % 2]}/{i}", "") for i in range(count)]

    def rollout(self, problems, group_size, sampling, seed) -> list[Group]:
        said = [Completion(np.array([int(p.id[-1])]), np.zeros(1, np.float32), "", True, 0) for p in problems]
        return [Group(p, np.array([11, 12]), (c,)) for p, c in zip(problems, said, strict=True)]

    def score(self, group: Group) -> Group:
        return Group(group.problem, group.prompt_tokens, group.completions, (Score({}),), (0.0,))


def test_each_problem_is_taught_by_the_teacher_of_its_domain(decoder):
    settings = Distill(
        kind="distill",
        model="m",
        teachers={"clock": "a", "chat": "b"},
        problems={"clock": 1, "chat": 1},
        prompts_per_step=6,
    )
    stub = Stub()
    lesson = DistillSampler(settings, 0, stub, stub, None, [])(0)
    parts = lesson.by_teacher()
    assert {name: [int(a.sample.tokens[-1]) for a in part] for name, part in parts.items()} == {
        "a": [0, 2, 4],
        "b": [1, 3, 5],
    }
    teachers = {name: Teacher(Scorer(decoder(seed=seed))) for seed, name in enumerate("ab")}
    batches, read = attach_teachers(lesson, teachers, 1 << 20)
    assert [(b.tokens, b.sequences) for b in batches] == [(6, 6)] * 2 and read == {"a": 9, "b": 9}
    for batch, name in zip(batches, "ab", strict=True):
        assert torch.equal(batch.teacher.head_VC, teachers[name].scorer.model.head.weight)
        assert torch.equal(batch.teacher.hidden_MC, teachers[name].scorer.states(batch).hidden_MC)


def test_rows_come_all_once_before_one_comes_twice_and_steps_are_their_own():
    settings = Distill(kind="distill", model="m", on_policy=0, rows={"r": 1}, prompts_per_step=4)
    rows = [Assigned(LABELLED, Sample(np.array([1, i]), 1), "") for i in range(6)]
    lessons = DistillSampler(settings, 0, None, None, None, rows)
    drawn = [[int(a.sample.tokens[1]) for a in lessons(step).by_teacher()[LABELLED]] for step in range(6)]
    flat = [i for step in drawn for i in step]
    assert all(sorted(flat[i : i + 6]) == list(range(6)) for i in range(0, 24, 6)) and flat[:6] != flat[6:12]
    again = DistillSampler(settings, 0, None, None, None, rows)(4).by_teacher()[LABELLED]
    assert [int(a.sample.tokens[1]) for a in again] == drawn[4]


def test_a_teachers_score_is_the_mean_log_probability_of_each_completion(decoder):
    teacher, prompt = Scorer(decoder()), np.array([3, 4, 5])
    said = [np.array(tokens) for tokens in ([7, 8, 9, 2], [7, 2], [6, 6, 6])]
    group = Group(
        Problem("clock/0", ""),
        prompt,
        tuple(Completion(t, np.zeros(len(t)), "", True, i) for i, t in enumerate(said)),
    )
    scores = mean_logprob(teacher, 1 << 20)(group)
    for score, tokens in zip(scores, said, strict=True):
        (alone,) = teacher.logprobs(pack([Sample(np.concatenate([prompt, tokens]), 3)], 1 << 20))
        assert score == pytest.approx(float(alone.mean()), abs=1e-5)


# ---------------------------------------------------------------- small parts


def test_best_and_worst_of_equals_are_the_first():
    assert best_and_worst([1, 2, 0, 2, 0], 0) == (1, 2)
    assert best_and_worst([1, 1], 0) is None and best_and_worst([1, 2], 1) is None


def test_what_is_kept_first():
    completions = tuple(
        Completion(np.zeros(n), np.zeros(n), str(n), True, i) for i, n in enumerate((5, 3, 4, 3))
    )
    group = Group(Problem("clock/0", ""), np.zeros(1), completions)
    assert ranked(group, None, None) == [0, 1, 2, 3]
    assert ranked(group, "shortest", None) == [1, 3, 2, 0]
    assert ranked(group, "best", lambda _: [0.5, 2.0, 2.0, 1.0]) == [1, 2, 3, 0]


def test_a_plan_of_pairs_never_parts_one():
    samples = [
        half for i in range(9) for half in to_pair(np.arange(3), np.arange(2 + i), np.arange(4), i + 1)
    ]
    plan = plan_by_tokens(samples, 2, 60, "seed")
    counts = Counter(samples[i].pair for batch in plan for i in batch)
    assert set(counts.values()) == {2} and len(counts) == 18 and len(plan) > 4
    assert all(
        batch[k + 1] == batch[k] + 1 and samples[batch[k]].pair == -samples[batch[k + 1]].pair
        for batch in plan
        for k in range(0, len(batch), 2)
    )


def test_rows_are_learned_under_a_system_prompt_where_one_is_given(tokenizer):
    row = {
        "prompt": "use 6 1 5 make 3 ?",
        "completion": "<answer> 6 </answer>",
        "content": "<answer> 6 </answer>",
    }
    plain = to_sample(row, tokenizer, "keep")
    led = to_sample({**row, "system": "try wait"}, tokenizer, "keep")
    said = tokenizer.decode(led.tokens[: led.start])
    assert said == "<bos> try wait User: use 6 1 5 make 3 ? Assistant:"
    assert tokenizer.decode(plain.tokens[: plain.start]) == "<bos> User: use 6 1 5 make 3 ? Assistant:"
    assert led.tokens[led.start :].tolist() == plain.tokens[plain.start :].tolist()


# ---------------------------------------------------------------- what is refused


def foreign(folder, end: str = "<eos>") -> None:
    """A model of another world, or one that ends its turns otherwise."""
    world = (
        load(folder.parent / "still.yaml")
        .problems["clock"]
        .model_copy(update={"modulus": 3 if end != "<eos>" else 7})
    )
    base = Countdown("clock", world).tokenizer()
    tokenizer = Tokenizer(base.backend, base.template, end, base.pad, base.bos)
    weights.save(
        Decoder(ModelConfig("llama", tokenizer.size, 16, 1, 2, 1, 8, 32, max_positions=128)).initialize(0),
        folder,
        tokenizer,
    )
    tokenizer.save(folder)


@pytest.mark.parametrize(
    "stage, setting, end, said",
    [
        (
            "own",
            "teachers={clock: other, chat: big}",
            "<eos>",
            "the vocabulary of the teacher other differs from the student's in ",
        ),
        (
            "pairs",
            "scored_by=other",
            "<pad>",
            "the teacher other ends its turn with '<pad>', the student with '<eos>'",
        ),
    ],
)
def test_a_teacher_of_another_tongue_is_refused_before_anything_is_learned(
    still, tmp_path, end, said, stage, setting
):
    folder = tmp_path / "other"
    folder.mkdir()
    (tmp_path / "still.yaml").write_text(RECIPE)
    foreign(folder, end)
    run = tiny.open_run(
        tmp_path / "still.yaml",
        still.home,
        f"stages.other={{kind: load, path: {folder}, licence: own}}",
        f"stages.{stage}.{setting}",
    )
    with pytest.raises(LimbeckError, match=said):
        run.execute()
    assert not any(
        read_metrics(p)
        for p in (still.home / "store" / ".partial").glob(
            f"{stored_kind(run.graph.nodes[stage].kind)}-{run.graph.nodes[stage].key[:16]}"
        )
    )


def test_labels_at_another_temperature_are_refused(still):
    run = tiny.open_run(still.recipe, still.home, "stages.offline.temperature=2")
    with pytest.raises(
        LimbeckError, match="temperature is 2, but labels was labelled at 1; give both the same"
    ):
        run.execute()


@pytest.mark.parametrize(
    "setting, said",
    [
        ("stages.own.teachers={clock: big}", "stages.own.teachers has none for chat"),
        (
            "stages.own.teachers={clock: big, chat: big, chta: big}",
            "stages.own.teachers cites chta, which is not under problems; did you mean chat",
        ),
        (
            "stages.own.teachers={clock: outputs, chat: big}",
            "stages.own.teachers.clock needs a model, but outputs is a sample stage",
        ),
        ("stages.offline.rows={outputs: 1}", "stages.offline.rows cites outputs, which nobody has labelled"),
        ("stages.offline.rows={}", "leaves steps that need rows"),
        ("stages.own.problems={}", "needs problems for the student to answer"),
        (
            "stages.preferring.pairs={outputs: 1}",
            "stages.preferring.pairs needs pairs, but outputs is a sample stage",
        ),
        (
            "stages.raised.system={outptus: try}",
            "stages.raised.system cites outptus, which gives it no rows; did you mean outputs",
        ),
        (
            "stages.offline.divergence=text",
            "stages.offline.rows cites labels, labels of tokens, which divergence text cannot use",
        ),
        ("stages.raised.flops_of=own", "are two budgets; give one"),
        ("stages.pairs.scored_by=outputs", "stages.pairs.scored_by needs a model"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, setting, said):
    (tmp_path / "still.yaml").write_text(RECIPE)
    with pytest.raises(LimbeckError, match="still.yaml: ") as error:
        load(tmp_path / "still.yaml", [setting])
    assert said in str(error.value)


# ---------------------------------------------------------------- what it survives


@pytest.mark.parametrize("stage", ["mixed", "preferring", "labels"])
def test_a_stage_killed_at_random_instants_ends_with_the_same_bytes(nursery, still, tmp_path, stage):
    attempt, instants = Attempt(nursery, still, tmp_path, stage), random.Random(stage)
    killed = 0
    for _ in range(2):
        process = attempt.start()
        process.join(instants.uniform(0.02, 0.05 + attempt.seconds))
        killed += process.is_alive()
        process.kill()
        process.join()
    assert killed
    assert attempt.end() == attempt.expected
