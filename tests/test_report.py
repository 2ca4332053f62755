"""The report of a made-up run: whole, self-contained, safe, bilingual, and calm when parts are missing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from limbeck.eval.statistics import wilson
from limbeck.report.loaded_run import Run
from limbeck.report.page import format_response
from limbeck.report.report import StageView, write
from limbeck.report.summary import control, not_shown

pytestmark = pytest.mark.slow

# name: (t1, greedy, length, attempts, persist, language), all of them invented
MODELS = {
    "base": (0.19, 0.17, 22, 1.0, 0.50, 0.76), "zero": (0.72, 0.84, 71, 4.8, 0.99, 0.78),
    "dev1": (0.64, 0.66, 60, 4.1, 0.93, 0.97), "dev2": (0.83, 0.86, 68, 4.6, 0.99, 0.99),
    "dev3": (0.79, 0.83, 66, 4.5, 0.98, 0.97), "r1": (0.86, 0.88, 69, 4.7, 0.99, 0.993),
    "small-base": (0.18, 0.18, 21, 1.0, 0.48, 0.75), "small": (0.82, 0.84, 66, 4.6, 0.99, 0.98),
    "small-rl": (0.37, 0.39, 48, 3.2, 0.90, 0.74), "small-answers": (0.24, 0.30, 9, 0.0, None, 1.0),
    "base+forced": (0.60, 0.83, 64, 4.4, 1.0, 0.74),
}  # fmt: skip
STAGES = {
    "base": ("pretrain", ()), "zero": ("rl", ("base",)), "cold": ("sample", ("zero",)),
    "desk": ("curate", ("cold",)),
    "dev1": ("sft", ("base", "desk")), "dev2": ("rl", ("dev1",)), "reject": ("sample", ("dev2",)),
    "general": ("general", ()), "dev3": ("sft", ("base", "reject", "general")), "r1": ("rl", ("dev3",)),
    "traces": ("sample", ("r1",)), "small-base": ("pretrain", ()), "small": ("sft", ("small-base", "traces")),
    "small-answers": ("sft", ("small-base", "traces")), "small-rl": ("rl", ("small-base",)),
}  # fmt: skip
STORY = {role: role.replace("_", "-") for role in (
    "base", "zero", "dev1", "dev2", "dev3", "r1", "small", "small_base", "small_rl", "small_answers",
)}  # fmt: skip
THOUGHTS = {
    ("p0", "en"): ("use 5 1 6 make 4?",
                   "<think> try 6*5 gives 2+1 gives 3 vs 4 no</think><answer>6*5+1</answer>",
                   "<think> try 1+5 gives 6*6 gives 1 vs 4 no wait 1-5 gives 3-6 gives 4 vs 4 yes</think>"),
    ("p1", "zh"): ("用6 1 5凑3?", "<think>试6-5得1*1得1</think><answer>6-5*1</answer>",
                   "<think>试1+6得0*5得0比3错等1-6得2+5得0比3错等1-6得2*5得3比3对</think><answer>1-6*5</answer>"),
    ("p2", "en"): ("use 1 2 2 make 6?", "<script>alert(1)</script>", "<think> try & give up </think>"),
}  # fmt: skip


def interval(share: float, n: int = 1000) -> dict[str, float]:
    low, high = wilson(share, n)
    return {"mean": share, "low": low, "high": high, "n": n, "problems": n}


def evaluation(folder: Path, name: str, bare: bool = False) -> StageView:
    t1, greedy, length, attempts, persist, language = MODELS[name]
    model, _, forced = name.partition("+")
    rest = {
        "length": length,
        "truncated": 0.06,
        "format": 0.95,
        "language_consistency": None if bare else language,
    }
    rest["stats"] = {} if bare else {"attempts": attempts, "persist": persist, "mixed": 0.2}
    modes = {
        "t1": {"accuracy": interval(t1), **rest},
        "t06": {"accuracy": interval((t1 + greedy) / 2), **rest},
    }
    modes |= {
        "greedy": {"accuracy": interval(greedy), **rest},
        "pass@8": {"accuracy": interval(min(0.99, t1 + 0.4))},
    }
    sources = {"clock": {"modes": modes}, "chat": {"modes": {"t1": {"accuracy": interval(0.9), "stats": {}}}}}
    told = {"schema": 1, "model": model, "control": forced or None, "seed": 0, "sources": sources}
    rows = [
        {
            "problem": problem,
            "prompt": prompt,
            "language": language,
            "mode": "t1",
            "length": len(text) // 2,
            "text": text,
            "correct": problem != "p2" and name != "base",
        }
        for (problem, language), (prompt, before, after) in THOUGHTS.items()
        for text in [before if name == "base" else after]
    ]
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(told))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return StageView(f"evaluation/{name}", "evaluate", "", folder, manifest("evaluate", 3), (model,))


def manifest(kind: str, seconds: float, **notes) -> dict:
    return {
        "schema": 1,
        "kind": kind,
        "key": "3fa9c1d07b52aa",
        "digest": "77",
        "code_version": "0.1.0",
        "seed": 0,
        "settings": {"auto": "accept"} if kind == "curate" else {},
        "inputs": {},
        "outputs": {},
        "sources": {},
        "seconds": seconds,
        "cpu_seconds": 1.9 * seconds,
        "peak_memory_bytes": 620 * 2**20,
        "tokens": 31_000 * seconds,
        "flops": 2.6e10 * seconds,
        "joules": None,
        "licences": ["MIT"],
        "notes": notes,
    }


def history(kind: str, name: str) -> list[dict]:
    random = np.random.default_rng(len(name))
    last = MODELS.get(name, MODELS["zero"])
    rows = []
    for step in range(60 if kind == "rl" else 30):
        gone, noise = 1 - math.exp(-step / 12), random.normal(0, 0.02)
        row = {
            "step": step,
            "loss": 3 * (1 - 0.8 * gone) + noise,
            "entropy": 1.1 - 0.8 * gone + noise,
            "gradient_norm": 0.4,
        }
        if kind == "rl":
            row |= {
                "accuracy": 0.2 + (last[0] - 0.2) * gone + noise,
                "length": 22 + (last[2] - 22) * gone + 40 * noise,
            }
            row |= {
                "attempts": 1 + (last[3] - 1) * gone,
                "persist": 0.5 + 0.49 * gone,
                "gap": 2e-6 * (1 + abs(noise)),
            }
            row |= {
                "reward": 0.4 + 0.6 * gone,
                "language_consistency": min(1, 0.75 + (last[5] - 0.75) * gone + noise),
            }
            row |= {"alarms": ["truncation: 12% of responses"]} if step == 40 else {}
        rows.append(row)
    return rows


def fake_run(root: Path) -> tuple[list[StageView], dict, dict]:
    notes = {
        "sample": {
            "sampled": 4096,
            "kept": 1210,
            "dropped": {"wrong": 2103, "mixed language": 641, "repeats": 142},
        },
        "curate": {"policy": "accept what the filters left", "accepted": 1188, "edited": 0, "rejected": 22},
    }
    stages = []
    for name, (kind, inputs) in STAGES.items():
        folder = root / f"{kind}-{name}"
        folder.mkdir(parents=True)
        if kind in ("pretrain", "rl", "sft"):
            rows = history(kind, name)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = {"parameters": 38_912 if "small" in name else 141_760} if kind == "pretrain" else {}
        told = manifest(kind, 20 + 7 * len(name), **notes.get(kind, {}), **size)
        stages.append(StageView(name, kind, "", folder, told, inputs))
    stages += [evaluation(root / f"evaluate-{name}", name) for name in MODELS]
    recipe = {
        "name": "quickstart",
        "description": "The R1 recipe in a bottle.",
        "seed": 0,
        "problems": {"clock": {"source": "miniature", "modulus": 7}},
        "stages": {
            **{
                name: {"kind": kind, **({"model": inputs[0]} if kind in ("rl", "sft") else {})}
                for name, (kind, inputs) in STAGES.items()
            },
            "evaluation": {"kind": "evaluate", "models": list(MODELS)[:-1], "forced": ["base"]},
            "report": {"kind": "report", "evaluation": "evaluation", "story": STORY},
        },
    }
    machine = {"processor": "a processor", "cores": 2, "torch": "2.13.0", "python": "3.12.4"}
    return stages, recipe, {"seconds": 431.0, "peak_memory_bytes": 700 * 2**20, "machine": machine}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("made")
    stages, recipe, summary = fake_run(tmp_path / "store")
    path = write(tmp_path / "report", stages, recipe, summary)
    return path.read_text(encoding="utf-8"), json.loads(
        (path.parent / "report.json").read_text(encoding="utf-8")
    )


def test_named_benchmarks_have_a_table_with_published_scores(tmp_path):
    stages, recipe, summary = fake_run(tmp_path / "store")
    told = json.loads((tmp_path / "store/evaluate-zero/evaluation.json").read_text())
    told["suites"] = {"aime-2024": {"protocol": "deepseek", "metrics": {"math_verify": interval(0.123, 30)}}}
    (tmp_path / "store/evaluate-zero/evaluation.json").write_text(json.dumps(told))
    page = write(tmp_path / "report", stages, recipe, summary).read_text(encoding="utf-8")
    assert "Named benchmarks" in page and "公开基准" in page
    row = page.partition("aime-2024 (deepseek, math_verify)")[2].partition("</tr>")[0]
    assert ">12.3<small>" in row and row.count("–</td>") == len(MODELS) - 1
    assert "DeepSeek-R1 79.8 (2025-01)" in row and "OpenThinker-7B 31.3 (2025-04)" in row


def test_the_page_loads_nothing(made):
    page, _ = made
    assert "http://" not in page and "https://" not in page and "Named benchmarks" not in page
    assert not re.search(r"<link|<img|<iframe|@import|\bsrc=|url\((?!#)", page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))
    assert page.count("<script") == 1, "the language switch and nothing else"
    assert page.count("<svg") >= 10 and len(page) < 1_000_000


def test_both_languages_say_the_same_things(made):
    page, _ = made
    assert '<html lang="en">' in page and "html.lang = language" in page
    assert page.count('class="en" lang="en"') == page.count('class="zh" lang="zh-CN"') > 100
    assert "It learns to keep trying" in page and "它学会了不放弃" in page
    assert "72.0%" in page and "{" not in re.sub(r"<(script|style|pre).*?</\1>", "", page, flags=re.DOTALL)


def test_a_continued_stage_is_named_with_its_step(tmp_path):
    stages, recipe, summary = fake_run(tmp_path / "store")
    zero = next(stage for stage in stages if stage.name == "zero")
    zero.manifest["continued"] = {"artifact": "rl-9fe188b45f7dfa0a", "key": "9f", "digest": "1", "step": 20}
    path = write(tmp_path / "report", stages, recipe, summary)
    page = path.read_text(encoding="utf-8")
    assert "zero continues rl-9fe188b45f7dfa0a from step 20" in page
    assert "zero 接着 rl-9fe188b45f7dfa0a 从第 20 步继续训练" in page
    told = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    row = next(stage for stage in told["stages"] if stage["name"] == "zero")
    assert row["continued"]["step"] == 20


def test_what_a_model_wrote_is_text(made):
    page, _ = made
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert re.sub(r"</?span[^>]*>", "", format_response("a <b> & wait 等 c")) == "a &lt;b&gt; &amp; wait 等 c"


def test_the_same_run_makes_the_same_page(made, tmp_path):
    page, _ = made
    assert write(tmp_path / "again", *fake_run(tmp_path / "store")).read_text(encoding="utf-8") == page


def test_report_json(made):
    _, told = made
    assert told["schema"] == 1 and told["name"] == "quickstart" and told["source"] == "clock"
    assert set(told["models"]) == set(MODELS)
    zero = told["models"]["zero"]
    assert zero["accuracy"]["t1"] == interval(0.72) and set(zero["accuracy"]) == {
        "t1",
        "t06",
        "greedy",
        "pass@8",
    }
    assert (zero["length"], zero["attempts"], zero["parameters"], zero["control"]) == (71, 4.8, 141_760, None)
    assert told["models"]["base+forced"]["control"] == "forced"
    assert told["models"]["small"]["parameters"] == 38_912
    assert zero["other"]["chat"]["t1"]["mean"] == 0.9
    assert told["seconds"] == 431 and told["joules"] is None and told["cost"] is None
    assert {stage["name"] for stage in told["stages"]} >= set(STAGES)
    assert told["alarms"][0] == {
        "stage": "zero",
        "alarm": "truncation: 12% of responses",
        "first": 40,
        "times": 1,
    }
    assert any("seed" in sentence for sentence in told["not_shown"])


def test_the_control_is_told_from_its_numbers(tmp_path, monkeypatch):
    def said(t1: float, greedy: float) -> str:
        monkeypatch.setitem(MODELS, "base+forced", (t1, greedy, *MODELS["base+forced"][2:]))
        run = Run(*(tuple(p) if isinstance(p, list) else p for p in fake_run(tmp_path / f"{t1}-{greedy}")))
        return " ".join(text.en for text in control(run))

    assert "mostly persistence" in said(0.60, 0.83) and "cannot be told from it" in said(0.60, 0.83 + 1e-9)
    assert "taught more than persistence" in said(0.25, 0.25)
    assert "much of what RL found, not all" in said(0.30, 0.80)
    assert "is below it by" in said(0.90, 0.95)


def test_what_the_numbers_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "r1", (0.72, 0.84, *MODELS["r1"][2:]))
    stages, recipe, summary = fake_run(tmp_path)
    said = [text.en for text in not_shown(Run(tuple(stages), recipe, summary))]
    assert any(sentence.startswith("That r1 is above zero (temperature 1)") for sentence in said)
    assert any(sentence.startswith("What people at the desk") for sentence in said)


@pytest.mark.parametrize("missing", ["base", "zero", "r1", "small", "dev1", "everything"])
def test_a_missing_role_drops_its_section(tmp_path, missing):
    stages, recipe, summary = fake_run(tmp_path / "store")
    story = {role: model for role, model in STORY.items() if missing not in (role, "everything")}
    recipe["stages"]["report"]["story"] = story
    page = write(tmp_path / "report", stages, recipe, summary).read_text(encoding="utf-8")
    assert ("The honest control" in page) == ({"base", "zero"} <= set(story))
    assert ("Small models" in page) == ("small" in story)


def test_other_recipes(tmp_path):
    """No attempts, no language, no control, no curves, no summary: what is left is still told."""
    stages, recipe, _ = fake_run(tmp_path / "store")
    base = evaluation(tmp_path / "bare", "base", bare=True)
    recipe["stages"]["report"] = {"kind": "report", "evaluation": "elsewhere"}
    for some in ([], [stages[0]], [stages[0], base], [stages[1], base]):
        folder = tmp_path / f"report-{len(list(tmp_path.iterdir()))}"
        page = write(folder, some, recipe, {}).read_text(encoding="utf-8")
        assert "What was not shown" in page and "nan" not in page
