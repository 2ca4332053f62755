"""Stretched positions: `rope_scaling` of config.json as llama.cpp's keys and tensor, and back. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...types import LimbeckError

# Llama 3.1's stretching is kept as its outcome: what each frequency is divided by.
FACTORS = "rope_freqs.weight"
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
KINDS = ("default", "linear", "llama3", "yarn")
YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# DeepSeek's attention temperature, a tenth of the mscale_all_dim that its configuration names.
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"

Settings = dict[str, int | float | str]


def settle(tree: dict[str, Any], where: str) -> tuple[float, dict[str, Any]]:
    """Base and scaling as the older and the newer keys of config.json tell them; `{}` is no scaling."""
    newer = tree.get("rope_parameters") or {}
    scaling = {k: v for k, v in (tree.get("rope_scaling") or newer).items() if v is not None}
    theta = float(tree.get("rope_theta") or scaling.get("rope_theta") or newer.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS:
        known = ", ".join(KINDS[1:])
        raise LimbeckError(f"{where}: rope_scaling of type {kind} is not supported; supported are {known}")
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type", "rope_theta")}
    return theta, {} if kind == "default" else {"rope_type": kind, **rest}


def settings(scaling: dict[str, Any], ggml: str, where: str) -> Settings:
    """The keys of a GGUF file, without its architecture; refuses what llama.cpp would compute otherwise."""
    kind = scaling.get("rope_type")
    try:
        if kind == "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            return _yarn(scaling, ggml, where)
        if kind == "llama3" and ggml != "llama":
            raise LimbeckError(
                f"{where}: rope_scaling of type llama3 is for Llama only; take yarn for {ggml}"
            )
    except (KeyError, TypeError, ValueError):
        raise LimbeckError(
            f"{where}: rope_scaling = {scaling} is incomplete; copy the file again from its source"
        ) from None
    return {}


def _yarn(scaling: dict[str, Any], ggml: str, where: str) -> Settings:
    """llama.cpp derives the temperature: of the scaled positions, or for DeepSeek of `mscale_all_dim` alone."""
    known = {"rope_type", *YARN.values()} | ({"mscale", "mscale_all_dim"} if ggml == "deepseek2" else set())
    if other := sorted(set(scaling) - known):
        raise LimbeckError(
            f"{where}: rope_scaling.{other[0]} has no place in a GGUF file of {ggml}; remove it"
        )
    found: Settings = {"rope.scaling.type": "yarn"}
    for ours, theirs in YARN.items():
        if theirs in scaling or theirs in ("factor", "original_max_position_embeddings"):
            found[ours] = int(scaling[theirs]) if theirs.startswith("original") else float(scaling[theirs])
    if ggml == "deepseek2":
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if not mscale or mscale != all_dim:
            raise LimbeckError(
                f"{where}: rope_scaling has mscale = {mscale} and mscale_all_dim = {all_dim}; "
                "llama.cpp needs both, and equal"
            )
        found[LOG_MULTIPLIER] = 0.1 * float(all_dim)
    return found


def scaling(
    setting: Any, factors: np.ndarray | None, theta: float, head_dim: int, where: str
) -> dict[str, Any]:
    """`rope_scaling` of a GGUF file; `setting(key, kind, default)` looks its keys up."""
    kind = setting("rope.scaling.type", str, "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": setting("rope.scaling.factor", float, 1.0)}
    if kind == "yarn":
        kinds = {ours: int if theirs.startswith("original") else float for ours, theirs in YARN.items()}
        found = {theirs: setting(ours, kinds[ours], None) for ours, theirs in YARN.items()}
        if multiplier := setting(LOG_MULTIPLIER, float, None):
            found["mscale"] = found["mscale_all_dim"] = round(10 * multiplier, 6)
        return {"rope_type": "yarn", **{k: v for k, v in found.items() if v is not None}}
    if kind != "none":
        raise LimbeckError(
            f"{where}: rope scaling of type {kind} is not supported; supported are {', '.join(KINDS[1:])}"
        )
    return {} if factors is None else _llama3(factors, theta, head_dim, where)


def _llama3(found: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": float(found.max()), **LLAMA31}
    if found.shape != (head_dim // 2,) or not np.allclose(
        found, factors(theta, head_dim, scaling), rtol=1e-3
    ):
        raise LimbeckError(
            f"{where}: its rope factors are not Llama 3.1's; take the model's HuggingFace directory"
        )
    return scaling


def factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3.1 divides each of `head_dim / 2` frequencies by: short waves stay, long ones stretch."""
    frequency = theta ** -(np.arange(head_dim // 2) / (head_dim // 2))
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (blend + (1 - blend) / scaling["factor"])
