"""Sentences of the report, in English and Chinese. The run's numbers decide which sentence is chosen.

base, zero, control, r1, small and so on are roles of models, explained in `loaded_run`. A function returns an
empty list if the run lacks what its sentences are about.
"""

from __future__ import annotations

from typing import Any

from ..eval.statistics import Interval, difference
from .i18n import MODES, Text, bounds, count, number, percent, scientific, size
from .loaded_run import Run
from .sentences import unchanged

_FEW_PROBLEMS = 1000  # problems below which an interval is so wide that the report says so
_MANY_TRUNCATED = 0.05  # share of truncated responses from which a sentence mentions them
_COMPARED_ROLES = (("zero", "base"), ("zero", "control"), ("r1", "zero"), ("small", "small_rl"))


def opening(run: Run) -> list[Text]:
    """Return the first paragraph of the report: the stages that learned nothing, and the accuracies of base,
    zero, r1 and small, where evaluated.
    """
    sentences = []
    for stage in run.stages:
        if stage.notes.get("weights_changed") is False:
            sentences.append(unchanged(stage.name, stage.manifest))
    base = run.accuracy(run.role("base"))
    if base:
        sentence = Text(
            "The base model answers {} of {:,} held-out problems correctly at temperature 1.",
            "在温度 1 下，基座模型答对了 {1:,} 道留出题中的 {0}。",
        )
        sentences.append(sentence.format(percent(base.mean), base.problems))
    zero = run.accuracy(run.role("zero"))
    if zero:
        sentence = Text(
            "Reinforcement learning with rule-based rewards alone takes it to {}: the model {}.",
            "仅凭规则奖励的强化学习把它带到 {}，即模型 {}。",
        )
        sentences.append(sentence.format(percent(zero.mean), run.cast["zero"]))
        sentences += _growth(run)
    r1 = run.accuracy(run.role("r1"))
    if r1:
        sentences.append(_r1(run, r1))
    small = run.accuracy(run.role("small"))
    if small:
        sentences.append(_small(run, small))
    return sentences


def _growth(run: Run) -> list[Text]:
    """Return a sentence on how length and number of attempts of zero's responses compare with base's."""
    length_before, length_after = _base_and_zero(run, "length")
    attempts_before, attempts_after = _base_and_zero(run, "attempts")
    if length_before is None or length_after is None:
        return []
    length = Text("Its responses went from {:.0f} to {:.0f} tokens", "它的回答从 {:.0f} 个词元变为 {:.0f} 个")
    length = length.format(length_before, length_after)
    if attempts_before is None or attempts_after is None:
        return [Text("{}.", "{}。").format(length)]
    attempts = Text(", and from {:.1f} to {:.1f} attempts", "，尝试从 {:.1f} 次变为 {:.1f} 次")
    attempts = attempts.format(attempts_before, attempts_after)
    end = Text(".", "。")
    if attempts_after > 1.2 * attempts_before:
        end = Text("; no reward asked it to try again.", "；没有任何奖励要求它再试一次。")
    return [Text("{}{}{}", "{}{}{}").format(length, attempts, end)]


def _base_and_zero(run: Run, name: str) -> tuple[float | None, float | None]:
    """Return the measure `name` (such as length) of base and of zero; None where it was not measured."""
    return run.measure(run.role("base"), name), run.measure(run.role("zero"), name)


def _r1(run: Run, r1: Interval) -> Text:
    """Return a sentence on the accuracy of r1 and, if measured, its language consistency."""
    language = run.measure(run.role("r1"), "language_consistency")
    accuracy = percent(r1.mean)
    if language is None:
        sentence = Text("The rest of the recipe ends in {} with {}.", "配方余下的步骤终于 {}：{}。")
        return sentence.format(run.cast["r1"], accuracy)
    sentence = Text(
        "The rest of the recipe ends in {} with {}, and {} of its words in the language of the question.",
        "配方余下的步骤终于 {}：{}，且 {} 的词与提问同一种语言。",
    )
    return sentence.format(run.cast["r1"], accuracy, percent(language))


def _small(run: Run, small: Interval) -> Text:
    """Return a sentence on the accuracy of the distilled model and, if it is smaller than its teacher, on
    its size.
    """
    teacher = run.parameters(run.role("r1")) or run.parameters(run.role("base"))
    student = run.parameters(run.role("small"))
    accuracy = percent(small.mean)
    if not teacher or not student or teacher <= student:
        sentence = Text("Distilled, {} reaches {}.", "蒸馏得到的 {} 达到 {}。")
        return sentence.format(run.cast["small"], accuracy)
    sentence = Text(
        "Distilled into a model {:.1f} times smaller, {} reaches {}.",
        "蒸馏进一个只有其 1/{:.1f} 大小的模型后，{} 达到 {}。",
    )
    return sentence.format(teacher / student, run.cast["small"], accuracy)


# ---------------------------------------------------------------- persistence, and its control


def persistence(run: Run) -> list[Text]:
    """Return a sentence on how often base and zero make another attempt after a wrong one."""
    before, after = _base_and_zero(run, "persist")
    if before is None or after is None:
        return []
    sentence = Text(
        "After writing “no”, the base makes another attempt in {} of cases; {} in {}.",
        "写下“错”之后，基座有 {} 的时候会再试一次；{} 则为 {}。",
    )
    return [sentence.format(percent(before, 0), run.cast["zero"], percent(after, 0))]


def control(run: Run) -> list[Text]:
    """Return sentences on the control, base with forced retries (budget forcing): its accuracy, and the
    share of RL's gain that forced retries alone give.
    """
    sentences = [
        Text(
            "Without any training: the base again, with another attempt forced on it after each “no” "
            "(budget forcing, arXiv 2501.19393).",
            "不做任何训练：还是那个基座，只在每次判错后强制它再试一次（budget forcing，arXiv 2501.19393）。",
        )
    ]
    shares = []
    for mode in ("t1", "greedy"):
        base = run.accuracy(run.role("base"), mode)
        forced = run.accuracy(run.role("control"), mode)
        zero = run.accuracy(run.role("zero"), mode)
        if not (base and forced and zero):
            continue
        sentences.append(_against(run, mode, forced, zero))
        if zero.mean > base.mean:
            shares.append((forced.mean - base.mean) / (zero.mean - base.mean))
    return [*sentences, _verdict(shares)]


def _against(run: Run, mode: str, forced: Interval, zero: Interval) -> Text:
    """Return a sentence that compares the accuracy of the control (`forced`) with that of zero in one
    mode, with the interval of their difference.
    """
    gap, low, high = difference(zero, forced)
    if low > 0:
        outcome = Text(
            "{} is above it by {:.1f} points ({:.1f} to {:.1f})",
            "{} 比它高 {:.1f} 个百分点（{:.1f} 至 {:.1f}）",
        )
    elif high < 0:
        outcome = Text(
            "{} is below it by {:.1f} points ({:.1f} to {:.1f})",
            "{} 比它低 {:.1f} 个百分点（{:.1f} 至 {:.1f}）",
        )
        gap = -gap
        low, high = -high, -low
    else:
        outcome = Text(
            "{0} cannot be told from it ({2:.1f} to {3:.1f} points)",
            "{0} 与它分不出高下（{2:.1f} 至 {3:.1f} 个百分点）",
        )
    outcome = outcome.format(run.cast["zero"], 100 * gap, 100 * low, 100 * high)
    title = Text(MODES[mode].en.capitalize(), MODES[mode].zh)
    sentence = Text("{mode}: it reaches {forced}, and {outcome}.", "{mode}：它达到 {forced}，{outcome}。")
    return sentence.format(mode=title, forced=percent(forced.mean), outcome=outcome)


def _verdict(shares: list[float]) -> Text:
    """Return the concluding sentence on the control.

    `shares` are the shares of RL's gain that forced retries give, one for each mode.
    """
    if not shares:
        return Text(
            "There is no gain over the base here that a control could explain.",
            "这里没有超过基座的提升，对照也就无从解释。",
        )
    least = min(shares)
    most = max(shares)
    if least >= 0.5:
        sentence = Text(
            "Keeping at it alone gives {} of the gain. So what RL discovers is mostly persistence; "
            "it does not invent a skill that the base lacked.",
            "仅仅坚持下去就能得到提升的 {}。可见强化学习发现的主要是“坚持”，并没有发明基座所没有的本领。",
        )
    elif most < 0.5:
        sentence = Text(
            "Keeping at it alone gives {} of the gain: less than half. Here RL taught more than persistence.",
            "仅仅坚持下去只能得到提升的 {}，不到一半。在这里，强化学习教会的不止是“坚持”。",
        )
    else:
        sentence = Text(
            "Keeping at it alone gives {} of the gain, depending on how one samples: "
            "persistence explains much of what RL found, not all of it.",
            "视采样方式不同，仅仅坚持下去可得到提升的 {}：坚持能解释强化学习所得的很大一部分，但不是全部。",
        )
    return sentence.format(_span(least, most))


def _span(low: float, high: float) -> str:
    """Return a range of shares (0 to 1) in percent, or one number if both ends are equal when rounded."""
    if percent(low, 0) == percent(high, 0):
        return percent(low, 0)
    return f"{100 * low:.0f}–{100 * high:.0f}%"


# ---------------------------------------------------------------- the later stages


def language(run: Run) -> list[Text]:
    """Return sentences on the language consistency of zero and r1, and on what it costs in accuracy."""
    first = run.measure(run.role("zero"), "language_consistency")
    last = run.measure(run.role("r1"), "language_consistency")
    if first is None or last is None:
        return []
    sentence = Text(
        "{} writes {} of its words in the language of the question, {} writes {}.",
        "{} 有 {} 的词与提问同语言，{} 为 {}。",
    )
    sentences = [sentence.format(run.cast["zero"], percent(first), run.cast["r1"], percent(last))]
    zero = run.accuracy(run.role("zero"))
    cold = run.accuracy(run.role("dev1"))
    after = run.accuracy(run.role("dev2"))
    if zero and cold and difference(zero, cold)[1] > 0:
        sentence = Text(
            "Order has a price: the cold start, {}, is at {} where {} was at {}.",
            "秩序是有代价的：冷启动得到的 {} 为 {}，而 {} 为 {}。",
        )
        accuracies = (percent(cold.mean), run.cast["zero"], percent(zero.mean))
        sentences.append(sentence.format(run.cast["dev1"], *accuracies))
    if cold and after:
        sentence = Text(
            "Reinforcement learning from there, {}, takes {} to {}.",
            "由此出发的强化学习 {} 把 {} 变为 {}。",
        )
        sentences.append(sentence.format(run.cast["dev2"], percent(cold.mean), percent(after.mean)))
    return sentences


def distillation(run: Run) -> list[Text]:
    """Return sentences that compare the distilled model with RL on the same small base: accuracy and
    training compute.
    """
    distilled = run.accuracy(run.role("small"))
    trained = run.accuracy(run.role("small_rl"))
    if not distilled or not trained:
        return []
    sentences = [_student_against_rl(distilled, trained)]
    distillation_flops, rl_flops = _small_flops(run)
    if distillation_flops and rl_flops:
        sentence = Text("RL had {:.1f} times its training compute.", "强化学习用了它 {:.1f} 倍的训练算力。")
        sentences.append(sentence.format(rl_flops / distillation_flops))
    return sentences


def _student_against_rl(distilled: Interval, trained: Interval) -> Text:
    """Return a sentence on the difference in accuracy between the distilled model and RL on the same base,
    or that it is not significant.
    """
    gap, low, high = difference(distilled, trained)
    if low <= 0 <= high:
        return Text(
            "The student taught by traces cannot be told from the same small base trained by RL.",
            "用教师轨迹教出的学生，与同一小基座做强化学习的结果分不出高下。",
        )
    direction = Text("above", "高") if low > 0 else Text("below", "低")
    nearest, farthest = sorted((abs(low), abs(high)))
    sentence = Text(
        "The student taught by traces is {:.1f} points ({:.1f} to {:.1f}) {} the same small base "
        "trained by RL.",
        "用教师轨迹教出的学生，比同一小基座做强化学习{3} {0:.1f} 个百分点（{1:.1f} 至 {2:.1f}）。",
    )
    return sentence.format(100 * abs(gap), 100 * nearest, 100 * farthest, direction)


def _small_flops(run: Run) -> tuple[float | None, float | None]:
    """Return the training FLOPs of the distilled model and of RL on the small base; None where not known."""
    return run.spent(run.role("small"), "flops"), run.spent(run.role("small_rl"), "flops")


def curation(run: Run) -> list[Text]:
    """Return sentences on each curate stage: the verdicts, who or which policy gave them, and the
    reviewers' agreement.
    """
    sentence = Text(
        "{name}: {accepted} rows accepted, {edited} edited, {rejected} rejected. Policy: {policy}.",
        "{name}：接受 {accepted} 行，修改 {edited} 行，拒绝 {rejected} 行。方针：{policy}。",
    )
    sentences = []
    for stage in run.of_kind("curate"):
        notes = stage.notes
        policy = notes.get("policy", "–")
        counts = {key: count(notes.get(key, 0)) for key in ("accepted", "edited", "rejected")}
        sentences.append(sentence.format(name=stage.name, policy=policy, **counts))
        if notes.get("agreement"):
            sentences.append(_agreement(notes["agreement"]))
    return sentences


def _agreement(agreement: dict[str, Any]) -> Text:
    """Return a sentence on how far reviewers who judged the same rows agree.

    `agreement` has the number of `rows`, the share of equal verdicts (`same`) and the agreement coefficient
    `alpha`.
    """
    sentence = Text(
        "{rows} of them were seen by several people, who gave {same} of these the same verdict "
        "(Krippendorff's alpha {alpha}).",
        "其中 {rows} 行由多人审阅，{same} 的结论一致（Krippendorff α 为 {alpha}）。",
    )
    same = percent(agreement["same"])
    return sentence.format(rows=count(agreement["rows"]), same=same, alpha=number(agreement["alpha"], 2))


def comparison(result: dict[str, Any]) -> list[Text]:
    """Return a sentence on each way of pretraining but the first: the compute after which it reaches the
    first one's final loss, or that it does not.

    `result` is what `report.comparison.compare` returns.
    """
    ways = result["ways"]
    first, *others = ways
    target = number(result["target"], 4)
    flops = ways[first]["flops"]
    missed = Text(
        "{} does not reach {}'s final loss ({}) with as many tokens: it ends at {}.",
        "词元数相同时，{} 未达到 {} 的最终损失（{}），止于 {}。",
    )
    reached = Text(
        "{} reaches {}'s final loss ({}) after {} FLOPs, {} of the {} that {} took.",
        "{0} 用 {3} FLOPs 达到 {1} 的最终损失（{2}），为 {6} 所用 {5} 的 {4}。",
    )
    sentences = []
    for name in others:
        after = ways[name]["reaches_target_after"]
        if after is None:
            losses = ways[name]["final_losses"]
            mean = number(sum(losses) / len(losses), 4)
            sentences.append(missed.format(name, first, target, mean))
        else:
            compute = (scientific(after), percent(after / flops), scientific(flops))
            sentences.append(reached.format(name, first, target, *compute, first))
    return sentences


# ---------------------------------------------------------------- limits


def not_shown(run: Run) -> list[Text]:
    """Return sentences on what the run does not show: limits of any single run, and limits that follow
    from its numbers.
    """
    seed = Text(
        "One seed, {}. Intervals tell how sure an accuracy is over problems, not how it would vary "
        "over seeds.",
        "只有一个随机种子：{}。区间说明准确率在题目间有多确定，并不说明换种子后会变化多少。",
    )
    return [
        seed.format(run.recipe.get("seed", "–")),
        *_miniature(run),
        *_sample_size(run),
        *_missing_significance(run),
        *_truncation(run),
        *_unequal_compute(run),
        *_policies(run),
    ]


def _miniature(run: Run) -> list[Text]:
    """Return a sentence on the limit of a run whose problems are those of Limbeck's miniature (the clock
    countdown task for tiny models).

    Return an empty list for other problems.
    """
    sources = [problems.get("source") for problems in (run.recipe.get("problems") or {}).values()]
    if "miniature" not in sources:
        return []
    sentence = Text(
        "A miniature: {} parameters and a small world of problems. That larger models learn in the "
        "same way is not shown here.",
        "这是一个微缩世界：{} 个参数，题目的天地很小。更大的模型是否同样如此，这里没有证明。",
    )
    parameters = run.parameters(run.role("base")) or run.parameters(run.role("zero"))
    return [sentence.format(size(parameters))]


def _sample_size(run: Run) -> list[Text]:
    """Return a sentence that few problems were evaluated, if a model was evaluated on fewer than
    `_FEW_PROBLEMS`.
    """
    accuracies = [run.accuracy(model) for model in run.evaluations]
    problems = [accuracy.problems for accuracy in accuracies if accuracy]
    if not problems or min(problems) >= _FEW_PROBLEMS:
        return []
    sentence = Text("Only {} problems were evaluated.", "只评测了 {} 道题。")
    return [sentence.format(count(min(problems)))]


def _missing_significance(run: Run) -> list[Text]:
    """Return a sentence on each pair of models whose expected difference in accuracy is not significant,
    and one if zero has no control.
    """
    sentences = []
    for upper, lower in _COMPARED_ROLES:
        for mode in ("t1", "greedy"):
            above = run.accuracy(run.role(upper), mode)
            below = run.accuracy(run.role(lower), mode)
            if above and below and difference(above, below)[1] <= 0:
                names = (run.cast[upper], run.cast[lower])
                sentences.append(_unsupported_claim(names, mode, above, below))
    if "zero" in run.cast and "control" not in run.cast:
        sentence = Text(
            "How much of the gain mere persistence would give: no control was run.",
            "单靠坚持能得到多少提升：没有做对照。",
        )
        sentences.append(sentence)
    return sentences


def _unsupported_claim(names: tuple[str, str], mode: str, above: Interval, below: Interval) -> Text:
    """Return a sentence that the run does not show that the first model of `names` is better than the
    second, with both accuracies in that mode.
    """
    sentence = Text(
        "That {} is above {} ({mode}): {} ({}) against {} ({}).",
        "“{} 高于 {}”（{mode}）：{}（{}）对 {}（{}）。",
    )
    accuracies = (percent(above.mean), bounds(above), percent(below.mean), bounds(below))
    return sentence.format(*names, *accuracies, mode=MODES[mode])


def _truncation(run: Run) -> list[Text]:
    """Return a sentence on each of zero and r1 whose responses often ran out of tokens."""
    sentence = Text(
        "What {} would reach with more room: {} of its responses ran out of tokens and count as "
        "wrong unless an answer was given before.",
        "{} 若有更多空间会怎样：它有 {} 的回答用尽词元，除非此前已作答，否则算错。",
    )
    sentences = []
    for role in ("zero", "r1"):
        truncated = run.measure(run.role(role), "truncated")
        if truncated is not None and truncated >= _MANY_TRUNCATED:
            sentences.append(sentence.format(run.cast[role], percent(truncated)))
    return sentences


def _unequal_compute(run: Run) -> list[Text]:
    """Return a sentence that RL had less training compute than distillation, if so."""
    distillation_flops, rl_flops = _small_flops(run)
    if not distillation_flops or not rl_flops or rl_flops >= distillation_flops:
        return []
    sentence = Text(
        "Distillation against RL at equal compute: RL had only {} times the training FLOPs of distillation.",
        "同等算力下的蒸馏与强化学习：强化学习的训练 FLOPs 只有蒸馏的 {} 倍。",
    )
    return [sentence.format(number(rl_flops / distillation_flops, 2))]


def _policies(run: Run) -> list[Text]:
    """Return a sentence that names the curate stages in which a policy decided instead of people."""
    names = []
    for stage in run.of_kind("curate"):
        settings = stage.manifest.get("settings") or {}
        if settings.get("auto", "off") != "off":
            names.append(stage.name)
    if not names:
        return []
    sentence = Text(
        "What people at the desk would have changed: {} applied a stated policy instead.",
        "若由人来审校会改动什么：{} 按既定方针自动执行。",
    )
    return [sentence.format(", ".join(names))]
