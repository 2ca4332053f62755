"""Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`, written and read.

PEFT (github.com/huggingface/peft) names the adapter of a HuggingFace module `base_model.model.MODULE.lora_A`
and `.lora_B`. R rank · C inputs · P outputs.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..types import LimbeckError
from .decoder import Decoder
from .lora import LoRA
from .weights import flush, parts, write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes, with the only value that is read.
WANTED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "target_parameters": None,
}


def save(lora: LoRA, directory: Path) -> None:
    """Write the adapters of a model as a PEFT directory, replacing what was there.

    Returns when all files are flushed to the disk. Equal adapters give equal bytes.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {}
    modules = []
    for part, a_RC, b_PR in lora.matrices():
        name = part.theirs.removesuffix(".weight")
        modules.append(name)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a_RC.cpu().contiguous()
        rows = b_PR if part.order is None else b_PR[part.order.argsort()]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rows.cpu().contiguous()
    path = directory / WEIGHTS
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable for its owner alone
    write_json(directory / CONFIG, _config(lora, modules))
    flush(directory)


def _config(lora: LoRA, modules: list[str]) -> dict[str, Any]:
    """Return the content of `adapter_config.json` for adapters of the HuggingFace modules `modules`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.settings.rank,
        "lora_alpha": lora.settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


@torch.no_grad()
def merge(decoder: Decoder, directory: Path) -> None:
    """Add the adapters of a PEFT directory to a model's weights, in place: W + scale * B @ A, in float32.

    Raises:
        LimbeckError: the directory is none of PEFT's, its method is not LoRA, or its adapters are of another
            model.
    """
    config = _read_config(directory / CONFIG)
    tensors = _read_tensors(directory / WEIGHTS)
    weights = dict(decoder.named_parameters())
    for part in parts(decoder):
        name = PREFIX + part.theirs.removesuffix(".weight")
        a_RC = tensors.pop(f"{name}.lora_A.weight", None)
        b_PR = tensors.pop(f"{name}.lora_B.weight", None)
        if a_RC is None or b_PR is None:
            if a_RC is not b_PR:
                raise LimbeckError(
                    f"{directory / WEIGHTS}: {name} has only one of lora_A and lora_B; copy it again"
                )
            continue
        place = part.place(weights[part.ours])
        if a_RC.shape[1] != place.shape[1] or len(b_PR) != len(place) or len(a_RC) != b_PR.shape[1]:
            raise LimbeckError(
                f"{directory / WEIGHTS}: {name} has {tuple(b_PR.shape)} times {tuple(a_RC.shape)}, but the "
                f"weight is {tuple(place.shape)}; take the model that the adapter was trained on"
            )
        if part.order is not None:
            b_PR = b_PR[part.order]
        rank = math.sqrt(len(a_RC)) if config.get("use_rslora") else len(a_RC)
        scale = config["lora_alpha"] / rank
        precision = torch.promote_types(place.dtype, torch.float32)
        place.copy_(torch.addmm(place.to(precision), b_PR.to(precision), a_RC.to(precision), alpha=scale))
    if tensors:
        raise LimbeckError(
            f"{directory / WEIGHTS}: {min(tensors)} has no place in this model; take the model that the "
            "adapter was trained on"
        )


def _read_config(path: Path) -> dict[str, Any]:
    """Return the settings of an adapter; refuse those of another method than plain LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        float(config["lora_alpha"])
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; give a directory that PEFT saved") from None
    except (ValueError, KeyError, TypeError):
        raise LimbeckError(
            f"{path}: no settings of a LoRA adapter; copy it from the adapter's source"
        ) from None
    for key, wanted in WANTED.items():
        value = config.get(key, wanted)
        if value != wanted and (value or wanted):
            raise LimbeckError(
                f"{path}: {key} is {value!r}, and only {wanted!r} is read; merge this adapter with PEFT"
            )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise LimbeckError(
            f"{path} is missing; adapters are read from safetensors files only, so save it so with PEFT"
        ) from None
    except (SafetensorError, OSError) as error:
        raise LimbeckError(
            f"{path}: truncated or damaged ({error}); copy it again from the adapter's source"
        ) from None
