"""Small random checkpoints of every family that GGUF is read and written for, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("1", "2"), ("12", "3"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {
    **SHAPE,
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}
del LATENT["head_dim"]
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GROUPS = {"n_group": 4, "topk_group": 2}

# The configuration class of transformers, and what it is given.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE),
    "llama3": ("LlamaConfig", {**SHAPE, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SHAPE, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**SHAPE, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SHAPE),
    "qwen3-yarn": ("Qwen3Config", {**SHAPE, "rope_parameters": YARN}),
    "gemma3": (
        "Gemma3TextConfig",
        {**SHAPE, "num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 32},
    ),
    "qwen3moe": ("Qwen3MoeConfig", {**SHAPE, **EXPERTS, "num_experts": 8, "norm_topk_prob": True}),
    "deepseek-v2": ("DeepseekV2Config", {**LATENT, "q_lora_rank": 48, "n_shared_experts": 2}),
    "deepseek-v2-lite": (
        "DeepseekV2Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **LATENT,
            **GROUPS,
            "q_lora_rank": 48,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek-v3-full": (
        "DeepseekV3Config",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
        },
    ),
}


def save(name: str, directory: Path, vocabulary: int, seed: int = 0, **changes: Any) -> Any:
    """Write the checkpoint's weights and configuration; returns the model of transformers."""
    import transformers

    kind, settings = CHECKPOINTS[name]
    config = getattr(transformers, kind)(**{**settings, "vocab_size": vocabulary, **changes})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():  # norms and biases are born as ones and zeros, which hide mistakes
        for key, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.dim() == 1 and "inv_freq" not in key:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory)
    return model


def tokenizer(steps: list[Any] | None = None, nfc: bool = False, whole_words: bool = False) -> Tokenizer:
    """Byte-level BPE over single bytes and a few merges; SmolLM's way of cutting text unless told
    otherwise."""
    tokens = [*SPECIAL, *LETTERS, *map("".join, MERGES)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, MERGES, ignore_merges=whole_words))
    if nfc:
        made.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(steps or [digits, GPT2])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return made


def save_tokenizer(directory: Path, made: Tokenizer | None = None, **settings: Any) -> None:
    """Write the files that a checkpoint carries beside its weights."""
    directory.mkdir(exist_ok=True, parents=True)
    (made or tokenizer()).save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    (directory / "tokenizer_config.json").write_text(json.dumps({**ends, **settings}))


def isolated(*patterns: str) -> list[Any]:
    """A chain of patterns whose matches are cut out, as tokenizers of DeepSeek, Llama 3 and Qwen begin."""
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [*(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns), bytes_last]
