"""`limbeck iterate`: whole generations of a tiny recipe, stopped and resumed; mistakes in one sentence."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import tiny
from test_studio_runs import got

from limbeck.serve.votes import Answer, VoteStore
from limbeck.types import Problem

pytestmark = pytest.mark.slow

RECIPE = """
name: little
threads: 1
problems:
  say: {source: miniature, modulus: 3, numbers: 3, largest: 5, task: repeat}
stages:
  base:
    kind: pretrain
    problems: say
    corpus: {textbook: 0, general: 0.9, plain: 0, tagged: 0.7, guessed: 0, slip: 0, misjudged: 0}
    tokens: 24000
    batch_tokens: 512
    optimizer: {name: muon, learning_rate: 0.02, warmup_steps: 5}
    shape: {hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, intermediate_size: 64}
  polished:
    kind: rl
    model: base
    problems: {say: 1}
    rewards: {accuracy: 1}
    steps: 3
    policy: {prompts_per_step: 8, group_size: 4, zero_variance: keep}
    sampling: &brief {max_new_tokens: 24}
  asked: {kind: evaluate, models: [polished], problems: [say], prompts: 16, max_new_tokens: 24}
  report: {kind: report, evaluation: asked, story: {base: base, r1: polished}}
iterate: {start: last, screen: {limit: 96, samples: 4, high: 1, share: 0.5}, gate: {language_margin: 0.5}}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "little.yaml"
    path.write_text(RECIPE)
    return path


def test_two_generations_stopped_and_gone_on_with(recipe, tmp_path):
    """The ledger, the page, the runs and the lineage; what the first generation made is not made again."""
    home = tmp_path / "runs"
    command = ("iterate", recipe, "--runs", home, "--generations", 2, "--price", 1.5)
    process = tiny.limbeck(*command)
    tiny.until(lambda: list((home / "store").glob("pretrain-*/manifest.json")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 75 and "Traceback" not in err
    made = tiny.digests(home)

    code, out, err = tiny.answer(*command)
    assert code == 0, err
    assert made.items() <= tiny.digests(home).items()
    assert "polished_g2" in out and "at most 5%" in out and "1.5 dollars an hour" in out
    lines = [json.loads(line) for line in (home / "little-generations/ledger.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == [1, 2] and lines[0]["promoted"]
    assert lines[1]["champion"]["artifact"] == lines[0]["candidate"]["artifact"]
    page = (home / "little-generations/index.html").read_text()
    assert "polished_g2" in page and "<svg" in page
    first, second = (json.loads((home / f"little-g{i}/stages.json").read_text()) for i in (1, 2))
    assert first["base"] == second["base"] and first["polished"] == second["polished"]
    manifest = json.loads((home / "store" / second["polished_g2"] / "manifest.json").read_text())
    assert set(manifest["inputs"]) == {"polished", "harder_g2"}

    before = tiny.digests(home)
    code, out, err = tiny.answer(*command, "--json")
    assert code == 0 and tiny.digests(home) == before
    told = json.loads(out)["data"]
    assert [row["run"] for row in told["generations"]] == ["little-g1", "little-g2"]
    assert told["false_promotion_rate"] == 0.05 and told["best"]["run"] in ("little-g1", "little-g2")
    assert (
        told["generations"][1]["candidate"]["dollars_per_right"] is not None
        or not lines[1]["candidate"]["right"]
    )

    code, _, err = tiny.answer(*command, "--set", "stages.polished.steps=4")
    assert code == 2 and "is of other settings of little" in err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("smoke",), "nothing says which stage is the model of a generation"),
        (("quickstart", "--set", "iterate={gate: {problems: [cloc]}}"), "did you mean clock?"),
        (("nowhere.yaml",), "no such recipe"),
        (("quickstart", "--generations", 0), "generations"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, arguments, says):
    code, _, err = tiny.answer("iterate", *arguments, "--runs", tmp_path / "runs")
    assert code == 2 and says in err and "Traceback" not in err


def test_the_studio_links_ledgers(tmp_path):
    runs = tmp_path / "runs"
    (runs / "little-generations").mkdir(parents=True)
    (runs / "little-generations/index.html").write_text("<h1>better</h1>")
    table, ledger, missing = got(runs, "/runs", "/runs/-/ledger/little", "/runs/-/ledger/..%2Fx")
    assert 'href="/runs/-/ledger/little"' in table.text
    assert ledger.text == "<h1>better</h1>" and "content-security-policy" in ledger.headers
    assert missing.status_code == 404


def test_people_s_votes_on_two_models(tmp_path):
    """By their weights, on either side; judges' votes do not count, and those on others do not."""
    store = VoteStore(tmp_path)
    battles = [("new", "old", "a"), ("old", "new", "a"), ("old", "new", "tie"), ("new", "other", "a")]
    for number, (a, b, outcome) in enumerate(battles):
        problem = Problem(f"p{number}", f"ask {number}")
        battle = store.begin("Mei", problem, (f"model {a}", f"model {b}"), (a, b), {})
        store.add_answers(battle, Answer("yes"), Answer("no"), "")
        store.vote(battle.id, battle.token, "Mei", outcome)
        store.judge(battle.id, "judge", "b")
    assert store.between("old", "new") == [1, -1, 0]
    assert store.between("new", "old") == [-1, 1, 0]
