"""The supported families of models: their fixed settings, their keys in config.json, their tensor names.

All of it is data that is used both for reading and for writing. A model whose family is not listed is refused
with an error that lists the families. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Names = Mapping[str, tuple[str, ...]]

# Our module -> the HuggingFace tensors that are stacked in it by rows. `{layer}` and `{expert}` are numbers;
# a name without `.weight` or `.bias` gets the suffix of our parameter.
LLAMA: Names = {
    "embed": ("model.embed_tokens",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
    "attention_norm": ("model.layers.{layer}.input_layernorm",),
    "attention.qkv": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj",
    ),
    "attention.q": ("model.layers.{layer}.self_attn.q_proj",),
    "attention.q_norm": ("model.layers.{layer}.self_attn.q_norm",),
    "attention.k_norm": ("model.layers.{layer}.self_attn.k_norm",),
    "attention.out": ("model.layers.{layer}.self_attn.o_proj",),
    "ffn_norm": ("model.layers.{layer}.post_attention_layernorm",),
    "ffn.gate_up": ("model.layers.{layer}.mlp.gate_proj", "model.layers.{layer}.mlp.up_proj"),
    "ffn.down": ("model.layers.{layer}.mlp.down_proj",),
    # multi-token prediction, as DeepSeek-V3 stores it: layers beyond the last
    "embed_norm": ("model.layers.{layer}.enorm",),
    "hidden_norm": ("model.layers.{layer}.hnorm",),
    "join": ("model.layers.{layer}.eh_proj",),
    "head_norm": ("model.layers.{layer}.shared_head.norm",),
}

MIXTURE: Names = {
    **LLAMA,
    "ffn.router": ("model.layers.{layer}.mlp.gate",),
    "ffn.correction": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
    "ffn.experts_gate_up": (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    ),
    "ffn.experts_down": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
    "ffn.shared.gate_up": (
        "model.layers.{layer}.mlp.shared_experts.gate_proj",
        "model.layers.{layer}.mlp.shared_experts.up_proj",
    ),
    "ffn.shared.down": ("model.layers.{layer}.mlp.shared_experts.down_proj",),
}

MIXTRAL: Names = {
    **LLAMA,
    "ffn.router": ("model.layers.{layer}.block_sparse_moe.gate",),
    "ffn.experts_gate_up": (
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    ),
    "ffn.experts_down": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
}

DEEPSEEK: Names = {
    **MIXTURE,
    "attention.q_latent": (
        "model.layers.{layer}.self_attn.q_a_proj",
        "model.layers.{layer}.self_attn.kv_a_proj_with_mqa",
    ),
    "attention.q_full": (
        "model.layers.{layer}.self_attn.q_proj",
        "model.layers.{layer}.self_attn.kv_a_proj_with_mqa",
    ),
    "attention.q_norm": ("model.layers.{layer}.self_attn.q_a_layernorm",),
    "attention.q_up": ("model.layers.{layer}.self_attn.q_b_proj",),
    "attention.kv_norm": ("model.layers.{layer}.self_attn.kv_a_layernorm",),
    "attention.kv_up": ("model.layers.{layer}.self_attn.kv_b_proj",),
}

HUNYUAN: Names = {
    **MIXTURE,
    "attention.q_norm": ("model.layers.{layer}.self_attn.query_layernorm",),
    "attention.k_norm": ("model.layers.{layer}.self_attn.key_layernorm",),
    "ffn.router": ("model.layers.{layer}.mlp.gate.wg",),
    "ffn.shared.gate_up": (
        "model.layers.{layer}.mlp.shared_mlp.gate_proj",
        "model.layers.{layer}.mlp.shared_mlp.up_proj",
    ),
    "ffn.shared.down": ("model.layers.{layer}.mlp.shared_mlp.down_proj",),
}

GEMMA: Names = {
    **LLAMA,
    "attention_post_norm": ("model.layers.{layer}.post_attention_layernorm",),
    "ffn_norm": ("model.layers.{layer}.pre_feedforward_layernorm",),
    "ffn_post_norm": ("model.layers.{layer}.post_feedforward_layernorm",),
}

FALCON: Names = {
    "embed": ("transformer.word_embeddings",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
    "attention_norm": ("transformer.h.{layer}.input_layernorm",),
    "attention.qkv": ("transformer.h.{layer}.self_attention.query_key_value",),
    "attention.out": ("transformer.h.{layer}.self_attention.dense",),
    "ffn.up": ("transformer.h.{layer}.mlp.dense_h_to_4h",),
    "ffn.down": ("transformer.h.{layer}.mlp.dense_4h_to_h",),
}

# Field of `ModelConfig`, `Latent` or `Experts` -> key of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
LATENT = {
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}
DEEPSEEK_EXPERTS = {
    "count": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
    "normalize": "norm_topk_prob",
}
DEEPSEEK_GROUPS = {
    **DEEPSEEK_EXPERTS,
    "scale": "routed_scaling_factor",
    "groups": "n_group",
    "top_groups": "topk_group",
}


@dataclass(frozen=True)
class Family:
    """The differences of one family of models from Llama, and its names in transformers.

    `architecture` is the class in transformers and `model_type` its short name. `names` maps our modules to
    HuggingFace tensors. `sizes` maps fields of `ModelConfig` to keys of config.json, `experts` does so for
    fields of `Experts`. `switches` are the values of fields of `ModelConfig` that all models of the family
    share, and `gate` the values of fields of `Experts`. `wanted` holds the one supported value of each key of
    config.json that would change the logits: any other value is refused. `norm_eps` is the key of the epsilon
    of norms. `latent` marks families with MLA. `tied` and `theta` are the defaults of tied embeddings and of
    the base of rotary positions.
    """

    architecture: str
    model_type: str
    names: Names = field(default_factory=lambda: LLAMA)
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)
    switches: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, Any] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    latent: bool = False
    tied: bool = False
    theta: float = 10_000.0


SILU = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
GEMMA3 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
FALCON_7B = {
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "activation": "gelu",
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", wanted=SILU),
    "mistral": Family("MistralForCausalLM", "mistral", wanted=SILU),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", switches={"qkv_bias": True}, wanted=SILU),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", switches={"qk_norm": "before"}, wanted=SILU),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        MIXTURE,
        switches={"qk_norm": "before"},
        experts={
            "count": "num_experts",
            "top_k": "num_experts_per_tok",
            "intermediate_size": "moe_intermediate_size",
            "normalize": "norm_topk_prob",
        },
        wanted=SILU,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        "mixtral",
        MIXTRAL,
        experts={
            "count": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "intermediate_size": "intermediate_size",
        },
        gate={"normalize": True},
        wanted=SILU,
        theta=1e6,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "falcon",
        FALCON,
        sizes={**SIZES, "intermediate_size": "ffn_hidden_size"},
        switches={"layer_norm": True, "parallel": True, "gated": False},
        wanted=FALCON_7B,
        norm_eps="layer_norm_epsilon",
        tied=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        GEMMA,
        switches={
            "qk_norm": "before",
            "gelu": True,
            "norms_from_one": True,
            "post_norms": True,
            "scaled_embeddings": True,
        },
        wanted=GEMMA3,
        tied=True,
        theta=1e6,
    ),
    "deepseek": Family(
        "DeepseekForCausalLM",
        "deepseek",
        MIXTURE,
        experts=DEEPSEEK_EXPERTS,
        wanted={**SILU, "scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        DEEPSEEK,
        experts=DEEPSEEK_GROUPS,
        wanted={**SILU, "scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False},
        latent=True,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        DEEPSEEK,
        experts=DEEPSEEK_GROUPS,
        gate={"sigmoid": True, "balanced": True},
        wanted={**SILU, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        latent=True,
    ),
    "hunyuan_v1_moe": Family(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        HUNYUAN,
        switches={"qk_norm": "after"},
        experts={"count": "num_experts", "top_k": "moe_topk", "intermediate_size": "intermediate_size"},
        gate={"normalize": True},
        wanted={**SILU, "num_shared_expert": 1, "use_mixed_mlp_moe": True},
    ),
    "hunyuan": Family(  # Hunyuan-Large, whose single expert's weight is left as the gate gave it
        "HunYuanForCausalLM",
        "hunyuan",
        HUNYUAN,
        experts={"count": "num_experts", "top_k": "moe_topk", "intermediate_size": "intermediate_size"},
        wanted={**SILU, "use_mixed_mlp_moe": True},
    ),
}
