"""Settings of the optimizer that save memory: what is refused, and which keys they change."""

from __future__ import annotations

import pytest
import tiny

from limbeck.config.load import load
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Store
from limbeck.types import LimbeckError

STAGE = "stages.base"


@pytest.fixture
def recipe(tmp_path):
    """`recipe(*settings)`: one with every kind of stage, with settings of its pretraining."""
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.RECIPE)
    return lambda *settings: load(path, [f"{STAGE}.{setting}" for setting in settings])


@pytest.mark.parametrize(
    "settings, named",
    [
        (["optimizer={name: muon, moments: int8}"], ("optimizer", "moments: int8", "name is muon")),
        (["optimizer={name: muon, masters: false}"], ("optimizer", "masters: false", "name is muon")),
        (["optimizer={name: muon, offload: true}"], ("optimizer", "offload: true", "name is muon")),
        (["optimizer={masters: false}"], ("optimizer.masters: false", "set precision: bfloat16")),
        (
            ["optimizer={masters: false}", "precision=float32"],
            ("optimizer.masters: false", "precision is float32"),
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(recipe, settings, named):
    with pytest.raises(LimbeckError) as error:
        recipe(*settings)
    sentence = str(error.value)
    assert "\n" not in sentence and all(words in sentence for words in (STAGE, *named)), sentence


def test_adapters_have_no_masters(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny.RECIPE)
    settings = ["precision=bfloat16", "stages.zero.lora={rank: 2}", "stages.zero.optimizer={masters: false}"]
    with pytest.raises(LimbeckError, match=r"stages\.zero\.lora: .* leave optimizer\.masters: false out$"):
        load(path, settings)
    load(path, [settings[0], settings[2]])


def test_what_changes_the_result_changes_the_key_and_nothing_else_does(recipe, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def key(more: str) -> str | None:
        graph = Graph(
            recipe("precision=bfloat16", f"optimizer={{learning_rate: 0.02{more}}}"),
            Store(tmp_path / "store"),
            tmp_path,
        )
        return graph.nodes["base"].key

    plain = key("")
    assert plain
    for same in (", moments: float32", ", masters: true", ", offload: true", ", offload: false"):
        assert key(same) == plain, same
    assert len({plain, key(", moments: int8"), key(", masters: false")}) == 3
