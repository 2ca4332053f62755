"""Sizes and costs of published models, against the figures of their makers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from limbeck.model.config import ModelConfig
from limbeck.model.footprint import describe, tell

PUBLISHED = Path(__file__).parent.parent / "docs" / "models"

# parameters and those a token meets, in 1e9, as their makers round them; cache values a token, exactly
FIGURES = {
    "deepseek-v3": (671, 37, 35_136),  # arXiv 2412.19437, section 4.2
    "deepseek-v2": (236, 21, 34_560),  # arXiv 2405.04434, section 3.1.2 and Table 1: (512 + 64) x 60
    # arXiv 2411.02265, Table 1; 2 x 8 x 80 x 64 / 2 with keys shared by two layers
    "hunyuan-large": (389, 52, 40_960),
    "llama-3.1-405b": (405, 405, 258_048),
    "qwen2.5-72b": (72.7, 72.7, 163_840),
}
# ISCA 2025, "Insights into DeepSeek-V3", Tables 1 and 2: bytes of cache a token in bfloat16, training GFLOPs
# a token
INSIGHTS = {
    "deepseek-v3": (70_272, 250),
    "deepseek-v2": (None, 155),
    "llama-3.1-405b": (516_096, 2448),
    "qwen2.5-72b": (327_680, None),
}


def published(name: str) -> ModelConfig:
    """The configuration of a published model."""
    return ModelConfig.from_directory(PUBLISHED / f"{name}.json")


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_cache_are_as_published(name):
    """Parameters within their rounding, the cache exactly."""
    config = published(name)
    whole, active, values = FIGURES[name]
    assert config.parameters / 1e9 == pytest.approx(whole, rel=0.003)
    assert config.active_parameters / 1e9 == pytest.approx(active, rel=0.02)
    assert config.kv_bytes_per_token(1) == values


@pytest.mark.parametrize("name", INSIGHTS)
def test_bytes_and_flops_are_as_published(name):
    """Where the table has both or one of them."""
    figures = describe(published(name))
    cache, gflops = INSIGHTS[name]
    if cache is not None:
        assert figures["kv_bytes_per_token"] == cache
    if gflops is not None:
        assert figures["training_flops_per_token"] / 1e9 == pytest.approx(gflops, rel=0.015)


def test_v3_looks_one_token_ahead():
    """The weights of V3's one module of multi-token prediction."""
    config = published("deepseek-v3")
    assert config.parameters_ahead / 1e9 == pytest.approx(11.5, rel=0.015)


def test_v2s_famous_cut_of_the_cache_needs_six_bits():
    """93.3 % against DeepSeek 67B (arXiv 2405.04434, 3.2.3) is at 6 bits; in bfloat16 it is 82.2 %."""
    dense = published("deepseek-67b").kv_bytes_per_token(2)
    latent = published("deepseek-v2")
    in_bfloat16 = latent.kv_bytes_per_token(2) / dense
    in_six_bits = latent.kv_bytes_per_token(1) * 6 / 8 / dense
    assert 1 - in_bfloat16 == pytest.approx(0.822, abs=0.001)
    assert 1 - in_six_bits == pytest.approx(0.933, abs=0.001)


def test_hunyuan_keeps_a_twentieth_of_the_heads():
    """Its cache against one with every head's keys and values."""
    config = published("hunyuan-large")
    all_heads = 2 * config.heads * config.head_dim * config.layers
    assert config.kv_bytes_per_token(1) / all_heads == pytest.approx(0.05)


def test_show_tells_people_and_programs():
    """`limbeck show` with and without --json."""
    path = PUBLISHED / "deepseek-v3.json"
    config = published("deepseek-v3")
    code, out, _ = tiny.answer("show", path, "--json", "--context", 8192)
    assert code == 0
    assert json.loads(out) == {**describe(config, 8192), "weights_bytes": 0}
    _, out, _ = tiny.answer("show", path)
    assert tell(config) in out


def test_show_names_what_is_missing(tmp_path):
    """A file that is not there."""
    code, _, err = tiny.answer("show", tmp_path / "nothing.json")
    assert code == 2
    assert "nothing.json is missing" in err
