"""The quickstart's small bilingual world: a clock countdown, and the text a base model grows up on.

Problem: reach a target on a clock with `modulus` hours, using each of a few numbers once, with + - * read
from left to right. `use 6 1 5 make 3 ?` is answered by `<answer>1 -6 *5</answer>`. A thought tries, checks by
taking the target away, and tries again: `try 6 -5 gives 1 *1 gives 1 =3 gives 5 no wait 1 -6 gives 2 *5 gives
3 =3 gives 0 yes`.

A random legal expression hits with probability about .18, so guessing pays a little and persistence pays
more. Problems are split by content (sorted numbers and target): whatever is tested was never in a corpus or
in RL.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from ..config.recipe import Miniature
from ..text.reasoning_parser import split_thought
from ..text.tokenizer import Tokenizer
from ..types import Completion, Problem, Sample, Score, fingerprint

OPERATIONS = "+-*"
WORDS = {
    "en": {"use": "use", "make": "make", "try": "try", "gives": "gives", "no": "no", "yes": "yes",
           "wait": "wait", "guess": "guess", "say": "say"},
    "zh": {"use": "用", "make": "凑", "try": "试", "gives": "得", "no": "错", "yes": "对",
           "wait": "等", "guess": "猜", "say": "说"},
}  # fmt: skip
SPECIAL = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", "User:", "Assistant:"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}<bos>{{ message.content }} "
    "{% elif message.role == 'user' %}{% if loop.first or loop.previtem.role != 'system' %}<bos>{% endif %}User:{{ message.content }}"
    "{% else %}Assistant:{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# How the base's documents are mixed. `worked` of the problem documents think; the rest only answer.
CORPUS = {
    "textbook": 0.30,  # exercises: chains, comparisons, searches; without them verifying is learned late
    "general": 0.06,  # repeat after me: needs no thought
    "plain": 0.12, "tagged": 0.14, "guessed": 0.14,  # shares of the problem documents that do not work
    "direct_right": 0.20,  # of those, how many are right on purpose
    "systematic": 0.80,  # of the worked ones, how many retry like an odometer
    "unverified": 0.25,  # of the single attempts, how many skip the verdict
    "slip": 0.03, "misjudged": 0.02,  # wrong results, flipped verdicts
    "same": 0.60, "other": 0.10,  # language of the words: the question's, the other; the rest is mixed
}  # fmt: skip
ATTEMPTS = {1: 0.62, 2: 0.18, 3: 0.07, 5: 0.05, 8: 0.03, 16: 0.05}
PATIENT = (
    8  # who is as patient as this is also unlucky for half of the way: long thoughts must be seen to be had
)


class Countdown:
    """The task: problems of both splits, and a judge that needs no gold answer."""

    def __init__(self, name: str, settings: Miniature):
        self.name, self.settings = name, settings

    # ------------------------------------------------------------ problems

    @cached_property
    def sets(self) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        """(sorted numbers, target) of each split; all are solvable."""
        world = self.settings
        every = itertools.combinations_with_replacement(range(1, world.largest + 1), world.numbers)
        solvable = [(numbers, target) for numbers in every for target in sorted(self._reachable(numbers))]
        solvable.sort(key=lambda key: fingerprint(world.seed, "split", key))
        cut = max(1, round(world.held_out * len(solvable)))
        return {"test": sorted(solvable[:cut]), "train": sorted(solvable[cut:])}

    def _reachable(self, numbers: tuple[int, ...]) -> set[int]:
        return {
            self.value(order, operations)
            for order in set(itertools.permutations(numbers))
            for operations in itertools.product(OPERATIONS, repeat=len(numbers) - 1)
        }

    def value(self, numbers: Sequence[int], operations: Sequence[str]) -> int:
        total = numbers[0] % self.settings.modulus
        for operation, number in zip(operations, numbers[1:], strict=True):
            total = self.apply(total, operation, number)
        return total

    def apply(self, a: int, operation: str, b: int) -> int:
        result = a + b if operation == "+" else a - b if operation == "-" else a * b
        return result % self.settings.modulus

    def problems(self, split: str) -> list[Problem]:
        """Every order of the numbers of every set, in both languages; or the requests to repeat."""
        if self.settings.task == "repeat":
            return list(self._repeats(split))
        found = []
        for numbers, target in self.sets[split]:
            for order in sorted(set(itertools.permutations(numbers))):
                found += [self._problem(order, target, language) for language in WORDS]
        return found

    def _problem(self, order: Sequence[int], target: int, language: str) -> Problem:
        words = WORDS[language]
        shown = " ".join(map(str, order))
        return Problem(
            id=f"{self.name}/{language}-{'-'.join(map(str, order))}-{target}",
            prompt=f"{words['use']} {shown} {words['make']} {target} ?",
            language=language,
            origin="miniature/countdown",
            data={"numbers": sorted(order), "target": target},
        )

    def _repeats(self, split: str) -> Iterator[Problem]:
        """`say 4 2 6`: a general request, answered without a thought."""
        for numbers in itertools.product(range(1, self.settings.largest + 1), repeat=3):
            if (fingerprint(self.settings.seed, "say", numbers) % 100 < 15) != (split == "test"):
                continue
            language = "zh" if fingerprint("language", numbers) % 100 < 100 * self.settings.chinese else "en"
            said = " ".join(map(str, numbers))
            yield Problem(
                id=f"{self.name}/say-{language}-{said.replace(' ', '-')}",
                prompt=f"{WORDS[language]['say']} {said} ?",
                answer=said,
                language=language,
                origin="miniature/repeat",
            )

    # ------------------------------------------------------------ judging

    def score(self, problem: Problem, completion: Completion) -> Score:
        """accuracy, format and language, each in 0..1, with the reason for a zero."""
        from .reward_parts import language_consistency

        split = split_thought(completion.text)
        answer, complaint = _answer(split.answer if "</think>" in completion.text else completion.text)
        accuracy, why = (0.0, complaint) if answer is None else self._judge(problem, answer)
        if accuracy and not completion.stopped:
            accuracy, why = 0.0, "ran out of tokens"
        tidy = split.wellformed and answer is not None and split.answer == f"<answer> {answer} </answer>"
        if problem.answer is not None:  # a request that needs no thought is in order without one
            tidy = answer is not None and completion.text.strip() == f"<answer> {answer} </answer>"
        tidy = tidy and completion.stopped
        consistency = language_consistency(split.thought, problem.language)
        parts = {"accuracy": accuracy, "format": float(tidy)}
        if consistency is not None or problem.answer is not None:  # nothing said, nothing earned
            parts["language"] = 1.0 if consistency is None else consistency
        reasons = {"accuracy": why} if not accuracy else {}
        if not tidy:
            reasons["format"] = "not one thought and one answer, in their tags, and a stop"
        if not parts.get("language"):
            reasons["language"] = "no word in the question's language"
        return Score(parts, reasons, self._stats(problem, split.thought, consistency), answer or "")

    def _judge(self, problem: Problem, answer: str) -> tuple[float, str]:
        tokens = answer.split()
        if problem.answer is not None:
            return (1.0, "") if answer == problem.answer else (0.0, f"said {answer}, asked {problem.answer}")
        numbers, operations = [tokens[0], *(t[1:] for t in tokens[1:])], [t[0] for t in tokens[1:]]
        if not all(n.isdecimal() and len(n) < 10 for n in numbers) or not set(operations) <= set(OPERATIONS):
            return 0.0, f"{answer} is no expression"
        values = [int(n) for n in numbers]
        if sorted(values) != list(problem.data["numbers"]):
            return 0.0, f"{answer} does not use each number once"
        reached, target = self.value(values, operations), problem.data["target"]
        return (1.0, "") if reached == target else (0.0, f"{answer} makes {reached}, not {target}")

    def _stats(self, problem: Problem, thought: str, consistency: float | None) -> dict[str, float]:
        """What reflection looks like from outside; `persist` and `verdict` only where there was a chance."""
        if problem.answer is not None:
            return {"general": 1.0}
        words = thought.split()
        english, chinese = WORDS["en"], WORDS["zh"]
        tries = {english["try"], chinese["try"], english["wait"], chinese["wait"]}
        noes = [i for i, word in enumerate(words) if word in (english["no"], chinese["no"])]
        stats = {"attempts": float(sum(word in tries for word in words))}
        if noes:
            stats["persist"] = sum(words[i + 1 : i + 2] != [] and words[i + 1] in tries for i in noes) / len(
                noes
            )
        verdicts = self._verdicts(words)
        if verdicts:
            stats["verdict"] = sum(verdicts) / len(verdicts)
        if consistency is not None:
            known = [w for w in words if w in english.values() or w in chinese.values()]
            stats["mixed"] = float(len({w in english.values() for w in known}) == 2)
            stats["language_consistency"] = consistency
        return stats

    @staticmethod
    def _verdicts(words: list[str]) -> list[bool]:
        """Was each `3 =4 gives 6 no` right?"""
        yes, no = ({WORDS[language][word] for language in WORDS} for word in ("yes", "no"))
        asked = [i for i in range(1, len(words) - 3) if words[i].startswith("=") and words[i + 3] in yes | no]
        return [(words[i + 3] in yes) == (words[i - 1] == words[i][1:]) for i in asked]

    # ------------------------------------------------------------ text to grow up on

    def tokenizer(self) -> Tokenizer:
        """Word-level. A number with what is done with it is one token, so that a step is a lookup of two
        things, what there was and what is done, and not of three."""
        numbers = [str(n) for n in range(max(self.settings.modulus, self.settings.largest + 1))]
        steps = [f"{sign}{number}" for sign in [*OPERATIONS, "="] for number in numbers]
        words = [word for language in WORDS.values() for word in language.values()]
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *numbers, *steps, "?", *words])}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Split(
                    Regex(r"<[^<>]+>|[A-Za-z]+:?|[-+*=]?[0-9]+|[^A-Za-z0-9<>\s]"), "isolated"
                ),
            ]
        )
        backend.add_special_tokens(SPECIAL)
        return Tokenizer(backend, TEMPLATE, end="<eos>", pad="<pad>", bos="<bos>")

    def documents(self, seed: object, mixture: dict[str, float]) -> Iterator[list[str]]:
        """Endless documents as lists of words; `mixture` overrides `CORPUS`."""
        author = _Author(self, random.Random(fingerprint(seed, "corpus")), {**CORPUS, **mixture})
        while True:
            yield author.document()

    def rewrite(self, thought: str, language: str) -> str:
        """The annotator's translation: each word in the language asked for."""
        theirs, ours = WORDS["en" if language == "zh" else "zh"], WORDS[language]
        dictionary = {theirs[key]: ours[key] for key in ours}
        return " ".join(dictionary.get(word, word) for word in thought.split())


def _answer(text: str) -> tuple[str | None, str]:
    """The content of the only `<answer>` pair, or why there is none."""
    answer, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    if text.count("<answer>") != 1 or text.count("</answer>") != 1 or not closed:
        return None, "not exactly one answer in tags"
    answer = answer.strip()
    return (answer, "") if answer else (None, "the answer is empty")


class Given(str):
    """A word of a document that is read and not learned: a question, or the numbers of an exercise. Nobody
    can foresee them, and learning to would drown the little that can be learned in noise."""


class _Author:
    """Writes the base's documents; all its dice are one generator, so a corpus is its seed."""

    def __init__(self, task: Countdown, dice: random.Random, mixture: dict[str, float]):
        self.task, self.dice, self.mixture = task, dice, mixture
        self.modulus, self.largest = task.settings.modulus, task.settings.largest
        self.sets = task.sets["train"]
        self.spoken = [p for p in task._repeats("train")]

    def document(self) -> list[str]:
        dice, share = self.dice, self.mixture
        if dice.random() < share["textbook"]:
            return ["<bos>", *self._textbook(), "<eos>"]
        if dice.random() < share["general"]:
            return self._general()
        numbers, target = dice.choice(self.sets)
        language = "zh" if dice.random() < self.task.settings.chinese else "en"
        order = dice.sample(numbers, len(numbers))
        words = WORDS[language]
        asked = [
            "<bos>",
            "User:",
            words["use"],
            *map(str, order),
            words["make"],
            str(target),
            "?",
            "Assistant:",
        ]
        return [*map(Given, asked), *self._solution(numbers, target, language), "<eos>"]

    def _general(self) -> list[str]:
        problem = self.dice.choice(self.spoken)
        asked = ["<bos>", "User:", *problem.prompt.split(), "Assistant:"]
        return [*map(Given, asked), "<answer>", *problem.answer.split(), "</answer>", "<eos>"]

    def _solution(self, numbers: tuple[int, ...], target: int, language: str) -> list[str]:
        form = self.dice.random()
        speak = self._speech(language)
        for kind in ("plain", "tagged", "guessed"):
            form -= self.mixture[kind]
            if form < 0:
                answer = self._direct(numbers, target)
                tagged = ["<answer>", *answer, "</answer>"]
                return (
                    answer
                    if kind == "plain"
                    else tagged
                    if kind == "tagged"
                    else ["<think>", speak("guess"), "</think>", *tagged]
                )
        thought, answer = self._attempts(numbers, target, speak)
        return ["<think>", *thought, "</think>", "<answer>", *answer, "</answer>"]

    def _speech(self, language: str):
        """The document's tongue: the question's, the other one, or a new coin for every word."""
        other = "en" if language == "zh" else "zh"
        coin = self.dice.random()
        if coin < self.mixture["same"]:
            return WORDS[language].__getitem__
        if coin < self.mixture["same"] + self.mixture["other"]:
            return WORDS[other].__getitem__
        return lambda word: WORDS[self.dice.choice(("en", "zh"))][word]

    def _direct(self, numbers: tuple[int, ...], target: int) -> list[str]:
        order, operations = self._random_expression(numbers)
        if self.dice.random() < self.mixture["direct_right"]:
            while self.task.value(order, operations) != target:
                order, operations = self._random_expression(numbers)
        return _expression(order, operations)

    def _random_expression(self, numbers: Sequence[int]) -> tuple[list[int], list[str]]:
        order = self.dice.sample(numbers, len(numbers))
        return order, [OPERATIONS[int(self.dice.random() * 3)] for _ in order[1:]]

    def _attempts(self, numbers: tuple[int, ...], target: int, speak) -> tuple[list[str], list[str]]:
        """Try until it says yes or patience ends; a patience of one makes the model give up by habit."""
        most = self.dice.choices(list(ATTEMPTS), list(ATTEMPTS.values()))[0]
        systematic = self.dice.random() < self.mixture["systematic"]
        order, operations = self._random_expression(numbers)
        thought, tried, unlucky = [], set(), most // 2 if most >= PATIENT else 0
        for attempt in range(most):
            thought.append(speak("wait" if attempt else "try"))
            tried.add((*order, *operations))
            steps, reached = self._work(order, operations, speak)
            thought += steps
            if most == 1 and self.dice.random() < self.mixture["unverified"]:
                break
            yes = (reached == target) != (self.dice.random() < self.mixture["misjudged"])
            thought += self._compare(reached, target, yes, speak)
            if yes:
                break
            if attempt < most - 1:
                shunned = target if attempt + 1 < unlucky else None
                following = self._untried(order, operations, tried, systematic, shunned)
                if following is None:
                    break
                order, operations = following
        return thought, _expression(order, operations)

    def _untried(
        self, order: list[int], operations: list[str], tried: set, systematic: bool, shunned: int | None
    ):
        """The next expression that was not tried yet and does not reach `shunned`; None when a fair search
        finds none."""
        for _ in range(50):
            order, operations = _turn(order, operations) if systematic else self._random_expression(order)
            if (*order, *operations) not in tried and self.task.value(order, operations) != shunned:
                return order, operations
        return None

    def _work(
        self, order: Sequence[int], operations: Sequence[str], speak, word=str
    ) -> tuple[list[str], int]:
        """The steps and where they lead; `word` is `Given` where the expression is an exercise."""
        total, steps = order[0] % self.modulus, [word(order[0])]
        for operation, number in zip(operations, order[1:], strict=True):
            total = self.task.apply(total, operation, number)
            if self.dice.random() < self.mixture["slip"]:
                total = int(self.dice.random() * self.modulus)
            steps += [word(f"{operation}{number}"), speak("gives"), str(total)]
        return steps, total

    def _textbook(self) -> list[str]:
        """Seven steps of arithmetic, six comparisons, or a search gone through in order: the skills that a
        thought is made of."""
        dice = self.dice
        speak = self._speech("zh" if dice.random() < self.task.settings.chinese else "en")
        kind = dice.random()
        if kind < 0.4:
            return self._comparisons(speak)
        if kind < 0.7:
            return self._search(speak)
        numbers = [dice.randint(1, self.largest) for _ in range(8)]
        return self._work(numbers, [dice.choice(OPERATIONS) for _ in range(7)], speak, Given)[0]

    def _comparisons(self, speak) -> list[str]:
        words = []
        for _ in range(6):
            a = self.dice.randrange(self.modulus)
            b = a if self.dice.random() < 0.4 else self.dice.randrange(self.modulus)
            asked, *told = self._compare(a, b, a == b, speak)
            words += [speak("gives"), Given(a), Given(asked), *told]
        return words

    def _compare(self, reached: int, target: int, yes: bool, speak) -> list[str]:
        """`=3 gives 0 yes`: whoever can subtract can check. (Seeing that two numbers are equal, without the
        difference, is a skill of its own, which a base this small learns late or not at all.)"""
        gap = (reached - target) % self.modulus
        return [f"={target}", speak("gives"), str(gap), speak("yes" if yes else "no")]

    def _search(self, speak) -> list[str]:
        numbers = [self.dice.randint(1, self.largest) for _ in range(self.task.settings.numbers)]
        order, operations = self._random_expression(numbers)
        words = []
        for attempt in range(6):
            work = self._work(order, operations, speak, str if attempt else Given)[0]
            words += [speak("wait" if attempt else "try"), *work]
            order, operations = _turn(order, operations)
        return words


def _expression(order: Sequence[int], operations: Sequence[str]) -> list[str]:
    return [str(order[0]), *(f"{o}{n}" for o, n in zip(operations, order[1:], strict=True))]


def _turn(order: list[int], operations: list[str]) -> tuple[list[int], list[str]]:
    """The odometer's next expression: last operation, then the one before it, then the numbers rotate."""
    turned = list(operations)
    for i in reversed(range(len(turned))):
        turned[i] = OPERATIONS[(OPERATIONS.index(turned[i]) + 1) % 3]
        if turned[i] != OPERATIONS[0]:
            return order, turned
    return order[1:] + order[:1], turned


def encode_documents(documents: Iterator[list[str]], tokenizer: Tokenizer, tokens: int) -> list[Sample]:
    """Documents up to a budget of tokens, as samples; words are ids already, so no text is parsed."""
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    encoded, total = [], 0
    for words in documents:
        learned = np.array([not isinstance(word, Given) for word in words])
        encoded.append(
            Sample(np.array([ids[word] for word in words], dtype=np.int64), start=1, learned=learned[1:])
        )
        total += len(words)
        if total >= tokens:
            return encoded
    return encoded
