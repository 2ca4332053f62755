"""The decoder against transformers, against itself packed, and against itself with a cache."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.model import weights
from limbeck.model.decoder import Decoder
from limbeck.model.kv_cache import KVCache, Packed

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
FALCON = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 0.8, "mscale_all_dim": 1.0}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}

GEMMA3 = {"sliding_window": 7, "sliding_window_pattern": 3, "query_pre_attn_scalar": 20}

TEXT_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
VARIANTS = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied-mha": ("Llama", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-llama3-rope": ("Llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen2-gqa": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-mha-untied": ("Qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "qwen2-mqa": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3-gqa": ("Qwen3", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3-wide-heads-mha": ("Qwen3", {"num_key_value_heads": 4, "head_dim": 32}),
    "qwen3-mqa": ("Qwen3", {"num_key_value_heads": 1}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2-half-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "num_experts": 8, "norm_topk_prob": True}),
    "qwen3-moe-some-dense": (
        "Qwen3Moe",
        {**MOE, "num_experts": 8, "decoder_sparse_step": 2, "norm_topk_prob": False},
    ),
    "falcon-7b": ("Falcon", {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "gemma3": ("Gemma3", GEMMA3),
    "gemma3-one-base": ("Gemma3", {**GEMMA3, "layer_types": ["full_attention"] * 3, "head_dim": 32}),
    "gemma3-linear-rope": (
        "Gemma3",
        {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e5},
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        {**MLA, **MOE, "q_lora_rank": None, "n_routed_experts": 6, "n_group": None},
    ),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **MLA,
            **MOE,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
    ),
    "deepseek-v2-yarn": ("DeepseekV2", {**MLA, **MOE, "rope_scaling": DEEPSEEK_YARN}),
    "deepseek-v3": ("DeepseekV3", {**MLA, **MOE, "n_group": 4, "topk_group": 2}),
    "deepseek-v3-full-queries": (
        "DeepseekV3",
        {**MLA, **MOE, "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    ),
    "deepseek-v3-yarn": (
        "DeepseekV3",
        {**MLA, **MOE, "n_group": 2, "topk_group": 1, "rope_scaling": DEEPSEEK_YARN},
    ),
    "deepseek-v3-dense": (
        "DeepseekV3",
        {**MLA, **MOE, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 3},
    ),
    "deepseek-v3-halves": (
        "DeepseekV3",
        {**MLA, **MOE, "n_group": 2, "topk_group": 1, "rope_interleave": False},
    ),
    "hunyuan-moe": ("HunYuanMoEV1", {"num_experts": 6, "moe_topk": 2}),
    "hunyuan-moe-alpha": (
        "HunYuanMoEV1",
        {"num_experts": 4, "moe_topk": 1, "rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small gain nothing from a second thread, and lose much where cores are contended."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def pair(request, tmp_path_factory) -> tuple[torch.nn.Module, Decoder, Path]:
    """The same random weights in transformers and here; ours came through a HuggingFace directory."""
    name, switches = VARIANTS[request.param]
    torch.manual_seed(0)
    sizes = {key: size for key, size in SIZES.items() if name != "Falcon" or key in FALCON}
    kind = TEXT_CONFIGS.get(name, f"{name}Config")
    config = getattr(transformers, kind)(**{**sizes, "pad_token_id": None, **switches})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # fresh norms are ones and biases zeros, which would hide that they are not read
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return theirs, weights.load(directory), directory


def logits(decoder: Decoder, *rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return decoder.head(decoder(torch.cat(rows), Packed([len(row) for row in rows])))


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (count,), generator=torch.Generator().manual_seed(seed))


def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    row = tokens(120)
    with torch.no_grad():
        expected = theirs(row.unsqueeze(0)).logits[0]
    torch.testing.assert_close(logits(ours, row), expected, atol=1e-4, rtol=0)


def test_what_is_saved_loads_in_transformers_with_equal_logits(pair, tmp_path):
    theirs, ours, _ = pair
    weights.save(ours, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    row = tokens(60)
    with torch.no_grad():
        assert torch.equal(again(row.unsqueeze(0)).logits, theirs(row.unsqueeze(0)).logits)


def test_parameters_are_counted_as_transformers_counts_them(pair):
    theirs, ours, _ = pair
    biases = sum(bias.numel() for name, bias in theirs.named_buffers() if name.endswith("correction_bias"))
    assert (
        ours.config.parameters
        == theirs.num_parameters() + biases
        == sum(w.numel() for w in ours.parameters())
    )


@pytest.mark.parametrize("lengths", [(9, 9, 9), (7, 3, 30, 1, 12)], ids=str)
def test_packed_sequences_are_blind_to_each_other(pair, lengths):
    ours = pair[1].double()
    rows = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    alone = torch.cat([logits(ours, row) for row in rows])
    torch.testing.assert_close(logits(ours, *rows), alone, atol=1e-10, rtol=0)


class DecodeStep:
    """Rows that grow by given tokens through the cache; `seen` holds each row's logits, step by step."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.cache = decoder, KVCache(decoder.config, torch.float64)
        self.rows: list[torch.Tensor] = []
        self.seen: list[list[torch.Tensor]] = []

    @torch.no_grad()
    def admit(self, prompts: list[torch.Tensor], copies: list[int]) -> None:
        prefill = Packed([len(p) for p in prompts]).keep()
        self.decoder(torch.cat(prompts), prefill)
        self.cache.fork(prefill, copies)
        self.rows += [p for p, n in zip(prompts, copies, strict=True) for _ in range(n)]
        self.seen += [[] for _ in range(sum(copies))]

    @torch.no_grad()
    def step(self, seed: int) -> None:
        new = tokens(len(self.rows), seed)
        self.cache.advance()
        for i, logits in enumerate(self.decoder.head(self.decoder(new, self.cache))):
            self.rows[i] = torch.cat([self.rows[i], new[i : i + 1]])
            self.seen[i].append(logits)

    def keep(self, rows: list[int]) -> None:
        self.cache.select_rows(np.array(rows))
        self.rows, self.seen = [self.rows[i] for i in rows], [self.seen[i] for i in rows]


def test_cached_decoding_equals_uncached(pair):
    """Two prompts prefilled and forked; rows dropped and new ones let in while others are on their way."""
    decoding = DecodeStep(pair[1].double())
    decoding.admit([tokens(5, 1), tokens(11, 2)], [3, 2])
    for seed in range(40):
        decoding.step(seed)
    decoding.keep([0, 3, 4])
    decoding.step(50)
    decoding.admit([tokens(17, 3), tokens(2, 4)], [1, 2])
    for seed in range(60, 66):
        decoding.step(seed)
    uncached = logits(decoding.decoder, *decoding.rows).split([len(row) for row in decoding.rows])
    for seen, expected in zip(decoding.seen, uncached, strict=True):
        torch.testing.assert_close(torch.stack(seen), expected[-len(seen) :], atol=1e-10, rtol=0)


def test_gradients_equal_transformers(pair):
    theirs, ours, directory = pair
    ours, row = weights.load(directory), tokens(24)
    loss = torch.nn.functional.cross_entropy(ours.head(ours(row[:-1], Packed([23]))), row[1:])
    loss.backward()
    theirs.zero_grad()
    theirs(row.unsqueeze(0), labels=row.unsqueeze(0)).loss.backward()
    found = dict(ours.named_parameters())
    for part in weights.parts(ours):
        if found[part.ours].requires_grad:
            expected = gradient_of(theirs, part.theirs)
            expected = expected if part.order is None else expected[part.order]
            torch.testing.assert_close(part.place(found[part.ours].grad), expected, atol=1e-5, rtol=1e-4)


def gradient_of(theirs: torch.nn.Module, name: str) -> torch.Tensor:
    """By the name in a checkpoint; in memory transformers stacks the experts."""
    weights_ = dict(theirs.named_parameters())
    name = name.replace("block_sparse_moe", "mlp")
    if expert := re.fullmatch(r"(.*experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight", name):
        stem, number, kind = expert.groups()
        if kind in ("down_proj", "w2"):
            return weights_[f"{stem}.down_proj"].grad[int(number)]
        both = weights_[f"{stem}.gate_up_proj"].grad[int(number)]
        return both.chunk(2)[kind in ("up_proj", "w3")]
    return weights_[name].grad
