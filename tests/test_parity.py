"""The decoder against transformers, against itself packed, and against itself with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.model import weights
from limbeck.model.cache import KVCache, Packed
from limbeck.model.decoder import Decoder

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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

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
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **switches})
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
    assert ours.config.parameters == theirs.num_parameters() == sum(w.numel() for w in ours.parameters())


@pytest.mark.parametrize("lengths", [(9, 9, 9), (7, 3, 30, 1, 12)], ids=str)
def test_packed_sequences_are_blind_to_each_other(pair, lengths):
    ours = pair[1].double()
    rows = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    alone = torch.cat([logits(ours, row) for row in rows])
    torch.testing.assert_close(logits(ours, *rows), alone, atol=1e-10, rtol=0)


class Decoding:
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
        self.cache.keep(torch.tensor(rows))
        self.rows, self.seen = [self.rows[i] for i in rows], [self.seen[i] for i in rows]


def test_cached_decoding_equals_uncached(pair):
    """Two prompts prefilled and forked; rows dropped and new ones let in while others are on their way."""
    decoding = Decoding(pair[1].double())
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
    expected, found = dict(theirs.named_parameters()), dict(ours.named_parameters())
    for part in weights.parts(ours):
        gradient = found[part.ours].grad[part.begin : part.end]
        torch.testing.assert_close(gradient, expected[part.theirs].grad, atol=1e-5, rtol=1e-4)
