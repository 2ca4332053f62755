"""Tokenizers in and out: llama.cpp keeps lists of tokens and merges, and the name of a splitting rule.

What each name means is data here. Only byte-level BPE has such names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ...types import LimbeckError


@dataclass(frozen=True)
class Splitting:
    r"""How text is cut before byte-pair merging: `Splitting((r"\p{N}",))` is SmolLM's, single digits, then GPT-2's.

    Each of `cuts` isolates what it matches in the pieces of the one before; `gpt2` then applies GPT-2's own
    rule. `whole_words`: a piece that is a token needs no merges. `begins`: the first token is added by default.
    """

    cuts: tuple[str, ...] = ()
    gpt2: bool = True
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
HAN, HAN_KANA = "[一-龥ࠀ-一가-퟿]+", "[一-龥぀-ゟ゠-ヿ]+"
# Letters with case; some are written by number, as editors like to replace them by their twins.
CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-"
    "ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃ"
    "ↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
LETTERS = rf"\s?[{CASED}]+"


def _cl100k(number: str) -> str:
    """The words of tiktoken's cl100k; Llama 3 and Qwen2 differ in how many digits make a piece."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


DEEPSEEK3_WORDS = (
    r'[!"'
    r"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = Splitting((_cl100k(THREE_DIGITS),), gpt2=False, whole_words=True, begins=True)
QWEN2 = Splitting((_cl100k(DIGIT),), gpt2=False, nfc=True)
DEEPSEEK = (r"[\r\n]", LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", HAN, DIGIT)
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, DIGIT)

# Of names with one meaning the first is written.
SPLITTINGS = {
    "gpt-2": Splitting(),
    "gpt2": Splitting(),
    "default": Splitting(),
    "smollm": Splitting((DIGIT,)),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "deepseek-llm": Splitting(DEEPSEEK, gpt2=False),
    "deepseek-coder": Splitting(CODER, gpt2=False),
    "deepseek-v3": Splitting((THREE_DIGITS, HAN_KANA, DEEPSEEK3_WORDS), gpt2=False),
}


# ---------------------------------------------------------------- reading


def build(get: Callable[..., Any], where: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file; `get(key, kind, default)` looks keys up, without default they are needed."""
    if (kind := get("tokenizer.ggml.model", str)) != "gpt2":
        raise LimbeckError(
            f"{where}: a {kind} tokenizer is not supported, only gpt2; take the model's HuggingFace directory"
        )
    splitting = _splitting(get("tokenizer.ggml.pre", str, "default"), where)
    tokens, merges = get("tokenizer.ggml.tokens", list), get("tokenizer.ggml.merges", list)
    types = get("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    if not all(isinstance(text, str) for text in [*tokens, *merges]) or len(types) != len(tokens):
        raise LimbeckError(
            f"{where}: tokenizer.ggml.tokens, token_type and merges are damaged; download the file again"
        )
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != TokenType.UNUSED}
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        model = models.BPE(vocabulary, pairs, ignore_merges=splitting.whole_words)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for merges of other tokens
        raise LimbeckError(
            f"{where}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error}); download the file again"
        ) from None
    tokenizer = tokenizers.Tokenizer(model)
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(splitting))
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in (
        (TokenType.USER_DEFINED, tokenizer.add_tokens),
        (TokenType.CONTROL, tokenizer.add_special_tokens),
    ):
        special = kind == TokenType.CONTROL
        add([AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, types) if k == kind])
    if get("tokenizer.ggml.add_bos_token", bool, splitting.begins):
        tokenizer.post_processor = _begin_with(tokens, special_token(get, "bos", where))
    return tokenizer


def special_token(get: Callable[..., Any], role: str, where: Path, default: int | None = -1) -> int | None:
    """The id of the token with a role (`bos`, `eos`, `padding`); without default it must be there."""
    key = f"tokenizer.ggml.{role}_token_id"
    found = get(key, int) if default == -1 else get(key, int, default)
    if found is not None and not 0 <= found < len(get("tokenizer.ggml.tokens", list)):
        raise LimbeckError(f"{where}: {key} = {found} is no token of this file; download the file again")
    return found


def _splitting(name: str, where: Path) -> Splitting:
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise LimbeckError(f"{where}: tokenizer rule {name} is not supported; supported are {known}")
    return SPLITTINGS[name]


def _steps(splitting: Splitting) -> list[Any]:
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in splitting.cuts]
    return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2)]


def _begin_with(tokens: list[str], start: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{tokens[start]} $A",
        pair=f"{tokens[start]} $A {tokens[start]} $B",
        special_tokens=[(tokens[start], start)],
    )


# ---------------------------------------------------------------- writing


def add(writer: gguf.GGUFWriter, directory: Path, rows: int) -> None:
    """Write the tokenizer and chat template of a directory; `rows` of the embedding beyond its tokens are unused.

    Raises LimbeckError, before anything is written, for a tokenizer that llama.cpp has no name for.
    """
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    tree, settings = _json(path), _json(config) if config.exists() else {}
    name = _name(tree, path)
    backend = _backend(path)
    tokens, types = _tokens(tree, rows, path)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    roles = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, write in roles.items():
        token = _content(settings.get(f"{role}_token"))
        if token and token not in ids:
            raise LimbeckError(
                f"{path} has no token {token!r}, which tokenizer_config.json names as {role}_token"
            )
        if token:
            write(ids[token])
    if not _content(settings.get("eos_token")):
        raise LimbeckError(f"{config}: eos_token is missing; name the end-of-turn token")
    writer.add_add_bos_token(_begins(backend, settings))
    template = directory / "chat_template.jinja"
    if chat := template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template"):
        writer.add_chat_template(chat)


def _name(tree: dict[str, Any], path: Path) -> str:
    """The name of the splitting rule of a `tokenizer.json`, recognised by its steps."""
    model = tree.get("model") or {}
    if (kind := model.get("type", "BPE")) != "BPE":
        raise LimbeckError(
            f"{path}: model.type = {kind} has no place in a GGUF file, as llama.cpp runs byte-level BPE; "
            "export a model with such a tokenizer"
        )
    normalizer = tree.get("normalizer") or {}
    rest = normalizer.get("normalizers", [normalizer] if normalizer else [])
    cuts, end = _cuts(tree.get("pre_tokenizer") or {})
    found = (cuts, end, rest == [{"type": "NFC"}], model.get("ignore_merges", False))
    odd = any(
        model.get(key)
        for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    )
    for name, rule in SPLITTINGS.items():
        if found == (rule.cuts, rule.gpt2, rule.nfc, rule.whole_words) and len(rest) == rule.nfc and not odd:
            return name
    known = ", ".join(
        dict.fromkeys(next(n for n, s in SPLITTINGS.items() if s == r) for r in SPLITTINGS.values())
    )
    raise LimbeckError(
        f"{path}: pre_tokenizer is none of the rules that have a name in llama.cpp and here ({known}); "
        "export a model with such a tokenizer"
    )


def _cuts(tree: dict[str, Any]) -> tuple[tuple[str, ...], bool | None]:
    """The patterns of a pre-tokenizer, and whether GPT-2's own rule follows; None where bytes do not come last."""
    *before, last = tree.get("pretokenizers") or [tree]
    cuts = tuple(_cut(step) for step in before)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) or None in cuts:
        return (), None
    return cuts, last.get("use_regex", True)


def _cut(step: dict[str, Any]) -> str | None:
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    pattern = step.get("pattern", {}).get("Regex")
    return pattern and pattern.replace("\r", r"\r").replace("\n", r"\n")


def _tokens(tree: dict[str, Any], rows: int, path: Path) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [int(TokenType.UNUSED)] * rows
    added = {token["id"]: token for token in tree.get("added_tokens") or []}
    ids = {
        **{i: t for t, i in tree["model"]["vocab"].items()},
        **{i: token["content"] for i, token in added.items()},
    }
    if (size := max(ids, default=-1) + 1) > rows:
        raise LimbeckError(
            f"{path}: {size} tokens, but the embedding has {rows} rows; copy the tokenizer that belongs to this model"
        )
    for i, text in ids.items():
        token = added.get(i)
        if token and any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise LimbeckError(
                f"{path}: token {text!r} swallows its neighbours, which a GGUF file cannot hold; set lstrip, rstrip and single_word to false"
            )
        tokens[i] = text
        types[i] = int(
            TokenType.NORMAL
            if not token
            else TokenType.CONTROL
            if token.get("special")
            else TokenType.USER_DEFINED
        )
    return tokens, types


def _begins(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> bool:
    """Whether a text begins with the first token: tokenizer_config.json says so, or else tokenizer.json does it."""
    if settings.get("add_bos_token") is not None:
        return bool(settings["add_bos_token"])
    first = backend.encode("").tokens[:1]
    return bool(first) and first == [_content(settings.get("bos_token"))]


def _content(token: str | dict | None) -> str:
    return (token["content"] if isinstance(token, dict) else token) or ""


def _backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        raise LimbeckError(
            f"{path}: not a tokenizer ({error}); copy it again from the model's source"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {**tree}
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; copy it from the model's source") from None
    except (ValueError, TypeError) as error:
        raise LimbeckError(
            f"{path}: not a JSON object ({error}); copy it again from the model's source"
        ) from None
