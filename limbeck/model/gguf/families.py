"""The names of tensors and settings in GGUF and in HuggingFace, for each family of models.

All of it is data that is used both for reading and for writing. Names of tensors are listed without their
layer: `attn_q.weight` of `blk.3` is `self_attn.q_proj.weight` of `model.layers.3`. A tensor that is not
listed is refused. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf

Names = Mapping[str, str]

OUTER: Names = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORMS: Names = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
ATTENTION: Names = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
QKV_BIASES: Names = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
QK_NORMS: Names = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
SANDWICH_NORMS: Names = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
# MLA; its keys and values are one matrix in HuggingFace and two in GGUF (`forms.Latent`).
LATENT: Names = {
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
KEYS_VALUES = (("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight")
FULL_QUERIES: Names = {"attn_q.weight": "self_attn.q_proj.weight"}
LOW_RANK_QUERIES: Names = {
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
}
DENSE: Names = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ROUTER = "ffn_gate_inp.weight"
EXPERTS: Names = {
    ROUTER: "mlp.gate.weight",
    "ffn_gate_exps.weight": "mlp.experts.{}.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.{}.up_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.{}.down_proj.weight",
}
SHARED_EXPERTS: Names = {
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
}
BALANCE: Names = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}


@dataclass(frozen=True)
class Key:
    """A setting that both formats hold, such as `Key("block_count", "num_hidden_layers")`.

    `ggml` is its name in GGUF without the architecture, `theirs` its name in config.json, `kind` its type.
    `default` is the value if a GGUF file lacks the key. A key without a default must be there, and its value
    is a size: a whole number above zero.
    """

    ggml: str
    theirs: str
    kind: type = int
    default: Any = None


# What llama.cpp computes for Gemma 3 if a file does not say otherwise.
PERIOD = 6  # each sixth layer sees all positions
LOCAL_BASE = 10_000.0  # the base of rotary positions in the layers that do not

SIZES = (
    Key("block_count", "num_hidden_layers"),
    Key("context_length", "max_position_embeddings"),
    Key("embedding_length", "hidden_size"),
    Key("feed_forward_length", "intermediate_size"),
    Key("attention.head_count", "num_attention_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", float, 1e-6),
)
EXPERT_SIZES = (
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
)
# What newer versions of transformers call a key.
ALIASES = {"num_local_experts": "num_experts"}
QWEN_EXPERTS = (*EXPERT_SIZES, Key("expert_count", "num_experts"))
DEEPSEEK_EXPERTS = (
    *EXPERT_SIZES,
    Key("expert_count", "n_routed_experts"),
    Key("expert_shared_count", "n_shared_experts"),
    Key("leading_dense_block_count", "first_k_dense_replace", int, 0),
    Key("expert_weights_scale", "routed_scaling_factor", float, 1.0),
    Key("expert_weights_norm", "norm_topk_prob", bool, False),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
)
# Parts of the width of a head; llama.cpp stores their sums.
LATENT_SIZES = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class Family:
    """One class of models in transformers, and the architecture of llama.cpp that runs it.

    `Family("qwen3", "qwen3", layer={**NORMS, **ATTENTION, **QK_NORMS})` is Qwen3's. `ggml` is the name of
    llama.cpp's architecture, `model_type` the short name in transformers. `layer` lists the tensors that all
    layers have, `dense` and `sparse` those that a dense feed-forward and one with experts have in addition.
    `wanted` holds, for keys of config.json, the only value that llama.cpp computes. `interleaved` means that
    the rows of queries and keys have another order in GGUF than in HuggingFace. `latent` marks multi-head
    latent attention (MLA), `gate` the function of the router's scores.
    `norms_from_one` means that the weights of norms are one higher in GGUF than in HuggingFace.
    """

    ggml: str
    model_type: str
    layer: Names
    dense: Names = field(default_factory=lambda: DENSE)
    sparse: Names = field(default_factory=dict)
    keys: tuple[Key, ...] = SIZES
    wanted: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    latent: bool = False
    gate: gguf.ExpertGatingFuncType | None = None
    norms_from_one: bool = False


SILU = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LLAMA = {**NORMS, **ATTENTION}
DEEPSEEK = {**NORMS, **LATENT}
GEMMA3_WANTED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
DEEPSEEK_WANTED = {**SILU, "moe_layer_freq": 1, "rope_interleave": True}

# Where two classes share an architecture and a gate, the first is what a GGUF file becomes.
FAMILIES = {
    "LlamaForCausalLM": Family("llama", "llama", LLAMA, wanted=SILU, interleaved=True),
    "MistralForCausalLM": Family("llama", "mistral", LLAMA, wanted=SILU, interleaved=True),
    "Qwen2ForCausalLM": Family("qwen2", "qwen2", {**LLAMA, **QKV_BIASES}, wanted=SILU),
    "Qwen3ForCausalLM": Family("qwen3", "qwen3", {**LLAMA, **QK_NORMS}, wanted=SILU),
    "Qwen3MoeForCausalLM": Family(
        "qwen3moe",
        "qwen3_moe",
        {**LLAMA, **QK_NORMS},
        sparse=EXPERTS,
        keys=(*SIZES, *QWEN_EXPERTS),
        wanted={**SILU, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3",
        "gemma3_text",
        {**SANDWICH_NORMS, **ATTENTION, **QK_NORMS},
        keys=(*SIZES, Key("attention.sliding_window", "sliding_window")),
        wanted=GEMMA3_WANTED,
        norms_from_one=True,
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek2",
        "deepseek_v2",
        DEEPSEEK,
        sparse={**EXPERTS, **SHARED_EXPERTS},
        keys=(*SIZES, *DEEPSEEK_EXPERTS),
        wanted={**DEEPSEEK_WANTED, "scoring_func": "softmax", "norm_topk_prob": False},
        latent=True,
        gate=gguf.ExpertGatingFuncType.SOFTMAX,
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek2",
        "deepseek_v3",
        DEEPSEEK,
        sparse={**EXPERTS, **SHARED_EXPERTS, **BALANCE},
        keys=(*SIZES, *DEEPSEEK_EXPERTS),
        wanted={**DEEPSEEK_WANTED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        latent=True,
        gate=gguf.ExpertGatingFuncType.SIGMOID,
    ),
}
