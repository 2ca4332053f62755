"""Names of models: every command takes every form of a name, and refuses what is none in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import checkpoints
import pytest
import tiny
import torch
from test_cli import refused

from limbeck.config.load import load
from limbeck.files import checksums
from limbeck.model import gguf, weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.pull import checksums_of
from limbeck.pipeline.model_name import final_stage, find, find_artifact, find_model
from limbeck.pipeline.run_folder import read_json
from limbeck.serve.models import named
from limbeck.types import LimbeckError

pytestmark = pytest.mark.slow

RECIPE = """
name: mine
threads: 1
stages: {base: {kind: load, path: models/pulled, licence: MIT}}
"""
FORMS = ("pulled", "./local", "local", "local.gguf", "mine/base", "runs/mine/base", "mine", "base", "prefix")
SHORT = ("--mode", "greedy", "--max-new-tokens", "4", "--held-out", "4")
MADE = ("mine/base", "runs/mine/base", "mine", "base", "prefix")  # those that a stage made


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A working directory with a pulled model, another directory, a GGUF file, and the run `mine`."""
    folder = tmp_path_factory.mktemp("names")
    pulled = folder / "models" / "pulled"
    shape = {
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
    }
    weights.save(Decoder(ModelConfig("llama", 280, **shape, max_positions=128)).initialize(0), pulled)
    checkpoints.save_tokenizer(pulled)
    (pulled / "provenance.json").write_text('{"source": "hf:A/B", "licence": "Apache-2.0"}')
    checksums_of(pulled).write_text(checksums(pulled))
    shutil.copytree(pulled, folder / "local", ignore=lambda *_: ["provenance.json"])
    gguf.write(pulled, folder / "local.gguf", "f32")
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(9)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(RECIPE)
    code, _, err = tiny.answer("run", "mine.yaml", cwd=folder)
    assert code == 0, err
    return folder


@pytest.fixture
def here(built, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    folder = Path(shutil.copytree(built, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def spelled(form: str, folder: Path) -> str:
    """The name of a form, in which `prefix` is the beginning of the artifact's name."""
    artifact = read_json(folder / "runs" / "mine" / "stages.json")["base"]
    return artifact[:9] if form == "prefix" else form


# ---------------------------------------------------------------- every command with every form


@pytest.mark.parametrize("form", FORMS)
def test_every_command_takes_every_form(call, here, form):
    name = spelled(form, here)
    title = "base" if form in MADE else form.removeprefix("./").removesuffix(".gguf")

    said = call("ask", name, "12?", "--max-new-tokens", "2", "--temperature", "0")
    assert said.code == 0 and said.out.endswith("\n")
    assert said.err == ("mine: its model base\n" if form == "mine" else "")

    said = call("show", name)
    assert said.code == 0 and ("manifest" in said.out or '"stage": "base"' in said.out) == (form in MADE)
    assert form in MADE or re.search(r"^weights +\d+\.\d kB in ", said.out, re.MULTILINE)

    said = call("why", name)
    assert said.code == 0 and said.out.startswith(f"{title} (")

    said = call("export", name, "--gguf", "f32", "--out", "out.gguf")
    if form == "local.gguf":
        refused(said, "local.gguf is a GGUF file already")
    else:
        assert said.out == "out.gguf\n"

    assert named([name], Path("runs")).keys() == {title}
    assert named([f"other={name}"], Path("runs")).keys() == {"other"}

    said = call("eval", name, "--problems", "sums.jsonl", *SHORT)
    assert said.code == 0 and re.search(r"^sums +greedy +\d+\.\d%  \(.*\) +4 problems", said.out)

    said = call("release", name, "released", "--gguf", "none")
    if form in MADE:
        assert said.code == 0 and call("verify", "released").out == "released: as it was\n"
        assert call("why", "released").out.startswith("base (")
    else:
        refused(said, f"{name} is a model that no stage of a run made", "RUN/STAGE")

    said = call("verify", name)
    if form in MADE or form == "pulled":
        assert said.code == 0 and said.out.endswith(": as it was\n")
    else:
        refused(said, "has no checksums to compare with")


@pytest.mark.parametrize("form", FORMS)
def test_python_takes_every_form(here, form):
    name = spelled(form, here)
    model = find_model(name)
    assert (model.artifact is not None) == (form in MADE)
    decoder = weights.load(model.directory())
    assert torch.equal(decoder.head.weight, weights.load(Path("models/pulled")).head.weight)
    assert find_model(Path(name)) == model


def test_a_changed_file_is_found_by_name(call, here):
    call("release", "mine", "released", "--gguf", "none")
    for path in ("released", "models/pulled"):
        with open(Path(path) / "config.json", "a") as file:
            file.write(" ")
        said = call("verify", path)
        assert said.code == 4 and said.out == f"{path}: {path}/config.json has changed\n"
        (Path(path) / "config.json").unlink()
        assert "config.json is missing" in call("verify", path).out if path == "released" else True


# ---------------------------------------------------------------- names that are two things, or nothing

COMMANDS = (
    ("ask", "{}", "why?"), ("show", "{}"), ("why", "{}"), ("export", "{}"), ("release", "{}", "out"),
    ("serve", "{}"), ("verify", "{}"), ("eval", "{}", "--problems", "smoke"),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_refuses_what_is_two_things_or_nothing(call, here, command):
    shutil.copytree("models/pulled", "models/mine")

    def said(name: str):
        port = ("--port", "0") if command[0] == "serve" else ()
        return call(*(word.format(name) for word in command), *port)

    refused(said("mine"), "mine is 2 things; write one of models/mine (pulled model), runs/mine (run)")
    refused(said("puled"), "puled: no model or artifact of that name; there are pulled, mine, ", "models.md")
    refused(said("mine/bse"), "runs/mine has no finished stage bse; it has base")
    refused(said("hf:A/B"), "hf:A/B is not here yet; `limbeck pull hf:A/B` fetches it")
    refused(said("runs"), "runs: holds no model: neither config.json")
    refused(said("x" * 5000), "no model or artifact of that name")
    refused(said("a\nb"), "'a\\nb': no model or artifact of that name")
    if command[0] != "verify":  # without a name it verifies all artifacts, as show lists them
        assert command[0] == "show" or refused(said(""), "the empty name: no model") is None
    if command[0] != "show":
        refused(said("deepseek-v3"), "deepseek-v3: there are no weights of it here, `limbeck show`")


def test_a_written_path_means_one_thing(here):
    shutil.copytree("models/pulled", "base")
    with pytest.raises(LimbeckError, match=r"^base is 2 things; .* \./base \(directory\), runs/mine/base"):
        find("base")
    assert find("./base").path == Path("base")
    assert find("runs/mine/base").artifact
    shutil.copytree("models/pulled", "models/mine")
    assert find("models/mine").artifact is None and find("runs/mine").run == Path("runs/mine")


def test_a_run_without_a_model_is_none(here):
    (here / "runs" / "pulled").mkdir()
    (here / "runs" / "pulled" / "recipe.yaml").write_text(RECIPE.replace("mine", "pulled"))
    assert find("pulled").path == Path("models/pulled")
    with pytest.raises(LimbeckError, match="runs/pulled has no model yet; `limbeck status runs/pulled`"):
        find("runs/pulled")


def test_where_nothing_is_the_error_says_how_to_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LimbeckError, match="there is none in models or runs: `limbeck pull smollm2-135m`"):
        find("mine")
    with pytest.raises(LimbeckError, match="smollm2-135m is not here yet; `limbeck pull smollm2-135m`"):
        find("smollm2-135m")


def test_the_beginning_of_an_artifacts_name_or_key_must_be_its_alone(finished):
    for stage in ("traces", "zero"):
        artifact, _ = find_artifact(f"tiny/{stage}", finished.home)
        for name in (artifact.folder.name[:-4], artifact.manifest["key"][:12], artifact.folder):
            assert find(name, finished.home).artifact == artifact
    with pytest.raises(LimbeckError, match="tiny/traces is a sample stage, which has no model; there are"):
        find_model("tiny/traces", finished.home)


# ---------------------------------------------------------------- the model of a run


def made(home: Path, accuracies: dict[str, float | None], story: dict[str, str]) -> Path:
    """A run by hand: a model for each key of `accuracies`, which is its accuracy on 400 problems."""
    run = home / "told"
    index = {}
    report = {"kind": "report", "evaluation": "evaluation", "story": story}
    recipe = {"name": "told", "problems": {"clock": {"source": "miniature"}}, "stages": {}}
    for stage, accuracy in accuracies.items():
        index[stage] = f"sft-{stage}"
        folder = home / "store" / index[stage]
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
        manifest = {"kind": "sft", "key": stage, "stage": stage}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        recipe["stages"][stage] = {"kind": "pretrain", "problems": "clock", "tokens": 1000}
        if accuracy is not None:
            index[f"evaluation/{stage}"] = f"evaluate-{stage}"
            folder = home / "store" / index[f"evaluation/{stage}"]
            folder.mkdir()
            half = 0.04
            mode = {
                "mean": accuracy,
                "low": accuracy - half,
                "high": accuracy + half,
                "n": 400,
                "problems": 400,
            }
            evaluation = {"model": stage, "sources": {"clock": {"modes": {"t1": {"accuracy": mode}}}}}
            (folder / "evaluation.json").write_text(json.dumps(evaluation))
            manifest = {"kind": "evaluate", "key": f"e{stage}", "stage": f"evaluation/{stage}"}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    evaluated = [stage for stage, accuracy in accuracies.items() if accuracy is not None]
    if story:
        models = evaluated or list(accuracies)
        recipe["stages"]["evaluation"] = {"kind": "evaluate", "models": models, "problems": ["clock"]}
        recipe["stages"]["report"] = report
    run.mkdir()
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    (run / "stages.json").write_text(json.dumps(index))
    return run


@pytest.mark.parametrize("accuracies, roles, stage", [
    ({"base": 0.2, "zero": 0.6, "r1": 0.7, "small": 0.9}, "base zero r1 small", "r1"),  # small is another
    ({"base": 0.2, "zero": 0.72, "r1": 0.7}, "base zero r1", "r1"),  # the intervals overlap
    ({"base": 0.2, "zero": 0.9, "dev1": 0.8, "r1": 0.5}, "base zero dev1 r1", "zero"),
    ({"base": 0.2, "zero": 0.6}, "base zero", "zero"),
    ({"base": 0.6, "zero": 0.2}, "base zero", "base"),  # training did harm
    ({"base": None, "zero": None}, "base zero", "zero"),
    ({"base": None, "r1": None, "small": None}, "", "r1"),
    ({"base": None, "other": None}, "", "other"),
    ({}, "", None),
])  # fmt: skip
def test_a_run_stands_for_the_best_model_of_its_story(tmp_path, accuracies, roles, stage):
    run = made(tmp_path, accuracies, {role: role for role in roles.split()})
    assert final_stage(run) == stage


# ---------------------------------------------------------------- recipes


def test_a_recipe_goes_by_its_bare_name(call, here):
    """Also beside a folder of that name, as `limbeck release` might have written."""
    (here / "smoke").mkdir()
    said = call("plan", "smoke")
    assert said.code == 0 and "will run" in said.out
    refused(call("run", "smok"), "smok: no such recipe; did you mean smoke?")
    refused(call("plan", "smok"), "smok: no model or artifact of that name; there are smoke,")
    refused(call("plan", "quickstart.yml"), "did you mean quickstart?")
    assert load("smoke").name == "smoke"


def test_a_model_that_is_here_can_be_planned(call, here):
    amounts = ("--on", "8x4090", "--tokens", "1e9", "--batch", "8", "--seq", "1024")
    for name in ("mine/base", "pulled", "local.gguf"):
        said = call("plan", name, *amounts)
        assert said.code == 0 and said.out.startswith(f"{name} on ")
    assert call("plan", "nothing", *amounts).code == 2


# ---------------------------------------------------------------- eval


def test_eval_gives_the_figures_of_the_stage(call, finished):
    """The same problems, seed and settings as the recipe's `evaluate` stage, so the same numbers."""
    stage, _ = find_artifact("tiny/evaluation/zero", finished.home)
    written = json.loads((stage.folder / "evaluation.json").read_text())
    said = call("eval", "tiny/zero", "--problems", finished.recipe, "--runs", finished.home, "--json")
    assert json.loads(said.out)["data"]["sources"] == written["sources"]
    said = call(
        "eval", "tiny/zero", "--problems", finished.recipe, "--runs", finished.home, "--mode", "greedy"
    )
    (line,) = said.out.splitlines()
    assert line.split()[:2] == ["clock", "greedy"]
    accuracy = written["sources"]["clock"]["modes"]["greedy"]["accuracy"]
    assert f"{accuracy['mean']:.1%}  (" in line and f"{accuracy['problems']} problems" in line


def test_eval_refuses_in_one_sentence(call, here):
    refused(call("eval", "pulled", "--problems", "sums"), "sums: no such recipe")
    refused(call("eval", "pulled", "--problems", "no.jsonl"), "--problems no.jsonl: there is no such file")
    refused(call("eval", "pulled", "--problems", "sums.jsonl", "--mode", "hot"), "--mode hot: choose t1")
    refused(call("eval", "pulled", "--problems", "sums.jsonl", "--answer", "x"), "--answer x: choose tags")
    refused(
        call("eval", "pulled", "--problems", "sums.jsonl"),
        "--held-out 200: too many for sums.jsonl (different problems: 9)",
        "give a lower number",
    )
    for columns, said in (("x", "write problem=NAME"), ("problem=x", "with --columns problem=NAME")):
        refused(call("eval", "pulled", "--problems", "sums.jsonl", "--columns", columns), said)
    refused(call("eval", "pulled", "--problems", "mine.yaml"), "mine.yaml has no problems to ask")


# ---------------------------------------------------------------- models of which only the shapes are known


def test_show_knows_what_plan_knows(call, here):
    said = call("show", "deepseek-v3")
    assert said.code == 0 and "8 of 256 experts" in said.out and "a token uses 36.63G" in said.out
    assert said.out.endswith("weights        none here: only the shapes are known\n")
    assert call("show", "deepseek-ai/DeepSeek-V3").out == said.out
    assert json.loads(call("show", "deepseek-v3", "--json").out)["weights_bytes"] == 0
    refused(call("show", "deepseek-v33"), "there are deepseek-v3, ", "pulled")


def test_a_dense_model_does_not_read_like_a_mixture(call, here):
    for name in ("llama-3.1-8b", "pulled", "local.gguf"):
        said = call("show", name)
        assert said.code == 0 and "expert" not in said.out and "a token uses" not in said.out
    assert re.search(r"^parameters +134\.5M$", call("show", "smollm2-135m").out, re.MULTILINE)
