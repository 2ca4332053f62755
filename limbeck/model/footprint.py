"""A model's parameters, FLOPs, cache and memory, from its configuration alone. Does not import torch."""

from __future__ import annotations

from typing import Any

from .config import Experts, ModelConfig

# Bytes per weight in training: weight and gradient in bfloat16 with a float32 master copy, or both in
# float32,
# and AdamW's two moments in float32: 16 either way. (DeepSeek-V3 keeps its moments in bfloat16.)
TRAINING_BYTES = 16  # bytes per weight


def describe(config: ModelConfig, context: int = 4096) -> dict[str, Any]:
    """Return the sizes and costs of a model by name: parameters, FLOPs, values and bytes.

    FLOPs are the mean over a sequence of `context` tokens: with causal attention, a token sees half of them.
    Cache and serving memory assume bfloat16.
    """
    seen = context / 2
    weights = config.parameters + config.parameters_ahead
    cached = config.kv_bytes_per_token(2)
    return {
        "family": config.family,
        "parameters": config.parameters,
        "active_parameters": config.active_parameters,
        "parameters_ahead": config.parameters_ahead,
        "forward_flops_per_token": config.flops_per_token(seen),
        "training_flops_per_token": config.flops_per_token(seen, backward=True),
        "kv_values_per_token": config.kv_bytes_per_token(1),
        "kv_bytes_per_token": cached,
        "training_bytes": TRAINING_BYTES * weights,
        "serving_bytes": 2 * config.parameters + cached * context,
        "context": context,
    }


def tell(config: ModelConfig, context: int = 4096) -> str:
    """Return the figures of `describe` as text, one line for each."""
    figures = describe(config, context)
    serving = size_text(figures["serving_bytes"])
    training = size_text(figures["training_bytes"])
    rows = {"architecture": _architecture(config)}
    rows["parameters"] = _count(figures["parameters"])
    if config.experts:
        rows["parameters"] += f", of which a token uses {_count(figures['active_parameters'])}"
    if figures["parameters_ahead"]:
        rows["looking ahead"] = (
            f"{_count(figures['parameters_ahead'])} more in {config.predicted} module(s) "
            "for multi-token prediction"
        )
    rows["FLOPs a token"] = (
        f"{_count(figures['forward_flops_per_token'])} forward, "
        f"{_count(figures['training_flops_per_token'])} in training, within {context:,} tokens"
    )
    rows["cache a token"] = (
        f"{figures['kv_values_per_token']:,} values, {figures['kv_bytes_per_token']:,} bytes in bfloat16"
    )
    rows["to serve"] = f"{serving}: weights in bfloat16 and one conversation of {context:,} tokens"
    rows["to train"] = (
        f"{training}: {TRAINING_BYTES} bytes a weight (AdamW, mixed precision or float32), activations aside"
    )
    return "\n".join(f"{name:14} {text}" for name, text in rows.items())


def _architecture(config: ModelConfig) -> str:
    """Return one line of text about layers, heads and experts."""
    attention = _attention(config)
    if config.share_kv > 1:
        attention += f", keys shared by {config.share_kv} layers"
    if config.experts:
        attention += _mixture(config.experts, config.sparse_layers - config.predicted)
    layers = f"{config.layers} layers of {config.hidden_size}"
    return f"{config.family}: {layers}, {config.heads} heads, {attention}"


def _attention(config: ModelConfig) -> str:
    """Return the name of the kind of attention: MLA, MHA, MQA or GQA."""
    if config.latent:
        return "MLA"
    if config.kv_heads == config.heads:
        return "MHA"
    return "MQA" if config.kv_heads == 1 else "GQA"


def _mixture(experts: Experts, layers: int) -> str:
    """Return a phrase about the experts; `layers` is the number of layers that have them."""
    shared = ""
    if experts.shared_size:
        shared = f" and {experts.shared_size // experts.intermediate_size} shared"
    return f", {experts.top_k} of {experts.count} experts{shared} in {layers} layers"


def _count(number: float) -> str:
    """Return a number with a decimal prefix, such as `1.5G`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:g}"


def size_text(number: float) -> str:
    """Return a number of bytes in a decimal unit, such as `1.5 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"
