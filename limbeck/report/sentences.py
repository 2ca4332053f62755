"""Sentences about a run in progress, in English and Chinese. The run's numbers decide which sentence is
chosen.

Shapes: N values of a metric.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..activity import PhaseReport
from ..run_log import example
from ..train.learned_rewards import CLEAR, trend
from ..train.learning_signal import UNTAUGHT
from .flips import Flips
from .history import History
from .i18n import KINDS, MODES, Text, count, duration, percent, plain
from .loaded_run import EVALUATION, Run, StageView

_ENDS = 10  # values: the first and the last 1/10 of a curve are its beginning and its end
_ROUNDING_GAP = 1e-3  # nats a token that rounding in float32 explains (train/alarms.py)
_MANY_TRUNCATED = 0.05  # share of truncated responses from which a sentence mentions them


# ---------------------------------------------------------------- progress

_UNITS = {
    "sample": Text("chunks", "批"),
    "screen": Text("chunks", "批"),
    "label": Text("chunks", "批"),
    "evaluate": Text("measurements", "项测量"),
}
_STEPS = Text("steps", "步")


def progress(name: str, kind: str, state: str, history: History, manifest: dict[str, Any]) -> Text:
    """Return a sentence on the progress of the stage `name`. `manifest` describes its results and is read
    only if it is done.

    `state` is done, running, begun (it has logs, but no process works on it), asks (it waits for people's
    reviews) or waits (the stages before it are not done).
    """
    if state == "done":
        sentence = Text("{name} is done: {kind} in {time}.", "{name} 已完成：{kind}，用时 {time}。")
        title = KINDS.get(kind, plain(kind))
        return sentence.format(name=name, kind=title, time=duration(manifest.get("seconds")))
    if state == "waits":
        return Text("{} waits for the stages before it.", "{} 在等待前面的阶段。").format(name)
    if not history.done:
        return Text("{} has begun; nothing is measured yet.", "{} 已开始，还没有测量结果。").format(name)
    steps = _count_steps(name, kind, history)
    if state != "running":
        return Text("{} and rests.", "{}，现已暂停。").format(steps)
    if history.pace is None or not history.total:
        return Text("{}.", "{}。").format(steps)
    return Text("{}; one takes {}.", "{}；每步 {}。").format(steps, _brief(history.pace))


# The phases that `limbeck.activity` names, and their units.
PHASES = {
    "": Text("", ""),
    "sampling": Text("sampling", "采样"),
    "asking": Text("asking", "询问接口"),
    "asking the teacher": Text("asking the teacher", "询问教师模型"),
    "handing over the weights": Text("handing over the weights", "移交权重"),
    "on seats": Text("on seats", "在各采样进程上"),
    "shard": Text("shard", "分片"),
    "scoring": Text("scoring", "评分"),
    "previewing": Text("previewing", "预览"),
    "judging": Text("judging", "由模型评判"),
    "filtering": Text("filtering", "筛选"),
    "labelling": Text("labelling", "标注"),
    "learning": Text("learning", "学习"),
    "updating the weights": Text("updating the weights", "更新权重"),
    "computing log-probabilities": Text("computing log-probabilities", "计算对数概率"),
    "measuring": Text("measuring", "测量"),
    "drawing problems": Text("drawing problems", "抽取题目"),
    "opening the problems": Text("opening the problems", "打开题目"),
    "writing the corpus": Text("writing the corpus", "生成语料"),
    "loading the model": Text("loading the model", "载入模型"),
    "saving the model": Text("saving the model", "保存模型"),
    "saving a checkpoint": Text("saving a checkpoint", "保存检查点"),
    "reading the checkpoint": Text("reading the checkpoint", "读取检查点"),
    "choosing kernels": Text("choosing kernels", "选择内核"),
    "writing to disk": Text("writing to disk", "写入磁盘"),
}
PHASE_UNITS = {
    "rows": Text("rows", "行"),
    "problems": Text("problems", "题"),
    "tokens": Text("tokens", "词元"),
    "micro-batches": Text("micro-batches", "个微批次"),
    "files": Text("files", "个文件"),
    "tensors": Text("tensors", "个张量"),
    "sets of responses": Text("sets of responses", "组回答"),
}
_RATES = {
    "tokens a second": Text("{} tokens a second", "每秒 {} 词元"),
    "rows a second": Text("{} rows a second", "每秒 {} 行"),
    "problems a second": Text("{} problems a second", "每秒 {} 题"),
    "steps a minute": Text("{} steps a minute", "每分钟 {} 步"),
}


def work(phases: Sequence[PhaseReport]) -> Text:
    """Return the phases of work that go on as text: `sampling 3 of 8 problems, 40 of 128 rows`."""
    text = plain("")
    for report in phases:
        name = PHASES.get(report.name, plain(report.name))
        part = Text("{} {}", "{} {}").format(name, _count_units(report)) if report.unit else name
        text = Text("{}, {}", "{}，{}").format(text, part) if text.en else part
    return Text(text.en.strip().replace(",  ", ", "), text.zh.strip().replace("， ", "，"))


def _count_units(report: PhaseReport) -> Text:
    """Return the finished units of a phase as text: `40 of 128 rows`."""
    unit = PHASE_UNITS.get(report.unit, plain(report.unit))
    if report.total is None:
        return Text("{} {}", "{} {}").format(count(report.done), unit)
    return Text("{} of {} {}", "{}/{} {}").format(count(report.done), count(report.total), unit)


def now(
    phases: Sequence[PhaseReport], rate: tuple[float, str] | None, left: tuple[float, float, bool] | None
) -> list[Text]:
    """Return a sentence on what a stage does at this moment: its phases of work, its `rate` (a number and its
    unit), and the time `left` (seconds at least, at most, and whether it may be less than the first).

    Return [] if nothing of it is known.
    """
    parts = [work(phases)] if phases else []
    if rate:
        value, unit = rate
        number = f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        parts.append(_RATES.get(unit, plain(f"{{}} {unit}")).format(number))
    if left:
        parts.append(_left(*left))
    if not parts:
        return []
    english = "; ".join(part.en for part in parts)
    chinese = "；".join(part.zh for part in parts)
    return [Text("Now: {}.", "现在：{}。").format(Text(english, chinese))]


def _left(low: float, high: float, at_most: bool) -> Text:
    """Return the time left, in seconds, as text: one duration, an interval, or an upper bound."""
    longest = duration(high)
    if at_most:
        return Text("at most {} left", "至多还需 {}").format(longest)
    shortest = duration(low)
    if shortest == longest:
        return Text("about {} left", "大约还需 {}").format(longest)
    return Text("{} to {} left", "还需 {} 至 {}").format(shortest, longest)


def _count_steps(name: str, kind: str, history: History) -> Text:
    """Return the beginning of a sentence, without a full stop: how many steps the stage has taken and, if
    known, of how many.
    """
    sentence = Text("{name} has taken {done} {what}", "{name} 已走 {done} {what}")
    if history.total:
        sentence = Text("{name} has taken {done} of {total} {what}", "{name} 已走 {done}/{total} {what}")
    unit = _UNITS.get(kind, _STEPS)
    return sentence.format(name=name, done=count(history.done), total=count(history.total), what=unit)


def _brief(seconds: float) -> Text:
    """Return a duration as text, with two significant digits if it is below ten seconds."""
    if seconds >= 10:
        return duration(seconds)
    return Text(f"{seconds:.2g} s", f"{seconds:.2g} 秒")


# ---------------------------------------------------------------- curves

_share: Callable[[float], str] = percent
_CURVES: tuple[tuple[str, Text, Callable[[float], str]], ...] = (
    ("accuracy", Text("Accuracy", "准确率"), _share),
    ("held_out_accuracy", Text("Accuracy on held-out problems", "留出题准确率"), _share),
    ("reward", Text("The mean reward", "平均奖励"), lambda value: f"{value:.3g}"),
    ("length", Text("The mean length of a response", "回答的平均长度"), lambda value: f"{value:.0f}"),
    ("attempts", Text("Attempts per response", "每次回答的尝试次数"), lambda value: f"{value:.1f}"),
    (
        "language_consistency",
        Text("The share of words in the question’s language", "与提问同语言的词所占比例"),
        _share,
    ),
    ("entropy", Text("Entropy per token", "每词元的熵"), lambda value: f"{value:.2f}"),
    ("loss", Text("Loss", "损失"), lambda value: f"{value:.3g}"),
)
_QUIET = {
    "pretrain": {"entropy"},
    "sft": {"entropy"},
    "rl": {"loss"},
    "sample": {"reward", "accuracy", "entropy"},
    "screen": {"reward", "entropy"},
}


def curves(kind: str, history: History) -> list[Text]:
    """Return a sentence on each metric of a stage: its value at the beginning and at the end.

    Metrics that say little for this kind of stage are left out.
    """
    if kind == "evaluate":
        return []
    quiet = _QUIET.get(kind, set())
    sentences = []
    for name, title, write in _CURVES:
        values = history.column(name)
        if name not in quiet and len(values):
            sentences.append(_went(title, values, write))
    return sentences


def _went(title: Text, values: np.ndarray, write: Callable[[float], str]) -> Text:
    """Return a sentence on the change of a metric over its `values` [N]. `title` names the metric and
    `write` formats a value.

    It says "rose" or "fell" only if the means at both ends and the trend of the whole curve agree.
    """
    start, end = _ends(values)
    first = write(start)
    last = write(end)
    if len(values) < 4:
        return Text("{} stands at {}.", "{}为 {}。").format(title, last)
    rises = end > start
    direction = 1 if rises else -1
    if first == last or direction * trend(values) < CLEAR:
        sentence = Text(
            "{} has no clear direction: {} at first, {} now.", "{}没有明显的方向：起初 {}，现在 {}。"
        )
    elif rises:
        sentence = Text("{} rose from {} to {}.", "{}从 {} 升到 {}。")
    else:
        sentence = Text("{} fell from {} to {}.", "{}从 {} 降到 {}。")
    return sentence.format(title, first, last)


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of the first tenth and of the last tenth of `values` [N]."""
    tenth = max(1, len(values) // _ENDS)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


# ---------------------------------------------------------------- soundness


def soundness(history: History) -> list[Text]:
    """Return sentences on whether the training works as it should.

    They are about the gap between sampler and learner (their log-probabilities of the same tokens), the share
    of groups whose responses differ in reward, truncated responses, and alarms.
    """
    sentences = []
    gap = history.column("gap")
    if len(gap):
        sentences.append(_gap(float(gap.max())))
    informative = history.column("informative")
    if len(informative):
        _, share = _ends(informative)
        sentence = Text(
            "Of the latest groups {} hold both better and worse responses; the others teach nothing.",
            "最近的组中有 {} 既有较好也有较差的回答，其余的组教不了什么。",
        )
        sentences.append(sentence.format(percent(share, 0)))
    truncated = history.column("truncated")
    if len(truncated):
        _, share = _ends(truncated)
        if share >= _MANY_TRUNCATED:
            sentence = Text("{} of the latest responses ran out of tokens.", "最近的回答中有 {} 用尽了词元。")
            sentences.append(sentence.format(percent(share, 0)))
    return sentences + alarms(history)


def alarms(history: History) -> list[Text]:
    """Return a sentence on each different alarm of a stage, and a response where rewards taught nothing."""
    sentences = _alarm_sentences(history.alarms)
    untaught = any(message.startswith(UNTAUGHT) for _, message in history.alarms)
    if untaught and history.shown:
        sentences += [quote(row) for row in history.responses(history.shown[0].step)[:1]]
    return sentences


def quote(row: dict[str, Any]) -> Text:
    """Return a sentence that quotes one response of a recorded group, which `row` holds as it was logged."""
    text, reason = example(row)
    if not reason:
        return Text("One of the responses: “{}”", "其中一个回答：“{}”").format(text)
    return Text("One of the responses ({}): “{}”", "其中一个回答（{}）：“{}”").format(reason, text)


def _gap(gap: float) -> Text:
    """Return a sentence on the gap between sampler and learner and its likely cause.

    `gap` is the largest difference of a token's log-probability, in nats.
    """
    if gap < _ROUNDING_GAP:
        cause = Text(": no more than rounding", "，不超过舍入误差")
    else:
        cause = Text(": more than rounding explains", "，超出舍入误差所能解释的范围")
    sentence = Text(
        "On the same weights sampler and learner differ by at most {} nats a token{}.",
        "同一权重下，采样器与学习器每词元最多相差 {} 奈特{}。",
    )
    return sentence.format(f"{gap:.1e}", cause)


def _alarm_sentences(alarms: Sequence[tuple[int, str]]) -> list[Text]:
    """Return a sentence on each different alarm: the first step at which it was raised and how often.

    `alarms` are pairs of step and message.
    """
    steps: dict[str, list[int]] = {}
    for step, message in alarms:
        steps.setdefault(message, []).append(step)
    sentence = Text("Alarm at step {} ({} in all): {}.", "第 {} 步响起警报（共 {} 次）：{}。")
    return [sentence.format(times[0], len(times), alarm(message)) for message, times in steps.items()]


# Messages of train/alarms.py, train/learning_signal.py and train/learned_rewards.py, and the same in Chinese.
_NO_SIGNAL = "no learning signal: "
_NO_SIGNAL_ZH = "没有学习信号："
_NO_ANSWER = "no response has an answer where the verifier looks for it; "
_NO_ANSWER_ZH = "没有一个回答在判题器查找的位置给出答案；"
_SCREEN = r"or cite a screen stage in (\S+), which keeps those that are sometimes solved"
_SCREEN_ZH = r"或在 \1 中引用一个 screen 阶段，它只留下有时能解出的题目"
_HACKING = r"reward hacking: (\w+) rises while the truth on held-out problems does not: "
_HACKING_ZH = r"奖励作弊：\1 上升，而留出题目上的实情没有上升；"
_ALARMS = {
    "more than half of the responses run out of tokens: raise max_new_tokens": (
        "超过一半的回答用尽了词元，请调高 max_new_tokens"
    ),
    "fewer than a tenth of the groups differ in reward: other problems are needed": (
        "奖励有高低之分的组不到十分之一，需要别的题目"
    ),
    "length tripled within 20 steps": "长度在 20 步内增至三倍",
    "length fell to a third within 20 steps": "长度在 20 步内降到三分之一",
    r"the part '(\w+)' outweighs accuracy: lower its weight": r"“\1”一项压过了正确率，请降低它的权重",
    _NO_SIGNAL + r"nearly every response is cut off at max_new_tokens = (\d+); raise (\S+)": (
        _NO_SIGNAL_ZH + r"几乎所有回答都在 max_new_tokens = \1 处被截断；请调高 \2"
    ),
    rf"(?:{_NO_SIGNAL}|no answer: ){_NO_ANSWER}"
    r"ask for that form in (\S+), or set (\S+) to the form that the model writes": (
        _NO_ANSWER_ZH + r"请在 \1 中要求这种形式，或把 \2 设为模型所写的形式"
    ),
    rf"(?:{_NO_SIGNAL}|no answer: ){_NO_ANSWER}teach (\S+) that form first, with an sft stage": (
        _NO_ANSWER_ZH + r"请先用 sft 阶段教会 \1 这种形式"
    ),
    _NO_SIGNAL + r"the responses to each problem are the same text; raise (\S+)": (
        _NO_SIGNAL_ZH + r"每道题的各个回答完全相同；请调高 \1"
    ),
    _NO_SIGNAL + "every response is wrong; give easier problems, " + _SCREEN: (
        _NO_SIGNAL_ZH + "所有回答都错；请换更容易的题目，" + _SCREEN_ZH
    ),
    _NO_SIGNAL + "every response is right; give harder problems, " + _SCREEN: (
        _NO_SIGNAL_ZH + "所有回答都对；请换更难的题目，" + _SCREEN_ZH
    ),
    _NO_SIGNAL + r"the responses to each problem earn equal rewards; raise (\S+) or (\S+)": (
        _NO_SIGNAL_ZH + r"每道题的各个回答奖励相同；请调高 \1 或 \2"
    ),
    _HACKING + "it no longer counts": _HACKING_ZH + "它不再计入奖励",
    _HACKING + "the stage ends here": _HACKING_ZH + "本阶段到此结束",
}


def alarm(text: str) -> Text:
    """Return an alarm's message in both languages.

    A message that has no translation here, such as one from another version of Limbeck, stays in English in
    both.
    """
    for pattern, chinese in _ALARMS.items():
        match = re.fullmatch(pattern, text)
        if match:
            return Text(text, match.expand(chinese))
    return Text(text, text)


# ---------------------------------------------------------------- outcomes


def continued(name: str, origin: dict[str, Any] | None) -> list[Text]:
    """Return a sentence on the shorter stage that the stage `name` continues; [] without one.

    `origin` is the entry `continued` of its manifest.
    """
    if not origin:
        return []
    sentence = Text(
        "{} continues {} from step {}; its time is that of the later steps.",
        "{} 接着 {} 从第 {} 步继续训练；用时只计其后的步。",
    )
    return [sentence.format(name, origin["artifact"], count(origin["step"]))]


def outcome(view: StageView) -> list[Text]:
    """Return sentences on the results of a finished stage: the rows it kept, its reviewers' verdicts, or
    its accuracies.
    """
    sentences = []
    if view.notes.get("weights_changed") is False:
        sentences.append(unchanged(view.name, view.manifest))
    if view.notes.get("sampled"):
        sentences += _sampling_sentences(view.notes)
    if "policy" in view.notes:
        sentences.append(_review_sentence(view.notes))
    if view.kind == "evaluate" and (view.folder / EVALUATION).exists():
        sentences += _accuracy_sentences(view)
    return sentences


def unchanged(name: str, manifest: dict[str, Any]) -> Text:
    """Return the sentence that the stage `name`, described by its `manifest`, left the weights as they
    were."""
    initial = manifest.get("settings", {}).get("model")
    if not initial:
        sentence = Text(
            "{} learned nothing: its weights did not change.", "{} 什么也没有学到：权重没有变化。"
        )
        return sentence.format(name)
    sentence = Text(
        "{} learned nothing: its weights are those of {}, byte for byte.",
        "{} 什么也没有学到：它的权重与 {} 逐字节相同。",
    )
    return sentence.format(name, initial)


def _sampling_sentences(notes: dict[str, Any]) -> list[Text]:
    """Return sentences on the number of responses that rejection sampling kept, and on the reasons for
    dropping the others.

    `notes` are the stage's.
    """
    kept = Text("It kept {} of {} responses.", "从 {1} 个回答中留下 {0} 个。")
    sentences = [kept.format(count(notes["kept"]), count(notes["sampled"]))]
    dropped = Text("{} were dropped: {}.", "{} 个被丢弃：{}。")
    for reason, times in notes.get("dropped", {}).items():
        if times:
            sentences.append(dropped.format(count(times), reason))
    return sentences


def _review_sentence(notes: dict[str, Any]) -> Text:
    """Return a sentence on the verdicts of a curate stage, and on the reviewers or the policy that gave
    them.

    `notes` are the stage's.
    """
    sentence = Text(
        "{} rows were accepted, {} edited, {} rejected, by {}.",
        "接受 {} 行，修改 {} 行，拒绝 {} 行，由 {} 决定。",
    )
    reviewers = ", ".join(notes.get("reviewers", []))
    by = reviewers or notes["policy"]
    return sentence.format(notes["accepted"], notes["edited"], notes["rejected"], by)


def _accuracy_sentences(view: StageView) -> list[Text]:
    """Return a sentence on each accuracy of an evaluation: one for each source of problems and mode of
    sampling.
    """
    run = Run((view,), {}, {})
    model = next(iter(run.evaluations))
    sentence = Text(
        "On {source}, {mode}: {mean} right ({low}–{high}, {n} problems).",
        "{source}，{mode}：答对 {mean}（{low}–{high}，{n} 题）。",
    )
    sentences = []
    for source in run.sources:
        for mode in run.modes(model, source):
            accuracy = run.accuracy(model, mode, source)
            text = sentence.format(
                source=source,
                mode=MODES.get(mode, plain(mode)),
                mean=percent(accuracy.mean),
                low=percent(accuracy.low),
                high=percent(accuracy.high),
                n=count(accuracy.problems),
            )
            sentences.append(text)
    return sentences


def flipped(before: str, after: str, flips: Flips) -> Text:
    """Return a sentence on the problems whose result differs between the evaluations called `before` and
    `after`.
    """
    if not flips.asked:
        return Text("{} and {} share no problem.", "{} 与 {} 没有共同的题目。").format(before, after)
    sentence = Text(
        "Of {asked} problems that both answered, {won} went from wrong in {before} to right in {after}, and "
        "{lost} from right to wrong.",
        "两者都答过的 {asked} 题中，{won} 题由 {before} 的错变为 {after} 的对，{lost} 题由对变错。",
    )
    won = len(flips.won)
    lost = len(flips.lost)
    return sentence.format(asked=flips.asked, won=won, lost=lost, before=before, after=after)


def learned(flips: Flips) -> Text:
    """Return a sentence on the problems whose result differs between the first and the last group of
    responses that a training stage recorded for them.
    """
    sentence = Text(
        "Of {asked} problems that were written down more than once, {won} were mostly wrong at first and are "
        "mostly right by now; with {lost} it is the other way round.",
        "记录过不止一次的 {asked} 题中，{won} 题起初多半答错、如今多半答对；{lost} 题则相反。",
    )
    return sentence.format(asked=flips.asked, won=len(flips.won), lost=len(flips.lost))


def foreseen(actual: float, forecast: dict[str, float], over: bool) -> Text:
    """Return a sentence that compares a stage's forecast with its time `actual`, in seconds.

    `over` is True if the stage has ended; otherwise `actual` is the time so far.
    """
    low = forecast["low"]
    high = forecast["high"]
    times = (duration(forecast["seconds"]), duration(low), duration(high), duration(actual))
    if not over:
        sentence = Text(
            "The plan said {} ({} to {}); {} have passed{}.", "计划为 {}（{} 至 {}），已过去 {}{}。"
        )
        late = Text(", more than it allowed for", "，超出了预期")
        return sentence.format(*times, late if actual > high else "")
    sentence = Text("The plan said {} ({} to {}); it took {}, {}.", "计划为 {}（{} 至 {}），实际 {}，{}。")
    if actual > high:
        verdict = Text("longer than foreseen", "比计划长")
    elif actual < low:
        verdict = Text("shorter than foreseen", "比计划短")
    else:
        verdict = Text("as foreseen", "如计划所料")
    return sentence.format(*times, verdict)
