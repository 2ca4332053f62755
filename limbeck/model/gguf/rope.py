"""Conversion of the scaling of rotary positions between config.json and GGUF. Does not import torch.

config.json has it under `rope_scaling`; llama.cpp has keys for it, and for Llama 3.1 a tensor with a divisor
for each frequency. A head of D dimensions has D / 2 frequencies. `where` is the name of a file in error
messages.
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
    """Return the base and the scaling of rotary positions of a config.json (`tree`); `{}` means no scaling.

    Both the older keys (`rope_theta`, `rope_scaling`) and the newer `rope_parameters` are read.
    """
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
    """Return the keys of a GGUF file for this scaling, by name without the architecture.

    `ggml` is the name of llama.cpp's architecture.

    Raises:
        LimbeckError: llama.cpp cannot compute this scaling, or would compute another one.
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
    """Return the keys of a GGUF file for YaRN.

    llama.cpp derives YaRN's factor of the attention scores itself: from the stretching factor, or for
    DeepSeek from `mscale_all_dim`. A setting that would change this is refused.
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
    """Return the type of the value of one of YaRN's settings, int or float."""
    return int if theirs.startswith("original") else float


def _log_multiplier(scaling: dict[str, Any], where: str) -> float:
    """Return llama.cpp's `yarn_log_multiplier` for DeepSeek: a tenth of `mscale_all_dim`."""
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
    """Return config.json's `rope_scaling` from the keys of a GGUF file, `{}` for none.

    `setting(key, kind, default)` returns the value of a key. The tensor of Llama 3.1 is not considered;
    `llama3` reads it.
    """
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
    """Return YaRN's settings, as config.json names them, from the keys of a GGUF file."""
    values = {theirs: setting(ours, _kind(theirs), None) for ours, theirs in YARN.items()}
    multiplier = setting(LOG_MULTIPLIER, float, None)
    if multiplier:
        values["mscale"] = round(10 * multiplier, 6)
        values["mscale_all_dim"] = values["mscale"]
    return {key: value for key, value in values.items() if value is not None}


def llama3(factors_D: np.ndarray, theta: float, head_dim: int, where: str) -> dict[str, Any]:
    """Return Llama 3.1's `rope_scaling`, from the divisors [D / 2] of the frequencies in a GGUF file.

    Raises:
        LimbeckError: the divisors are not those of Llama 3.1.
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
    """Return Llama 3.1's divisors of a head's frequencies, [D / 2].

    High frequencies are divided by 1, low ones by the scaling's `factor`, and those between by a blend of
    both. `theta` is the base of the rotary positions.
    """
    half = head_dim // 2
    frequency_D = theta ** -(np.arange(half) / half)
    turns_D = scaling["original_max_position_embeddings"] * frequency_D / (2 * np.pi)
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    blend_D = np.clip((turns_D - low) / (high - low), 0, 1)
    return 1 / (blend_D + (1 - blend_D) / scaling["factor"])
