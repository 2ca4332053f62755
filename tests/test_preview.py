"""Previews: what `limbeck try` and the beginning of a stage show, and that they change nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
import tiny
from markupsafe import escape
from stub import Stub, completion
from studio import NoModels

from limbeck.config.load import load
from limbeck.model import weights
from limbeck.pipeline import preview
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Store
from limbeck.report.preview import remedies, summary
from limbeck.serve.app import build
from limbeck.types import LimbeckError

RECIPE = """
name: own
licence: own
threads: 1
problems:
  own: {source: files, path: own.jsonl, held_out: 5, licence: own, template: 'use 2 {problem}', answer: final,
        system: say 1}
stages:
  base: {kind: load, path: model}
  fresh: {kind: pretrain, problems: clock, tokens: 1000}
  zero: {kind: rl, model: base, problems: {own: 1}, steps: 2, sampling: {max_new_tokens: 20},
         policy: {prompts_per_step: 2, group_size: 2}}
  chosen: {kind: screen, model: zero, problems: {own: 1}, sampling: {max_new_tokens: 20}}
  traces: {kind: sample, model: zero, problems: {chosen: 1}, prompts: 8, samples: 2, correct: false,
           wellformed: false, sampling: {max_new_tokens: 20}}
  later: {kind: rl, model: fresh, problems: {clock: 1}}
  evaluation: {kind: evaluate, models: [base, zero], problems: [own], max_new_tokens: 24}
"""
CLOCK = "  clock: {source: miniature, modulus: 3}\n"


@pytest.fixture
def recipe(tmp_path, decoder, tokenizer) -> Path:
    """A recipe beside a model and problems; only `fresh` needs a model that is not there."""
    weights.save(decoder(), tmp_path / "model", tokenizer)
    tokenizer.save(tmp_path / "model")
    rows = [{"question": f"say {i} ?", "answer": str(i)} for i in range(1, 30)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "own.yaml"
    path.write_text(RECIPE.replace("stages:", f"{CLOCK}stages:", 1))
    return path


def graph_of(recipe: Path, *overrides: str) -> Graph:
    return Graph(load(recipe, overrides), Store(recipe.parent / "runs" / "store"), recipe.parent)


def tried(recipe: Path, stage: str, *overrides: str) -> dict:
    graph = graph_of(recipe, *overrides)
    (node,) = preview.nodes_to_try(graph, stage)
    return preview.try_node(graph, node, recipe.parent / "scratch", 4, 3)


# ---------------------------------------------------------------- what is shown


def test_a_preview_shows_what_the_model_sees_and_what_it_is_worth(recipe):
    found = tried(recipe, "zero")
    assert found == tried(recipe, "zero")  # the seed decides
    assert found["model"] == "base" and "wanted" not in found
    assert len(found["prompts"]) == 4 and found["summary"]["answers"] == 12
    for prompt in found["prompts"]:
        assert prompt["prompt"] == f"<bos>say 1 User:use 2 say {prompt['gold']} ?Assistant:"
        assert prompt["problem"].startswith("own/") and prompt["prompt_tokens"] == 10
        for answer in prompt["answers"]:
            assert answer["tokens"] <= found["sampling"]["max_new_tokens"] == 20
            assert answer["right"] or answer["reason"]
            assert answer["stopped"] or answer["tokens"] == 20
    assert not (recipe.parent / "runs").exists()


def test_a_preview_on_a_device_is_that_of_the_cpu(recipe, call):
    found, same = (
        json.loads(call("try", recipe, "--stage", "zero", "--device", device, "--json").out)
        for device in ("cpu", "plain")
    )
    assert found == same and found["data"]["previews"][0]["prompts"]
    ended = call("try", recipe, "--device", "gpu")
    assert ended.code == 2 and "--device gpu: not a device" in ended.err


def test_a_missing_model_has_the_one_that_it_is_trained_from_in_its_place(recipe):
    found = tried(recipe, "traces")
    assert (found["model"], found["wanted"]) == ("base", "zero")
    assert {prompt["problem"].split("/")[0] for prompt in found["prompts"]} == {"own"}


def test_an_evaluation_is_tried_by_name_on_its_test_problems(recipe):
    graph = graph_of(recipe)
    nodes = preview.nodes_to_try(graph, "evaluation")
    assert [node.name for node in nodes] == ["evaluation/base", "evaluation/zero"]
    found = preview.try_node(graph, nodes[0], recipe.parent / "scratch", 5, 1)
    held_out = {problem.id for problem in preview._job(graph, nodes[0], {}).task("own").problems("test")}
    assert {prompt["problem"] for prompt in found["prompts"]} == held_out
    assert found["summary"]["differing"] is None


def test_stages_that_learn_or_collect_are_tried_unless_one_is_named(recipe):
    graph = graph_of(recipe)
    assert [node.name for node in preview.nodes_to_try(graph)] == ["zero", "chosen", "traces", "later"]
    (later,) = preview.nodes_to_try(graph, "later")
    assert preview.try_node(graph, later, recipe.parent / "scratch", 1, 1) is None


@pytest.mark.parametrize("stage", ["zeroo", "base"])
def test_a_stage_that_does_not_sample_is_refused_with_those_that_do(recipe, stage):
    with pytest.raises(LimbeckError, match=f"--stage {stage}: .*these do: zero, chosen, traces, later"):
        preview.nodes_to_try(graph_of(recipe), stage)


def test_greedy_answers_are_not_repeated(recipe):
    found = tried(recipe, "zero", "stages.zero.sampling.temperature=0")
    assert found["summary"]["answers"] == 4
    assert any("temperature 0" in text.en for text in remedies(found))


def test_a_remote_model_is_tried_by_name_and_gets_the_system_prompt(recipe):
    with Stub(lambda body, n: (200, {}, completion("so it is 4"))) as stub:
        recipe.write_text(
            recipe.read_text()
            + f"  far: {{kind: remote, url: '{stub.url}', model: wise, licence: own}}\n"
            + "  asked: {kind: sample, model: far, problems: {own: 1}, prompts: 4, samples: 1}\n"
        )
        found = tried(recipe, "asked")
        assert "asked" not in [node.name for node in preview.nodes_to_try(graph_of(recipe))]
    assert all(body["messages"][0] == {"role": "system", "content": "say 1"} for body in stub.asked)
    assert found["prompts"][0]["prompt"].startswith("system: say 1\n\nuser: use 2 say ")
    assert found["summary"]["extracted"] == found["summary"]["answers"] == 12


# ---------------------------------------------------------------- what it says


def counted(kind: str = "rl", temperature: float = 1.0, **counts: int | None) -> dict:
    summary = {"answers": 16, "cut": 0, "extracted": 16, "right": 8, "problems": 8, "differing": 4, **counts}
    answer = {"stopped": True, "reason": "no box"}
    return {
        "stage": "zero",
        "kind": kind,
        "sampling": {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 32},
        "prompts": [{"problem": "own/1", "answers": [answer]}],
        "fixed": False,
        "summary": summary,
    }


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (counted(), []),
        (counted(cut=16, extracted=0, right=0), ["raise stages.zero.sampling.max_new_tokens, which is 32"]),
        (counted(kind="evaluate", cut=8, differing=None), ["raise stages.zero.max_new_tokens"]),
        (counted(extracted=0, right=0), ["(no box): ask for it in problems.own.template or system"]),
        ({**counted(extracted=0, right=0), "fixed": True}, ["(no box): start from a model that writes it"]),
        (counted(right=0), ["take easier problems"]),
        (counted(right=16), ["take harder problems"]),
        (counted(right=0, differing=0), ["take easier problems", "a step learns only from those"]),
        (counted(temperature=0.0, differing=None), ["at temperature 0: raise stages.zero.sampling"]),
        (counted(kind="sample", right=16), []),  # right answers are what it is there for
        (counted(kind="screen", right=16), ["take harder problems"]),
    ],
)
def test_what_keeps_a_stage_from_learning_is_said_with_its_remedy(found, said):
    texts = remedies(found)
    assert len(texts) == len(said)
    for text, part in zip(texts, said, strict=True):
        assert part in text.en and text.zh and text.zh != text.en


def test_the_counts_are_one_sentence():
    assert "Of 16 answers to 8 problems 8 are right" in summary(counted()).en
    assert "differ in reward" not in summary(counted(differing=None)).en


# ---------------------------------------------------------------- in a run


def test_a_run_previews_new_problems_once_and_no_byte_depends_on_it(finished, tmp_path):
    run = tiny.open_run(finished.recipe, tmp_path / "runs")
    run.execute()
    assert tiny.digests(tmp_path / "runs") == tiny.digests(finished.home)
    assert not (run.folder / preview.FOLDER).exists()
    shown = preview.read(finished.home / "tiny", "zero")
    assert shown["stage"] == "zero" and shown["summary"]["answers"] == 16
    assert {path.stem for path in (finished.home / "tiny" / preview.FOLDER).iterdir()} == {
        "zero",
        "screened",
        "traces",
    }
    assert '"event": "said"' in finished.out and "answers to 8 problems" in finished.out


def test_a_resumed_stage_does_not_repeat_its_preview(recipe):
    run = tiny.open_run(recipe, recipe.parent / "runs", "stages.later.steps=1")
    run.previews = True
    graph = graph_of(recipe)
    folder = preview._model_folder(graph.nodes["base"], recipe.parent / "scratch")
    (folder / "manifest.json").write_text('{"digest": "0"}')
    job = preview._job(graph, graph.nodes["zero"], {"base": folder})
    job = job.__class__(**{**vars(job), "preview": recipe.parent / "previews" / "zero.json"})
    assert preview.write_once(job)["summary"]["answers"] == 16
    written = job.preview.read_bytes()
    assert preview.write_once(job) == {} and job.preview.read_bytes() == written
    (recipe.parent / "own.jsonl").write_text(
        "".join(json.dumps({"question": f"say {i} ?", "answer": str(i)}) + "\n" for i in range(3, 40))
    )
    assert preview.write_once(job)


# ---------------------------------------------------------------- on the command line


def test_the_command_prints_prompts_answers_and_counts(recipe):
    code, out, err = tiny.answer("try", recipe, "--prompts", 2, "--samples", 2, cwd=recipe.parent)
    assert code == 0, err
    assert "<bos>say 1 User:use 2 say" in out and "gold:" in out and "of 20 tokens" in out
    assert "later needs a model that is not made yet; `limbeck run` makes fresh first" in out
    code, out, _ = tiny.answer("try", recipe, "--stage", "zero", "--prompts", 1, "--json", cwd=recipe.parent)
    data = json.loads(out)["data"]
    assert code == 0 and len(data["previews"]) == 1 and data["missing"] == []
    assert not (recipe.parent / "runs").exists()


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def test_what_cannot_be_tried_ends_in_one_sentence(recipe):
    with pytest.raises(LimbeckError, match="problems.own.system: 300 tokens and max_new_tokens=20 exceed"):
        tried(recipe, "zero", f"problems.own.system={'say ' * 300}")
    (recipe.parent / "model" / "chat_template.jinja").write_text(ENDLESS)
    code, _, err = tiny.answer("try", recipe, "--stage", "zero", cwd=recipe.parent)
    assert code == 2 and err.count("\n") == 1
    assert "chat_template.jinja: the template ran for more than 2 seconds" in err
    code, _, err = tiny.answer("try", recipe, "--stage", "later", cwd=recipe.parent)
    assert code == 2 and "nothing can be tried yet: later needs a model" in err


# ---------------------------------------------------------------- in the studio


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_stages_page_shows_the_preview_in_both_languages(finished, language):
    shown = preview.read(finished.home / "tiny", "zero")
    page = stage_page(finished.home, "tiny/zero", language)
    for prompt in shown["prompts"]:
        assert escape(prompt["prompt"]) in page
    assert getattr(summary(shown), language) in page
    assert "preview-title" in page and "preview-title" not in stage_page(finished.home, "tiny/dev1", language)


def test_the_report_tells_what_was_seen_before_the_first_step(finished):
    shown = summary(preview.read(finished.home / "tiny", "zero"))
    page = (finished.home / "tiny" / "report" / "index.html").read_text()
    assert "Before the first step:" in page and shown.en in page and shown.zh in page


def stage_page(home: Path, name: str, language: str) -> str:
    app = build(home, NoModels())

    async def ask() -> str:
        transport = httpx.ASGITransport(app)
        headers = {"accept-language": language}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost:8000", headers=headers
        ) as client:
            return (await client.get(f"/runs/{name}")).text

    return asyncio.run(ask())
