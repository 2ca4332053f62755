"""Whether a stage fits a card: its largest micro-batch as it is packed, its rollout as it is admitted, and
settings that make it fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import counted
import numpy as np
import pytest
import torch
import yaml

from limbeck.cli import recipe_plan
from limbeck.config.load import load
from limbeck.config.recipe import RL
from limbeck.engine import device_batch, rollout
from limbeck.engine.device_batch import DeviceBatch
from limbeck.engine.sampling import SamplingParams
from limbeck.model import packed
from limbeck.model.config import ModelConfig
from limbeck.model.decoder import Decoder
from limbeck.model.ops import place
from limbeck.model.ops.table import BLOCK
from limbeck.pipeline import job
from limbeck.pipeline.graph import Graph
from limbeck.pipeline.store import Store
from limbeck.plan import activations, card_runs, chips, fit, micro_batch, rollout_memory, roofline
from limbeck.plan import cluster as clusters
from limbeck.plan.chips import Chip
from limbeck.plan.fit import Fit, foresee
from limbeck.plan.rollout_memory import RolloutMemory
from limbeck.plan.stage_work import StageWork, Walk
from limbeck.train import adamw, divergence
from limbeck.train.batch import pack
from limbeck.types import LimbeckError, Sample

TINY = ModelConfig("llama", 64, 32, 2, 2, 2, 16, 64, max_positions=4096)
SHAPE = {
    "hidden_size": 1536, "layers": 28, "heads": 12, "kv_heads": 4, "intermediate_size": 8960,
}  # fmt: skip
RECIPE = {
    "name": "own",
    "precision": "bfloat16",
    "problems": {"clock": {"source": "miniature", "modulus": 3, "numbers": 3, "largest": 2}},
    "stages": {
        "base": {"kind": "pretrain", "problems": "clock", "tokens": 10000, "shape": SHAPE},
        "zero": {
            "kind": "rl",
            "model": "base",
            "problems": {"clock": 1},
            "batch_tokens": 16384,
            "sampling": {"max_new_tokens": 1000},
        },
        "taught": {
            "kind": "distill",
            "model": "base",
            "teachers": {"clock": "zero"},
            "problems": {"clock": 1},
            "group_size": 2,
        },
        "traces": {"kind": "sample", "model": "zero", "problems": {"clock": 1}},
        "evaluation": {"kind": "evaluate", "models": ["zero"], "problems": ["clock"]},
    },
}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def fits_of(path: Path, card: str, *overrides: str) -> dict[str, Fit]:
    graph = Graph(load(path, overrides), Store(path.parent / "store"), path.parent)
    return recipe_plan.forecast_on(graph, card, {}).fits


def test_what_the_plan_assumes_is_what_the_code_has():
    card = type(counted.card_ops()).__mro__[1]
    assert (activations.LOGITS, rollout_memory.PREFILL) == (card.logits_at_once, card.prefill_tokens)
    assert (rollout_memory.BLOCK, rollout_memory.POOL_SHARE) == (BLOCK, device_batch.POOL_SHARE)
    assert device_batch.BUCKETS[: len(rollout_memory.BUCKETS)] == rollout_memory.BUCKETS
    assert (rollout_memory.PROMPT_STEP, micro_batch.LONG) == (rollout.PROMPT_STEP, packed.LONG)
    assert (fit.LEARNING_ROWS, fit.READING_ROWS) == (job.SMALL_MODEL_ROWS, job.LARGE_MODEL_ROWS)
    assert activations.DISTILLED_LOGITS == divergence.CHUNK
    from limbeck.plan import stage_memory

    assert stage_memory.CHUNK == adamw.CHUNK


@pytest.mark.parametrize(
    ("group", "limit", "batch_tokens", "groups"), [(4, 50, 1000, 9), (4, 50, 100, 2), (2, 3100, 4096, 3)]
)
def test_the_largest_micro_batch_is_the_one_that_is_packed(group, limit, batch_tokens, groups):
    """Groups that share a prompt, one that is larger than `batch_tokens`, and sequences too long to share."""
    stage = RL(
        kind="rl", model="m", problems={"p": 1}, batch_tokens=batch_tokens,
        policy={"group_size": group, "prompts_per_step": groups}, sampling={"max_new_tokens": limit},
    )  # fmt: skip
    foreseen = micro_batch.micro_batch(stage, StageWork("zero", "rl"))
    samples = []
    for i in range(groups):
        prompt = np.full(micro_batch.PROMPT, i + 1)
        for j in range(group):
            samples.append(Sample(np.concatenate([prompt, np.full(limit, j + 1)]), start=len(prompt)))
    batches = pack(samples, batch_tokens)
    largest = max(batches, key=lambda batch: len(batch.tokens_N))
    plan = largest.context.plan
    assert (foreseen.tokens, foreseen.predicted) == (len(largest.tokens_N), len(largest.predict_M))
    assert (foreseen.sequences, foreseen.keys) == (len(plan.rows.lengths), int(plan.rows.lengths.sum()))
    assert foreseen.several == (len(batches) > 1)


@pytest.mark.parametrize(("wanted", "group", "prompt", "limit"), [(16, 4, 100, 60), (12, 4, 200, 300)])
def test_rows_at_once_are_those_that_a_batch_admits(wanted, group, prompt, limit):
    """The pool has room for fewer rows than are wanted."""
    block = BLOCK * TINY.kv_bytes_per_token(4)
    foreseen = RolloutMemory(TINY, 4, wanted, group, prompt, limit, free=2 * 25 * block)
    model = place(Decoder(TINY), "plain")
    batch = DeviceBatch(model, 0, SamplingParams(max_new_tokens=limit), wanted, 256, blocks=25)
    admitted = group * batch.fits([prompt] * (wanted // group), group)
    assert 0 < foreseen.rows == admitted < wanted
    cache = batch.cache
    assert foreseen.pool == cache.keys.nbytes + cache.values.nbytes
    assert RolloutMemory(TINY, 4, wanted, group, prompt, limit, free=1e12).rows == wanted
    assert RolloutMemory(TINY, 4, wanted, group, prompt, limit, free=1e12, reserved=2e12).rows == group


def test_parts_add_up_and_a_large_card_holds_everything(recipe):
    fits = fits_of(recipe, "1xH200")
    assert {"base", "zero", "taught", "traces", "evaluation/zero"} == set(fits)
    assert all(one.fits for one in fits.values())
    told = fits["zero"].told()
    assert told["gib"] == pytest.approx(sum(told["parts"].values()), abs=0.01)
    assert {"weights", "gradients", "masters", "moments", "activations", "cache", "context"} <= set(
        told["parts"]
    )
    weights = fits["traces"].memory.weights
    assert fits["taught"].memory.reference > weights * 0.99  # the teacher
    assert not fits["traces"].memory.moments and fits["traces"].rows == fits["traces"].wanted > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_remedies_make_it_fit_and_none_of_them_is_needless(recipe, precision):
    of_precision = f"precision={precision}"
    tight = fits_of(recipe, "1xRTX4090", of_precision)["zero"]
    assert not tight.fits and tight.remedies and tight.relieved.memory.total < tight.capacity
    settings = [f"stages.zero.{key}={json.dumps(value)}" for key, value in tight.remedies.items()]
    eased = fits_of(recipe, "1xRTX4090", of_precision, *settings)["zero"]
    assert eased.fits and eased.memory == tight.relieved.memory
    for left_out in settings:
        if ".name=" in left_out or "precision" in left_out:
            continue  # the settings beside it are for AdamW, or for 16 bits
        kept = [setting for setting in settings if setting != left_out]
        assert not fits_of(recipe, "1xRTX4090", of_precision, *kept)["zero"].fits, left_out


def test_the_gentlest_settings_come_first(recipe):
    """A card that is a little too small takes recomputing alone; a smaller one what loses precision too."""
    graph = Graph(load(recipe), Store(recipe.parent / "store"), recipe.parent)
    configs = recipe_plan.model_configs(graph)
    walk = Walk(graph.recipe, configs)
    for node in graph.nodes.values():
        walk.add(node.name, node.stage, node.inputs, node.control)

    def told(memory: float) -> dict:
        card = chips.find("h100").change(memory=memory)
        found = foresee(graph.nodes["zero"].stage, walk.efforts["zero"], configs, graph.recipe, card)
        return json.loads(json.dumps(found.told()))

    def remedies(memory: float) -> dict:
        return told(memory)["fits_with"]

    assert told(200)["fits"] and "fits_with" not in told(200)
    assert remedies(60) == {"recompute": "keep_attention"}
    assert remedies(33) == {"recompute": True}
    assert remedies(28) == {"recompute": "keep_attention", "optimizer.moments": "int8"}
    assert remedies(12) == {"recompute": "keep_attention", "optimizer.offload": True}
    assert remedies(9) == {"recompute": "keep_attention", "optimizer.offload": True, "batch_tokens": 8192}
    assert remedies(2) == {}


def test_a_stage_that_vllm_samples_for_has_no_pool(recipe):
    fits = fits_of(recipe, "1xH100", 'stages.zero.engine="http://127.0.0.1:8000/v1"')
    assert not fits["zero"].memory.cache and not fits["zero"].wanted
    assert fits["zero"].memory.total < fits_of(recipe, "1xH100")["zero"].memory.total


def test_latents_take_less_of_the_pool(recipe):
    latent = {"kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 4, "value_dim": 8}
    fits = fits_of(recipe, "1xH100", f"stages.base.shape.latent={json.dumps(latent)}")
    assert fits["zero"].fits and fits["zero"].memory.cache < fits_of(recipe, "1xH100")["zero"].memory.cache


@pytest.mark.parametrize(
    ("name", "chip", "memory"),
    [
        ("1xRTX4090", "4090", 24), ("4090", "4090", 24), ("RTX 4090", "4090", 24), ("rtx-4090", "4090", 24),
        ("GeForce RTX 4090", "4090", 24), ("1xRTX3090", "3090", 24), ("RTX3090", "3090", 24),
        ("A100-80", "a100", 80), ("A100", "a100", 80), ("1xA100-40", "a100-40gb", 40), ("H100", "h100", 80),
        ("RTX3060-12", "3060", 12), ("1xRTX4080", "4080", 16), ("A6000", "a6000", 48), ("L40S", "l40s", 48),
    ],
)  # fmt: skip
def test_cards_by_the_names_that_people_type(name, chip, memory):
    found = clusters.cluster(name)
    assert (found.count, found.chip.name, found.chip.memory) == (1, chip, 1e9 * memory)


def test_every_card_that_serves_has_a_number_of_multiprocessors():
    def units(chip: Chip) -> int:
        return roofline.Roofline(chip, "bf16").units

    assert (
        units(chips.find("rtx3090")) == 82 and units(chips.find("h200")) == units(chips.find("h100")) == 132
    )
    serving = ("ampere", "ada")
    known = [chip.name for chip in chips.catalogue().values() if chip.generation in serving]
    assert all(name.startswith((*roofline.UNITS, "a800")) for name in known)


def test_figures_of_one_card_are_foreseen_within_a_factor_of_two():
    """Memory within a tenth; times as the forecast promises of other chips."""
    runs = list(card_runs.card_runs())
    assert len(runs) > 15 and {run.unit for run in runs} == {"tokens/s", "ms", "GiB"}
    for run in runs:
        assert 0.5 < run.foreseen / run.seen < 2, run
        assert run.unit != "GiB" or run.foreseen == pytest.approx(run.seen, rel=0.1)


# ---------------------------------------------------------------- the command


def test_a_recipe_on_a_card(call, recipe):
    code, out, _ = call("plan", recipe, "--on", "1xRTX4090")
    assert code == 0
    assert "memory of the card" in out and "zero" in out and "does not fit" in out
    assert (
        "fits with recompute: keep_attention" in out and "rows at once" in out and "at $0.34 to $0.6" in out
    )
    code, out, _ = call("plan", recipe, "--on", "RTX3060", "--set", "stages.base.shape.hidden_size=6144")
    assert code == 0 and "no setting makes it fit this card" in out and "not in it      base, " in out
    code, out, _ = call("plan", recipe, "--on", "RTX3060", "--set", "stages.base.shape.layers=1")
    assert code == 0 and "no price of an hour is known" in out


def test_the_same_for_programs(call, recipe):
    told = json.loads(call("plan", recipe, "--on", "1xRTX4090", "--json")[1])
    rows = {row["stage"]: row for row in told["data"]}
    memory = rows["zero"]["memory"]
    assert not memory["fits"] and memory["fits_with"]["recompute"] and memory["rows_at_once"] > 0
    assert memory["gib"] > memory["of_gib"] > memory["fits_with_gib"]
    assert rows["traces"]["memory"]["fits"] and rows["zero"]["forecast"]["seconds"] > 0
    assert told["rental"]["low"] < told["money"] < told["rental"]["high"]


def test_cards_side_by_side(call, recipe):
    cards = [part for name in ("1xRTX4090", "A100", "H100") for part in ("--on", name)]
    code, out, _ = call("plan", recipe, *cards)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4 and lines[0].split() == ["on", "time", "dollars", "fits"]
    assert "all stages" in lines[3] and "zero" in lines[1]
    told = json.loads(call("plan", recipe, *cards, "--json")[1])["cards"]
    assert [card["on"] for card in told] == ["1xRTX4090", "A100", "H100"]
    assert told[0]["seconds"] > told[1]["seconds"] > told[2]["seconds"]
    assert [card["fits"] for card in told] == [False, told[1]["stages"]["zero"]["fits"], True]
    code, _, err = call("plan", "deepseek-v3", *cards)
    assert code == 2 and "several cards are for a recipe" in err
    code, _, err = call("plan", recipe, *cards, "--until", "2099")
    assert code == 2 and "--until 2099: with one --on at a time" in err


def test_an_unknown_card_ends_in_one_sentence(recipe):
    with pytest.raises(LimbeckError, match="rtx4091"):
        fits_of(recipe, "1xrtx4091")


def test_half_of_the_numbers_take_half_of_the_memory(recipe):
    """In bfloat16 the weights of a stage that samples take half of those in float32."""
    half, whole = (fits_of(recipe, "1xH100", f"precision={p}")["traces"] for p in ("bfloat16", "float32"))
    assert half.memory.weights < 0.6 * whole.memory.weights and half.memory.cache * 2 == whole.memory.cache
    assert torch.bfloat16.itemsize == fit.WIDTHS["bfloat16"]


def test_the_page_shows_what_the_command_prints(call, tmp_path, monkeypatch):
    """The how-to page's recipe on the shape of its model, on one card and on four."""
    page = (Path(__file__).parent.parent / "docs/how-to/plan-a-bigger-run.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"(?ms)^```yaml\n(.*?)^```$", page)
    shown = re.findall(r"(?ms)^```sh\nlimbeck plan (own.yaml [^\n]*)\n```\n\n```text\n(.*?)^```$", page)
    shapes = yaml.safe_load(card_runs.FILE.read_text(encoding="utf-8"))["shapes"]
    model = tmp_path / "models/qwen2.5-1.5b"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(ModelConfig(**shapes["1.5B"]).to_hf(0, 0)))
    (tmp_path / "own.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert len(shown) == 2
    for command, text in shown:
        code, out, _ = call("plan", *command.split())
        assert (code, out) == (0, text)
