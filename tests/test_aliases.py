"""Recipes in earlier words: the same keys, one notice for each old word, no setting under both its words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from limbeck.config import aliases
from limbeck.config.load import dump, load
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Artifact, Store, digest_of
from limbeck.types import LimbeckError

NEW = """
name: words
problems:
  clock: {source: miniature}
stages:
  far: {kind: remote, url: "http://far/v1", model: wise, max_concurrency: 2, timeout: 9, licence: MIT}
  base:
    kind: pretrain
    problems: clock
    shape: {latent: {kv_lora_rank: 36, nope_dim: 8, rope_dim: 8, value_dim: 16}, mtp_layers: 1}
    optimizer: {mtp_loss_weight: 0.4}
  pairs: {kind: pairs, model: base, problems: {clock: 1}}
  dpo: {kind: dpo, model: base, pairs: {pairs: 1}}
  helpful: {kind: reward, model: base, rows: pairs}
  zero:
    kind: rl
    model: dpo
    problems: {clock: 1}
    rewards: {accuracy: 1, preference: 0.5}
    learned_rewards: {preference: {of: helpful}}
"""
WORDS = {
    "max_concurrency": "concurrent",
    "timeout": "patience",
    "learned_rewards": "opinions",
    "mtp_layers": "predicted",
    "kv_lora_rank": "kv_rank",
    "mtp_loss_weight": "ahead_weight",
    "kind: dpo": "kind: preference",
}
OVERRIDES = {
    "max_concurrency": "stages.far.{}=3",
    "timeout": "stages.far.{}=3",
    "learned_rewards": "stages.zero.{}.preference.window=9",
    "mtp_layers": "stages.base.shape.{}=2",
    "kv_lora_rank": "stages.base.shape.latent.{}=40",
    "mtp_loss_weight": "stages.base.optimizer.{}=0.5",
}


class Full(Store):
    """A store in which every stage is complete, with its key as its result."""

    def find(self, kind: str, key: str) -> Artifact:
        manifest = {"kind": aliases.stored_kind(kind), "key": key, "digest": digest_of(key), "outputs": {}}
        return Artifact(self.root / "artifact", manifest)


@pytest.fixture(autouse=True)
def unnoticed(monkeypatch):
    monkeypatch.setattr(aliases, "_noticed", set())


def in_old_words(text: str) -> str:
    for new, old in WORDS.items():
        text = text.replace(f"{new}: ", f"{old}: ") if new in OVERRIDES else text.replace(new, old)
    return text


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def graph(folder: Path, text: str) -> Graph:
    return Graph(load(written(folder, text)), Full(folder / "store"), folder)


def test_old_words_give_the_same_recipe_and_keys_and_one_notice_each(tmp_path, capsys):
    today = graph(tmp_path, NEW)
    assert not capsys.readouterr().err
    before = graph(tmp_path, in_old_words(NEW))
    notices = capsys.readouterr().err.splitlines()
    assert before.recipe == today.recipe
    keys = {name: node.key for name, node in today.nodes.items()}
    assert all(keys.values())
    assert {name: node.key for name, node in before.nodes.items()} == keys
    assert len(notices) == len(WORDS)
    for new, old in WORDS.items():
        assert sum(f"`{old}`" in notice and f"`{new}`" in notice for notice in notices) == 1
    graph(tmp_path, in_old_words(NEW))
    assert not capsys.readouterr().err


def test_keys_hash_the_stored_words(tmp_path):
    today = graph(tmp_path, NEW)
    settings = {name: today.identity(node)["settings"] for name, node in today.nodes.items()}
    assert settings["dpo"]["kind"] == "preference"
    assert settings["base"]["shape"]["predicted"] == 1
    assert settings["base"]["shape"]["latent"]["kv_rank"] == 36
    assert settings["base"]["optimizer"]["ahead_weight"] == 0.4
    assert settings["zero"]["opinions"]["preference"]["of"] == "helpful"
    assert not {"timeout", "patience", "max_concurrency", "concurrent"} & settings["far"].keys()


def test_artifacts_keep_the_stored_kind(tmp_path):
    store = Store(tmp_path)
    folder = store.partial("dpo", "0123456789abcdef0")
    assert folder.name == "preference-0123456789abcdef"
    artifact = store.finish(folder, {"kind": "preference", "key": "0123456789abcdef0"})
    assert artifact.kind == "dpo"
    assert store.find("dpo", "0123456789abcdef0") == artifact


def test_dump_writes_the_new_words_only(tmp_path):
    recipe = load(written(tmp_path, in_old_words(NEW)))
    stages = yaml.safe_load(dump(recipe))["stages"]
    assert stages["dpo"]["kind"] == "dpo"
    assert stages["far"]["timeout"] == 9
    assert "patience" not in stages["far"]


@pytest.mark.parametrize("new", OVERRIDES)
def test_overrides_know_old_words(tmp_path, new, capsys):
    override = OVERRIDES[new]
    path = written(tmp_path, NEW)
    assert load(path, [override.format(WORDS[new])]) == load(path, [override.format(new)])
    assert f"`{WORDS[new]}` in a recipe is called `{new}` now" in capsys.readouterr().err


@pytest.mark.parametrize("new", OVERRIDES)
def test_an_old_and_its_new_word_together_are_refused(tmp_path, new):
    tree = yaml.safe_load(NEW)
    *parents, last = OVERRIDES[new].format(new).partition("=")[0].split(".")
    if new == "learned_rewards":
        parents, last = ["stages", "zero"], new
    mapping = tree
    for parent in parents:
        mapping = mapping[parent]
    mapping[WORDS[new]] = mapping[last]
    with pytest.raises(LimbeckError, match=f"has {WORDS[new]} and {new}, the old and the new word"):
        load(written(tmp_path, yaml.safe_dump(tree)))


def test_old_words_elsewhere_are_names_like_others(tmp_path, capsys):
    text = NEW.replace("clock", "predicted").replace("helpful", "patience")
    recipe = load(written(tmp_path, text))
    assert "predicted" in recipe.problems
    assert "patience" in recipe.stages
    assert not capsys.readouterr().err
