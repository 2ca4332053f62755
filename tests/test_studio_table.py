"""The studio's table of runs: its order, runs compared in one chart, and what a deletion means."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from studio import NoModels, accessible, chromium, house, picture, visit  # noqa: F401 - fixtures
from test_studio_runs import asked, got

from limbeck import LimbeckError
from limbeck.pipeline import deletion, run_state, run_table
from limbeck.pipeline.run_status import RunStatus
from limbeck.serve import jobs

pytestmark = pytest.mark.slow

OWNED = ("zero", "evaluation/zero")  # stages that `tiny` does not share with `twin`


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """The finished run `tiny`; `twin` shares all but two of its artifacts; `alone` has other stages."""
    home = tmp_path / "runs"
    shutil.copytree(finished.home, home)
    shutil.copytree(home / "tiny", home / "twin")
    recipe = yaml.safe_load((home / "twin" / "recipe.yaml").read_text())
    recipe["name"] = "twin"
    recipe["stages"]["zero"]["steps"] = 9
    (home / "twin" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    index = json.loads((home / "twin" / "stages.json").read_text())
    kept = {stage: artifact for stage, artifact in index.items() if stage not in OWNED}
    (home / "twin" / "stages.json").write_text(json.dumps(kept))
    (home / "alone").mkdir()
    stages = {"base": recipe["stages"]["base"]}
    alone = {"name": "alone", "problems": recipe["problems"], "stages": stages}
    (home / "alone" / "recipe.yaml").write_text(yaml.safe_dump(alone))
    return home


def order(page: str) -> list[str]:
    return re.findall(r'id="run-(\w+)"', page)


# ---------------------------------------------------------------- the table


def test_each_row_has_date_time_accuracy_and_what_differs(runs):
    page = got(runs, "/runs")[0].text
    rows = dict(zip(order(page), page.split('id="run-')[1:], strict=True))
    best = run_table.best_accuracy(run_state.look(runs / "tiny"))
    assert f"{100 * best.mean:.1f}%" in rows["tiny"] and ">zero</small>" in rows["tiny"]
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", rows["tiny"]) and " s</td>" in rows["tiny"]
    assert "stages.zero.steps</small> 8" in rows["tiny"] and "stages.zero.steps</small> 9" in rows["twin"]
    assert "stages." not in rows["alone"]  # it has other stages: everything would differ
    chinese = got(runs, "/runs", headers={"accept-language": "zh"})[0].text
    assert "最高准确率" in chinese and "不同的设置" in chinese


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("sort=name", ["alone", "tiny", "twin"]),
        ("sort=name&order=down", ["twin", "tiny", "alone"]),
        ("sort=time", ["tiny", "twin", "alone"]),
        ("sort=time&order=up", ["alone", "twin", "tiny"]),
        ("sort=progress", ["tiny", "twin", "alone"]),
    ],
)
def test_the_table_is_sorted_by_a_column(runs, query, expected):
    page = got(runs, f"/runs?{query}")[0].text
    assert order(page) == expected
    assert page.count("aria-sort=") == 1
    address = re.search(r'hx-get="([^"]+)"', page).group(1).replace("&amp;", "&")
    assert query in address and got(runs, address)[0].status_code == 204  # it stays so when it is refreshed


def test_runs_without_a_value_come_last_and_nonsense_is_the_default(runs):
    for query in ("sort=accuracy", "sort=accuracy&order=up"):
        assert order(got(runs, f"/runs?{query}")[0].text)[0] == "tiny"
    first, second = got(runs, "/runs", "/runs?sort=__class__&order=sideways")
    assert order(first.text) == order(second.text)


# ---------------------------------------------------------------- comparison


def test_chosen_runs_are_drawn_in_one_chart(runs):
    page = got(runs, "/runs/-/compare?run=tiny&run=twin&metric=dev1/loss")[0]
    assert page.status_code == 200 and "<option selected>dev1/loss</option>" in page.text
    chart = page.text.partition('<figure class="chart">')[2].partition("</figure>")[0]
    assert ">tiny</text>" in chart and ">twin</text>" in chart
    assert "var(--one)" in chart and "var(--two)" in chart
    assert "style=" not in page.text and "<style" not in page.text  # the content policy would refuse them
    assert re.search(r"stages\.zero\.steps</th><td>8</td><td>9</td>", page.text)
    assert "zero · clock · t1" in page.text


def test_the_chart_begins_with_the_accuracy_of_rl(runs):
    page = got(runs, "/runs/-/compare?run=tiny")[0].text
    assert "<option selected>zero/accuracy</option>" in page
    page = got(runs, "/runs/-/compare?run=tiny&run=twin")[0].text
    assert "<option selected>base/loss</option>" in page  # which both have; a screening is no curve
    page = got(runs, "/runs/-/compare?run=alone", headers={"accept-language": "zh"})[0].text
    assert "还没有测量结果" in page and "<svg" not in page


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("", "0 runs are chosen"),
        ("run=nobody", "there is no run nobody"),
        ("run=tiny&run=../../etc", "there is no run ../../etc"),
    ],
)
def test_a_choice_that_cannot_be_drawn_is_one_sentence(runs, query, said):
    page = got(runs, f"/runs/-/compare?{query}")[0]
    assert page.status_code == 400 and said in page.text


def test_more_runs_than_colours_are_refused(runs):
    for i in range(7):
        shutil.copytree(runs / "alone", runs / f"more{i}")
    query = "&".join(f"run=more{i}" for i in range(7))
    assert "choose 1 to 6" in got(runs, f"/runs/-/compare?{query}")[0].text


# ---------------------------------------------------------------- deletion


def test_a_deletion_is_told_before_it_is_done(runs):
    before = sorted(path for path in runs.rglob("*") if ".studio" not in path.parts)
    foreseen = deletion.foresee(runs / "tiny")
    page = got(runs, "/runs/-/delete/tiny")[0].text
    assert f"{foreseen.size / 1e6:.1f} MB" in page and "models of these stages go away: zero" in page
    assert "(twin) use results that therefore stay: brought, base, screened" in page
    assert "zero" not in page.partition("therefore stay")[2].partition("</li>")[0]
    assert 'method="post"' in page
    assert "永久删除" in got(runs, "/runs/-/delete/tiny", headers={"accept-language": "zh"})[0].text
    assert sorted(path for path in runs.rglob("*") if ".studio" not in path.parts) == before


def test_a_deletion_frees_what_no_other_run_uses(runs):
    index = json.loads((runs / "tiny" / "stages.json").read_text())
    checkpoint = runs / "store" / ".checkpoints" / f"{index['zero']}.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.write_bytes(b"state")
    foreseen = deletion.foresee(runs / "tiny")
    answer = asked(runs, ("POST", "/runs/-/delete/tiny", {}))[0]
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs")
    assert not (runs / "tiny").exists()
    gone = {stage for stage, artifact in index.items() if not (runs / "store" / artifact).exists()}
    assert gone == set(OWNED)
    folders = {"tiny", *(index[stage] for stage in OWNED)}
    assert {path.name for path in foreseen.freed} == {*folders, checkpoint.name}
    assert not any(path.exists() for path in foreseen.freed)
    assert run_state.look(runs / "twin").stage("base").state == "done"
    assert deletion.delete(runs / "twin").models == ("brought", "base", "dev1")  # nobody shares them now
    assert not list((runs / "store").glob("*/manifest.json"))


def test_a_deletion_stays_inside_the_store(runs):
    """Also if somebody else wrote the run's files."""
    (runs / "precious").mkdir()
    names = {"a": "../precious", "b": "..", "c": ".queues", "d": ""}
    (runs / "alone" / "stages.json").write_text(json.dumps(names))
    assert list(deletion.delete(runs / "alone").freed) == [runs / "alone"]
    assert (runs / "precious").is_dir() and (runs / "store").is_dir()


def test_of_a_link_only_the_link_is_deleted(runs, tmp_path):
    (runs / "alone").rename(tmp_path / "elsewhere")
    (runs / "alone").symlink_to(tmp_path / "elsewhere")
    deletion.delete(runs / "alone")
    assert not (runs / "alone").exists() and (tmp_path / "elsewhere" / "recipe.yaml").exists()


def test_served_models_and_runs_that_load_from_it_are_named(runs):
    index = json.loads((runs / "tiny" / "stages.json").read_text())
    model = runs / "store" / index["zero"] / "model"
    loading = {"name": "alone", "stages": {"start": {"kind": "load", "path": str(model)}}}
    (runs / "alone" / "recipe.yaml").write_text(yaml.safe_dump(loading))
    served = {"best": model, "other": runs / "store" / index["base"] / "model"}
    foreseen = deletion.foresee(runs / "tiny", served)
    assert (foreseen.served, foreseen.dependent) == (("best",), ("alone",))
    service = NoModels()
    service.models = {"best": SimpleNamespace(folder=model)}
    page = asked(runs, ("GET", "/runs/-/delete/tiny", {}), service=service)[0].text
    assert "This server serves some of them: best." in page and "could not be run again: alone" in page


def test_a_run_that_is_carried_out_is_not_deleted(runs):
    with RunStatus(runs / "tiny"):
        page, answer = asked(runs, ("GET", "/runs/-/delete/tiny", {}), ("POST", "/runs/-/delete/tiny", {}))
        with pytest.raises(LimbeckError, match="is being carried out; pause it first"):
            deletion.delete(runs / "tiny")
    assert 'id="delete"' not in page.text and "pause it first" in page.text
    assert answer.status_code == 409 and (runs / "tiny").exists()


def test_another_site_cannot_delete(runs):
    foreign = {"headers": {"origin": "http://elsewhere.example"}}
    answers = asked(runs, ("POST", "/runs/-/delete/tiny", foreign), ("POST", "/runs/-/delete/nobody", {}))
    assert [answer.status_code for answer in answers] == [403, 404] and (runs / "tiny").exists()


# ---------------------------------------------------------------- a journey


def test_runs_are_sorted_compared_and_deleted_in_the_browser(visit, house, runs):  # noqa: F811
    with house(runs=runs) as url:
        page = visit(url + "/runs")
        page.get_by_role("link", name="Run", exact=True).click()
        assert order(page.content()) == ["alone", "tiny", "twin"]
        accessible(page)
        picture(page, "runs-table")
        page.get_by_label("Choose tiny").check()
        page.get_by_label("Choose twin").check()
        page.get_by_role("button", name="Compare the marked runs").click()
        page.get_by_role("heading", name="Runs compared").wait_for()
        page.locator("select[name=metric]").select_option("dev1/loss")
        page.locator("#draw").click()
        page.locator(".chart svg").wait_for()
        assert "run=tiny&run=twin" in page.url and "metric=dev1%2Floss" in page.url
        accessible(page)
        picture(page, "runs-compare")
        page.goto(url + "/runs/tiny")
        page.locator("#delete-link").click()
        accessible(page)
        picture(page, "runs-delete")
        page.locator("#delete").click()
        page.wait_for_url("**/runs")
        assert sorted(order(page.content())) == ["alone", "twin"] and not jobs.state(runs / "twin").alive
