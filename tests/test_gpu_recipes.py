"""The recipes for one card: what they are made of, what is said without their files, and each of them from
the base to the report, with the engine of a card and torch's operations on a CPU.

A tiny model of the same family stands in for the real one. It was taught the form of an answer and guesses
the number, so that it is right sometimes, as screening, GRPO and rejection sampling need it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import tiny
import tokenizers
import torch
import yaml
from tiny import Silent
from tokenizers import decoders, models, trainers

from limbeck.config.load import dump, load, shipped, with_auto_curation
from limbeck.config.parts import Optimizer
from limbeck.config.recipe import Load, Recipe, Stage
from limbeck.model import weights
from limbeck.pipeline.graph import Node
from limbeck.pipeline.run import Run
from limbeck.plan.models import published
from limbeck.run_log import read_metrics
from limbeck.tasks.registry import open_task
from limbeck.text.tokenizer import Tokenizer
from limbeck.train.batch import pack
from limbeck.train.learner import Learner
from limbeck.train.losses import CrossEntropy
from limbeck.types import Sample

pytestmark = pytest.mark.slow

RECIPES = [name for name in shipped() if name.startswith("gpu/")]
CHAIN = [
    "base",
    "reach",
    "zero",
    "traces",
    "coldstart",
    "dev1",
    "reach_later",
    "dev2",
    "reasoning",
    "dev3",
    "r1",
    "outputs",
]
CHAIN += ["small_base", "small", "evaluation", "report"]  # fmt: skip
FAMILIES = {"smollm2": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3"}
NUMBERS = (1, 2, 3)  # the answers, one of which the model guesses
THINGS = ("apples", "books", "coins", "drums", "eggs", "flags", "goats", "hats", "inks", "jars")
OWNERS = ("Ada", "Bo", "Cem", "Dia", "Eli", "Fay")


# ---------------------------------------------------------------- without a model


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_whole_chain(name):
    recipe = load(name)
    assert list(recipe.stages) == CHAIN and recipe.name == name.replace("/", "-")
    assert yaml.safe_load(dump(recipe)) == recipe.model_dump(mode="json")
    assert recipe.precision == "bfloat16" and recipe.licence == "Apache-2.0"
    assert set(recipe.stages["report"].story.values()) == set(recipe.stages["evaluation"].models)
    for source in recipe.problems.values():
        assert source.licence == "MIT" and f"-o {source.path} " in source.download


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_planned_for_chips_without_its_files(name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, errors = call("plan", name, "--on", "1xH100", "--json")
    told = json.loads(out)
    assert (code, errors) == (0, "") and told["seconds"] > 0  # and no licence forbids a step
    stages = {row["stage"] for row in told["data"]}
    assert stages > set(CHAIN) - {"evaluation", "report"} and "evaluation/small" in stages
    recipe = load(name)
    paths = {stage.path for stage in recipe.stages.values() if isinstance(stage, Load)}
    said = "\n".join(told["absent"])
    assert all(f"`limbeck pull {path}` fetches one" in said for path in paths)
    assert all(f"`{source.download}`" in said for source in recipe.problems.values())
    for stage in recipe.stages.values():
        if isinstance(stage, Load):
            assert published(stage.path).layers >= (stage.layers or 1)


def test_without_its_file_a_recipe_says_how_to_get_it(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("plan", "run", "try"):
        code, out, errors = call(command, "gpu/qwen3-0.6b")
        assert (code, out) == (2, "") and len(errors.splitlines()) == 1
        assert re.search(
            r"problems\.gsm8k\.path: gsm8k/train\.jsonl is no file.*get it with `curl .*`, or name yours "
            r"with --set problems\.gsm8k\.path=FILE",
            errors,
        )
    file = f"problems.gsm8k.path={write_problems(tmp_path)['gsm8k']}"
    code, _, errors = call("run", "gpu/qwen3-0.6b", "--set", file)
    assert code == 2 and "`limbeck pull hf:Qwen/Qwen3-0.6B-Base` fetches one" in errors
    code, _, errors = call("plan", "gpu/qwen3-0.6b", "--on", "1xH100", "--set", "stages.base.path=hf:a/b")
    assert code == 2 and "model hf:a/b is neither a directory nor a GGUF file" in errors


def test_a_name_without_its_folder_is_answered_with_it(call):
    code, _, errors = call("run", "qwen3-0.6b")
    assert code == 2 and "did you mean gpu/qwen3-0.6b?" in errors


# ---------------------------------------------------------------- with a tiny model


def write_problems(folder: Path) -> dict[str, Path]:
    """Files in the form of GSM8K's and MATH's by the name of the recipe's source."""
    gsm8k, math = [], []
    for i, thing in enumerate(THINGS):
        for k, owner in enumerate(OWNERS):
            right = NUMBERS[(i + k) % len(NUMBERS)]
            question = f"{owner} has {right + i} {thing} and gives {i} away. How many are left?"
            gsm8k.append({"question": question, "answer": f"{right + i} - {i} = {right}\n#### {right}"})
            problem = f"How much more are ${right + 10 * k + i}$ {thing} than ${10 * k + i}$ of {owner}?"
            math.append(
                {"problem": problem, "solution": f"It is $\\boxed{{{right}}}$.", "answer": str(right)}
            )
    files = {"gsm8k": folder / "gsm8k.jsonl", "math": folder / "math.jsonl"}
    for name, rows in (("gsm8k", gsm8k), ("math", math)):
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def shrink(recipe: Recipe, files: dict[str, Path], model: Path) -> Iterator[str]:
    """Settings that let a recipe end in seconds: a few steps, problems and tokens of a tiny model."""
    yield "threads=1"
    for name in recipe.problems:
        yield from (f"problems.{name}.path={files[name]}", f"problems.{name}.held_out=8")
    for name, stage in recipe.stages.items():
        for key, value in SMALLER.get(stage.kind, {}).items():
            yield f"stages.{name}.{key}={value}"
        if isinstance(stage, Load):
            yield f"stages.{name}.path={model}"
            if stage.layers:
                yield f"stages.{name}.layers=1"
        if getattr(stage, "lora", None):
            yield f"stages.{name}.lora.rank=8"


SMALLER = {
    "screen": {"limit": 32, "samples": 4, "sampling.max_new_tokens": 16},
    "rl": {
        "steps": 2,
        "policy.prompts_per_step": 4,
        "policy.group_size": 4,
        "sampling.max_new_tokens": 16,
        "batch_tokens": 1024,
    },
    "sample": {"prompts": 24, "samples": 4, "sampling.max_new_tokens": 16},
    "sft": {"epochs": 1, "batch_tokens": 1024},
    "evaluate": {"prompts": 4, "max_new_tokens": 16},
}


def respond(style: str, number: int) -> str:
    """A response in the form that the recipe's verifier looks for."""
    return (
        f"It is {number}" if style == "final" else f" <think> so it is {number} </think> \\boxed{{{number}}}"
    )


def save_model(recipe: Recipe, family: str, folder: Path) -> dict[str, str]:
    """Write a tiny random model of a family, and return the recipe's prompts, each with the place of its
    answer."""
    prompts = {
        problem.prompt: source.answer
        for name, source in recipe.problems.items()
        for problem in open_task(name, source).problems("train")
    }
    responses = [respond(style, number) for style in set(prompts.values()) for number in NUMBERS]
    made = byte_pairs([*prompts, *responses])
    checkpoints.save_tokenizer(folder, made)
    checkpoints.save(family, folder, made.get_vocab_size(), num_hidden_layers=2)
    return prompts


def teach(recipe: Recipe, family: str, folder: Path) -> None:
    """Write a tiny model of a family that answers the recipe's problems in their form, with any number."""
    prompts = save_model(recipe, family, folder)
    tokenizer = Tokenizer.from_directory(folder, plain=recipe.stages["base"].chat_template == "plain")
    decoder = weights.load(folder)
    random = np.random.default_rng(0)
    samples = []
    for _ in range(8):
        for prompt, style in prompts.items():
            asked = tokenizer.prompt(prompt)
            answered = tokenizer.response(respond(style, random.choice(NUMBERS)))
            samples.append(Sample(np.concatenate([asked, answered]), start=len(asked)))
    learner = Learner(decoder, Optimizer(learning_rate=3e-3, warmup_steps=5), 1)
    for first in range(0, len(samples), 8):
        learner.update(pack(samples[first : first + 8], 4096), CrossEntropy())
    weights.save(decoder, folder, Tokenizer.from_directory(folder))


def byte_pairs(texts: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer of bytes and of the words in some texts."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = checkpoints.GPT2
    made.decoder = decoders.ByteLevel()
    alphabet = checkpoints.LETTERS
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=checkpoints.SPECIAL, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_from_the_base_to_the_report(name, call, tmp_path):
    files, model, runs = write_problems(tmp_path), tmp_path / "model", tmp_path / "runs"
    settings = list(shrink(load(name), files, model))
    recipe = with_auto_curation(load(name, settings))
    teach(recipe, next(family for key, family in FAMILIES.items() if key in name), model)
    run = Run(recipe, shipped()[name].parent, runs, Silent())
    stages = tiny.carry_out(run, "plain")
    assert {node.state for node in stages.values()} == {"cached"}
    for stage, node in stages.items():
        check(node, recipe.stages[stage.partition("/")[0]])

    settings += [f"problems.{source}.download=elsewhere" for source in recipe.problems]  # in no key
    options = ["--runs", runs, *(word for setting in settings for word in ("--set", setting))]
    code, _, errors = call("run", name, "--auto", "--device", "plain", *options)
    assert code == 0 and "begins" not in errors  # every stage is done; the report is written
    told = json.loads((runs / recipe.name / "report" / "report.json").read_text(encoding="utf-8"))
    assert told["story"] == recipe.stages["report"].story
    assert set(told["models"]) == set(recipe.stages["evaluation"].models)


def test_a_base_model_is_asked_without_a_chat_template(call, tmp_path):
    name, files, model = "gpu/qwen3-0.6b", write_problems(tmp_path), tmp_path / "model"
    settings = list(shrink(load(name), files, model))
    save_model(load(name, settings), "qwen3", model)
    options = ["--runs", tmp_path / "runs", *(word for setting in settings for word in ("--set", setting))]
    code, out, errors = call("try", name, "--stage", "zero", "--json", *options)
    assert code == 0, errors
    prompts = [shown["prompt"] for shown in json.loads(out)["data"]["previews"][0]["prompts"]]
    assert all(prompt.startswith("A conversation") and prompt.endswith("? Assistant:") for prompt in prompts)


def check(node: Node, stage: Stage) -> None:
    """What a stage has made is what its settings ask for."""
    folder, notes = node.artifact.folder, node.artifact.manifest["notes"]
    if node.kind == "rl":
        steps = read_metrics(folder)
        assert len(steps) == stage.steps and steps[0]["gap_kl"] < 0.01
    if node.kind in ("screen", "sample"):
        assert 0 < notes["kept"] < notes["sampled"]
    if node.kind in ("rl", "sft", "load"):
        assert weights.stored_dtype(folder / "model") == (
            torch.float32 if node.kind == "load" else torch.bfloat16
        )
        assert (folder / "adapter").exists() == bool(getattr(stage, "lora", None))
