"""Opinions in a recipe: judges that were calibrated, reward models that learned, and the alarm that watches
both."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from judges import Programmed, choosing, longer, material, truth
from stub import Stub, completion
from tiny import answer
from trainers import train_grpo

from limbeck.config.learned_rewards import Calibrate, LearnedReward
from limbeck.config.load import load
from limbeck.config.parts import Optimizer, Policy, Sampling
from limbeck.config.recipe import RL
from limbeck.engine.rollout import Engine
from limbeck.engine.sampling import SamplingParams
from limbeck.model import weights
from limbeck.model.kv_cache import Packed
from limbeck.pipeline.graph import resolve_paths
from limbeck.pipeline.job import Job
from limbeck.pipeline.stages import calibrate
from limbeck.pipeline.stages.rewards import judge_of, reward_model_of
from limbeck.run_log import RunLog, read_metrics
from limbeck.tasks.mixture import Mixture
from limbeck.train.batch import pack
from limbeck.train.checkpoint import Checkpoint
from limbeck.train.learned_rewards import LearnedRewards, hacked, trend
from limbeck.train.learner import Learner
from limbeck.train.pairs import plan_by_count
from limbeck.train.reward_model import BradleyTerry, RewardModelLearner, RewardModelScorer, split, to_sample
from limbeck.train.sft import SFTTrainer
from limbeck.types import Completion, Group, LimbeckError, Problem, Resumable, Sample, Score, generator

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------- the reward model


def test_bradley_terry_by_hand(decoder, tokenizer):
    """-log sigmoid(gap), the mean over pairs, however they are packed and cut."""
    said = (
        ("5 5 5", "6"),
        ("4 4", "3 1 2 2"),
        ("2", "6"),
    )  # the worse halves of the first and the third are one text
    pairs = [tuple(to_sample(tokenizer, "say 4 ?", text) for text in pair) for pair in said]
    lengths = [sum(len(half.tokens) for half in pair) for pair in pairs]
    learner = RewardModelLearner(decoder(), Optimizer(), 1)
    torch.nn.init.normal_(learner.model.value.weight)
    better, worse = (learner.values([pair[half] for pair in pairs]) for half in (0, 1))
    expected = np.mean(np.log1p(np.exp(-(better - worse))))
    for micro, pieces in ((1, 3), (lengths[1] + lengths[2], 2), (1 << 20, 1)):
        batches = pack(numbered(pairs), micro)
        assert len(batches) == pieces
        parts = [BradleyTerry()(learner.forward(batch)[0], batch) for batch in batches]
        assert float(sum(loss.detach() for loss, _ in parts)) == pytest.approx(expected, rel=1e-5)
        assert float(sum(m["accuracy"] for _, m in parts)) == pytest.approx(np.mean(better > worse))


def test_a_value_is_read_at_the_end_of_the_turn_and_alone(decoder, tokenizer):
    """By hand from the hidden states of the sequence alone; company in the batch changes nothing."""
    learner = RewardModelLearner(decoder(torch.float64), Optimizer(), 1)
    learner.model.value.double()
    torch.nn.init.normal_(learner.model.value.weight)
    samples = [
        to_sample(tokenizer, "say 4 2 6 ?", text)
        for text in ("<answer> 4 2 6 </answer>", "4", "<think>try 4</think> 5 5")
    ]
    for sample, value in zip(samples, learner.values(samples), strict=True):
        assert sample.tokens[-2] == tokenizer.end_id
        with torch.no_grad():
            hidden = learner.model(torch.from_numpy(sample.tokens[:-1]), Packed([len(sample.tokens) - 1]))
        assert value == pytest.approx(float(learner.model.value(hidden[-1]).detach()), rel=1e-5)


def test_only_the_final_answer_is_read(tokenizer):
    short, long = (to_sample(tokenizer, "say 4 ?", text) for text in ("4", "<think>try 5 no wait 4</think>4"))
    assert (short.tokens == long.tokens).all()


def planted(tokenizer, count: int, seed: object) -> list[tuple[Sample, Sample]]:
    """The answer with the larger first number is preferred: an order that is nowhere in the text."""
    dice, pairs = generator(seed), []
    while len(pairs) < count:
        a, b = dice.integers(1, 7, 3), dice.integers(1, 7, 3)
        if a[0] != b[0]:
            high, low = (a, b) if a[0] > b[0] else (b, a)
            question = f"say {' '.join(map(str, dice.integers(1, 7, 3)))} ?"
            pairs.append(
                tuple(
                    to_sample(tokenizer, question, f"<answer> {' '.join(map(str, x))} </answer>")
                    for x in (high, low)
                )
            )
    return pairs


def numbered(pairs: list[tuple[Sample, Sample]]) -> list[Sample]:
    """The halves side by side, each with the number of its pair."""
    return [
        replace(half, pair=sign * number)
        for number, pair in enumerate(pairs, start=1)
        for half, sign in zip(pair, (1, -1), strict=True)
    ]


def learn(learner, pairs, plan, micro: int, log_every: int, log: RunLog, checkpoint: Checkpoint) -> None:
    unlogged = frozenset(["entropy"])
    trainer = SFTTrainer(learner, numbered(pairs), plan, micro, log_every, BradleyTerry(), unlogged)
    trainer.train(log, checkpoint)


def test_it_learns_a_planted_preference(decoder, tokenizer, tmp_path):
    learned, kept = planted(tokenizer, 600, "learned"), planted(tokenizer, 200, "kept")
    plan = plan_by_count(600, 4, 32, "plan")
    learner = RewardModelLearner(
        decoder(), Optimizer(learning_rate=3e-3, warmup_steps=5, schedule="linear"), len(plan)
    )
    before = np.mean(learner.values([p[0] for p in kept]) > learner.values([p[1] for p in kept]))
    learn(learner, learned, plan, 4096, 10, RunLog(tmp_path), Checkpoint(tmp_path))
    accuracy = np.mean(learner.values([p[0] for p in kept]) > learner.values([p[1] for p in kept]))
    assert before == 0 and accuracy > 0.9, accuracy  # it begins with one value for all
    history = read_metrics(tmp_path)
    assert (
        history[0]["loss"] == pytest.approx(np.log(2), rel=1e-3)
        and history[-1]["loss"] < 0.4
        and "entropy" not in history[0]
    )


def test_killed_and_resumed_it_learns_the_same(decoder, tokenizer, tmp_path):
    pairs, plan, ended = planted(tokenizer, 40, "learned"), plan_by_count(40, 2, 8, "plan"), []
    for stops in ((), (3, 6)):
        folder = tmp_path / str(len(stops))
        folder.mkdir()
        for stop in (*stops, None):
            learner, checkpoint = (
                RewardModelLearner(decoder(), Optimizer(), len(plan)),
                Checkpoint(folder, 0.0),
            )
            if state := checkpoint.restore():
                learner.load_state_dict(state["learner"])
            if stop:
                checkpoint.stopping = lambda learner=learner, stop=stop: learner.step >= stop
            record = RunLog(folder, learner.step)
            with pytest.raises(Resumable) if stop else nullcontext():
                learn(learner, pairs, plan, 64, 1, record, checkpoint)
        ended.append((learner.values([p[0] for p in pairs]).tolist(), read_metrics(folder)))
    assert ended[0] == ended[1] and len(ended[0][1]) == 10


def test_its_opinion_is_a_chance_and_of_nothing_it_thinks_nothing(decoder, tokenizer):
    learner = RewardModelLearner(decoder(), Optimizer(), 1)
    torch.nn.init.normal_(learner.model.value.weight)
    texts = ["<think>try</think>4", "<think>endless", "5"]
    none = np.zeros(0)
    group = Group(
        Problem("chat/1", "say 4 ?"),
        none,
        tuple(Completion(none, none, t, True, i) for i, t in enumerate(texts)),
    )
    value = learner.values([to_sample(tokenizer, "say 4 ?", "4")])[0]
    weight = learner.model.value.weight.detach().clone()
    model = RewardModelScorer(learner.model, weight, tokenizer, centre=float(value))
    scores = model.score_groups([group, group])
    assert scores[0] == scores[1] and scores[0][0].parts["preference"] == pytest.approx(0.5)
    assert scores[0][1] == Score({"preference": 0.0}, {"preference": "no final answer"})
    assert model.take_usage()["preference_tokens"] > 0 == model.take_usage()["preference_tokens"]


def test_a_question_is_learned_or_held_out_and_never_both():
    rows = [{"prompt": f"p{i % 40}"} for i in range(200)]
    learned, kept = split(rows, 0.25, "s")
    assert len(kept) == 50 and not {r["prompt"] for r in learned} & {r["prompt"] for r in kept}


def test_plans_of_pairs():
    plan = plan_by_count(10, 1.5, 4, "s")
    assert [len(batch) for batch in plan] == [8, 8, 4, 8, 2]
    assert sorted([i for batch in plan for i in batch][:20]) == list(range(20))


# ---------------------------------------------------------------- the alarm


def run_of(kind: str, seed: int, steps: int = 60, held: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """An opinion and the truth, step by step, with the noise that so many samples have."""
    dice, way = generator("alarm", kind, seed), np.arange(steps) / steps
    opinion, truth = {
        "hacked": (0.4 + 0.4 * way, 0.5 + 0 * way),
        "harmful": (0.4 + 0.4 * way, 0.6 - 0.3 * way),
        "honest": (0.4 + 0.3 * way, 0.4 + 0.3 * way),
        "slow": (0.45 + 0.15 * way, 0.45 + 0.15 * way),
        "still": (0.5 + 0 * way, 0.5 + 0 * way),
        "perfect": (0.4 + 0.4 * way, 0.99 + 0 * way),
    }[kind]
    return opinion + dice.normal(0, 0.08, steps), dice.binomial(held, truth) / held


def rings(kind: str, seed: int, window: int = 30) -> bool:
    opinion, truth = run_of(kind, seed)
    return any(
        hacked(opinion[i : i + window], truth[i : i + window]) for i in range(len(opinion) - window + 1)
    )


@pytest.mark.parametrize(
    "kind, low, high",
    [
        ("hacked", 0.85, 1),
        ("harmful", 0.95, 1),
        ("honest", 0, 0.12),
        ("slow", 0, 0.12),
        ("still", 0, 0.12),
        ("perfect", 0, 0.15),
    ],
)
def test_the_alarm_rings_on_hacks_and_is_silent_on_honest_progress(kind, low, high):
    assert low <= np.mean([rings(kind, seed) for seed in range(50)]) <= high


def test_a_trend_is_the_t_value_of_a_regression():
    values = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.7])
    design = np.stack([np.ones(6), np.arange(6)], 1)
    fitted, rest, *_ = np.linalg.lstsq(design, values, rcond=None)
    error = np.sqrt(rest[0] / 4 * np.linalg.inv(design.T @ design)[1, 1])
    assert trend(values) == pytest.approx(fitted[1] / error)


class Flatterer:
    """A voice that likes a token ever more as time goes by: a reward that is easily pleased, and rises."""

    def __init__(self):
        self.calls = 0

    def score_groups(self, groups):
        self.calls += 1
        rise = 0.2 + 0.01 * self.calls
        return [
            [Score({"preference": rise + 0.1 * (i % 2)}) for i in range(len(g.completions))] for g in groups
        ]

    def take_usage(self):
        return {"preference_tokens": 1, "preference_flops": 1e6}


def stage(**changes) -> RL:
    settings = {
        "kind": "rl",
        "model": "base",
        "problems": {"clock": 1},
        "steps": 24,
        "rewards": {"accuracy": 1, "preference": 0.5},
        "learned_rewards": {"preference": {"of": "helpful", "window": 8, "held_out": 16}},
        "sampling": Sampling(max_new_tokens=8),
        "policy": Policy(prompts_per_step=2, group_size=2, zero_variance="keep", mask_truncated=False),
        "log_every": 1,
    }
    return RL(**{**settings, **changes})


@pytest.fixture
def reinforced(decoder, tokenizer, clock, tmp_path):
    """`reinforced(stage, voice)`: the metrics of a short RL run with one voice."""

    def run(settings: RL, voice, steps: int | None = None) -> list[dict]:
        tasks = Mixture({"clock": clock}, {"clock": 1}, settings.rewards)
        learner = Learner(decoder(), settings.optimizer, settings.steps)
        params = SamplingParams(max_new_tokens=8)
        rewards = LearnedRewards(settings, {"preference": voice}, tasks, params, "s")
        checkpoint = Checkpoint(tmp_path, 0.0)
        if steps:
            checkpoint.stopping = lambda: len(read_metrics(tmp_path)) >= steps
        train_grpo(tmp_path, learner, Engine(learner.model, tokenizer), rewards, checkpoint)
        return read_metrics(tmp_path)

    return run


def test_a_hacked_opinion_is_told_of_and_no_longer_counts(reinforced):
    history = reinforced(stage(), Flatterer())
    (rang,) = [row["step"] for row in history if "reward hacking: preference rises" in str(row.get("alarms"))]
    assert rang >= 7 and len(history) == 24
    assert all(("preference" in row) == (row["step"] <= rang) for row in history)
    assert all(("held_out_accuracy" in row) == (row["step"] <= rang) for row in history)
    assert history[0]["flops"] > 1e6


def test_a_hacked_opinion_ends_the_stage_where_that_is_wanted(reinforced):
    history = reinforced(
        stage(
            learned_rewards={"preference": {"of": "helpful", "window": 8, "held_out": 16, "on_alarm": "stop"}}
        ),
        Flatterer(),
    )
    assert "the stage ends here" in str(history[-1]["alarms"]) and len(history) < 24


def test_an_opinion_counts_in_the_last_steps_and_for_its_problems_only(reinforced):
    history = reinforced(
        stage(
            steps=12,
            learned_rewards={"preference": {"of": "helpful", "window": 8, "last_steps": 9, "held_out": 4}},
        ),
        Flatterer(),
    )
    assert [row["step"] for row in history if "preference" in row] == list(
        range(3, 3 + sum("preference" in row for row in history))
    )
    assert "preference" not in history[2] and "preference" in history[3]


def test_what_it_adds_is_its_worth_and_other_problems_get_none(clock):
    tasks = Mixture({"clock": clock}, {"clock": 1}, {"accuracy": 1.0, "preference": 0.5})
    problem = clock.problems("train")[0]
    none = np.zeros(0)
    group = Group(
        problem, none, tuple(Completion(none, none, text, True, i) for i, text in enumerate(("x", "y")))
    )
    for names, expected in (([], [0.105, 0.155]), (["chat"], [0.0, 0.0]), (["clock"], [0.105, 0.155])):
        settings = stage(
            learned_rewards={"preference": LearnedReward(of="helpful", problems=names, window=8, held_out=4)}
        )
        panel = LearnedRewards(settings, {"preference": Flatterer()}, tasks, None, "s")
        assert panel.at(0).score(group).rewards == pytest.approx(expected)


def test_held_out_problems_are_never_learned_from(clock):
    tasks = Mixture({"clock": clock}, {"clock": 1}, {"accuracy": 1.0})
    panel = LearnedRewards(stage(), {"preference": Flatterer()}, tasks, None, "s")
    drawn = {p.id for step in range(20) for p in panel.at(step).draw(64, ("s", step))}
    assert len(panel.held_out) == 16 and not drawn & panel.held_out_ids
    everything = Mixture({"clock": clock}, {"clock": 1}, {}, {"clock": clock.problems("train")[:4]})
    with pytest.raises(LimbeckError, match="held_out leaves no problem"):
        LearnedRewards(stage(), {"preference": Flatterer()}, everything, None, "s").at(0).draw(1, "s")


def test_killed_and_resumed_the_alarm_remembers(reinforced, tmp_path):
    """A voice without memory, so that two halves can be compared with one whole."""

    class Steady(Flatterer):
        def score_groups(self, groups):
            return [[Score({"preference": 0.1 * (len(c.text) % 7)}) for c in g.completions] for g in groups]

    whole = reinforced(stage(steps=10), Steady())
    (tmp_path / "state.pt").unlink()
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    with pytest.raises(Resumable):
        reinforced(stage(steps=10), Steady(), steps=5)
    assert len(read_metrics(tmp_path)) == 5
    assert reinforced(stage(steps=10), Steady()) == whole


# ---------------------------------------------------------------- as stages

RECIPE = """
name: opinions
threads: 1
problems:
  clock: &clock {{source: miniature, modulus: 3, numbers: 2, largest: 3}}
  chat: {{<<: *clock, task: repeat}}
stages:
  wise: {{kind: remote, url: {url}, model: wise, licence: MIT, max_concurrency: 8}}
  base: {{kind: load, path: model, licence: own}}
  checked: {{kind: calibrate, judge: wise, rows: labels.jsonl, pairs: 40, judging: {{reference: false}}}}
  zero:
    kind: rl
    model: base
    problems: {{clock: 0.5, chat: 0.5}}
    rewards: {{accuracy: 1, judge: 0.5}}
    learned_rewards: {{judge: {{of: checked, problems: [chat], last_steps: 8, window: 8, held_out: 4}}}}
    steps: 9
    policy: {{prompts_per_step: 4, group_size: 2, zero_variance: keep, mask_truncated: false}}
    sampling: {{max_new_tokens: 12}}
  kept: {{kind: sample, model: base, problems: {{chat: 1}}, prompts: 8, samples: 2,
         correct: false, wellformed: false, judge: checked, sampling: {{max_new_tokens: 12}}}}
  helpful: {{kind: reward, model: base, rows: labels.jsonl, licence: own, held_out: 0.4, epochs: 6,
            batch_pairs: 8, optimizer: {{learning_rate: 5.0e-3}}, save_every: 0.01}}
"""


@pytest.fixture
def learned_recipe(tmp_path, decoder, tokenizer):
    """`learned_recipe(stub)`: a recipe whose judge is a stub, and sixty labelled rows: the better answer
    repeats the question."""

    def write(stub: Stub) -> Path:
        weights.save(decoder(), tmp_path / "model", tokenizer)
        (tmp_path / "opinions.yaml").write_text(RECIPE.format(url=stub.url))
        dice, rows = generator("labels"), []
        for _ in range(60):
            a, b = (" ".join(map(str, dice.integers(1, 4, 3))) for _ in range(2))
            rows.append(
                {
                    "prompt": f"say {a} ?",
                    "chosen": f"<think>try</think><answer> {a} </answer>",
                    "rejected": f"<answer> {b} </answer>",
                }
            )
        rows = [row for row in rows if row["prompt"][4:-2] not in row["rejected"]]
        (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "opinions.yaml"

    return write


def checking(body: dict, n: int):
    """A judge that looks whether the response says what was asked."""
    given = material(body["messages"][0]["content"])
    right = [f"<answer> {given['question'][4:-2]} </answer>" in given[f"response {name}"] for name in "AB"]
    return (
        200,
        {},
        completion(f"verdict: {'A' if right[0] > right[1] else 'B' if right[1] > right[0] else 'tie'}"),
    )


def test_a_calibrated_judge_rewards_and_a_reward_model_learns(learned_recipe, tmp_path):
    with Stub(checking) as stub:
        code, _, err = answer("run", learned_recipe(stub), "--runs", tmp_path / "runs")
        assert code == 0, err
        asked = len(stub.asked)
    (calibration,) = tmp_path.glob("runs/store/calibrate-*/calibration.json")
    told = json.loads(calibration.read_text())
    assert told["passed"] and told["agreement"]["mean"] == 1 and told["pairs"] == 40 and asked > 200
    manifests = {
        m["stage"]: m
        for m in map(json.loads, (p.read_text() for p in tmp_path.glob("runs/store/*/manifest.json")))
    }
    assert manifests["checked"]["notes"]["judge_prompt_tokens"] > 0 and "MIT" in manifests["zero"]["licences"]
    (folder, *_) = tmp_path.glob("runs/store/rl-*")
    history = read_metrics(folder)
    assert "judge" not in history[0] and any(row.get("judge_tokens", 0) > 0 for row in history[1:])
    (kept,) = tmp_path.glob("runs/store/sample-*/metrics.jsonl")
    assert "judge_tokens" in json.loads(kept.read_text().splitlines()[0])
    (helpful,) = tmp_path.glob("runs/store/reward-*")
    assert json.loads((helpful / "reward.json").read_text())["accuracy"]["n"] >= 20
    assert (helpful / "value.safetensors").exists() and (helpful / "model" / "config.json").exists()


def job(recipe: Path, name: str, stub: Stub, **inputs: Path) -> Job:
    """One stage of the recipe, as a worker would get it."""
    folder = recipe.parent / "store" / "partial" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"digest": "d"}))
    stages = resolve_paths(load(recipe), recipe.parent).stages
    return Job(name, stages[name], f"0/{name}", inputs, {}, folder, endpoints={"wise": stages["wise"]})


def test_a_judge_that_fails_is_refused_as_a_reward_with_its_numbers(learned_recipe):
    with Stub(lambda body, n: (200, {}, completion("verdict: A"))) as stub:
        recipe = learned_recipe(stub)
        wise = job(recipe, "wise", stub)
        checked = job(recipe, "checked", stub, wise=wise.folder)
        outcome = calibrate.run(checked)
        assert not outcome["notes"]["passed"]
        with pytest.raises(LimbeckError) as error:
            judge_of(job(recipe, "zero", stub, wise=wise.folder, checked=checked.folder), "checked")
    assert str(error.value).startswith(
        "stages.zero: the judge wise is refused as a reward by checked: "
        "position bias +1.00 (it favours the first), above 0.2; "
    )
    assert "agreement 0.00" in str(error.value) and str(error.value).endswith(
        "ask it otherwise (stages.checked.judging)"
    )


@dataclass(frozen=True)
class Staged(Job):
    """A job whose models are programmes."""

    cast: dict[str, Programmed] = field(default_factory=dict)

    def sampler(self, name: str, speculate: bool = False) -> Programmed:
        return self.cast[name]


@pytest.mark.parametrize("reply, passed", [("truth", True), ("longer", False)])
def test_without_labels_the_truth_of_the_checker_is_the_label(clock, decoder, tmp_path, reply, passed):
    """In the miniature: a student that guesses, judged by whoever checks, or by whoever likes length."""
    dice = generator("student")

    def guess(prompt: str) -> str:
        numbers = list(map(str, dice.permutation(re.findall(r"\d+", prompt)[:3])))
        return f"<think>try</think><answer> {numbers[0]} +{numbers[1]} *{numbers[2]} </answer>"

    class Student(Programmed):
        def rollout(self, problems, group_size, sampling, seed):
            none = np.zeros(5)
            return [
                Group(
                    p,
                    none,
                    tuple(Completion(none, none, guess(p.prompt), True, i) for i in range(group_size)),
                )
                for p in problems
            ]

    student = Student(None)
    student.model = SimpleNamespace(config=decoder().config)
    cast = {"wise": Programmed({"truth": choosing(truth(clock)), "longer": longer}[reply]), "base": student}
    stage = Calibrate(
        kind="calibrate", judge="wise", model="base", problems={"clock": 1.0}, samples=12, pairs=60
    )
    (tmp_path / "manifest.json").write_text('{"digest": "d"}')
    job = Staged(
        "checked", stage, "0/checked", {"wise": tmp_path}, {"clock": clock.settings}, tmp_path, cast=cast
    )
    outcome = calibrate.run(job)
    told = json.loads((tmp_path / "calibration.json").read_text())
    assert told["passed"] is outcome["notes"]["passed"] is passed and told["pairs"] == 60
    assert outcome["flops"] > 0 and outcome["tokens"] > 60 * 12 * 5 - 1
    if not passed:
        assert any("length bias +1.00" in text for text in told["refusals"])


def test_a_reward_model_that_learned_nothing_is_refused(learned_recipe):
    with Stub() as stub:
        zero = job(learned_recipe(stub), "zero", stub, helpful=Path("/nowhere"))
    folder = zero.folder
    (folder / "reward.json").write_text(
        json.dumps({"accuracy": {"mean": 0.55, "low": 0.41, "high": 0.68, "n": 40}, "centre": 0.0})
    )
    with pytest.raises(
        LimbeckError,
        match=r"helpful is refused: on 40 held-out pairs it is right in 55% \[41%, 68%\], "
        "no better than chance",
    ):
        reward_model_of(replace(zero, inputs={"helpful": folder}), "helpful")


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            "stages.zero.learned_rewards=null",
            (
                "stages.zero.rewards.judge is an opinion: name its calibrate stage in "
                "stages.zero.learned_rewards.judge.of"
            ),
        ),
        (
            "stages.zero.learned_rewards.judge.of=wise",
            "stages.zero.learned_rewards.judge.of needs a calibration of the judge, but wise is remote",
        ),
        (
            "stages.zero.learned_rewards.judge.of=base",
            "stages.zero.learned_rewards.judge.of needs a calibration of the judge, but base is a load stage",
        ),
        (
            "stages.zero.rewards={accuracy: 1}",
            (
                "stages.zero.learned_rewards.judge earns nothing; say what it is worth in "
                "stages.zero.rewards.judge"
            ),
        ),
        (
            "stages.zero.learned_rewards.judge.problems=[chad]",
            (
                "stages.zero.learned_rewards.judge.problems cites chad, of which the stage has none; "
                "did you mean chat?"
            ),
        ),
        (
            "stages.zero.learned_rewards.judge.window=9",
            "stages.zero.learned_rewards.judge.window = 9 is longer than the 8 steps in which judge counts",
        ),
        (
            "stages.kept.judge=helpful",
            "stages.kept.judge needs a calibration of the judge, but helpful is a reward stage",
        ),
        (
            "stages.helpful.rows=kept",
            "stages.helpful.rows needs rows of preferences, but kept is a sample stage",
        ),
        ("stages.checked.model=base", "labels come from rows, or from model and problems together"),
        ("stages.checked.judging.votes=3", "are the same vote"),
    ],
)
def test_an_opinion_that_cannot_be_had_is_said_before_anything_runs(learned_recipe, settings, sentence):
    with Stub() as stub:
        recipe = learned_recipe(stub)
    with pytest.raises(LimbeckError) as error:
        load(recipe, [settings])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, sentence",
    [
        (
            '{"prompt": "x", "chosen": "y"}',
            (
                "labels.jsonl, line 1: rejected is missing or no text; "
                "rows of preferences have prompt, chosen and rejected"
            ),
        ),
        (
            '{"prompt": "x", "chosen": "y", "rejected": "z"}',
            "1 labelled pairs are too few to measure a judge by (20 at least); label more rows",
        ),
    ],
)
def test_labels_that_will_not_do(learned_recipe, tmp_path, line, sentence):
    with Stub(checking) as stub:
        recipe = learned_recipe(stub)
        (tmp_path / "labels.jsonl").write_text(line + "\n")
        with pytest.raises(LimbeckError, match=re.escape(sentence)):
            calibrate.run(job(recipe, "checked", stub))
    assert not stub.asked
