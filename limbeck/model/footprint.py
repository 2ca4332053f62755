"""What a model takes, told from its configuration alone: weights, arithmetic, cache, memory. No torch."""

from __future__ import annotations

from typing import Any

from .config import ModelConfig

# Bytes a weight while learning: weight and gradient in bfloat16 with a float32 master copy, or both in float32, and
# AdamW's two moments in float32: 16 either way. (DeepSeek-V3 keeps its moments in bfloat16.)
LEARNING = 16


def describe(config: ModelConfig, context: int = 4096) -> dict[str, Any]:
    """Figures of one model; FLOPs are at `context` tokens, causal, so that a token sees half of them."""
    whole = config.parameters + config.parameters_ahead
    seen = context / 2
    return {
        "family": config.family,
        "parameters": config.parameters,
        "active_parameters": config.active_parameters,
        "parameters_ahead": config.parameters_ahead,
        "forward_flops_per_token": config.flops_per_token(seen),
        "training_flops_per_token": config.flops_per_token(seen, backward=True),
        "kv_values_per_token": config.kv_bytes_per_token(1),
        "kv_bytes_per_token": config.kv_bytes_per_token(2),
        "training_bytes": LEARNING * whole,
        "serving_bytes": 2 * config.parameters + config.kv_bytes_per_token(2) * context,
        "context": context,
    }


def tell(config: ModelConfig, context: int = 4096) -> str:
    """The same for people."""
    told = describe(config, context)
    layers = f"{config.layers} layers of {config.hidden_size}"
    attention = (
        "MLA"
        if config.latent
        else "MHA"
        if config.kv_heads == config.heads
        else "MQA"
        if config.kv_heads == 1
        else "GQA"
    )
    if config.share_kv > 1:
        attention += f", keys shared by {config.share_kv} layers"
    mixture = ""
    if config.experts:
        experts = config.experts
        shared = (
            f" and {experts.shared_size // experts.intermediate_size} shared" if experts.shared_size else ""
        )
        mixture = f", {experts.top_k} of {experts.count} experts{shared} in {config.sparse_layers - config.predicted} layers"
    learning = _count(told["training_flops_per_token"])
    rows = [
        ("architecture", f"{config.family}: {layers}, {config.heads} heads, {attention}{mixture}"),
        (
            "parameters",
            f"{_count(told['parameters'])}, of which a token meets {_count(told['active_parameters'])}",
        ),
        (
            "FLOPs a token",
            f"{_count(told['forward_flops_per_token'])} forward, {learning} in training, within {context:,} tokens",
        ),
        (
            "cache a token",
            f"{told['kv_values_per_token']:,} values, {told['kv_bytes_per_token']:,} bytes in bfloat16",
        ),
        (
            "to serve",
            f"{_bytes(told['serving_bytes'])}: weights in bfloat16 and one conversation of {context:,} tokens",
        ),
        (
            "to train",
            f"{_bytes(told['training_bytes'])}: {LEARNING} bytes a weight (AdamW, mixed precision or float32), activations aside",
        ),
    ]
    if told["parameters_ahead"]:
        rows.insert(
            2,
            (
                "looking ahead",
                f"{_count(told['parameters_ahead'])} more in {config.predicted} module(s) for multi-token prediction",
            ),
        )
    return "\n".join(f"{name:14} {text}" for name, text in rows)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"
