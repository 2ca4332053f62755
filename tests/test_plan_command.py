"""`limbeck plan` for models: what it says to people and to programs, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SMALL = ("r1-distill-qwen-1.5b", "--on", "8xH100", "--seq", 4096, "--batch", 64, "--tokens", "1e9")


@pytest.fixture
def call(call):
    """`call(*arguments)` of `limbeck plan`."""
    return lambda *arguments: call("plan", *arguments)


def test_a_model_on_chips(call, tmp_path):
    code, out, _ = call(*SMALL, "--until", "2099", "--svg", tmp_path / "plan.svg")
    assert code == 0 and (tmp_path / "plan.svg").read_text().lstrip().startswith("<?xml")
    said = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert {
        "training",
        "best layout",
        "a step",
        "goodput",
        "in all",
        "energy",
        "money",
        "until",
        "teacher",
        "serving",
    } <= set(said)
    assert (
        "MFU" in said["a step"]
        and "causal" in said["a step"]
        and "all of it is done" in said["until"]
        and "2026-01" in said["money"]
    )


def test_the_same_for_programs(call):
    code, out, _ = call(*SMALL, "--what-if", "chip=H20", "--what-if", "count=4", "--json")
    told = json.loads(out)
    assert code == 0 and told["ok"] and told["schema"] == 1
    training, bill = told["plan"]["training"], told["plan"]["training"]["bill"]
    assert bill["seconds"]["low"] < bill["seconds"]["middle"] < bill["seconds"]["high"]
    assert bill["chip_hours"]["middle"] == pytest.approx(bill["seconds"]["middle"] * bill["chips"] / 3600)
    assert len(training["choices"]) > 1 and 0.1 < training["choices"][0]["step"]["mfu"] < 0.7
    assert told["what_if"]["times"] > 5  # a seventh of the arithmetic, and half of the chips
    assert told["what_if"]["training"]["bill"]["money"] is None  # nobody's price of an H20 is known


def test_a_price_that_is_given(call):
    told = json.loads(call(*SMALL, "--price", 2, "--json")[1])["plan"]["training"]["bill"]
    assert told["money"]["middle"] == pytest.approx(2 * told["chip_hours"]["middle"])


def test_r1_zero(call):
    code, out, _ = call("r1-zero", "--on", "512xH800", "--json")
    told = json.loads(out)["plan"]
    assert (
        code == 0
        and told["rl"]["chips"] == 512
        and told["rl"]["parts"]["tail"] > 0
        and told["rl"]["parts"]["learning"] > 0
    )
    assert told["bill"]["chip_hours"]["low"] < 101e3 < told["bill"]["chip_hours"]["high"]


def test_rules_are_asked_for_a_day_and_a_country(call):
    code, out, _ = call(
        *SMALL[:1],
        "--on",
        "8xH800",
        *SMALL[3:],
        "--to",
        "china",
        "--date",
        "2023-06-01",
        "--what-if",
        "chip=h100",
        "--json",
    )
    rules = json.loads(out)["rules"]
    assert code == 0 and [(r.get("chip"), r["decision"]) for r in rules] == [
        ("h800", "free"),
        ("h100", "licence"),
        (None, "free"),
    ]


def test_what_does_not_fit_is_said_with_what_would(call):
    code, out, _ = call("r1-distill-qwen-7b", "--on", "4090-node")
    assert code == 0 and "cannot be:" in out and "with sequences of" in out and "serving" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("qwen-nine", "--on", "8xH100"), "qwen-nine: no model or artifact of that name; there are"),
        (("deepseek-v3",), "deepseek-v3: on which chips? say --on"),
        (("deepseek-v3", "--on", "8xH801"), "h801"),
        (("qwen2.5-72b", "--on", "8xH100"), "give --tokens, --batch, --seq"),
        (("deepseek-v3", "--on", "64x910b"), "910b"),
        ((*SMALL, "--what-if", "nvlink"), "--what-if nvlink: write KEY=VALUE"),
        ((*SMALL, "--what-if", "nvlnk=400"), "nvlnk"),
        ((*SMALL, "--to", "atlantis"), "atlantis: no country"),
        ((*SMALL, "--until", "2001-01"), "has passed"),
        ((*SMALL, "--until", "soon"), "soon: no day"),
        (("deepseek-v3", "runs.csv", "--on", "8xH100"), "only `limbeck plan verify`"),
        (("smoke", "--what-if", "nvlink=400"), "name it with --on"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_end_in_one_sentence(call, arguments, sentence):
    code, out, err = call(*arguments)
    assert code == 2 and not out.strip() and sentence in err and len(err.strip().splitlines()) == 1


def test_a_plan_for_a_model_needs_no_torch():
    code = (
        "import sys; sys.argv = ['limbeck', 'plan', 'r1-distill-qwen-1.5b', '--on', '8xH100',"
        "'--seq', '4096', '--batch', '64'];"
        "from limbeck.cli import main\ntry: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
