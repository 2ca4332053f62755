"""Conversion of tokenizers between HuggingFace and GGUF.

GGUF stores lists of tokens and merges, and the name of the rule that splits a text before byte-pair encoding
(BPE). The meaning of each name is data in this module. Only tokenizers with byte-level BPE have such names;
`sentencepiece.py` converts the tokenizers without words.
In this module, `get(key, kind, default)` returns the value of a key of a GGUF file, and `path` or `where` is
the file that error messages name.
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
from . import sentencepiece


@dataclass(frozen=True)
class Splitting:
    r"""The rule that splits a text into pieces before byte-pair merging.

    `Splitting((r"\p{N}",))` is SmolLM's: it isolates single digits and then applies GPT-2's rule. `cuts` are
    regular expressions; each isolates its matches in the pieces that the one before has left. If `gpt2` is
    True, GPT-2's own rule is applied afterwards. `nfc` normalises the text to Unicode's form NFC first. With
    `whole_words` a piece that is itself a token is not split into merges. With `begins` a text begins with
    the beginning-of-sequence token unless the file says otherwise.
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
    """Return the regular expression of tiktoken's cl100k; `number` is the part that matches digits.

    Llama 3 and Qwen2 use it and differ in the number of digits of one piece.
    """
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
    """Return the tokenizer of a GGUF file.

    `get(key, kind, default)` returns the value of a key; a key without default must be in the file.

    Raises:
        LimbeckError: the tokenizer is damaged, or of a kind that is not supported.
    """
    kind = get("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise LimbeckError(
            f"{where}: a {kind} tokenizer is not supported, only gpt2 and llama; "
            "take the model's HuggingFace directory"
        )
    splitting = _splitting(get("tokenizer.ggml.pre", str, "default"), where)
    tokens, types = _read_tokens(get, where)
    if kind == "llama":
        tokenizer = sentencepiece.build(get, tokens, types, where)
        begins = True
    else:
        tokenizer = _byte_level(get, tokens, types, splitting, where)
        begins = splitting.begins
    tokenizer.add_tokens(_added(tokens, types, TokenType.USER_DEFINED))
    tokenizer.add_special_tokens(_added(tokens, types, TokenType.CONTROL))
    if get("tokenizer.ggml.add_bos_token", bool, begins):
        tokenizer.post_processor = _begin_with(tokens, special_token(get, "bos", where))
    return tokenizer


def _byte_level(
    get: Get, tokens: list[str], types: list[int], splitting: Splitting, where: Path
) -> tokenizers.Tokenizer:
    """Return a tokenizer with byte-level BPE, without its added tokens."""
    tokenizer = tokenizers.Tokenizer(_read_model(get, tokens, types, splitting, where))
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_steps(splitting))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read_tokens(get: Get, where: Path) -> tuple[list[str], list[int]]:
    """Return the texts and the types of all tokens, in the order of their ids."""
    tokens = get("tokenizer.ggml.tokens", list)
    merges = get("tokenizer.ggml.merges", list, [])
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
    """Return the byte-pair encoding with the tokens and merges of the file."""
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
    """Return the tokens of the type `kind` as added tokens, which are found in a text before it is split."""
    special = kind == TokenType.CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ == kind
    ]


def special_token(get: Get, role: str, where: Path, default: int | None = -1) -> int | None:
    """Return the id of the token with the role `bos`, `eos` or `padding`.

    If the file has no such token, return `default`; raise LimbeckError if no default is given.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    token = get(key, int) if default == -1 else get(key, int, default)
    if token is not None and not 0 <= token < len(get("tokenizer.ggml.tokens", list)):
        raise LimbeckError(f"{where}: {key} = {token} is no token of this file; download the file again")
    return token


def _splitting(name: str, where: Path) -> Splitting:
    """Return the splitting rule that GGUF calls `name`."""
    if name not in SPLITTINGS:
        known = ", ".join(SPLITTINGS)
        raise LimbeckError(f"{where}: tokenizer rule {name} is not supported; supported are {known}")
    return SPLITTINGS[name]


def _steps(splitting: Splitting) -> list[Any]:
    """Return the steps of a pre-tokenizer that apply a rule: one for each cut, and the conversion to
    bytes."""
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in splitting.cuts]
    return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.gpt2)]


def _begin_with(tokens: list[str], start: int) -> processors.TemplateProcessing:
    """Return a post-processor that puts the token with the id `start` before every text."""
    token = tokens[start]
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, start)]
    )


# ---------------------------------------------------------------- writing


def add(writer: gguf.GGUFWriter, directory: Path, rows: int) -> None:
    """Write the tokenizer and the chat template of a model directory to a GGUF file.

    `rows` is the number of rows of the embedding; rows without a token are written as unused tokens.

    Raises:
        LimbeckError: the tokenizer cannot be stored in GGUF, a token that the settings name is missing,
            or no end-of-sequence token is set. A tokenizer that cannot be stored is refused before anything
            is written.
    """
    path = directory / "tokenizer.json"
    config = directory / "tokenizer_config.json"
    tree = _read_json(path)
    settings = _read_json(config) if config.exists() else {}
    name = None if sentencepiece.matches(tree) else _name(tree, path)
    backend = _backend(path)
    tokens, types = _tokens(tree, rows, path)
    if name is None:
        sentencepiece.add(writer, tree, tokens, types)
    else:
        _add_byte_level(writer, name, tree, tokens, types)
    _add_special_tokens(writer, tokens, settings, path)
    if not _text(settings.get("eos_token")):
        raise LimbeckError(f"{config}: eos_token is missing; name the end-of-turn token")
    writer.add_add_bos_token(_begins(backend, settings))
    template = _template(directory, settings)
    if template:
        writer.add_chat_template(template)


def _add_byte_level(
    writer: gguf.GGUFWriter, name: str, tree: dict[str, Any], tokens: list[str], types: list[int]
) -> None:
    """Write tokens and merges of a `tokenizer.json` (`tree`); `name` is GGUF's of its splitting rule."""
    merges = tree["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])


def _add_special_tokens(
    writer: gguf.GGUFWriter, tokens: list[str], settings: dict[str, Any], path: Path
) -> None:
    """Write the ids of the tokens that tokenizer_config.json (`settings`) names as bos, eos and pad."""
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
    """Return the chat template from its own file or else from tokenizer_config.json, or None."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return settings.get("chat_template")


def _name(tree: dict[str, Any], path: Path) -> str:
    """Return GGUF's name of the splitting rule of a `tokenizer.json` (`tree`), recognised by its steps."""
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
    """Return the splitting rule of a `tokenizer.json`, or None if a `Splitting` cannot express it."""
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
    """Return the patterns of a pre-tokenizer, and True if GPT-2's own rule is applied after them.

    Return None if the last step is not the conversion to bytes, or another step is not supported.
    """
    *before, last = tree.get("pretokenizers") or [tree]
    cuts = tuple(_cut(step) for step in before)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True) or None in cuts:
        return None
    return cuts, last.get("use_regex", True)


def _cut(step: dict[str, Any]) -> str | None:
    """Return the regular expression whose matches a pre-tokenizer's step isolates; None for other steps."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return DIGIT
    if step.get("type") != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    pattern = step.get("pattern", {}).get("Regex")
    return pattern and pattern.replace("\r", r"\r").replace("\n", r"\n")


def _tokens(tree: dict[str, Any], rows: int, path: Path) -> tuple[list[str], list[int]]:
    """Return text and type of each of the embedding's `rows` rows; rows without a token are unused."""
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
    """Return the GGUF type of a token; `added` is its entry in the list of added tokens, or None."""
    if not added:
        return TokenType.NORMAL
    if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
        raise LimbeckError(
            f"{path}: token {added['content']!r} swallows its neighbours, which a GGUF file cannot hold; "
            "set lstrip, rstrip and single_word to false"
        )
    return TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED


def _begins(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> bool:
    """Return True if the tokenizer puts the beginning-of-sequence token before a text.

    tokenizer_config.json (`settings`) decides, or tokenizer.json (`backend`) if the setting is not there.
    """
    if settings.get("add_bos_token") is not None:
        return bool(settings["add_bos_token"])
    first = backend.encode("").tokens[:1]
    return bool(first) and first == [_text(settings.get("bos_token"))]


def _text(token: str | dict | None) -> str:
    """Return the text of a token as tokenizer_config.json stores it, a string or an object; "" for None."""
    text = token["content"] if isinstance(token, dict) else token
    return text or ""


def _backend(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer that is stored in a `tokenizer.json`."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception for a file it cannot read
        raise LimbeckError(
            f"{path}: not a tokenizer ({error}); copy it again from the model's source"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object that is stored in a JSON file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {**tree}
    except FileNotFoundError:
        raise LimbeckError(f"{path} is missing; copy it from the model's source") from None
    except (ValueError, TypeError) as error:
        raise LimbeckError(
            f"{path}: not a JSON object ({error}); copy it again from the model's source"
        ) from None
