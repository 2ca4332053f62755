"""Stages that learn with little memory, stopped and continued: the bytes of one that ran through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_lora import carry_out

from limbeck.model import weights
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder

pytestmark = pytest.mark.slow

RECIPE = """
name: little
threads: 1
problems:
  clock: {source: miniature, modulus: 3, numbers: 3, largest: 2}
stages:
  base: {kind: load, path: model, licence: own}
  zero:
    kind: rl
    model: base
    problems: {clock: 1}
    rewards: {language: 1}
    steps: 3
    policy: {prompts_per_step: 3, group_size: 3, zero_variance: keep, mask_truncated: false}
    sampling: {max_new_tokens: 8}
    precision: bfloat16
    optimizer: {learning_rate: 0.01, moments: int8, masters: false}
    save_every: 0.001
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("little")
    (folder / "little.yaml").write_text(RECIPE)
    sizes = ModelConfig("llama", tokenizer.size, 64, 1, 4, 2, 16, 96, max_positions=128)
    weights.save(Decoder(sizes).initialize(0), folder / "model", tokenizer)
    return folder / "little.yaml"


def manifest(folders: dict[str, Path]) -> dict:
    return json.loads((folders["zero"] / "manifest.json").read_text())


def test_stopped_after_every_step_and_on_the_host_it_ends_with_the_same_bytes(recipe, tmp_path):
    whole = manifest(carry_out(recipe, tmp_path / "whole"))
    again = manifest(carry_out(recipe, tmp_path / "again", stopping=True))
    hosted = carry_out(recipe, tmp_path / "host", "stages.zero.optimizer.offload=true", stopping=True)
    assert whole["digest"] == again["digest"] == manifest(hosted)["digest"]
    assert whole["key"] == manifest(hosted)["key"]
    kept = carry_out(recipe, tmp_path / "kept", "stages.zero.optimizer={learning_rate: 0.01}")
    assert manifest(kept)["digest"] != whole["digest"]


def test_more_steps_go_on_from_its_final_checkpoint(recipe, tmp_path):
    carry_out(recipe, tmp_path / "short")
    continued, anew = (
        manifest(carry_out(recipe, tmp_path / home, "stages.zero.steps=5")) for home in ("short", "long")
    )
    assert continued["digest"] == anew["digest"]
    assert "continued" in continued and "continued" not in anew
