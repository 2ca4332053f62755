"""From a release to a conversation: the command serves a released model, and a person chats in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
import tiny
from studio import accessible, picture
from test_gguf import tiny as small
from test_gguf import write_gguf

from limbeck.serve.pages import say

pytestmark = pytest.mark.slow

QUESTION = "use 1 2 1 make 0 ?"
HOW = {"max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}


@contextmanager
def serving(*arguments: object) -> Iterator[str]:
    """`limbeck serve`, as a process of its own; its address once it answers."""
    process = tiny.limbeck(
        "serve", *arguments, "--port", 0, "--threads", 1, env=tiny.environment(OMP_NUM_THREADS="1")
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), process.stderr.read()
        yield line.split()[0]
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)


def names(url: str) -> list[str]:
    return [model.id for model in openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list()]


@pytest.fixture(scope="module")
def released(finished, tmp_path_factory):
    """What `limbeck release` hands on of the tiny recipe's `zero`."""
    folder = tmp_path_factory.mktemp("released") / "tiny-zero"
    code, out, errors = tiny.answer("release", "tiny/zero", folder, "--runs", finished.home)
    assert code == 0 and str(folder) in out, errors
    return folder


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_released_model_is_talked_to(visit, released, tmp_path, language):
    with serving(released, "--runs", tmp_path) as url:
        assert names(url) == ["tiny-zero"]
        page = visit(url + "/chat", language)
        page.get_by_role("heading", name=say(language, "chat.new_title")).wait_for()
        page.locator(".composer > textarea").fill(QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_url("**/chat/*")
        page.locator(".answer[data-state=done]").wait_for()
        said = page.locator(".answer").inner_text()
        page.reload()
        page.locator(".answer[data-state=done]").wait_for()
        assert page.locator(".answer").inner_text() == said and "tiny-zero" in said
        accessible(page)
        picture(page, f"released-{language}")
        page.close()  # before the server goes, which it asks now and then


def test_whatever_has_a_name_can_be_served(finished, released, tmp_path):
    """A run by name and by folder, a stage of it, an artifact by a prefix of its name, a GGUF file."""
    (zero,) = {
        path.name
        for path in (finished.home / "store").glob("rl-*")
        if '"stage": "zero"' in (path / "manifest.json").read_text()
    }
    file = write_gguf(small(), tmp_path / "small.gguf")
    given = ["a=tiny", f"b={finished.home / 'tiny'}", "c=tiny/zero", f"d={zero[:7]}", f"e={released}", file]
    with serving(*given, "--runs", finished.home) as url:
        assert names(url) == ["a", "b", "c", "d", "e", "small"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        said = {
            name: client.completions.create(model=name, prompt="123" if name == "small" else QUESTION, **HOW)
            .choices[0]
            .text
            for name in names(url)
        }
        assert said["a"] == said["b"] and said["c"] == said["d"] == said["e"] and all(said.values())


def test_a_run_that_shares_its_name_with_a_model_is_not_guessed_at(finished, monkeypatch):
    monkeypatch.chdir(finished.home.parent)
    twin = finished.home.parent / "models" / "tiny"
    twin.mkdir(parents=True)
    try:
        code, _, errors = tiny.answer("serve", "tiny", "--runs", finished.home, "--port", 0)
    finally:
        twin.rmdir()
    assert code == 2 and f"tiny is a run and a model; say {finished.home / 'tiny'} or models/tiny" in errors
