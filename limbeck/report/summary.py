"""What the numbers say, in sentences: every claim is computed, and turns where the numbers turn."""

from __future__ import annotations

from typing import Any

from ..eval.statistics import Interval, difference
from .i18n import MODES, Text, bounds, count, number, percent, plain, scientific, size
from .loaded_run import Run

_FEW = 1000  # problems below which an interval is wide enough to say so


def opening(run: Run) -> list[Text]:
    """The whole run in a paragraph."""
    said = []
    base, zero, r1, small = (run.accuracy(run.role(role)) for role in ("base", "zero", "r1", "small"))
    if base:
        said.append(
            Text(
                "The base model answers {} of {:,} held-out problems correctly at temperature 1.",
                "在温度 1 下，基座模型答对了 {1:,} 道留出题中的 {0}。",
            ).format(percent(base.mean), base.problems)
        )
    if zero:
        said.append(
            Text(
                "Reinforcement learning with rule-based rewards alone takes it to {}: the model {}.",
                "仅凭规则奖励的强化学习把它带到 {}，即模型 {}。",
            ).format(percent(zero.mean), run.cast["zero"])
        )
        said += _growth(run)
    if r1:
        said.append(_r1(run, r1))
    if small:
        said.append(_small(run, small))
    return said


def _growth(run: Run) -> list[Text]:
    before, after = (run.measure(run.role(role), "length") for role in ("base", "zero"))
    tried, tries = (run.measure(run.role(role), "attempts") for role in ("base", "zero"))
    if before is None or after is None:
        return []
    said = Text(
        "Its responses went from {:.0f} to {:.0f} tokens", "它的回答从 {:.0f} 个词元变为 {:.0f} 个"
    ).format(before, after)
    if tried is None or tries is None:
        return [Text(said.en + ".", said.zh + "。")]
    more = Text(", and from {:.1f} to {:.1f} attempts", "，尝试从 {:.1f} 次变为 {:.1f} 次").format(
        tried, tries
    )
    unasked = Text("; no reward asked it to try again.", "；没有任何奖励要求它再试一次。")
    end = unasked if tries > 1.2 * tried else Text(".", "。")
    return [Text(said.en + more.en + end.en, said.zh + more.zh + end.zh)]


def _r1(run: Run, r1: Interval) -> Text:
    language = run.measure(run.role("r1"), "language_consistency")
    if language is None:
        return Text("The rest of the recipe ends in {} with {}.", "配方余下的步骤终于 {}：{}。").format(
            run.cast["r1"], percent(r1.mean)
        )
    return Text(
        "The rest of the recipe ends in {} with {}, and {} of its words in the language of the question.",
        "配方余下的步骤终于 {}：{}，且 {} 的词与提问同一种语言。",
    ).format(run.cast["r1"], percent(r1.mean), percent(language))


def _small(run: Run, small: Interval) -> Text:
    teacher = run.parameters(run.role("r1")) or run.parameters(run.role("base"))
    student = run.parameters(run.role("small"))
    if not teacher or not student or teacher <= student:
        return Text("Distilled, {} reaches {}.", "蒸馏得到的 {} 达到 {}。").format(
            run.cast["small"], percent(small.mean)
        )
    return Text(
        "Distilled into a model {:.1f} times smaller, {} reaches {}.",
        "蒸馏进一个只有其 1/{:.1f} 大小的模型后，{} 达到 {}。",
    ).format(teacher / student, run.cast["small"], percent(small.mean))


# ---------------------------------------------------------------- persistence, and its control


def persistence(run: Run) -> list[Text]:
    """What changed between base and zero, besides the accuracy."""
    before, after = (run.measure(run.role(role), "persist") for role in ("base", "zero"))
    if before is None or after is None:
        return []
    return [
        Text(
            "After writing “no”, the base makes another attempt in {} of cases; {} in {}.",
            "写下“错”之后，基座有 {} 的时候会再试一次；{} 则为 {}。",
        ).format(percent(before, 0), run.cast["zero"], percent(after, 0))
    ]


def control(run: Run) -> list[Text]:
    """What the same base does when it is kept at it by force, and what that leaves for RL."""
    said = [
        Text(
            "Without any training: the base again, with another attempt forced on it after each “no” "
            "(budget forcing, arXiv 2501.19393).",
            "不做任何训练：还是那个基座，只在每次判错后强制它再试一次（budget forcing，arXiv 2501.19393）。",
        )
    ]
    shares = []
    for mode in ("t1", "greedy"):
        base, forced, zero = (run.accuracy(run.role(role), mode) for role in ("base", "control", "zero"))
        if not (base and forced and zero):
            continue
        said.append(_against(run, mode, forced, zero))
        if zero.mean > base.mean:
            shares.append((forced.mean - base.mean) / (zero.mean - base.mean))
    return [*said, _verdict(shares)]


def _against(run: Run, mode: str, forced: Interval, zero: Interval) -> Text:
    gap, low, high = difference(zero, forced)
    if low > 0:
        outcome = Text(
            "{} is above it by {:.1f} points ({:.1f} to {:.1f})",
            "{} 比它高 {:.1f} 个百分点（{:.1f} 至 {:.1f}）",
        )
    elif high < 0:
        outcome, gap, low, high = (
            Text(
                "{} is below it by {:.1f} points ({:.1f} to {:.1f})",
                "{} 比它低 {:.1f} 个百分点（{:.1f} 至 {:.1f}）",
            ),
            -gap,
            -high,
            -low,
        )
    else:
        outcome = Text(
            "{0} cannot be told from it ({2:.1f} to {3:.1f} points)",
            "{0} 与它分不出高下（{2:.1f} 至 {3:.1f} 个百分点）",
        )
    said = outcome.format(run.cast["zero"], 100 * gap, 100 * low, 100 * high)
    return Text("{mode}: it reaches {forced}, and {said}.", "{mode}：它达到 {forced}，{said}。").format(
        mode=Text(MODES[mode].en.capitalize(), MODES[mode].zh), forced=percent(forced.mean), said=said
    )


def _verdict(shares: list[float]) -> Text:
    """`shares` tell, mode by mode, how much of RL's gain the forced base shows without training."""
    if not shares:
        return Text(
            "There is no gain over the base here that a control could explain.",
            "这里没有超过基座的提升，对照也就无从解释。",
        )
    least, most = min(shares), max(shares)
    span = (
        percent(least, 0) if percent(least, 0) == percent(most, 0) else f"{100 * least:.0f}–{100 * most:.0f}%"
    )
    if least >= 0.5:
        return Text(
            "Keeping at it alone gives {} of the gain. So what RL discovers is mostly persistence; "
            "it does not invent a skill that the base lacked.",
            "仅仅坚持下去就能得到提升的 {}。可见强化学习发现的主要是“坚持”，并没有发明基座所没有的本领。",
        ).format(span)
    if most < 0.5:
        return Text(
            "Keeping at it alone gives {} of the gain: less than half. Here RL taught more than persistence.",
            "仅仅坚持下去只能得到提升的 {}，不到一半。在这里，强化学习教会的不止是“坚持”。",
        ).format(span)
    return Text(
        "Keeping at it alone gives {} of the gain, depending on how one samples: "
        "persistence explains much of what RL found, not all of it.",
        "视采样方式不同，仅仅坚持下去可得到提升的 {}：坚持能解释强化学习所得的很大一部分，但不是全部。",
    ).format(span)


# ---------------------------------------------------------------- the later stages


def language(run: Run) -> list[Text]:
    first, last = (
        run.measure(run.role("zero"), "language_consistency"),
        run.measure(run.role("r1"), "language_consistency"),
    )
    if first is None or last is None:
        return []
    said = [
        Text(
            "{} writes {} of its words in the language of the question, {} writes {}.",
            "{} 有 {} 的词与提问同语言，{} 为 {}。",
        ).format(run.cast["zero"], percent(first), run.cast["r1"], percent(last))
    ]
    zero, cold, after = (run.accuracy(run.role(role)) for role in ("zero", "dev1", "dev2"))
    if zero and cold and difference(zero, cold)[1] > 0:
        said.append(
            Text(
                "Order has a price: the cold start, {}, is at {} where {} was at {}.",
                "秩序是有代价的：冷启动得到的 {} 为 {}，而 {} 为 {}。",
            ).format(run.cast["dev1"], percent(cold.mean), run.cast["zero"], percent(zero.mean))
        )
    if cold and after:
        said.append(
            Text(
                "Reinforcement learning from there, {}, takes {} to {}.",
                "由此出发的强化学习 {} 把 {} 变为 {}。",
            ).format(run.cast["dev2"], percent(cold.mean), percent(after.mean))
        )
    return said


def distillation(run: Run) -> list[Text]:
    taught, alone = run.accuracy(run.role("small")), run.accuracy(run.role("small_rl"))
    if not taught or not alone:
        return []
    gap, low, high = difference(taught, alone)
    if low > 0 or high < 0:
        outcome = Text("above", "高") if low > 0 else Text("below", "低")
        edges = sorted((abs(low), abs(high)))
        said = [
            Text(
                "The student taught by traces is {:.1f} points ({:.1f} to {:.1f}) {} the same small base "
                "trained by RL.",
                "用教师轨迹教出的学生，比同一小基座做强化学习{3} {0:.1f} 个百分点（{1:.1f} 至 {2:.1f}）。",
            ).format(100 * abs(gap), 100 * edges[0], 100 * edges[1], outcome)
        ]
    else:
        said = [
            Text(
                "The student taught by traces cannot be told from the same small base trained by RL.",
                "用教师轨迹教出的学生，与同一小基座做强化学习的结果分不出高下。",
            )
        ]
    spent, alone_spent = run.spent(run.role("small"), "flops"), run.spent(run.role("small_rl"), "flops")
    if spent and alone_spent:
        said.append(
            Text("RL had {:.1f} times its training compute.", "强化学习用了它 {:.1f} 倍的训练算力。").format(
                alone_spent / spent
            )
        )
    return said


def desk(run: Run) -> list[Text]:
    """What people, or a policy in their place, decided."""
    said = []
    for stage in run.of_kind("curate"):
        notes = stage.notes
        said.append(
            Text(
                "{name}: {accepted} rows accepted, {edited} edited, {rejected} rejected. Policy: {policy}.",
                "{name}：接受 {accepted} 行，修改 {edited} 行，拒绝 {rejected} 行。方针：{policy}。",
            ).format(
                name=stage.name,
                policy=notes.get("policy", "–"),
                **{key: count(notes.get(key, 0)) for key in ("accepted", "edited", "rejected")},
            )
        )
        if told := notes.get("agreement"):
            said.append(
                Text(
                    "{rows} of them were seen by several people, who gave {same} of these the same verdict (Krippendorff's alpha {alpha}).",
                    "其中 {rows} 行由多人审阅，{same} 的结论一致（Krippendorff α 为 {alpha}）。",
                ).format(
                    rows=count(told["rows"]),
                    same=percent(told["same"]),
                    alpha="–" if told["alpha"] is None else number(told["alpha"], 2),
                )
            )
    return said


# ---------------------------------------------------------------- what was not shown


def not_shown(run: Run) -> list[Text]:
    """Limits of this run: those of every single run, and those that its own numbers betray."""
    said = [
        Text(
            "One seed, {}. Intervals tell how sure an accuracy is over problems, not how it would vary "
            "over seeds.",
            "只有一个随机种子：{}。区间说明准确率在题目间有多确定，并不说明换种子后会变化多少。",
        ).format(run.recipe.get("seed", "–"))
    ]
    if any(problems.get("source") == "miniature" for problems in (run.recipe.get("problems") or {}).values()):
        said.append(
            Text(
                "A miniature: {} parameters and a small world of problems. That larger models learn in the "
                "same way is not shown here.",
                "这是一个微缩世界：{} 个参数，题目的天地很小。更大的模型是否同样如此，这里没有证明。",
            ).format(size(run.parameters(run.role("base")) or run.parameters(run.role("zero"))))
        )
    return [*said, *_size(run), *_differences(run), *_room(run), *_people(run)]


def _size(run: Run) -> list[Text]:
    sizes = [interval.problems for model in run.evaluations if (interval := run.accuracy(model))]
    if not sizes or min(sizes) >= _FEW:
        return []
    return [Text("Only {} problems were evaluated.", "只评测了 {} 道题。").format(count(min(sizes)))]


def compared(told: dict[str, Any]) -> list[Text]:
    """Where each way of pretraining reaches the first one's final loss."""
    (first, base), *others = told["ways"].items()
    said = []
    for name, way in others:
        after, losses = way["reaches_target_after"], way["final_losses"]
        if after is None:
            said.append(
                Text(
                    "{} does not reach {}'s final loss ({}) with as many tokens: it ends at {}.",
                    "词元数相同时，{} 未达到 {} 的最终损失（{}），止于 {}。",
                ).format(name, first, number(told["target"], 4), number(sum(losses) / len(losses), 4))
            )
        else:
            said.append(
                Text(
                    "{} reaches {}'s final loss ({}) after {} FLOPs, {} of the {} that {} took.",
                    "{0} 用 {3} FLOPs 达到 {1} 的最终损失（{2}），为 {6} 所用 {5} 的 {4}。",
                ).format(
                    name,
                    first,
                    number(told["target"], 4),
                    scientific(after),
                    percent(after / base["flops"]),
                    scientific(base["flops"]),
                    first,
                )
            )
    return said


def _differences(run: Run) -> list[Text]:
    """Pairs that the story would like to see apart, where the intervals do not."""
    said = []
    for upper, lower in (("zero", "base"), ("zero", "control"), ("r1", "zero"), ("small", "small_rl")):
        for mode in ("t1", "greedy"):
            a, b = run.accuracy(run.role(upper), mode), run.accuracy(run.role(lower), mode)
            if a and b and difference(a, b)[1] <= 0:
                said.append(
                    Text(
                        "That {} is above {} ({mode}): {} ({}) against {} ({}).",
                        "“{} 高于 {}”（{mode}）：{}（{}）对 {}（{}）。",
                    ).format(
                        run.cast[upper],
                        run.cast[lower],
                        percent(a.mean),
                        bounds(a),
                        percent(b.mean),
                        bounds(b),
                        mode=MODES[mode],
                    )
                )
    if "zero" in run.cast and "control" not in run.cast:
        said.append(
            Text(
                "How much of the gain mere persistence would give: no control was run.",
                "单靠坚持能得到多少提升：没有做对照。",
            )
        )
    return said


def _room(run: Run) -> list[Text]:
    said = []
    for role in ("zero", "r1"):
        truncated = run.measure(run.role(role), "truncated")
        if truncated is not None and truncated >= 0.05:
            said.append(
                Text(
                    "What {} would reach with more room: {} of its responses ran out of tokens and count as "
                    "wrong unless an answer was given before.",
                    "{} 若有更多空间会怎样：它有 {} 的回答用尽词元，除非此前已作答，否则算错。",
                ).format(run.cast[role], percent(truncated))
            )
    spent, alone = run.spent(run.role("small"), "flops"), run.spent(run.role("small_rl"), "flops")
    if spent and alone and alone < spent:
        said.append(
            Text(
                "Distillation against RL at equal compute: RL had only {} times the training FLOPs of "
                "distillation.",
                "同等算力下的蒸馏与强化学习：强化学习的训练 FLOPs 只有蒸馏的 {} 倍。",
            ).format(number(alone / spent, 2))
        )
    return said


def _people(run: Run) -> list[Text]:
    by_policy = [
        s.name
        for s in run.of_kind("curate")
        if (s.manifest.get("settings") or {}).get("auto", "off") != "off"
    ]
    if not by_policy:
        return []
    return [
        Text(
            "What people at the desk would have changed: {} applied a stated policy instead.",
            "若由人来审校会改动什么：{} 按既定方针自动执行。",
        ).format(plain(", ".join(by_policy)))
    ]
