"""Prompt formats: how a question becomes the messages of a chat, before the chat template renders them.

The question fills the placeholder of a template, which makes the user message; a system prompt is a message
before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..types import LimbeckError, Message

PLACEHOLDER = "{problem}"
FILE = "prompt_format.json"  # beside a model, if its format is not the plain one
SEPARATOR = "\n\n"  # between a system prompt and a question, for chat templates without a system role

# A word in braces, unless it is an argument of LaTeX: not the `answer` of `\boxed{answer}`.
_FIELD = re.compile(r"(?<![\\\w}])\{\s*([A-Za-z_]\w*)\s*\}")


@dataclass(frozen=True)
class PromptFormat:
    """The format of a model's prompts: `PromptFormat("You are terse.", "{problem} Answer in \\boxed{}.")`.

    `system` is the system prompt, empty if there is none. `template` is the text of the user message, in
    which `{problem}` stands for the question; other braces are left unchanged."""

    system: str = ""
    template: str = PLACEHOLDER

    def fill(self, question: str) -> str:
        """Return the user message: the template with the question in place of `{problem}`."""
        return self.template.replace(PLACEHOLDER, question)

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Return a conversation in this format: the system prompt first, and the template around each user
        message that does not have it yet.

        A conversation with a system message of its own is returned unchanged."""
        if any(message["role"] == "system" for message in messages):
            return list(messages)
        formatted = [self._fill_message(message) for message in messages]
        if self.system:
            formatted.insert(0, Message(role="system", content=self.system))
        return formatted

    def _fill_message(self, message: Message) -> Message:
        before, _, after = self.template.partition(PLACEHOLDER)
        text = message["content"]
        if message["role"] != "user" or (text.startswith(before) and text.endswith(after)):
            return message
        return {**message, "content": self.fill(text)}

    @classmethod
    def from_directory(cls, directory: Path) -> PromptFormat:
        """Read the format that `save` wrote beside a model; the plain one if there is no file. Raises
        LimbeckError if the file holds no format."""
        path = directory / FILE
        if not path.exists():
            return cls()
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**settings)
            valid = isinstance(found.system, str) and not template_fault(found.template)
        except (ValueError, TypeError):
            valid = False
        if not valid:
            raise LimbeckError(
                f"{path}: not a prompt format; it has the texts system and template, the latter with "
                f"{PLACEHOLDER}, or delete it"
            )
        return found

    def save(self, directory: Path) -> None:
        """Write the format beside a model, unless it is the plain one."""
        if self != PromptFormat():
            text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
            (directory / FILE).write_text(text, encoding="utf-8")


def conversation(prompt: str, system: str = "") -> str | list[Message]:
    """Return a prompt as `Tokenizer.prompt` reads it: unchanged or, with a system prompt, as two messages."""
    if not system:
        return prompt
    return [Message(role="system", content=system), Message(role="user", content=prompt)]


def format_of_rows(rows: Sequence[Mapping[str, Any]]) -> PromptFormat:
    """Return the most frequent format among training rows, whose columns `system` and `template` are absent
    where the format is plain; of several equally frequent ones the first."""
    counts: dict[PromptFormat, int] = {}
    for row in rows:
        found = PromptFormat(row.get("system", ""), row.get("template", PLACEHOLDER))
        counts[found] = counts.get(found, 0) + 1
    return max(counts, key=lambda found: counts[found], default=PromptFormat())


def template_fault(template: str) -> str:
    """Return what is wrong with a template, as the end of a sentence with the remedy; "" if it is valid."""
    if PLACEHOLDER not in template:
        return f"has no {PLACEHOLDER}; put it where the question belongs"
    if "{" + PLACEHOLDER + "}" in template:
        return f"has {{{PLACEHOLDER}}}; write {PLACEHOLDER} with single braces"
    for name in _FIELD.findall(template):
        if name != "problem":
            return f"has {{{name}}}, which stands for nothing; the only placeholder is {PLACEHOLDER}"
    return ""


def system_fault(system: str) -> str:
    """Return what is wrong with a system prompt, as the end of a sentence with the remedy; "" if it is
    valid."""
    if not system.strip():
        return "is empty; write a text, or leave the key out"
    for name in _FIELD.findall(system):
        return f"has {{{name}}}, but it is the same for all problems; placeholders belong into template"
    return ""
