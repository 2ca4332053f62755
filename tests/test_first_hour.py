"""The first hour of a new user: problems of his own, too few tokens. He is told at once, the run stops
early, and with the tokens raised it learns."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from studio import NoModels
from tiny import answer, open_run

from limbeck.config.recipe import RL, Files, Miniature, Problems
from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.pipeline import run_state, run_view
from limbeck.pipeline.worker import read_job, run_job, write_job
from limbeck.report import report, sentences
from limbeck.run_log import read_metrics
from limbeck.serve.app import build
from limbeck.train.alarms import AlarmMonitor
from limbeck.types import Completion, Group, Problem, Resumable, Score

RECIPE = """
name: mine
threads: 1
licence: Apache-2.0
problems:
  sums: {source: files, path: problems.jsonl, held_out: 6, answer: final, licence: own}
stages:
  base: {kind: load, path: model}
  zero:
    kind: rl
    model: base
    problems: {sums: 1}
    steps: 5
    steps_without_signal: 3
    policy: {prompts_per_step: 8, group_size: 8}
    sampling: {max_new_tokens: 1}
"""
FINDING = "nearly every response is cut off at max_new_tokens = 1; raise stages.zero.sampling.max_new_tokens"
ALARM = f"no learning signal: {FINDING}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer) -> Path:
    """A recipe, its problems and a model that writes tokens at random and ends now and then."""
    folder = tmp_path_factory.mktemp("hour")
    sizes = ModelConfig("llama", tokenizer.size, 32, 2, 4, 2, 8, 48, max_positions=128)
    decoder = Decoder(sizes).initialize(0)
    with torch.no_grad():
        decoder.head.weight.mul_(12)
        decoder.head.weight[tokenizer.end_id] *= 2.2
    weights.save(decoder, folder / "model", tokenizer)
    pairs = [(a, b) for a in range(1, 7) for b in range(1, 7)]
    rows = [{"question": f"use {a} {b} make {a + b} ?", "answer": f"{b}"} for a, b in pairs]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(RECIPE)
    return folder / "mine.yaml"


@pytest.fixture(scope="module")
def stopped(recipe) -> tuple[int, str, str]:
    """`limbeck run` on that recipe: exit code, output, errors."""
    return answer("run", recipe, "--runs", recipe.parent / "runs")


def carry_out(recipe: Path, *overrides: str) -> tuple[dict, list[str]]:
    """The stage `zero` in this process: the event of its end, and what it told. Its base is done."""
    run = open_run(recipe, recipe.parent / "runs", *overrides)
    node = run.graph.nodes["zero"]
    told: list[str] = []
    event = run_job(read_job(write_job(run._job(node)), threading.Event()), told.append)
    if event["event"] == "done":
        run.store.finish(run.store.partial(node.kind, node.key), run._manifest(node, event["outcome"]))
        run.graph.refresh()
        run._open_folder()
    return event, told


def artifact(recipe: Path, *overrides: str):
    return open_run(recipe, recipe.parent / "runs", *overrides).graph.nodes["zero"].artifact


def studio_page(home: Path, language: str) -> str:
    """The studio's page of the run, in process."""

    async def ask() -> str:
        transport = httpx.ASGITransport(build(home, NoModels()))
        headers = {"accept-language": language}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return (await client.get("/runs/mine", headers=headers)).text

    return asyncio.run(ask())


# ---------------------------------------------------------------- his session


def test_too_few_tokens_are_told_within_two_steps_and_the_run_stops_resumably(recipe, stopped):
    code, _, errors = stopped
    assert code == 75
    told, end = (line for line in errors.splitlines() if "no learning signal" in line)
    outlook = "After 3 such steps the stage stops."
    assert told.startswith(f"zero: {ALARM}. {outlook} One of the responses (ran out of tokens): “")
    assert end == (
        f"limbeck: stage zero: no learning signal in 3 steps: {FINDING}, "
        "or go on from the checkpoint with --set stages.zero.steps_without_signal=0"
    )
    (partial,) = (recipe.parent / "runs" / "store" / ".partial").glob("rl-*/")
    rows = read_metrics(partial)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["alarms"] == [ALARM] for row in rows)


def test_status_and_studio_show_what_stopped_it(recipe, stopped):
    folder = recipe.parent / "runs" / "mine"
    code, out, _ = answer("status", folder)
    assert code == 0
    assert ALARM in out and "One of the responses (ran out of tokens): “" in out
    code, out, _ = answer("watch", folder)
    assert code == 75 and "paused" in out and "no learning signal in 3 steps" in out
    run = run_state.look(folder)
    texts = run_view.narrate(run, run_view.lines(run, alive=False))
    assert any(ALARM in text.en and "请调高 stages.zero.sampling.max_new_tokens" in text.zh for text in texts)
    assert any(text.zh.startswith("其中一个回答（ran out of tokens）：“") for text in texts)


def test_the_same_command_stops_again_at_once_and_more_steps_go_on_from_the_checkpoint(recipe, stopped):
    event, told = carry_out(recipe)
    assert event["event"] == "failed" and event["code"] == 75 and "in 3 steps" in event["message"]
    assert not told
    event, told = carry_out(recipe, "stages.zero.steps_without_signal=4")
    assert event["code"] == 75 and "in 4 steps" in event["message"]
    assert len(told) == 1
    event, _ = carry_out(recipe, "stages.zero.steps_without_signal=0")
    assert event["event"] == "done"
    interrupted = artifact(recipe)
    assert interrupted.manifest["notes"]["weights_changed"] is False
    assert interrupted.manifest["notes"]["alarms"] == {ALARM: 5}

    interrupted.folder.rename(interrupted.folder.with_name(".interrupted"))
    carry_out(recipe, "stages.zero.steps_without_signal=0")
    assert artifact(recipe).digest == interrupted.digest


def test_a_stage_that_saw_nothing_to_learn_to_its_last_step_stops_instead_of_ending(recipe, stopped):
    event, _ = carry_out(recipe, "stages.zero.steps=3", "stages.zero.sampling.temperature=0.9")
    assert (
        event["event"] == "failed"
        and event["code"] == 75
        and "no learning signal in 3 steps" in event["message"]
    )


def test_a_stage_that_changed_no_weight_is_marked_everywhere(recipe, stopped, tmp_path):
    if not artifact(recipe):
        carry_out(recipe, "stages.zero.steps_without_signal=0")
    home = recipe.parent / "runs"
    run = run_state.look(home / "mine")
    line = next(line for line in run_view.lines(run, alive=False) if line.name == "zero")
    assert line.unchanged
    sentence = "zero learned nothing: its weights are those of base, byte for byte."
    assert sentence in [text.en for text in line.said]
    assert sentence in [text.en for text in run_view.narrate(run, run_view.lines(run, alive=False))]
    views = [stage.view for stage in run.stages]
    page = report.write(tmp_path, views, run.recipe.model_dump(mode="json"), {}).read_text()
    for text in (
        sentence,
        "它的权重与 base 逐字节相同",
        "weights unchanged",
        "权重未变",
        "One of the responses",
    ):
        assert text in page
    assert '<small class="wrong">weights unchanged</small>' in studio_page(home, "en")
    assert '<small class="wrong">权重未变</small>' in studio_page(home, "zh")
    assert "weights unchanged" in answer("status", home / "mine")[1]
    assert "weights unchanged" in answer("show", "--runs", home)[1]


def test_with_the_tokens_raised_he_learns(recipe, stopped):
    raised = ("stages.zero.sampling.max_new_tokens=48",)
    event, told = carry_out(recipe, *raised)
    assert event["event"] == "done"
    assert not told
    learned = artifact(recipe, *raised)
    assert learned.manifest["notes"]["weights_changed"] is True
    assert not any(alarm.startswith("no ") for alarm in learned.manifest["notes"]["alarms"])
    rows = read_metrics(learned.folder)
    assert len(rows) == 5 and any(row["gradient_norm"] > 0 for row in rows)


# ---------------------------------------------------------------- what is found

FILES = Files(source="files", path="problems.jsonl")


def group(*responses: tuple[str, str, float], stopped: bool = True) -> Group:
    """A group of responses to one problem, each with its text, its answer and its accuracy."""
    tokens = np.zeros(2, int)
    completions = [
        Completion(tokens, np.zeros(2), text, stopped, sample)
        for sample, (text, _, _) in enumerate(responses)
    ]
    scores = [Score({"accuracy": right}, answer=found) for _, found, right in responses]
    rewards = tuple(right for _, _, right in responses)
    return Group(Problem("sums/1", "2 + 2 ?"), tokens, tuple(completions), tuple(scores), rewards)


def monitor(source: Problems = FILES, **settings) -> AlarmMonitor:
    stage = RL(kind="rl", model="base", problems={"sums": 1}, **settings)
    return AlarmMonitor(stage, "zero", {"sums": source})


METRICS = {"truncated": 0.0, "informative": 1.0, "length": 9.0, "accuracy": 0.5}
WRONG = group(("five", "5", 0.0), ("six", "6", 0.0))
RIGHT = group(("four", "4", 1.0), ("it is four", "4", 1.0))
MIXED = group(("four", "4", 1.0), ("six", "6", 0.0))
SPEECHLESS = group(("well", "", 0.0), ("hm", "", 0.0))
CASES = {
    "cut off": ([group(("a", "", 0.0), ("b", "", 1.0), stopped=False)], "sampling.max_new_tokens"),
    "where the verifier looks": ([SPEECHLESS], "problems.sums.template, or set problems.sums.answer"),
    "same text": ([group(("five", "5", 0.0), ("five", "5", 0.0))], "stages.zero.sampling.temperature"),
    "is wrong": ([WRONG], "a screen stage in stages.zero.problems"),
    "is right": ([RIGHT], "harder problems"),
    "equal rewards": ([WRONG, RIGHT], "stages.zero.policy.group_size or stages.zero.sampling.temperature"),
}


@pytest.mark.parametrize("seen", CASES)
def test_each_cause_is_found_within_two_steps_and_told_with_its_key_in_both_languages(seen):
    groups, key = CASES[seen]
    watch = monitor()
    alarms = watch.check(dict(METRICS), groups) or watch.check(dict(METRICS), groups)
    assert len(alarms) == 1
    assert alarms[0].startswith("no learning signal: ") and seen in alarms[0] and key in alarms[0]
    said = sentences.alarm(alarms[0])
    assert re.search(r"[\u4e00-\u9fff]", said.zh) and not re.search(r"[a-z]{3} [a-z]{3}", said.zh)


def test_a_form_that_no_prompt_asks_for_is_to_be_taught():
    (alarm,) = monitor(Miniature(source="miniature")).check(dict(METRICS), [SPEECHLESS])
    assert "teach base that form first, with an sft stage" in alarm
    assert sentences.alarm(alarm).zh.endswith("请先用 sft 阶段教会 base 这种形式")


def test_a_stage_that_learned_once_is_never_stopped():
    watch = monitor(steps_without_signal=2)
    watch.check(dict(METRICS), [WRONG])
    assert watch.check(dict(METRICS), [MIXED]) == []
    for _ in range(5):
        watch.check(dict(METRICS), [WRONG])
    assert watch.without_signal is None
    watch.refuse_hopeless()


def test_a_signal_from_other_parts_than_accuracy_does_not_hide_that_no_answer_is_found():
    lengths = group(("well", "", 0.0), ("hm", "", 0.0))
    lengths = Group(lengths.problem, lengths.prompt_tokens, lengths.completions, lengths.scores, (0.1, 0.2))
    (alarm,) = monitor().check(dict(METRICS), [lengths])
    assert alarm.startswith("no answer: no response has an answer")


def test_the_count_survives_a_checkpoint_and_an_older_checkpoint_stops_nothing():
    watch = monitor(steps_without_signal=2)
    watch.check(dict(METRICS), [WRONG])
    again = monitor(steps_without_signal=2)
    again.load_state_dict(watch.state_dict())
    again.check(dict(METRICS), [WRONG])
    with pytest.raises(Resumable, match="in 2 steps: every response is wrong"):
        again.refuse_hopeless()
    older = monitor(steps_without_signal=2)
    older.load_state_dict({"watched": []})
    for _ in range(3):
        older.check(dict(METRICS), [WRONG])
    older.refuse_hopeless()
