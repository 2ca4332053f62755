"""Tokenizers in and out: llama.cpp stores lists of tokens and merges, and the name of a splitting rule.

The meaning of each name is data here. Only byte-level BPE has such names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ...types import LimbeckError


@dataclass(frozen=True)
class Splitting:
    r"""The rule that cuts text before byte-pair merging.

    `Splitting((r"\p{N}",))` is SmolLM's: single digits, then GPT-2's rule. Each of `cuts` isolates its
    matches in the pieces of the one before; `gpt2` then applies GPT-2's own rule. With `whole_words` a piece
    that is a token needs no merges. With `begins` a text begins with the first token by default.
    """

    cuts: tuple[str, ...] = ()
    gpt2: bool = True
    nfc: bool = False
    whole_words: bool = False
    begins: bool = False


DIGIT = r"\p{N}"
THREE_DIGITS = r"\p{N}{1,3}"
HAN = "[一-龥ࠀ-一가-퟿]+"
HAN_KANA = "[一-龥぀-ゟ゠-ヿ]+"
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

# Where several names mean the same rule, the first is written.
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
# Settings of byte-pair encoding that GGUF has no place for.
UNSUPPORTED = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")

Get = Callable[
    ..., Any
]  # get(key, kind, default) is the value of a key of a GGUF file, which must be of that kind

# ---------------------------------------------------------------- reading


def build(get: Get, where: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file.

    `get(key, kind, default)` looks keys up; without default they must be there.

    Raises:
        LimbeckError: the tokenizer is damaged, or of a kind that is not supported.
    """
    kind = get("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise LimbeckError(
            f"{where}: a {kind} tokenizer is not supported, only gpt2; take the model's HuggingFace directory"
        )
    splitting = _splitting(get("tokenizer.ggml.pre", str, "default"), where)
    tokens, types = _read_tokens(get, where)
    tokenizer = tokenizers.Tokenizer(_read_model(get, tokens, types, splitting, where))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(splitting))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED))
    tokenizer.add_special_tokens(_added(tokens, types, TokenType.CONTROL))
    if get("tokenizer.ggml.add_bos_token", bool, splitting.begins):
        tokenizer.post_processor = _begin_with(tokens, special_token(get, "bos", where))
    return tokenizer


def _read_tokens(get: Get, where: Path) -> tuple[list[str], list[int]]:
    """The texts and types of all tokens."""
    tokens = get("tokenizer.ggml.tokens", list)
    merges = get("tokenizer.ggml.merges", list)
    types = get("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    are_texts = all(isinstance(text, str) for text in [*tokens, *merges])
    if not are_texts or len(types) != len(tokens):
        raise LimbeckError(
            f"{where}: tokenizer.ggml.tokens, token_type and merges are damaged; download the file again"
        )
    return tokens, types


def _read_model(
    get: Get, tokens: list[str], types: list[int], splitting: Splitting, where: Path
) -> models.BPE:
    """Byte-pair encoding with the merges of a file."""
    vocabulary = {}
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.UNUSED:
            vocabulary[token] = i
    try:
        pairs = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges", list)]
        return models.BPE(vocabulary, pairs, ignore_merges=splitting.whole_words)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for merges of other tokens
        raise LimbeckError(
            f"{where}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens ({error}); "
            "download the file again"
        ) from None


def _added(tokens: list[str], types: list[int], kind: TokenType) -> list[AddedToken]:
    """The tokens of one type, which are found in a text before it is cut."""
    special = kind == TokenType.CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ == kind
    ]


def special_token(get: Get, role: str, where: Path, default: int | None = -1) -> int | None:
    """The id of the token with a role (`bos`, `eos`, `padding`); without default it must be there."""
    key = f"tokenizer.ggml.{role}_token_id"
    token = get(key, int) if default == -1 else get(key, int, default)
    if token is not None and not 0 <= token < len(get("tokenizer.ggml.tokens", list)):
        raise LimbeckError(f"{where}: {key} = {token} is no token of this file; download the file again")
    return token


def _splitting(name: str, where: Path) -> Splitting:
    """The rule with a name."""
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise LimbeckError(f"{where}: tokenizer rule {name} is not supported; supported are {known}")
    return SPLITTINGS[name]


def _steps(splitting: Splitting) -> list[Any]:
    """The steps of a pre-tokenizer."""
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in splitting.cuts]
    return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2)]


def _begin_with(tokens: list[str], start: int) -> processors.TemplateProcessing:
    """A post-processor that puts the start token before every text."""
    token = tokens[start]
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, start)]
    )


# ---------------------------------------------------------------- writing


def add(writer: gguf.GGUFWriter, directory: Path, rows: int) -> None:
    """Write the tokenizer and chat template of a directory.

    The embedding has `rows`; those beyond the tokens are unused.

    Raises:
        LimbeckError: llama.cpp has no name for the tokenizer; raised before anything is written.
    """
    path = directory / "tokenizer.json"
    config = directory / "tokenizer_config.json"
    tree = _read_json(path)
    settings = _read_json(config) if config.exists() else {}
    name = _name(tree, path)
    backend = _backend(path)
    tokens, types = _tokens(tree, rows, path)
    merges = tree["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special_tokens(writer, tokens, settings, path)
    if not _text(settings.get("eos_token")):
        raise LimbeckError(f"{config}: eos_token is missing; name the end-of-turn token")
    writer.add_add_bos_token(_begins(backend, settings))
    template = _template(directory, settings)
    if template:
        writer.add_chat_template(template)


def _add_special_tokens(
    writer: gguf.GGUFWriter, tokens: list[str], settings: dict[str, Any], path: Path
) -> None:
    """Write the ids of the tokens with a role."""
    ids = {token: i for i, token in enumerate(tokens)}
    roles = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}
    for role, write in roles.items():
        token = _text(settings.get(f"{role}_token"))
        if not token:
            continue
        if token not in ids:
            raise LimbeckError(
                f"{path} has no token {token!r}, which tokenizer_config.json names as {role}_token"
            )
        write(ids[token])


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The chat template, of its own file or of the settings."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")


def _name(tree: dict[str, Any], path: Path) -> str:
    """The name of the splitting rule of a `tokenizer.json`, recognised by its steps."""
    kind = (tree.get("model") or {}).get("type", "BPE")
    if kind != "BPE":
        raise LimbeckError(
            f"{path}: model.type = {kind} has no place in a GGUF file, as llama.cpp runs byte-level BPE; "
            "export a model with such a tokenizer"
        )
    rule = _rule(tree)
    names = {}
    for name, known in SPLITTINGS.items():
        if rule == replace(known, begins=False):
            return name
        names.setdefault(known, name)
    raise LimbeckError(
        f"{path}: pre_tokenizer is none of the rules that have a name in llama.cpp and here "
        f"({', '.join(names.values())}); export a model with such a tokenizer"
    )


def _rule(tree: dict[str, Any]) -> Splitting | None:
    """The splitting rule of a `tokenizer.json`, or None if a `Splitting` cannot express it."""
    model = tree.get("model") or {}
    if any(model.get(key) for key in UNSUPPORTED):
        return None
    normalizer = tree.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if steps not in ([], [{"type": "NFC"}]):
        return None
    cuts = _cuts(tree.get("pre_tokenizer") or {})
    if cuts is None:
        return None
    patterns, gpt2 = cuts
    return Splitting(patterns, gpt2, nfc=bool(steps), whole_words=model.get("ignore_merges", False))


def _cuts(tree: dict[str, Any]) -> tuple[tuple[str, ...], bool] | None:
    """The patterns of a pre-tokenizer, and True if GPT-2's own rule follows.

    None where bytes do not come last.
    """
    *before, last = tree.get("pretokenizers") or [tree]
    cuts = tuple(_cut(step) for step in before)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) or None in cuts:
        return None
    return cuts, last.get("use_regex", True)


def _cut(step: dict[str, Any]) -> str | None:
    """The pattern that a step isolates; None for another kind of step."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    pattern = step.get("pattern", {}).get("Regex")
    return pattern and pattern.replace("\r", r"\r").replace("\n", r"\n")


def _tokens(tree: dict[str, Any], rows: int, path: Path) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embedding."""
    added = {token["id"]: token for token in tree.get("added_tokens") or []}
    texts = {i: text for text, i in tree["model"]["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    size = max(texts, default=-1) + 1
    if size > rows:
        raise LimbeckError(
            f"{path}: {size} tokens, but the embedding has {rows} rows; "
            "copy the tokenizer that belongs to this model"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for i, text in texts.items():
        tokens[i] = text
        types[i] = int(_type(added.get(i), path))
    return tokens, types


def _type(added: dict[str, Any] | None, path: Path) -> TokenType:
    """The type of a token; `added` is its entry among the added tokens, if it is one of them."""
    if not added:
        return TokenType.NORMAL
    if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
        raise LimbeckError(
            f"{path}: token {added['content']!r} swallows its neighbours, which a GGUF file cannot hold; "
            "set lstrip, rstrip and single_word to false"
        )
    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _begins(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> bool:
    """True if a text begins with the first token, by tokenizer_config.json or else by tokenizer.json."""
    if settings.get("add_bos_token") is not None:
        return bool(settings["add_bos_token"])
    first = backend.encode("").tokens[:1]
    return bool(first) and first == [_text(settings.get("bos_token"))]


def _text(token: str | dict | None) -> str:
    """The text of a token in tokenizer_config.json; empty for none."""
    text = token["content"] if isinstance(token, dict) else token
    return text or ""


def _backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a `tokenizer.json`."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        raise LimbeckError(
            f"{path}: not a tokenizer ({error}); copy it again from the model's source"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {**tree}
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; copy it from the model's source") from None
    except (ValueError, TypeError) as error:
        raise LimbeckError(
            f"{path}: not a JSON object ({error}); copy it again from the model's source"
        ) from None
