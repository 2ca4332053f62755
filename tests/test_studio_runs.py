"""The pages of runs: read in process, and in a browser beside a run that is really going on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal

import httpx
import pytest
from studio import NoModels, accessible, chromium, house, picture, visit  # noqa: F401 - fixtures
from tiny import until

from limbeck.pipeline import run_status
from limbeck.run_log import METRICS, ROLLOUTS
from limbeck.serve import jobs
from limbeck.serve.app import build

pytestmark = pytest.mark.slow

RECIPE = """
name: watched
description: A base that grows slowly enough to be looked at.
threads: 1
problems: {chat: {source: miniature, modulus: 3, numbers: 3, largest: 2, task: repeat}}
stages:
  base:
    kind: pretrain
    problems: chat
    tokens: 4000000
    batch_tokens: 512
    shape: {hidden_size: 16, layers: 1, heads: 1, kv_heads: 1, intermediate_size: 32}
    log_every: 1
    save_every: 600
  rows: {kind: general, problems: chat, rows: 4}
  after: {kind: sft, model: base, rows: {rows: 1}}
"""
PATIENT = 240_000  # milliseconds in which a process has begun even on a busy machine


def asked(runs, *requests, service=None, **options):
    """Answers to `(method, path, options)` in turn."""
    app = build(runs, service or NoModels())

    async def ask():
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost:8000", **options
        ) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


def got(runs, *paths, **options):
    return asked(runs, *(("GET", path, {}) for path in paths), **options)


def test_every_stage_of_a_run_has_a_page_in_both_languages(finished):
    names = [
        "brought",
        "base",
        "zero",
        "screened",
        "traces",
        "coldstart",
        "general",
        "dev1",
        "evaluation/zero",
    ]
    paths = ["/runs", "/runs/tiny", *(f"/runs/tiny/{name}" for name in names)]
    for language, word in (("en", "Settings and origin"), ("zh", "设置与来源")):
        pages = got(finished.home, *paths, headers={"accept-language": language})
        assert [page.status_code for page in pages] == [200] * len(paths)
        assert all(word in page.text for page in pages[2:]) and f'lang="{language}"' in pages[0].text
    run, zero = pages[1].text, pages[4].text
    assert (
        'href="/runs/tiny/evaluation/zero"' in run
        and 'href="/runs/tiny/report"' in run
        and 'class="lineage"' in run
    )
    assert (
        "强化学习" in run
        and "zero 已完成" in zero
        and 'data-columns="reward accuracy format language"' in zero
    )
    assert not re.search(r"<[^>]+\sstyle=", run + zero)  # the content policy would refuse it


def test_the_report_runs_its_own_script_and_no_other(finished):
    report = got(finished.home, "/runs/tiny/report")[0]
    policy = report.headers["content-security-policy"]
    assert report.status_code == 200 and "script-src 'sha256-" in policy and "default-src 'none'" in policy


@pytest.mark.parametrize(
    "path",
    [
        "/runs/nobody",
        "/runs/store",
        "/runs/..%2f..%2fetc",
        "/runs/tiny/nothing",
        "/runs/tiny/..%2f..%2fstore",
        "/runs/tiny/%00",
        "/runs/.studio",
    ],
)
def test_what_is_not_there_is_not_found(finished, path):
    assert got(finished.home, path)[0].status_code == 404
    assert (
        asked(finished.home, ("POST", "/runs/nobody/pause", {}), ("POST", "/runs/tiny/burn", {}))[
            0
        ].status_code
        == 404
    )


def test_curves_are_sent_once_and_thinned(finished, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(finished.home, runs)
    first = got(runs, "/curves/tiny/zero")[0]
    assert first.json()["columns"]["accuracy"] and first.json()["done"] == 8 and not first.json()["alive"]
    tag = {"if-none-match": first.headers["etag"]}
    again = asked(runs, ("GET", "/curves/tiny/zero", {"headers": tag}))[0]
    assert (again.status_code, again.content) == (304, b"")
    stage = json.loads((runs / "tiny" / "stages.json").read_text())["zero"]
    with open(runs / "store" / stage / METRICS, "a") as file:
        file.write("".join(json.dumps({"step": step, "accuracy": 0.5}) + "\n" for step in range(8, 4000)))
    grown = asked(runs, ("GET", "/curves/tiny/zero", {"headers": tag}))[0]
    assert grown.status_code == 200 and len(grown.json()["steps"]) == 400 and len(grown.content) < 100_000
    assert got(runs, "/curves/tiny/nothing")[0].status_code == 404


def test_the_living_part_is_sent_only_when_it_has_changed(finished, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(finished.home, runs)
    for path in ("/runs", "/runs/tiny", "/runs/tiny/zero"):
        page = got(runs, path)[0].text
        address = re.search(r'hx-get="([^"]+)"', page).group(1)
        assert got(runs, address)[0].status_code == 204
        part = got(runs, f"{path}?seen=other")[0]
        assert part.status_code == 200 and part.text.startswith('<div id="live"') and "<html" not in part.text
    (runs / "tiny" / "report" / "index.html").unlink()
    assert got(runs, address.replace("/zero", ""))[0].status_code == 200


def test_what_a_model_wrote_is_text(finished, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(finished.home, runs)
    stage = runs / "store" / json.loads((runs / "tiny" / "stages.json").read_text())["zero"]
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>{{ 7*7 }}"
    row = {
        "step": 9,
        "problem": evil,
        "prompt": evil,
        "language": evil,
        "completions": [
            {
                "text": evil,
                "length": 3,
                "stopped": False,
                "reward": None,
                "parts": {evil: 0.0},
                "reasons": {evil: evil},
            }
        ],
    }
    with open(stage / ROLLOUTS, "a") as file:
        file.write(json.dumps(row) + "\n")
    with open(stage / METRICS, "a") as file:
        file.write(json.dumps({"step": 9, "alarms": [evil]}) + "\n")
    page = got(runs, "/runs/tiny/zero?step=9")[0]
    assert page.status_code == 200 and "&lt;script&gt;alert(1)" in page.text and "{{ 7*7 }}" in page.text
    assert "<script>alert" not in page.text and "<img" not in page.text and "<svg onload" not in page.text


@pytest.mark.parametrize("form, said", [
    ({"recipe": "smoke", "settings": "stages.zero.stepz=3"}, "did you mean steps"),
    ({"recipe": "smoke", "name": "../elsewhere"}, "names a folder"),
    ({"recipe": "/etc/passwd"}, "choose one of the list"),
    ({"path": "../../etc/passwd"}, "is no YAML file inside"),
    ({"path": "/etc/x.yaml"}, "is no YAML file inside"),
    ({"path": "nothing.yaml"}, "no such recipe"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_on_the_page_and_starts_nothing(tmp_path, form, said):
    answer = asked(tmp_path, ("POST", "/runs", {"data": form}))[0]
    assert answer.status_code == 400 and said in answer.text and 'role="alert"' in answer.text
    assert not list(tmp_path.glob("*/.child.json"))


def test_a_run_that_cannot_be_read_any_more_says_so(finished, tmp_path):
    shutil.copytree(finished.home, tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "recipe.yaml").write_text("stages: [")
    every, one, curves = got(tmp_path / "runs", "/runs", "/runs/tiny", "/curves/tiny/zero")
    assert every.status_code == 200 and "not valid YAML" in every.text
    assert one.status_code == curves.status_code == 409 and "not valid YAML" in one.text


def test_what_cannot_be_paused_says_so(finished):
    answer = asked(finished.home, ("POST", "/runs/tiny/pause", {}))[0]
    assert answer.status_code == 409 and "nobody is at work" in answer.text


@pytest.fixture
def watched(tmp_path):
    """The folder of a run that will be started; whatever becomes of the test, nothing goes on after it."""
    (tmp_path / "watched.yaml").write_text(RECIPE)
    folder = tmp_path / "watched"
    yield folder
    if folder.exists() and jobs.state(folder).alive:
        os.kill(json.loads((folder / jobs.CHILD).read_text())["pid"], signal.SIGKILL)


def test_a_run_is_started_watched_paused_and_gone_on_with_from_its_page(visit, house, watched, tmp_path):  # noqa: F811
    with house() as url:
        page = visit(url + "/runs")
        accessible(page)
        page.locator("select[name=recipe]").select_option("watched.yaml")
        page.get_by_role("button", name="Start").click()
        page.wait_for_url("**/runs/watched")
        page.get_by_text("base has taken").wait_for(timeout=PATIENT)
        accessible(page)
        picture(page, "runs-live-run")

        page.locator("#stage-base").click()
        page.wait_for_selector("#curves[data-drawn]:not([data-drawn='0'])", timeout=PATIENT)
        loss = page.locator("[data-columns='loss loss_ahead loss_balance'] .legend")
        before = loss.inner_text()
        until(lambda: loss.inner_text() != before)
        accessible(page)
        picture(page, "runs-live-stage")

        page.go_back()
        page.keyboard.press("p")
        page.locator("#resume").wait_for(timeout=PATIENT)
        assert jobs.state(watched).name == "paused"
        page.keyboard.press("r")
        page.locator("#pause").wait_for(timeout=PATIENT)
        page.close()
    until(lambda: run_status.is_running(watched) and run_status.status(watched).begun)
    written = next(tmp_path.glob(f"store/.partial/pretrain-*/{METRICS}"))
    size = written.stat().st_size
    until(lambda: written.stat().st_size > size)  # page and server are gone, and it goes on
    assert jobs.state(watched).name == "running"
    jobs.pause(watched)
    until(lambda: not jobs.state(watched).alive)
    assert jobs.state(watched).name == "paused"


def test_a_finished_run_reads_well_in_chinese_on_a_phone_in_the_dark(visit, house, finished):  # noqa: F811
    with house(runs=finished.home) as url:
        page = visit(url + "/runs/tiny", language="zh", width=375, dark=True)
        page.get_by_role("heading", name="发生了什么").wait_for()
        accessible(page)
        picture(page, "runs-run-zh-phone")
        page.get_by_role("link", name="zero", exact=False).first.click()
        page.wait_for_selector("#curves[data-drawn]:not([data-drawn='0'])")
        accessible(page)
        picture(page, "runs-stage-zh-phone")
        step = page.locator("input[name=step]").input_value()
        page.keyboard.press("b")
        until(lambda: page.locator("input[name=step]").input_value() != step)
        assert "step=" in page.url
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.goto(url + "/runs/tiny/report")
        assert page.locator("html").get_attribute("lang") == "zh-CN"  # the report's own script has run
