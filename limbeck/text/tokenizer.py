"""The tokenizer of a HuggingFace checkpoint, which converts text to token ids and back, and conversations to
prompts.

Dimensions: N tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ..types import LimbeckError, Message
from .chat_template import ChatTemplate, template_error
from .detokenizer import REPLACEMENT
from .prompt_format import SEPARATOR, PromptFormat

BOS = "{{ bos_token }}"
PLAIN = "{{ messages | map(attribute='content') | join('\n\n') }}"  # for models without a chat template
PROBE = "system-role-probe"  # the text of a message that tests a chat template


class Tokenizer:
    """A HuggingFace `tokenizer.json` (`backend`) with its chat template and the texts of its end-of-turn
    (`end`), padding (`pad`) and beginning-of-sequence (`bos`) tokens.

    The attribute `prompt_format` is the format of the prompts that the model was trained with. It is saved
    with the tokenizer; only chats use it."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str, end: str, pad: str, bos: str = ""):
        self.backend = backend
        self.template = template
        self.end = end
        self.pad = pad
        self.bos = bos
        self.end_id = self._id(end)
        self.pad_id = self._id(pad)
        self.prompt_format = PromptFormat()

    @classmethod
    def from_directory(cls, directory: Path, plain: bool = False) -> Tokenizer:
        """Read a tokenizer from the files of a HuggingFace checkpoint. A checkpoint without a chat template,
        such as that of a base model, gets the texts of the messages as they stand, with an empty line between
        two of them; so does every checkpoint if `plain`. Raises LimbeckError, which names the file, if a file
        is missing or names no end-of-turn token."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise LimbeckError(f"{path} is missing; copy it from the model's source")
        config_path = directory / "tokenizer_config.json"
        config = _read_json(config_path)
        template_path = directory / "chat_template.jinja"
        template = config.get("chat_template")
        if template_path.exists():
            template = template_path.read_text(encoding="utf-8")
        if plain or not template:
            template = BOS * bool(config.get("add_bos_token")) + PLAIN
        backend = tokenizers.Tokenizer.from_file(str(path))
        end = _token_text(config.get("eos_token"))
        if not end:
            raise LimbeckError(f"{config_path}: eos_token is missing; name the end-of-turn token")
        pad = _token_text(config.get("pad_token")) or end
        tokenizer = cls(backend, template, end, pad, _token_text(config.get("bos_token")))
        tokenizer.prompt_format = PromptFormat.from_directory(directory)
        return tokenizer

    def save(self, directory: Path) -> None:
        """Write the files that `from_directory`, and the AutoTokenizer of transformers, read."""
        self.backend.save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.end,
            "pad_token": self.pad,
        }
        if self.bos:
            config["bos_token"] = self.bos
        config["clean_up_tokenization_spaces"] = False
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text)
        self.prompt_format.save(directory)

    def ending_with(self, text: str) -> Tokenizer:
        """Return this tokenizer with the token of a text, such as an empty line, as its end-of-turn token.
        Raises LimbeckError if the text is not a single token."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise LimbeckError(
                f"eos_token = {text!r} is {len(ids)} tokens of this tokenizer; give the text of a single one"
            )
        end = self.backend.id_to_token(ids[0])
        tokenizer = Tokenizer(self.backend, self.template, end, self.pad, self.bos)
        tokenizer.prompt_format = self.prompt_format
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens at its beginning or end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids [N]. Special tokens such as `<think>` are kept, but end-of-turn tokens
        are left out."""
        ids = [int(token) for token in tokens if token != self.end_id]
        return self.backend.decode(ids, skip_special_tokens=False)

    def label(self, token: int) -> str:
        """Return the text of a single token for display. If the token is only part of a character, its name
        in the vocabulary is returned instead."""
        text = self.backend.decode([token], skip_special_tokens=False)
        if text and REPLACEMENT not in text:
            return text
        return self.backend.id_to_token(token) or ""

    def prompt(self, question: str | Sequence[Message]) -> np.ndarray:
        """Return the token ids [N] of a question, or of a conversation, rendered with the chat template up to
        where the assistant's turn begins."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return np.array(self.encode(self.render(messages)), dtype=np.int64)

    def plain(self) -> Tokenizer:
        """Return a tokenizer without the chat template: its prompts are texts as they stand."""
        return Tokenizer(self.backend, PLAIN, self.end, self.pad, self.bos)

    def user_opening(self) -> str:
        """Return what the chat template writes before the text of a conversation's first message, the user's;
        "" without a chat template."""
        if self.template.endswith(PLAIN):
            return ""
        return self.render([Message(role="user", content=PROBE)]).partition(PROBE)[0]

    def response(self, text: str) -> np.ndarray:
        """Return the token ids [N] of a response that was written, not sampled, followed by the end-of-turn
        token."""
        return np.array([*self.encode(text), self.end_id], dtype=np.int64)

    def render(self, messages: Sequence[Message], opened: bool = True) -> str:
        """Return the conversation as one string, rendered with the chat template. If `opened`, the string
        ends where the assistant's next turn begins.

        If the template has no system role, a system message at the beginning is put before the first user
        message, with an empty line between the two. Raises LimbeckError for any error in the template.
        """
        if messages and messages[0]["role"] == "system" and not self._has_system_role:
            messages = _join_system(messages)
        try:
            return self._chat_template.render(messages, opened)
        except Exception as error:  # noqa: BLE001 - a template is a program, and may raise anything
            raise template_error(error) from None

    @cached_property
    def _has_system_role(self) -> bool:
        """True if the chat template renders system messages, False if it leaves them out or raises an
        error."""
        probe = [Message(role="system", content=PROBE), Message(role="user", content=".")]
        try:
            return PROBE in self._chat_template.render(probe, True)
        except Exception:  # noqa: BLE001 - a template is a program, and may raise anything
            return False

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.template, self.bos, self.end)

    def _id(self, token: str) -> int:
        number = self.backend.token_to_id(token)
        if number is None:
            raise LimbeckError(f"tokenizer.json has no token {token!r}, which tokenizer_config.json names")
        return number

    @property
    def size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self.backend.get_vocab_size()


def _join_system(messages: Sequence[Message]) -> list[Message]:
    """Return a conversation without its first message, whose text begins the first user message instead."""
    system, *joined = messages
    for i, message in enumerate(joined):
        if message["role"] == "user":
            joined[i] = {**message, "content": system["content"] + SEPARATOR + message["content"]}
            return joined
    return list(messages)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if the file does not exist. Raises LimbeckError if it is not
    valid JSON."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LimbeckError(f"{path}: not valid JSON ({error})") from None


def _token_text(token: str | dict | None) -> str:
    """Return the text of a special token, which tokenizer_config.json gives as a string or as an object with
    the field `content`; "" for None."""
    if isinstance(token, dict):
        token = token["content"]
    return token or ""
