"""The report's words in English and Chinese: headings, captions, and formats of numbers.

A value that is None is written as `UNKNOWN`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..eval.statistics import Interval


class Text(NamedTuple):
    """One text in English and Chinese: `Text("Seed", "随机种子")`."""

    en: str
    zh: str

    def format(self, *args: object, **kwargs: object) -> Text:
        """Fill in the placeholders of both languages' texts, as `str.format` does.

        An argument that is itself a Text is filled in in the same language.
        """
        return Text(self._format("en", args, kwargs), self._format("zh", args, kwargs))

    def _format(self, language: str, args: tuple[object, ...], kwargs: dict[str, object]) -> str:
        """Return the text in one language (`en` or `zh`) with its placeholders filled in."""
        template = getattr(self, language)
        translated = [_in(language, value) for value in args]
        named = {key: _in(language, value) for key, value in kwargs.items()}
        return template.format(*translated, **named)


def _in(language: str, value: object) -> object:
    """Return `value` in one language (`en` or `zh`): that language's part of a Text, anything else
    unchanged.
    """
    return getattr(value, language) if isinstance(value, Text) else value


def plain(value: object) -> Text:
    """Return a Text that is the same in both languages, for a name or a number."""
    return Text(str(value), str(value))


# ---------------------------------------------------------------- numbers

UNKNOWN = "–"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share (0 to 1) in percent: `72.0%`."""
    if share is None:
        return UNKNOWN
    return f"{100 * share:.{digits}f}%"


def bounds(interval: Interval) -> str:
    """Return the ends of an interval in percent, without the percent sign: `69.1–74.7`."""
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def number(value: float | None, digits: int = 1) -> str:
    """Return a number with separators of thousands and `digits` decimals: `1,234.5`."""
    if value is None:
        return UNKNOWN
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """Return a count in full below a million, and in millions or larger units above: `1,234` or `2.50 M`."""
    if value is None:
        return UNKNOWN
    for unit, scale in (("G", 1e9), ("M", 1e6)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:,.0f}"


def size(parameters: float | None) -> str:
    """Return a number of model parameters with three significant digits: `142 K`, `134 M`."""
    if parameters is None:
        return UNKNOWN
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= scale:
            rounded = float(f"{parameters / scale:.3g}")
            return f"{rounded:g} {unit}"
    return f"{parameters:.0f}"


def scientific(value: float | None) -> str:
    """Return a number in scientific notation: `4.1 × 10¹²`."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{mantissa} × 10" + str(int(exponent)).translate(superscript)


def gibibytes(value: float | None) -> str:
    """Return a number of bytes in GiB: `0.68 GiB`."""
    if value is None:
        return UNKNOWN
    return f"{value / 2**30:.2f} GiB"


def duration(seconds: float | None) -> Text:
    """Return a duration in its largest two units: `42 s`, `7 min 11 s`, `3 h 20 min`."""
    if seconds is None:
        return plain(UNKNOWN)
    if seconds < 60:
        return Text(f"{seconds:.0f} s", f"{seconds:.0f} 秒")
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return Text(f"{hours} h {minutes} min", f"{hours} 小时 {minutes} 分")
    return Text(f"{minutes} min {rest} s", f"{minutes} 分 {rest} 秒")


def foreseen(forecast: dict[str, Any]) -> Text:
    """Return the sentence above the report's table of forecasts.

    `forecast` is the field `forecast` of `report.json`.
    """
    times = {key: duration(forecast[key]) for key in ("seconds", "low", "high", "took", "processor")}
    return W["foreseen_said"].format(**times)


# ---------------------------------------------------------------- fixed words

KINDS = {
    "load": Text("base, brought in", "引入的基座"),
    "pretrain": Text("pretraining", "预训练"),
    "rl": Text("RL", "强化学习"),
    "screen": Text("screening", "筛题"),
    "sample": Text("rejection sampling", "拒绝采样"),
    "curate": Text("curation", "人工审校"),
    "sft": Text("fine-tuning", "监督微调"),
    "general": Text("general rows", "通用数据"),
    "label": Text("a teacher's labels", "教师标注"),
    "pairs": Text("pairs", "偏好对"),
    "dpo": Text("preferences", "偏好优化"),
    "distill": Text("distillation", "蒸馏"),
    "remote": Text("an endpoint", "远程模型"),
    "calibrate": Text("a judge, calibrated", "裁判校准"),
    "reward": Text("reward model", "奖励模型"),
    "evaluate": Text("evaluation", "评测"),
    "report": Text("report", "报告"),
}

MODES = {
    "t1": Text("temperature 1", "温度 1"),
    "t06": Text("temperature 0.6", "温度 0.6"),
    "greedy": Text("greedy", "贪心"),
    "pass@8": Text("pass@8", "pass@8"),
    "cons@8": Text("cons@8", "cons@8"),
}

COLUMNS = {**MODES, "t1": Text("T = 1", "T = 1"), "t06": Text("T = 0.6", "T = 0.6")}

W = {
    "brand": Text("Report of a run", "运行报告"),
    "contents": Text("Accuracy by model", "各模型准确率"),
    "accuracy_caption": Text(
        "Share of held-out problems answered correctly, with 95% intervals.",
        "留出题答对的比例，附 95% 置信区间。",
    ),
    "compared": Text("Two side by side", "两相对照"),
    "compared_how": Text(
        "Both were asked the same problems. Differences are paired, problem by problem, with 95% intervals.",
        "两者回答相同的题目。差值逐题配对，附 95% 置信区间。",
    ),
    "compared_chart": Text(
        "B − A in points; an interval that crosses zero may be chance.",
        "B − A（百分点）；区间跨过零则可能出于偶然。",
    ),
    "compared_problems": Text("problems", "题数"),
    "compared_won": Text("Wrong in A, right in B: {}", "A 错而 B 对：{}"),
    "compared_lost": Text("Right in A, wrong in B: {}", "A 对而 B 错：{}"),
    "compared_curves": Text("Curves over each other", "曲线对照"),
    "compared_costs": Text("What each cost", "各自的代价"),
    "compared_settings": Text("Settings that differ", "不同的设置"),
    "generations": Text("Better, faster, cheaper", "更好、更快、更省"),
    "generations_how": Text(
        "Each generation of {} begins where the one before ended. Its model, the candidate, takes the place "
        "of the best one so far only if it passes every test of the gate.",
        "{} 的每一代都从上一代结束处开始。新模型（候选）只有通过关口的全部检验，才取代此前最好的模型。",
    ),
    "generations_rate": Text(
        "A gate promotes a model that is no better, or worse by a margin, with a probability of at most "
        "{alpha}; that any of {gates} so far did has one of at most {rate}. The rate is that of the tests: "
        "of fresh responses to these held-out problems, and of problems drawn like them.",
        "每道关口误升（模型并未变好，或某方面变差达到界限）的概率至多 {alpha}；"
        "至今 {gates} 道关口中有任何一道误升的概率至多 {rate}。"
        "该概率就检验而言：对这些留出题（及同样抽取的题）的全新回答。",
    ),
    "generations_chart": Text(
        "Accuracy on the gate’s held-out problems, with 95% intervals: above the candidate, below it the "
        "best model before, asked the same problems.",
        "关口留出题上的准确率及 95% 置信区间：上为候选，下为此前最好的模型，题目相同。",
    ),
    "generations_caption": Text(
        "Small: the best model before, in the same run on the same machine. Per right answer: the whole "
        "evaluation (loading, sampling, scoring), divided by its right responses.",
        "小字：此前最好的模型，同一次运行、同一台机器。“每个正确回答”为整次评测（载入、采样、评分）除以其正确回答数。",
    ),
    "generations_price": Text(
        "Money: {} dollars an hour of this machine, as given with --price.",
        "费用：按 --price 给出的每小时 {} 美元计。",
    ),
    "generations_unpriced": Text(
        "Money is not known: no price of an hour of this machine was given (--price).",
        "费用未知：没有给出本机每小时的价格（--price）。",
    ),
    "generations_best": Text(
        "The best model is {model} of generation {generation}, run {run}.",
        "目前最好的模型是第 {generation} 代的 {model}（运行 {run}）。",
    ),
    "generations_decisions": Text("What was decided, and why", "决定及理由"),
    "generations_training": Text("What each generation’s training took", "各代训练的代价"),
    "generation": Text("generation", "代"),
    "outcome": Text("outcome", "结果"),
    "first_generation": Text("the first: promoted without a gate", "第一代：不经关口"),
    "promoted": Text("promoted", "晋升"),
    "refused": Text("refused", "未晋升"),
    "tokens_per_answer": Text("tokens per answer", "每个回答的词元"),
    "seconds_per_right": Text("seconds per right answer", "每个正确回答的秒数"),
    "flops_per_right": Text("FLOPs per right answer", "每个正确回答的 FLOPs"),
    "money_per_right": Text("dollars per right answer", "每个正确回答的美元"),
    "check_accuracy": Text("accuracy", "准确率"),
    "check_language": Text("words in the question’s language", "与提问同语言的词"),
    "check_general": Text("general ability", "通用能力"),
    "check_arena": Text("people’s votes in the arena, won less lost", "竞技场中人的投票（胜减负）"),
    "check_better": Text(
        "{name}: {points} points on {n} problems, which is better ({p})",
        "{name}：{n} 题上 {points} 个百分点，确有提高（{p}）",
    ),
    "check_no_better": Text(
        "{name}: {points} points on {n} problems, which is not shown to be better ({p})",
        "{name}：{n} 题上 {points} 个百分点，未能证明提高（{p}）",
    ),
    "check_kept": Text(
        "{name}: {points} points on {n}; a loss of {margin} points is ruled out ({p})",
        "{name}：{n} 例上 {points} 个百分点；可排除下降 {margin} 个百分点（{p}）",
    ),
    "check_lost": Text(
        "{name}: {points} points on {n}; a loss of {margin} points is not ruled out ({p})",
        "{name}：{n} 例上 {points} 个百分点；不能排除下降 {margin} 个百分点（{p}）",
    ),
    "aha": Text("It learns to keep trying", "它学会了不放弃"),
    "learning": Text("What reinforcement learning changed", "强化学习改变了什么"),
    "preview": Text("Before the first step:", "第一步之前："),
    "curves_caption": Text(
        "Batch means at each step of reinforcement learning of {}: pale as measured, "
        "strong as a running mean.",
        "{} 强化学习每一步的批次均值：浅色为原始值，深色为滑动平均。",
    ),
    "accuracy": Text("Accuracy", "准确率"),
    "length": Text("Length, tokens", "长度（词元）"),
    "attempts": Text("Attempts per response", "每次回答的尝试次数"),
    "persist": Text("Tries again after “no”", "判错后再试的概率"),
    "persist_short": Text("persists", "再试率"),
    "entropy": Text("Entropy, nats per token", "熵（奈特/词元）"),
    "language_consistency": Text("Words in the question’s language", "与提问同语言的词"),
    "gap": Text("Sampler–learner gap", "采样器与学习器之差"),
    "format": Text("Format reward", "格式奖励"),
    "loss": Text("Loss of pretraining and fine-tuning", "预训练与微调损失"),
    "reward": Text("Reward", "奖励"),
    "thoughts": Text("Thoughts before and after", "之前与之后的思考"),
    "thoughts_caption": Text(
        "The same problem, at the same temperature, as the models wrote it. Attempts begin on new lines.",
        "同一道题、同一温度，模型原文照录；每次尝试另起一行。",
    ),
    "right": Text("right", "对"),
    "wrong": Text("wrong", "错"),
    "tokens_unit": Text("{} tokens", "{} 个词元"),
    "unsolved": Text("A problem that {} does not solve", "{} 没有解出的一道题"),
    "control": Text("The honest control", "诚实的对照"),
    "languages": Text("One language at a time", "一次只说一种语言"),
    "languages_caption": Text(
        "Share of words in the language of the question, over held-out problems.",
        "留出题回答中与提问同语言的词所占比例。",
    ),
    "models": Text("All models", "全部模型"),
    "models_caption": Text(
        "Percent correct with its 95% interval; tokens of response and thought and the rest at T = 1.",
        "正确率（%）及 95% 置信区间；回答与思考的长度（词元）及其余各列取自 T = 1。",
    ),
    "model": Text("model", "模型"),
    "length_short": Text("length", "长度"),
    "thought_short": Text("thought", "思考长度"),
    "attempts_short": Text("attempts", "尝试"),
    "language_short": Text("language", "语言一致"),
    "parameters": Text("parameters", "参数量"),
    "suites": Text("Named benchmarks", "公开基准"),
    "suite": Text("suite", "基准"),
    "published": Text("published scores of other models", "其他模型公布的分数"),
    "suites_caption": Text(
        "Percent with its 95% interval. Published scores were measured by other programs and prompts.",
        "百分比及 95% 置信区间。公布的分数由其他程序按各自的提示测得。",
    ),
    "other_problems": Text("Other problems: {}", "其他题目：{}"),
    "distillation": Text("Small models: taught, or left to themselves", "小模型：被教会，还是自己摸索"),
    "how": Text("how it was made", "如何得到"),
    "small_base": Text("the small base", "小基座"),
    "small_rl": Text("RL on the small base", "在小基座上做强化学习"),
    "small_answers": Text("taught the answers only", "只学答案"),
    "small": Text("taught thoughts and answers", "思考与答案都学"),
    "training_flops": Text("training FLOPs", "训练 FLOPs"),
    "comparison": Text("Pretraining compared at equal compute", "同等算力下的预训练对比"),
    "comparison_caption": Text(
        "Loss of every run against its compute, in 10^12 FLOPs; the corpus is read once, so it is loss on "
        "unseen text.",
        "每次运行的损失随算力（10^12 FLOPs）的变化；语料只读一遍，因此这是未见文本上的损失。",
    ),
    "final_losses": Text("final loss, run by run", "各次运行的最终损失"),
    "rows_flops": Text("sampling its rows, FLOPs", "采样其数据的 FLOPs"),
    "desk": Text("The desk, and what was thrown away", "审校台，以及被丢弃的样本"),
    "stage": Text("stage", "阶段"),
    "sampled": Text("sampled", "采样"),
    "kept": Text("kept", "保留"),
    "dropped": Text("dropped, and why", "丢弃及原因"),
    "more_curves": Text("More curves", "更多曲线"),
    "more_caption": Text(
        "Every stage of reinforcement learning. The gap is the largest absolute difference between the "
        "log-probabilities that the sampler recorded and those that the learner computes on the same "
        "weights.",
        "所有强化学习阶段。“之差”指同一权重下，采样器记录的对数概率与学习器重算值的最大绝对差。",
    ),
    "lineage": Text("Where everything came from", "一切从何而来"),
    "lineage_caption": Text(
        "Filled boxes are models, outlined ones rows and problems; evaluations, one for each model, "
        "are left out.",
        "实底为模型，空框为数据与题目；每个模型各有一次评测，图中从略。",
    ),
    "cost": Text("What it took", "代价几何"),
    "wall": Text("Time from start to end", "从头到尾的时间"),
    "cpu": Text("Processor time", "处理器时间"),
    "memory": Text("Peak memory", "内存峰值"),
    "tokens": Text("Tokens, read and written", "读写的词元"),
    "flops": Text("Floating-point operations", "浮点运算"),
    "energy": Text("Energy", "能耗"),
    "money": Text("Cost", "费用"),
    "foreseen": Text("What was foreseen", "事先的预计"),
    "foreseen_said": Text(
        "Before each stage began, its time was foreseen from this machine's speed: {seconds} in all "
        "({low} to {high}). By the clock the stages took {took}, and {processor} of the processor: on a "
        "busy machine the latter is what was foreseen.",
        "每个阶段开始之前，按本机速度预计用时：共 {seconds}（{low} 至 {high}）。"
        "按时钟实际用时 {took}，其中处理器时间 {processor}：机器繁忙时，应与后者比较。",
    ),
    "between": Text("between", "区间"),
    "took": Text("took", "实际"),
    "unreadable": Text("not readable on this machine", "本机无法读取"),
    "unpriced": Text("no price per hour was given", "未给出每小时单价"),
    "not_shown": Text("What was not shown", "没有证明的事"),
    "alarms": Text("Alarms that rang", "响过的警报"),
    "no_alarms": Text("No alarm rang.", "没有警报响过。"),
    "alarm_row": Text("first at step {first}, {times} in all", "首次在第 {first} 步，共 {times} 次"),
    "unchanged": Text("weights unchanged", "权重未变"),
    "exact": Text("To do it again", "如何重做"),
    "recipe": Text("The exact recipe", "完整配方"),
    "stages": Text("Every stage", "每个阶段"),
    "versions": Text("Versions and machine", "版本与机器"),
    "seed": Text("Seed", "随机种子"),
    "code": Text("Code", "代码版本"),
    "kind": Text("kind", "种类"),
    "time": Text("time", "时间"),
    "memory_short": Text("memory", "内存"),
    "key": Text("key", "键"),
    "licences": Text("Licences", "许可证"),
    "footer": Text(
        "The numbers of this page stand in report.json beside it. The page loads nothing from anywhere.",
        "本页数字见同目录的 report.json。本页不从任何地方加载内容。",
    ),
}
