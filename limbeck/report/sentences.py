"""What is happening in a run, in sentences: every claim is computed, and turns where the numbers turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..train.learned_rewards import CLEAR, trend
from .flips import Flips
from .history import History
from .i18n import KINDS, MODES, Text, count, duration, percent, plain
from .loaded_run import EVALUATION, Run, StageView

_TENTH = 10  # the beginning and the end of a curve are a tenth of it each
_GAP = 1e-3  # nats that rounding in float32 explains (train/selftest.py)
_CROWDED = 0.05  # a share of cut responses that is worth a word


def progress(name: str, kind: str, state: str, history: History, manifest: dict[str, Any]) -> Text:
    """Where a stage stands; `state` is done, running, begun (and nobody is at work), asks or waits."""
    done, total, what = history.done, history.total, _unit(kind)
    if state == "done":
        said = Text("{name} is done: {kind} in {time}.", "{name} 已完成：{kind}，用时 {time}。")
        return said.format(name=name, kind=_kind(kind), time=duration(manifest.get("seconds")))
    if state == "waits":
        return Text("{} waits for the stages before it.", "{} 在等待前面的阶段。").format(name)
    if not done:
        return Text("{} has begun; nothing is measured yet.", "{} 已开始，还没有测量结果。").format(name)
    said = (
        Text("{name} has taken {done} of {total} {what}", "{name} 已走 {done}/{total} {what}")
        if total
        else Text("{name} has taken {done} {what}", "{name} 已走 {done} {what}")
    )
    said = said.format(name=name, done=count(done), total=count(total), what=what)
    if state != "running":
        return Text(said.en + " and rests.", said.zh + "，现已暂停。")
    if history.pace is None or not total:
        return Text(said.en + ".", said.zh + "。")
    left = Text("; one takes {}, so about {} are left.", "；每步 {}，大约还需 {}。").format(
        _brief(history.pace), duration(history.pace * max(0, total - done))
    )
    return Text(said.en + left.en, said.zh + left.zh)


def _unit(kind: str) -> Text:
    return {
        "sample": Text("chunks", "批"),
        "screen": Text("chunks", "批"),
        "label": Text("chunks", "批"),
        "evaluate": Text("measurements", "项测量"),
    }.get(kind, Text("steps", "步"))


def _kind(kind: str) -> Text:
    return KINDS.get(kind, plain(kind))


def _brief(seconds: float) -> Text:
    return duration(seconds) if seconds >= 10 else Text(f"{seconds:.2g} s", f"{seconds:.2g} 秒")


# ---------------------------------------------------------------- what the curves say

_share: Callable[[float], str] = percent
_TOLD: tuple[tuple[str, Text, Callable[[float], str]], ...] = (
    ("accuracy", Text("Accuracy", "准确率"), _share),
    ("held_out_accuracy", Text("Accuracy on held-out problems", "留出题准确率"), _share),
    ("reward", Text("The mean reward", "平均奖励"), lambda value: f"{value:.3g}"),
    ("length", Text("The mean length of a response", "回答的平均长度"), lambda value: f"{value:.0f}"),
    ("attempts", Text("Attempts per response", "每次回答的尝试次数"), lambda value: f"{value:.1f}"),
    ("language_consistency", Text("The share of words in the question’s language", "与提问同语言的词所占比例"), _share),
    ("entropy", Text("Entropy per token", "每词元的熵"), lambda value: f"{value:.2f}"),
    ("loss", Text("Loss", "损失"), lambda value: f"{value:.3g}"),
)  # fmt: skip
_QUIET = {
    "pretrain": {"entropy"},
    "sft": {"entropy"},
    "rl": {"loss"},
    "sample": {"reward", "accuracy", "entropy"},
    "screen": {"reward", "entropy"},
}


def curves(kind: str, history: History) -> list[Text]:
    """From where to where the metrics of a stage went."""
    if kind == "evaluate":
        return []
    quiet = _QUIET.get(kind, set())
    return [
        _went(what, history.column(name), write)
        for name, what, write in _TOLD
        if name not in quiet and len(history.column(name))
    ]


def _went(what: Text, values: np.ndarray, write: Callable[[float], str]) -> Text:
    tenth = max(1, len(values) // _TENTH)
    first, last = write(float(values[:tenth].mean())), write(float(values[-tenth:].mean()))
    if len(values) < 4:
        return Text("{} stands at {}.", "{}为 {}。").format(what, last)
    rises = float(values[-tenth:].mean()) > float(values[:tenth].mean())
    if first == last or (1 if rises else -1) * trend(values) < CLEAR:  # the ends and the whole must agree
        return Text(
            "{} has no clear direction: {} at first, {} now.", "{}没有明显的方向：起初 {}，现在 {}。"
        ).format(what, first, last)
    said = (
        Text("{} rose from {} to {}.", "{}从 {} 升到 {}。")
        if rises
        else Text("{} fell from {} to {}.", "{}从 {} 降到 {}。")
    )
    return said.format(what, first, last)


def soundness(history: History) -> list[Text]:
    """Whether learning can be trusted: sampler against learner, what teaches, what is cut off, what rang."""
    said = []
    gap, informative, truncated = (history.column(name) for name in ("gap", "informative", "truncated"))
    if len(gap):
        most = float(gap.max())
        verdict = (
            Text(": no more than rounding", "，不超过舍入误差")
            if most < _GAP
            else Text(": more than rounding explains", "，超出舍入误差所能解释的范围")
        )
        text = Text(
            "On the same weights sampler and learner differ by at most {} nats a token{}.",
            "同一权重下，采样器与学习器每词元最多相差 {} 奈特{}。",
        )
        said.append(text.format(f"{most:.1e}", verdict))
    if len(informative):
        said.append(
            Text(
                "Of the latest groups {} hold both better and worse responses; the others teach nothing.",
                "最近的组中有 {} 既有较好也有较差的回答，其余的组教不了什么。",
            ).format(percent(_latest(informative), 0))
        )
    if len(truncated) and _latest(truncated) >= _CROWDED:
        said.append(
            Text("{} of the latest responses ran out of tokens.", "最近的回答中有 {} 用尽了词元。").format(
                percent(_latest(truncated), 0)
            )
        )
    for text, times in _rung(history.alarms).items():
        first, often = times[0], len(times)
        said.append(
            Text("Alarm at step {} ({} in all): {}.", "第 {} 步响起警报（共 {} 次）：{}。").format(
                first, often, _alarm(text)
            )
        )
    return said


# What train/selftest.py and train/learned_rewards.py say, and the same in Chinese.
_ALARMS = {
    "more than half of the responses run out of tokens: raise max_new_tokens": "超过一半的回答用尽了词元，请调高 max_new_tokens",
    "fewer than a tenth of the groups differ in reward: other problems are needed": "奖励有高低之分的组不到十分之一，需要别的题目",
    "length tripled within 20 steps": "长度在 20 步内增至三倍",
    "length fell to a third within 20 steps": "长度在 20 步内降到三分之一",
    r"the part '(\w+)' outweighs accuracy: lower its weight": r"“\1”一项压过了正确率，请降低它的权重",
    r"reward hacking: (\w+) rises while the truth on held-out problems does not: it no longer counts": r"奖励作弊：\1 上升，而留出题目上的实情没有上升；它不再计入奖励",
    r"reward hacking: (\w+) rises while the truth on held-out problems does not: the stage ends here": r"奖励作弊：\1 上升，而留出题目上的实情没有上升；本阶段到此结束",
}


def _alarm(text: str) -> Text:
    """In both languages where it is known; a message of another version stays as it was written."""
    matches = ((re.fullmatch(pattern, text), chinese) for pattern, chinese in _ALARMS.items())
    return next((Text(text, match.expand(chinese)) for match, chinese in matches if match), Text(text, text))


def _latest(values: np.ndarray) -> float:
    return float(values[-max(1, len(values) // _TENTH) :].mean())


def _rung(alarms: Sequence[tuple[int, str]]) -> dict[str, list[int]]:
    """Alarm -> the steps at which it rang."""
    rung: dict[str, list[int]] = {}
    for step, text in alarms:
        rung.setdefault(text, []).append(step)
    return rung


# ---------------------------------------------------------------- outcomes


def outcome(view: StageView) -> list[Text]:
    """What a finished stage left: rows kept, verdicts, accuracies."""
    notes, said = view.notes, []
    if notes.get("sampled"):
        said.append(
            Text("It kept {} of {} responses.", "从 {1} 个回答中留下 {0} 个。").format(
                count(notes["kept"]), count(notes["sampled"])
            )
        )
        said += [
            Text("{} were dropped: {}.", "{} 个被丢弃：{}。").format(count(many), why)
            for why, many in notes.get("dropped", {}).items()
            if many
        ]
    if "policy" in notes:
        said.append(
            Text(
                "{} rows were accepted, {} edited, {} rejected, by {}.",
                "接受 {} 行，修改 {} 行，拒绝 {} 行，由 {} 决定。",
            ).format(
                notes["accepted"],
                notes["edited"],
                notes["rejected"],
                ", ".join(notes.get("reviewers", [])) or notes["policy"],
            )
        )
    if view.kind == "evaluate" and (view.folder / EVALUATION).exists():
        run = Run((view,), {}, {})
        model = next(iter(run.evaluations))
        for source in run.sources:
            for mode in run.modes(model, source):
                found = run.accuracy(model, mode, source)
                said.append(
                    Text(
                        "On {source}, {mode}: {mean} right ({low}–{high}, {n} problems).",
                        "{source}，{mode}：答对 {mean}（{low}–{high}，{n} 题）。",
                    ).format(
                        source=source,
                        mode=MODES.get(mode, plain(mode)),
                        mean=percent(found.mean),
                        low=percent(found.low),
                        high=percent(found.high),
                        n=count(found.problems),
                    )
                )
    return said


def flipped(before: str, after: str, flips: Flips) -> Text:
    """Between two evaluations."""
    if not flips.asked:
        return Text("{} and {} share no problem.", "{} 与 {} 没有共同的题目。").format(before, after)
    return Text(
        "Of {asked} problems that both answered, {won} went from wrong in {before} to right in {after}, and {lost} from right to wrong.",
        "两者都答过的 {asked} 题中，{won} 题由 {before} 的错变为 {after} 的对，{lost} 题由对变错。",
    ).format(asked=flips.asked, won=len(flips.won), lost=len(flips.lost), before=before, after=after)


def learned(flips: Flips) -> Text:
    """Between the first and the last time that a stage met a problem."""
    return Text(
        "Of {asked} problems that were written down more than once, {won} were mostly wrong at first and are mostly right by now; with {lost} it is the other way round.",
        "记录过不止一次的 {asked} 题中，{won} 题起初多半答错、如今多半答对；{lost} 题则相反。",
    ).format(asked=flips.asked, won=len(flips.won), lost=len(flips.lost))


def foreseen(actual: float, told: dict[str, float], over: bool) -> Text:
    """What a plan said against what came; `over` is false while it still runs."""
    inside = told["low"] <= actual <= told["high"]
    bounds = (duration(told["seconds"]), duration(told["low"]), duration(told["high"]))
    if not over and actual <= told["high"]:
        return Text(
            "The plan said {} ({} to {}); {} have passed.", "计划为 {}（{} 至 {}），已过去 {}。"
        ).format(*bounds, duration(actual))
    if not over:
        return Text(
            "The plan said {} ({} to {}); {} have passed, more than it allowed for.",
            "计划为 {}（{} 至 {}），已过去 {}，超出了预期。",
        ).format(*bounds, duration(actual))
    verdict = (
        Text("as foreseen", "如计划所料")
        if inside
        else Text("longer than foreseen", "比计划长")
        if actual > told["high"]
        else Text("shorter than foreseen", "比计划短")
    )
    return Text(
        "The plan said {} ({} to {}); it took {}, {}.", "计划为 {}（{} 至 {}），实际 {}，{}。"
    ).format(*bounds, duration(actual), verdict)
