"""Reading HuggingFace's `config.json` into a `ModelConfig`, and writing one. Does not import torch.

The names of keys are data (families.py); this module handles what names alone do not express. A setting that
would change the logits and is not supported is refused. In all functions `tree` is the content of a
config.json and `where` the name of its file in error messages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..types import LimbeckError
from .config import Experts, Latent, ModelConfig
from .families import FAMILIES, LATENT, Family

Tree = dict[str, Any]

SCALINGS = ("linear", "llama3", "yarn")  # supported types of rope_scaling


# ---------------------------------------------------------------- reading


def read(directory: Path) -> ModelConfig:
    """Read the `config.json` of a model directory; `directory` may also be the JSON file itself.

    Raises:
        LimbeckError: the file is missing, damaged or not supported. The message names the file, the key
            and the remedy.
    """
    path = directory if directory.suffix == ".json" else directory / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LimbeckError(
            f"{path} is missing; a model directory holds config.json and *.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise LimbeckError(
            f"{path}: not valid JSON ({error}); copy it again from the model's source"
        ) from None
    if not isinstance(tree, dict):
        raise LimbeckError(f"{path}: not a model's configuration; copy it again from the model's source")
    return parse(tree, str(path))


def parse(tree: Tree, where: str) -> ModelConfig:
    """Translate a HuggingFace configuration; `where` is the name of its file in error messages.

    Raises:
        LimbeckError: a setting is missing, damaged or not supported.
    """
    name = _family(tree, where)
    family = FAMILIES[name]
    tree = {**_implied(name, tree), **tree}
    _refuse_unsupported(tree, name, where)
    fields = {ours: _size(tree, theirs, where) for ours, theirs in family.sizes.items()}
    fields |= family.switches
    fields["kv_heads"] = tree.get("num_key_value_heads") or fields["heads"]
    fields["head_dim"] = tree.get("head_dim") or fields["hidden_size"] // fields["heads"]
    fields["rope_theta"], fields["rope_scaling"] = _rope(tree, family, where)
    if name == "gemma3":
        fields["query_scalar"] = tree["query_pre_attn_scalar"]
        fields["local_theta"] = tree["rope_local_base_freq"]
    fields["norm_eps"] = tree.get(family.norm_eps, 1e-6)
    fields["tied"] = bool(tree.get("tie_word_embeddings", family.tied))
    fields["max_positions"] = tree.get("max_position_embeddings", 4096)
    fields["windows"] = _windows(tree, fields["layers"])
    fields["predicted"] = tree.get("num_nextn_predict_layers") or tree.get("num_mtp_layers") or 0
    if family.latent:
        fields["latent"] = _latent(tree, where)
    if family.experts:
        fields["experts"] = _experts(tree, name, where)
    if name == "hunyuan":
        fields["qk_norm"] = "after" if tree.get("use_qk_norm") else ""
        fields["share_kv"] = tree.get("cla_share_factor", 1) if tree.get("use_cla") else 1
    try:
        return ModelConfig(name, **fields)
    except LimbeckError as error:
        raise LimbeckError(f"{where}: {error}") from None


def _family(tree: Tree, where: str) -> str:
    """Return the name of the family whose class in transformers `tree` names as its architecture."""
    architecture = (tree.get("architectures") or ["none"])[0]
    for name, family in FAMILIES.items():
        if family.architecture == architecture:
            return name
    known = ", ".join(family.architecture for family in FAMILIES.values())
    if tree.get("auto_map"):
        raise LimbeckError(
            f"{where}: architecture {architecture} comes as Python code beside the weights (auto_map), "
            f"which is never run; use a checkpoint of a supported architecture: {known}"
        )
    raise LimbeckError(f"{where}: architecture {architecture} is not supported; supported are {known}")


def _implied(name: str, tree: Tree) -> Tree:
    """Return values for keys that files of the family `name` may leave out or call by another name."""
    if name == "falcon":
        return {"ffn_hidden_size": 4 * tree.get("hidden_size", 0), "num_key_value_heads": 1}
    if name == "qwen3_moe" and "num_local_experts" in tree:
        return {"num_experts": tree["num_local_experts"]}
    if name == "gemma3":
        return gemma_defaults(tree)
    return {}


def gemma_defaults(tree: Tree) -> Tree:
    """Return the defaults of Gemma 3's configuration in transformers.

    Older files give the pattern of layers as one number, newer ones the rotary positions as `rope_parameters`
    with an entry for each kind of layer. What they say is moved to the older keys.
    """
    pattern = tree.get("sliding_window_pattern") or 6
    ropes = tree.get("rope_parameters") or {}
    everywhere = ropes.get("full_attention") or {}
    local = ropes.get("sliding_attention") or {}
    return {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_local_base_freq": local.get("rope_theta", 10_000.0),
        "rope_theta": everywhere.get("rope_theta", 1e6),
        "rope_scaling": everywhere if everywhere.get("rope_type", "default") != "default" else None,
        "layer_types": [
            "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
            for layer in range(tree.get("num_hidden_layers") or 0)
        ],
    }


def _refuse_unsupported(tree: Tree, name: str, where: str) -> None:
    """Refuse settings whose value is not the one that our decoder computes for the family `name`."""
    for key, value in FAMILIES[name].wanted.items():
        if _uniform(tree.get(key, value)) != value:
            raise LimbeckError(
                f"{where}: {key} = {tree[key]!r} is not supported for {name}; only {value!r} is"
            )


def _size(tree: Tree, key: str, where: str) -> int:
    """Return the size stored under `key`, which must be a whole number above zero."""
    value = _uniform(tree.get(key))
    if not isinstance(value, int) or value < 1:
        raise LimbeckError(f"{where}: {key} = {value!r} is no size; copy the file again from its source")
    return value


def _uniform(value: Any) -> Any:
    """Return the common value if `value` is a list of equal values, otherwise `value` itself.

    Hunyuan's files list some settings once for each layer.
    """
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        return value[0]
    return value


def _rope(tree: Tree, family: Family, where: str) -> tuple[float, Tree]:
    """Return the base and the scaling of rotary positions; the scaling is `{}` if there is none.

    Both the older keys (`rope_theta`, `rope_scaling`) and the newer `rope_parameters` are read.
    """
    newer = tree.get("rope_parameters") or {}
    scaling = tree.get("rope_scaling") or newer
    if not family.latent:
        _refuse_partial(tree, newer, where)
    theta = float(tree.get("rope_theta") or newer.get("rope_theta") or family.theta)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, {}
    _check_scaling(scaling, kind, where)
    settings = {key: value for key, value in scaling.items() if key not in ("rope_theta", "type")}
    return theta, {**settings, "rope_type": kind}


def _refuse_partial(tree: Tree, newer: Tree, where: str) -> None:
    """Refuse models whose heads are rotated only in part; `newer` is the content of `rope_parameters`."""
    share = tree.get("partial_rotary_factor") or newer.get("partial_rotary_factor") or 1
    if share != 1:
        raise LimbeckError(f"{where}: partial_rotary_factor = {share} is not supported; only 1 is")


def _check_scaling(scaling: Tree, kind: str, where: str) -> None:
    """Refuse a scaling of rotary positions that is not supported or has no factor; `kind` is its type."""
    if kind == "dynamic" and scaling.get("alpha"):
        return
    if kind not in SCALINGS:
        raise LimbeckError(
            f"{where}: rope_scaling of type {kind} is not supported; supported are linear, llama3, yarn, "
            "dynamic with alpha"
        )
    if not isinstance(scaling.get("factor"), int | float):
        raise LimbeckError(f"{where}: rope_scaling has no factor; copy the file again from its source")


def _latent(tree: Tree, where: str) -> Latent:
    """Return the sizes of multi-head latent attention."""
    sizes = {ours: _size(tree, theirs, where) for ours, theirs in LATENT.items()}
    rank = tree.get("q_lora_rank") or 0
    return Latent(**sizes, q_rank=rank, interleaved=tree.get("rope_interleave", True))


def _experts(tree: Tree, name: str, where: str) -> Experts | None:
    """Return the mixture of experts of the family `name`; None for a configuration without experts."""
    family = FAMILIES[name]
    if not tree.get(family.experts["count"]):
        return None
    fields = dict(family.gate)
    for ours, theirs in family.experts.items():
        if tree.get(theirs) is not None:
            fields[ours] = _uniform(tree[theirs])
    for ours in ("count", "top_k", "intermediate_size"):
        fields[ours] = _size(tree, family.experts[ours], where)
    if name == "deepseek_v2" and tree.get("topk_method", "greedy") == "greedy":
        fields["groups"] = 1
        fields["top_groups"] = 1
    fields["shared_size"] = _shared_experts(tree, name) * fields["intermediate_size"]
    fields["dense"] = tuple(sorted(_dense_layers(tree, name)))
    if name == "hunyuan" and tree.get("moe_random_routing_dropped_token"):
        fields["capacity"] = 1.0
    return Experts(**fields)


def _shared_experts(tree: Tree, name: str) -> int:
    """Return the number of shared experts."""
    if name == "hunyuan_v1_moe":
        return 1
    key = "n_shared_experts" if name.startswith("deepseek") else "num_shared_expert"
    return _uniform(tree.get(key)) or 0


def _dense_layers(tree: Tree, name: str) -> set[int]:
    """Return the indices of the layers that have a dense feed-forward in a model with experts."""
    if name.startswith("deepseek"):
        return set(range(tree.get("first_k_dense_replace") or 0))
    if name != "qwen3_moe":
        return set()
    step = tree.get("decoder_sparse_step", 1)
    dense = set(tree.get("mlp_only_layers") or ())
    return dense | {layer for layer in range(tree["num_hidden_layers"]) if (layer + 1) % step}


def _windows(tree: Tree, layers: int) -> tuple[int, ...]:
    """Return the number of positions that each layer sees (0: all); an empty tuple if no layer is limited.

    Qwen's `sliding_window` applies only if `use_sliding_window` is true.
    """
    width = tree.get("sliding_window")
    if not width or not tree.get("use_sliding_window", True):
        return ()
    kinds = tree.get("layer_types")
    if kinds is None:
        first = tree.get("max_window_layers", 0) if "use_sliding_window" in tree else 0
        return (0,) * min(first, layers) + (width,) * (layers - first)
    return tuple(width if kind == "sliding_attention" else 0 for kind in kinds)


# ---------------------------------------------------------------- writing


def dump(config: ModelConfig, eos: int, pad: int) -> Tree:
    """Return the content of a `config.json`, as transformers reads it.

    `eos` and `pad` are the ids of the end-of-sequence token and of the padding token.
    """
    family = FAMILIES[config.family]
    tree: Tree = {"architectures": [family.architecture], "model_type": family.model_type}
    tree |= {theirs: getattr(config, ours) for ours, theirs in family.sizes.items()}
    if config.family != "falcon":
        tree |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_dim}
    tree |= {
        "max_position_embeddings": config.max_positions,
        family.norm_eps: config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling or None,
        "tie_word_embeddings": config.tied,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "bos_token_id": None,
        "torch_dtype": "float32",
    }
    tree |= {key: value for key, value in family.wanted.items() if key != "mlp_bias"}
    tree |= _dump_windows(config)
    if config.family == "gemma3":
        tree |= _dump_gemma(config)
    if config.predicted:
        tree["num_nextn_predict_layers"] = config.predicted
    if config.latent:
        tree |= _dump_latent(config.latent)
    if config.experts:
        tree |= _dump_experts(config, family)
    if config.family == "hunyuan":
        tree["use_qk_norm"] = bool(config.qk_norm)
        tree["use_cla"] = config.share_kv > 1
        tree["cla_share_factor"] = config.share_kv
    return tree


def _dump_windows(config: ModelConfig) -> Tree:
    """Return the keys of config.json for sliding windows."""
    if any(config.windows):
        kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
        first = config.layers if all(config.windows) else kinds.index("sliding_attention")
        return {
            "sliding_window": max(config.windows),
            "use_sliding_window": True,
            "layer_types": kinds,
            "max_window_layers": first,
        }
    if config.family in ("mistral", "mixtral"):
        return {"sliding_window": None}  # transformers would take 4,096
    return {}


def _dump_gemma(config: ModelConfig) -> Tree:
    """Return the keys of config.json that only Gemma 3 has; without them transformers takes its defaults."""
    kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(config.layers)]
    return {
        "layer_types": kinds,
        "query_pre_attn_scalar": config.query_scalar,
        "rope_local_base_freq": config.local_theta,
    }


def _dump_latent(latent: Latent) -> Tree:
    """Return the keys of config.json for multi-head latent attention."""
    tree = {theirs: getattr(latent, ours) for ours, theirs in LATENT.items()}
    tree["q_lora_rank"] = latent.q_rank or None
    tree["head_dim"] = latent.rope_dim
    tree["rope_interleave"] = latent.interleaved
    return tree


def _dump_experts(config: ModelConfig, family: Family) -> Tree:
    """Return the keys of config.json for the mixture of experts."""
    experts = config.experts
    tree = {theirs: getattr(experts, ours) for ours, theirs in family.experts.items()}
    shared = experts.shared_size // experts.intermediate_size
    if config.family.startswith("deepseek"):
        tree["n_shared_experts"] = shared or None
        tree["first_k_dense_replace"] = len(experts.dense)
    if config.family == "deepseek_v2":
        tree["topk_method"] = "group_limited_greedy" if experts.groups > 1 else "greedy"
    if config.family == "qwen3_moe":
        tree["mlp_only_layers"] = list(experts.dense)
        tree["decoder_sparse_step"] = 1
    if config.family == "hunyuan":
        tree["num_shared_expert"] = shared
        tree["moe_drop_tokens"] = bool(experts.capacity)
        tree["moe_random_routing_dropped_token"] = bool(experts.capacity)
    return tree
