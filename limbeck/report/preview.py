"""Sentences about the preview of a stage: what its counts are, and what to change where nothing can be
learned.

A preview is a JSON object as `pipeline/preview.py` makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .i18n import Text

_MUCH = 0.5  # share of answers cut off from which more tokens are suggested
_COMPARING = ("rl", "screen", "pairs")  # kinds of stages that need right and wrong answers to a problem


def summary(preview: Mapping[str, Any]) -> Text:
    """Return the counts of a preview as one sentence."""
    counts = preview["summary"]
    sentence = Text(
        "Of {answers} answers to {problems} problems {right} are right, {extracted} end with an answer that "
        "can be read, and {cut} are cut off at {tokens} tokens",
        "{problems} 道题的 {answers} 个回答中，{right} 个正确，{extracted} 个写完且能读出答案，"
        "{cut} 个在 {tokens} 个词元处被截断",
    )
    sentence = sentence.format(**counts, tokens=preview["sampling"]["max_new_tokens"])
    if counts["differing"] is None:
        return Text("{}.", "{}。").format(sentence)
    whole = Text(
        "{}; the answers to {} of the problems differ in reward.", "{}；其中 {} 道题的各个回答奖励不同。"
    )
    return whole.format(sentence, counts["differing"])


def remedies(preview: Mapping[str, Any]) -> list[Text]:
    """Return what is wrong with the answers of a preview, each with its remedy; [] if a stage can learn from
    such answers."""
    counts = preview["summary"]
    answers = counts["answers"]
    texts = []
    if counts["cut"] >= _MUCH * answers:
        texts.append(_cut(preview))
    if not counts["extracted"] and counts["cut"] < answers:
        texts.append(_formless(preview))
    elif not counts["right"] and counts["cut"] < answers:
        text = Text(
            "None of these is right; if that goes on, take easier problems, let a screen stage choose those "
            "that are solved sometimes, or start from a better model.",
            "没有一个正确；若一直如此，请换更容易的题，用 screen 阶段挑出有时能做对的题，"
            "或从更好的模型开始。",
        )
        texts.append(text)
    if counts["right"] == answers and preview["kind"] in _COMPARING:
        texts.append(Text("All of these are right: take harder problems.", "这些全部正确：请换更难的题。"))
    if preview["kind"] == "rl":
        texts += _without_difference(preview)
    return texts


def _cut(preview: Mapping[str, Any]) -> Text:
    """Return the sentence on answers that ran out of tokens."""
    stage = preview["stage"].split("/")[0]
    part = "" if preview["kind"] == "evaluate" else "sampling."
    text = Text(
        "{cut} of {answers} run out of tokens and count as wrong: raise stages.{key}, which is {tokens}.",
        "{answers} 个中有 {cut} 个用尽词元，按错误计：请提高 stages.{key}（现为 {tokens}）。",
    )
    counts = preview["summary"]
    return text.format(
        cut=counts["cut"],
        answers=counts["answers"],
        key=f"{stage}.{part}max_new_tokens",
        tokens=preview["sampling"]["max_new_tokens"],
    )


def _formless(preview: Mapping[str, Any]) -> Text:
    """Return the sentence on answers none of which has the form that the checker looks for, with the most
    frequent reason."""
    reasons: Counter[str] = Counter()
    for prompt in preview["prompts"]:
        reasons.update(answer["reason"] for answer in prompt["answers"] if answer["stopped"])
    reason = reasons.most_common(1)[0][0] if reasons else ""
    if preview["fixed"]:
        text = Text(
            "None of these has the form that the checker looks for ({}): start from a model that writes it.",
            "没有一个具有判题所需的格式（{}）：请从会写该格式的模型开始。",
        )
        return text.format(reason)
    name = preview["prompts"][0]["problem"].partition("/")[0]
    text = Text(
        "None of these has the form that the checker looks for ({reason}): ask for it in "
        "problems.{name}.template or system, or set problems.{name}.answer to the form that is written.",
        "没有一个具有判题所需的格式（{reason}）：请在 problems.{name}.template 或 system 中要求该格式，"
        "或把 problems.{name}.answer 设为模型所写的格式。",
    )
    return text.format(reason=reason, name=name)


def _without_difference(preview: Mapping[str, Any]) -> list[Text]:
    """Return the sentence on an `rl` stage whose answers have the same reward within each group, if it is
    so."""
    if not preview["sampling"]["temperature"]:
        stage = preview["stage"]
        text = Text(
            "All answers to a problem are the same at temperature 0: raise stages.{}.sampling.temperature.",
            "温度为 0 时同一道题的回答完全相同：请提高 stages.{}.sampling.temperature。",
        )
        return [text.format(stage)]
    if preview["summary"]["differing"] == 0:
        text = Text(
            "None of these problems has a better and a worse answer; a step learns only from those that do.",
            "这些题中没有一道同时有较好和较差的回答；训练只能从有差别的题学到东西。",
        )
        return [text]
    return []
