"""Conversion of SentencePiece's byte-pair tokenizers, such as Gemma's, between HuggingFace and GGUF.

GGUF stores the score of each token in place of merges: of all neighbours, those are merged first whose
union has the highest score. Texts are not split into words; a space is written as `▁`, and a character
without a token as its bytes. In this module, `get(key, kind, default)` returns the value of a key of a GGUF
file, and `path` or `where` is the file that error messages name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from gguf import TokenType
from tokenizers import decoders, models, normalizers, pre_tokenizers

from ...types import LimbeckError

SPACE = "▁"
UNKNOWN = "<unk>"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
NO_SCORE = -1000.0  # of tokens that no merge makes; what llama.cpp's own converter writes

Get = Callable[..., Any]


def build(get: Get, tokens: Sequence[str], types: Sequence[int], where: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a GGUF file, without its added tokens.

    `tokens` are the texts of all tokens, `types` their types in GGUF.

    Raises:
        LimbeckError: the tokenizer is damaged, or puts a space before a text.
    """
    if get("tokenizer.ggml.add_space_prefix", bool, True):
        raise LimbeckError(
            f"{where}: tokenizer.ggml.add_space_prefix is true, which is not supported; "
            "take the model's HuggingFace directory"
        )
    scores = get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise LimbeckError(f"{where}: tokenizer.ggml.scores is damaged; download the file again")
    ids = {token: i for i, token in enumerate(tokens) if types[i] != TokenType.UNUSED}
    ranked = [i for i, kind in enumerate(types) if kind == TokenType.NORMAL]
    ranked.sort(key=lambda i: -scores[i])
    merges = _merges([tokens[i] for i in ranked], ids)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _merges(ranked: Sequence[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make one of the tokens `ranked`, in the order of these.

    Pairs that make the same token are in the order of the ids of their parts.
    """
    merges = []
    for token in ranked:
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


# ---------------------------------------------------------------- writing


def matches(tree: dict[str, Any]) -> bool:
    """Return True if a `tokenizer.json` is of this kind: byte-pair encoding of whole texts that writes a
    space as `▁` and falls back to bytes."""
    model = tree.get("model") or {}
    normalizer = tree.get("normalizer") or {}
    replaces = normalizer.get("type") == "Replace" and normalizer.get("content") == SPACE
    return bool(model.get("byte_fallback") and replaces)


def add(writer: gguf.GGUFWriter, tree: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """Write the tokenizer of a `tokenizer.json` (`tree`) with these tokens and types to a GGUF file.

    The score of a token is minus the rank of the first merge that makes it; a token that is a single
    character comes after all that are merged.
    """
    merges = tree["model"]["merges"]
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    ranks: dict[str, int] = {}
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    kinds = [TokenType.BYTE if token in BYTES else kind for token, kind in zip(tokens, types, strict=True)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([_written(token, kind) for token, kind in zip(tokens, kinds, strict=True)])
    writer.add_token_scores(_scores(tokens, kinds, ranks))
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)


def _written(token: str, kind: int) -> str:
    """Return the text of a token in GGUF, where the spaces of added tokens are spaces."""
    return token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token


def _scores(tokens: list[str], kinds: list[int], ranks: Mapping[str, int]) -> list[float]:
    """Return the scores of all tokens; `ranks` are those of the tokens that merges make."""
    scores = []
    last = len(ranks)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == TokenType.NORMAL:
            scores.append(-float(ranks.get(token, last)))
            last += token not in ranks
        else:
            scores.append(0.0 if kind == TokenType.BYTE else NO_SCORE)
    return scores
