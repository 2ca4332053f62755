"""Stretched positions: `rope_scaling` of config.json as llama.cpp's keys and tensor, and back. No torch.

D / 2 frequencies of a head of D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...types import LimbeckError

# Llama 3.1's scaling is stored as its result: the divisor of each frequency.
FACTORS = "rope_freqs.weight"
LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
KINDS = ("default", "linear", "llama3", "yarn")
YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
REQUIRED = ("factor", "original_max_position_embeddings")  # of YARN
# DeepSeek's attention temperature, a tenth of the mscale_all_dim that its configuration names.
LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"

Settings = dict[str, int | float | str]


def settle(tree: dict[str, Any], where: str) -> tuple[float, dict[str, Any]]:
    """Base and scaling of positions in a config.json, under older keys or newer ones; `{}` is no scaling."""
    newer = tree.get("rope_parameters") or {}
    scaling = tree.get("rope_scaling") or newer
    scaling = {key: value for key, value in scaling.items() if value is not None}
    bases = (tree.get("rope_theta"), scaling.get("rope_theta"), newer.get("rope_theta"))
    theta = float(next(filter(None, bases), 10_000.0))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS:
        known = ", ".join(KINDS[1:])
        raise LimbeckError(f"{where}: rope_scaling of type {kind} is not supported; supported are {known}")
    if kind == "default":
        return theta, {}
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return theta, {"rope_type": kind, **rest}


# ---------------------------------------------------------------- writing


def settings(scaling: dict[str, Any], ggml: str, where: str) -> Settings:
    """The keys of a GGUF file, without its architecture.

    Raises:
        LimbeckError: llama.cpp would compute something else.
    """
    kind = scaling.get("rope_type")
    if kind == "llama3" and ggml != "llama":
        raise LimbeckError(f"{where}: rope_scaling of type llama3 is for Llama only; take yarn for {ggml}")
    try:
        if kind == "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            return _yarn_settings(scaling, ggml, where)
    except (KeyError, TypeError, ValueError):
        raise LimbeckError(
            f"{where}: rope_scaling = {scaling} is incomplete; copy the file again from its source"
        ) from None
    return {}


def _yarn_settings(scaling: dict[str, Any], ggml: str, where: str) -> Settings:
    """The keys of YaRN, whose temperature llama.cpp derives.

    It follows from the factor, or for DeepSeek from `mscale_all_dim` alone.
    """
    known = {"rope_type", *YARN.values()}
    if ggml == "deepseek2":
        known |= {"mscale", "mscale_all_dim"}
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise LimbeckError(
            f"{where}: rope_scaling.{unknown[0]} has no place in a GGUF file of {ggml}; remove it"
        )
    keys: Settings = {"rope.scaling.type": "yarn"}
    for ours, theirs in YARN.items():
        if theirs in scaling or theirs in REQUIRED:
            keys[ours] = _kind(theirs)(scaling[theirs])
    if ggml == "deepseek2":
        keys[LOG_MULTIPLIER] = _log_multiplier(scaling, where)
    return keys


def _kind(theirs: str) -> type:
    """The type of one of YaRN's settings."""
    return int if theirs.startswith("original") else float


def _log_multiplier(scaling: dict[str, Any], where: str) -> float:
    """DeepSeek's attention temperature."""
    mscale = scaling.get("mscale")
    all_dim = scaling.get("mscale_all_dim")
    if not mscale or mscale != all_dim:
        raise LimbeckError(
            f"{where}: rope_scaling has mscale = {mscale} and mscale_all_dim = {all_dim}; "
            "llama.cpp needs both, and equal"
        )
    return 0.1 * float(all_dim)


# ---------------------------------------------------------------- reading


def scaling(setting: Callable[..., Any], where: str) -> dict[str, Any]:
    """`rope_scaling` of a GGUF file by its keys alone; `setting(key, kind, default)` looks them up."""
    kind = setting("rope.scaling.type", str, "none")
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": setting("rope.scaling.factor", float, 1.0)}
    if kind == "yarn":
        return {"rope_type": "yarn", **_read_yarn(setting)}
    known = ", ".join(KINDS[1:])
    raise LimbeckError(f"{where}: rope scaling of type {kind} is not supported; supported are {known}")


def _read_yarn(setting: Callable[..., Any]) -> dict[str, Any]:
    """YaRN's settings in a GGUF file."""
    values = {theirs: setting(ours, _kind(theirs), None) for ours, theirs in YARN.items()}
    multiplier = setting(LOG_MULTIPLIER, float, None)
    if multiplier:
        values["mscale"] = round(10 * multiplier, 6)
        values["mscale_all_dim"] = values["mscale"]
    return {key: value for key, value in values.items() if value is not None}


def llama3(factors_D: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """`rope_scaling` of Llama 3.1, from the divisors of the frequencies in a GGUF file.

    Raises:
        LimbeckError: they are not Llama 3.1's.
    """
    scaling = {"rope_type": "llama3", "factor": float(factors_D.max()), **LLAMA31}
    if factors_D.shape == (head_dim // 2,):
        expected_D = factors(theta, head_dim, scaling)
        if np.allclose(factors_D, expected_D, rtol=1e-3):
            return scaling
    raise LimbeckError(
        f"{where}: its rope factors are not Llama 3.1's; take the model's HuggingFace directory"
    )


def factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's divisors of a head's frequencies, [D / 2]: 1 for short waves, `factor` for long ones."""
    half = head_dim // 2
    frequency_D = theta ** -(np.arange(half) / half)
    turns_D = scaling["original_max_position_embeddings"] * frequency_D / (2 * np.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    blend_D = np.clip((turns_D - low) / (high - low), 0, 1)
    return 1 / (blend_D + (1 - blend_D) / scaling["factor"])
