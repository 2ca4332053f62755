"""The small bilingual task of the quickstart, a countdown game on a clock, and the text corpus on which its
base model is trained.

A problem asks for an expression that has the value `target` modulo the clock's hours (`modulus`) and uses
each of a few numbers once, with + - * evaluated from left to right. For example `use 6 1 5 make 3 ?` is
answered by `<answer>1 -6 *5</answer>`. In a thought, the model tries an expression, checks it by subtracting
the target, and tries again if the difference is not 0: `try 6 -5 gives 1 *1 gives 1 =3 gives 5 no wait 1 -6
gives 2 *5 gives 3 =3 gives 0 yes`.

A random valid expression is correct with probability about .18, so guessing earns a little and trying
repeatedly earns more. Problems are split by content (sorted numbers and target), so that no test problem
occurs in a corpus or in reinforcement learning.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from ..config.recipe import Miniature
from ..text.reasoning_parser import split_thought
from ..text.tokenizer import Tokenizer
from ..types import Completion, Problem, Sample, Score, fingerprint
from .rewards import language_consistency

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
    "{% elif message.role == 'user' %}"
    "{% if loop.first or loop.previtem.role != 'system' %}<bos>{% endif %}User:{{ message.content }}"
    "{% else %}Assistant:"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Shares of the kinds of documents in the corpus. A problem document whose solution is neither plain, tagged
# nor guessed is worked: its solution has a thought with attempts.
CORPUS = {
    "textbook": 0.30,  # exercises: chains, comparisons, searches; without them verification is learned late
    "general": 0.06,  # requests to repeat, which need no thought
    "plain": 0.12, "tagged": 0.14, "guessed": 0.14,  # shares of the problem documents that are not worked
    "direct_right": 0.20,  # of those, the share that is made correct
    "systematic": 0.80,  # of the worked ones, the share that tries expressions in systematic order
    "unverified": 0.25,  # of the single attempts, the share without a verdict
    "slip": 0.03, "misjudged": 0.02,  # shares of wrong results and of flipped verdicts
    "same": 0.60, "other": 0.10,  # language of the words: the question's, the other; the rest is mixed
}  # fmt: skip
ATTEMPTS = {
    1: 0.62,
    2: 0.18,
    3: 0.07,
    5: 0.05,
    8: 0.03,
    16: 0.05,
}  # share of the worked documents with each maximum of attempts
# If the maximum of attempts is at least this, the first half of them is made to fail: the base model must see
# long thoughts in order to write them.
LONG_SEARCH = 8  # attempts
MAX_REDRAWS = 50  # random expressions drawn to find an untried one
TEST_REPEATS = 15  # per cent of the requests to repeat that are in the test
MAX_DIGITS = 10  # digits of a number in an answer, exclusive
CHAIN = 7  # steps of an exercise in arithmetic
COMPARISONS = 6  # comparisons of an exercise
SEARCH = 6  # attempts of an exercise

Speak = Callable[[str], str]  # the word of a key of `WORDS`, in the language of the document


class Expression(NamedTuple):
    """An expression evaluated from left to right: `Expression([1, 6, 5], ["-", "*"])` is `1 -6 *5`."""

    numbers: list[int]
    operations: list[str]

    def words(self) -> list[str]:
        """Return the expression as words of the corpus: the first number, then each operation joined with its
        number (`-6`)."""
        first, *rest = self.numbers
        steps = [f"{operation}{number}" for operation, number in zip(self.operations, rest, strict=True)]
        return [str(first), *steps]

    def following(self) -> Expression:
        """Return the next expression in a systematic search, which changes like an odometer: the last
        operation is replaced by the next in `OPERATIONS`; after the last of these comes the first, and the
        operation before it changes too. Once all operations are the first again, the numbers rotate by one
        place."""
        operations = list(self.operations)
        for i in reversed(range(len(operations))):
            operations[i] = OPERATIONS[(OPERATIONS.index(operations[i]) + 1) % len(OPERATIONS)]
            if operations[i] != OPERATIONS[0]:
                return Expression(self.numbers, operations)
        return Expression(self.numbers[1:] + self.numbers[:1], operations)


class Countdown:
    """The task: its problems in both splits, and the scoring of completions, which needs no gold answer."""

    def __init__(self, name: str, settings: Miniature):
        self.name = name
        self.settings = settings

    # ------------------------------------------------------------ problems

    @cached_property
    def sets(self) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        """The solvable problems of the splits `train` and `test`, each a pair (sorted numbers, target)."""
        world = self.settings
        solvable: list[tuple[tuple[int, ...], int]] = []
        for numbers in itertools.combinations_with_replacement(range(1, world.largest + 1), world.numbers):
            solvable += [(numbers, target) for target in sorted(self._reachable(numbers))]
        solvable.sort(key=lambda key: fingerprint(world.seed, "split", key))
        cut = max(1, round(world.held_out * len(solvable)))
        return {"test": sorted(solvable[:cut]), "train": sorted(solvable[cut:])}

    def _reachable(self, numbers: tuple[int, ...]) -> set[int]:
        """Return the values of all expressions that use each of the numbers once."""
        values = set()
        for order in set(itertools.permutations(numbers)):
            for operations in itertools.product(OPERATIONS, repeat=len(numbers) - 1):
                values.add(self.evaluate(order, operations))
        return values

    def evaluate(self, numbers: Sequence[int], operations: Sequence[str]) -> int:
        """Return the value of an expression, evaluated from left to right modulo the clock's hours."""
        total = numbers[0] % self.settings.modulus
        for operation, number in zip(operations, numbers[1:], strict=True):
            total = self.apply(total, operation, number)
        return total

    def apply(self, a: int, operation: str, b: int) -> int:
        """Return the result of one operation modulo the clock's hours."""
        if operation == "+":
            result = a + b
        elif operation == "-":
            result = a - b
        else:
            result = a * b
        return result % self.settings.modulus

    def problems(self, split: str) -> list[Problem]:
        """Return the problems of a split: one for every set of numbers and target, every order of the
        numbers, and both languages. If the recipe's `task` is `repeat`, return the requests to repeat numbers
        instead."""
        if self.settings.task == "repeat":
            return list(self.repeats(split))
        problems: list[Problem] = []
        for numbers, target in self.sets[split]:
            for order in sorted(set(itertools.permutations(numbers))):
                problems += [self._problem(order, target, language) for language in WORDS]
        return problems

    def _problem(self, order: Sequence[int], target: int, language: str) -> Problem:
        words = WORDS[language]
        numbers = [str(number) for number in order]
        return Problem(
            id=f"{self.name}/{language}-{'-'.join(numbers)}-{target}",
            prompt=f"{words['use']} {' '.join(numbers)} {words['make']} {target} ?",
            language=language,
            origin="miniature/countdown",
            data={"numbers": sorted(order), "target": target},
        )

    def repeats(self, split: str) -> Iterator[Problem]:
        """Yield the requests of a split to repeat three numbers, such as `say 4 2 6 ?`, which are answered
        without a thought."""
        world = self.settings
        for numbers in itertools.product(range(1, world.largest + 1), repeat=3):
            in_test = fingerprint(world.seed, "say", numbers) % 100 < TEST_REPEATS
            if in_test != (split == "test"):
                continue
            language = "zh" if fingerprint("language", numbers) % 100 < 100 * world.chinese else "en"
            answer = " ".join(map(str, numbers))
            yield Problem(
                id=f"{self.name}/say-{language}-{answer.replace(' ', '-')}",
                prompt=f"{WORDS[language]['say']} {answer} ?",
                answer=answer,
                language=language,
                origin="miniature/repeat",
            )

    # ------------------------------------------------------------ judging

    def score(self, problem: Problem, completion: Completion) -> Score:
        """Return the score of a completion: the parts accuracy, format and language, each in [0, 1], and a
        reason for each part that is zero."""
        text = completion.text
        split = split_thought(text)
        answer, fault = _answer(split.answer if "</think>" in text else text)
        if answer is not None:
            fault = self._fault(problem, answer)
            if not fault and not completion.stopped:
                fault = "ran out of tokens"
        tidy = completion.stopped and answer is not None and _is_tidy(problem, completion, answer)
        consistency = language_consistency(split.thought, problem.language)
        parts = {"accuracy": float(not fault), "format": float(tidy)}
        language = _language_part(problem, consistency)
        if language is not None:
            parts["language"] = language
        reasons = {"accuracy": fault} if fault else {}
        if not tidy:
            reasons["format"] = "not one thought and one answer, in their tags, and a stop"
        if not language:
            reasons["language"] = "no word in the question's language"
        return Score(parts, reasons, self._statistics(problem, split.thought, consistency), answer or "")

    def _fault(self, problem: Problem, answer: str) -> str:
        """Return the reason why an answer is not correct, or "" if it is correct."""
        if problem.answer is not None:
            return "" if answer == problem.answer else f"said {answer}, asked {problem.answer}"
        first, *steps = answer.split()
        numbers = [first, *(step[1:] for step in steps)]
        operations = [step[0] for step in steps]
        legal = all(number.isdecimal() and len(number) < MAX_DIGITS for number in numbers)
        if not legal or not set(operations) <= set(OPERATIONS):
            return f"{answer} is no expression"
        values = [int(number) for number in numbers]
        if sorted(values) != list(problem.data["numbers"]):
            return f"{answer} does not use each number once"
        reached = self.evaluate(values, operations)
        target = problem.data["target"]
        return "" if reached == target else f"{answer} makes {reached}, not {target}"

    def _statistics(self, problem: Problem, thought: str, consistency: float | None) -> dict[str, float]:
        """Return metrics of how a thought checks itself. `attempts` is the number of attempts, `persist` the
        share of rejected attempts that are followed by another one, and `verdict` the share of verdicts (yes
        or no) that are correct. The last two are absent if there is no rejected attempt or no verdict."""
        if problem.answer is not None:
            return {"general": 1.0}
        words = thought.split()
        attempts = _both_languages("try") | _both_languages("wait")
        no = _both_languages("no")
        rejections = [i for i, word in enumerate(words) if word in no]
        statistics = {"attempts": float(sum(word in attempts for word in words))}
        if rejections:
            persisted = [i for i in rejections if i + 1 < len(words) and words[i + 1] in attempts]
            statistics["persist"] = len(persisted) / len(rejections)
        verdicts = self._verdicts(words)
        if verdicts:
            statistics["verdict"] = sum(verdicts) / len(verdicts)
        if consistency is not None:
            statistics["mixed"] = float(_is_mixed(words))
            statistics["language_consistency"] = consistency
        return statistics

    @staticmethod
    def _verdicts(words: list[str]) -> list[bool]:
        """Return one truth value for each check in a thought: True if its verdict is correct. In `3 =4 gives
        6 no` the value 3 is compared with the target 4; the verdict "no" is correct, since they differ."""
        yes = _both_languages("yes")
        verdict_words = yes | _both_languages("no")
        verdicts = []
        for i in range(1, len(words) - 3):
            if words[i].startswith("=") and words[i + 3] in verdict_words:
                equal = words[i - 1] == words[i][1:]
                verdicts.append((words[i + 3] in yes) == equal)
        return verdicts

    # ------------------------------------------------------------ corpus

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the task, in which every word is one token. A number with its operation
        (`-6`) is one token too, so that the next value depends on two tokens, the value so far and the step,
        and not on three."""
        numbers = [str(number) for number in range(max(self.settings.modulus, self.settings.largest + 1))]
        steps = [f"{sign}{number}" for sign in [*OPERATIONS, "="] for number in numbers]
        words = [word for language in WORDS.values() for word in language.values()]
        tokens = [*SPECIAL, *numbers, *steps, "?", *words]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        pattern = Regex(r"<[^<>]+>|[A-Za-z]+:?|[-+*=]?[0-9]+|[^A-Za-z0-9<>\s]")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern, "isolated")]
        )
        backend.add_special_tokens(SPECIAL)
        return Tokenizer(backend, TEMPLATE, end="<eos>", pad="<pad>", bos="<bos>")

    def documents(self, seed: object, mixture: dict[str, float]) -> Iterator[list[str]]:
        """Yield an endless sequence of documents, each a list of words. `mixture` overrides entries of
        `CORPUS`, the shares of the kinds of documents."""
        author = _Author(self, random.Random(fingerprint(seed, "corpus")), {**CORPUS, **mixture})
        while True:
            yield author.document()

    def rewrite(self, thought: str, language: str) -> str:
        """Return the thought with each word translated into `language`."""
        source = WORDS["en" if language == "zh" else "zh"]
        target = WORDS[language]
        dictionary = {source[key]: target[key] for key in target}
        return " ".join(dictionary.get(word, word) for word in thought.split())


def _answer(text: str) -> tuple[str | None, str]:
    """Return the text between the only pair of `<answer>` tags and "", or None and the reason why there is no
    such text."""
    _, _, rest = text.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    if text.count("<answer>") != 1 or text.count("</answer>") != 1 or not closed:
        return None, "not exactly one answer in tags"
    answer = answer.strip()
    return (answer, "") if answer else (None, "the answer is empty")


def _is_tidy(problem: Problem, completion: Completion, answer: str) -> bool:
    """Return True if a completion consists of one thought and one answer in tags, or for a request to repeat
    of the answer alone."""
    expected = f"<answer> {answer} </answer>"
    if problem.answer is not None:
        return completion.text.strip() == expected
    split = split_thought(completion.text)
    return split.wellformed and split.answer == expected


def _language_part(problem: Problem, consistency: float | None) -> float | None:
    """Return the `language` part of a score: the share `consistency` of words in the question's language. It
    is None, and so earns no reward, if there are no words in the thought; a request to repeat, which needs no
    thought, then gets 1."""
    if consistency is None and problem.answer is not None:
        return 1.0
    return consistency


def _both_languages(key: str) -> set[str]:
    return {words[key] for words in WORDS.values()}


def _is_mixed(words: list[str]) -> bool:
    """Return True if the words of a thought are from both languages."""
    used = set(words)
    return all(used & set(vocabulary.values()) for vocabulary in WORDS.values())


class Given(str):
    """A word of a document that has no loss in training: a word of a question, or a number of an exercise.
    Such words cannot be predicted, and their loss would dominate that of the words that can."""


class _Author:
    """Generates the documents of the corpus. All random choices come from the generator `rng`, so its seed
    determines the corpus."""

    def __init__(self, task: Countdown, rng: random.Random, mixture: dict[str, float]):
        self.task = task
        self.rng = rng
        self.mixture = mixture
        self.modulus = task.settings.modulus
        self.largest = task.settings.largest
        self.sets = task.sets["train"]
        self.requests = list(task.repeats("train"))

    def document(self) -> list[str]:
        """Return the words of one document: an exercise, a request to repeat, or a problem with its
        solution."""
        if self._chance("textbook"):
            return ["<bos>", *self._textbook(), "<eos>"]
        if self._chance("general"):
            return self._general()
        numbers, target = self.rng.choice(self.sets)
        language = self._language()
        order = self.rng.sample(numbers, len(numbers))
        words = WORDS[language]
        prompt = ["<bos>", "User:", words["use"], *map(str, order), words["make"], str(target), "?"]
        solution = self._solution(numbers, target, language)
        return [*map(Given, [*prompt, "Assistant:"]), *solution, "<eos>"]

    def _chance(self, share: str) -> bool:
        return self.rng.random() < self.mixture[share]

    def _language(self) -> str:
        return "zh" if self.rng.random() < self.task.settings.chinese else "en"

    def _general(self) -> list[str]:
        problem = self.rng.choice(self.requests)
        prompt = ["<bos>", "User:", *problem.prompt.split(), "Assistant:"]
        return [*map(Given, prompt), "<answer>", *problem.answer.split(), "</answer>", "<eos>"]

    def _solution(self, numbers: tuple[int, ...], target: int, language: str) -> list[str]:
        """Return the words of a response to a problem: a plain answer, an answer in tags, a guess, or a
        thought with attempts and an answer."""
        form = self.rng.random()
        speak = self._choose_words(language)
        for kind in ("plain", "tagged", "guessed"):
            form -= self.mixture[kind]
            if form < 0:
                return self._direct_response(kind, self._direct(numbers, target), speak)
        thought, answer = self._attempts(numbers, target, speak)
        return ["<think>", *thought, "</think>", "<answer>", *answer, "</answer>"]

    def _direct_response(self, kind: str, answer: list[str], speak: Speak) -> list[str]:
        if kind == "plain":
            return answer
        tagged = ["<answer>", *answer, "</answer>"]
        if kind == "tagged":
            return tagged
        return ["<think>", speak("guess"), "</think>", *tagged]

    def _choose_words(self, language: str) -> Speak:
        """Return a function from the keys of `WORDS` to the words of a document. The words are in the
        question's language, in the other one, or each in a random one."""
        other = "en" if language == "zh" else "zh"
        coin = self.rng.random()
        if coin < self.mixture["same"]:
            return WORDS[language].__getitem__
        if coin < self.mixture["same"] + self.mixture["other"]:
            return WORDS[other].__getitem__
        return lambda word: WORDS[self.rng.choice(("en", "zh"))][word]

    def _direct(self, numbers: tuple[int, ...], target: int) -> list[str]:
        """Return the words of a random expression. In a share of the documents (`direct_right` in `CORPUS`)
        it reaches the target."""
        expression = self._random_expression(numbers)
        if self._chance("direct_right"):
            while self.task.evaluate(*expression) != target:
                expression = self._random_expression(numbers)
        return expression.words()

    def _random_expression(self, numbers: Sequence[int]) -> Expression:
        order = self.rng.sample(numbers, len(numbers))
        return Expression(order, [OPERATIONS[int(self.rng.random() * 3)] for _ in order[1:]])

    def _attempts(self, numbers: tuple[int, ...], target: int, speak: Speak) -> tuple[list[str], list[str]]:
        """Return the words of a thought, and of the expression that it tries last. The thought tries
        expressions until a verdict is yes or a random maximum of attempts is reached.

        Documents with a maximum of one attempt teach the model to give up early.
        """
        (maximum,) = self.rng.choices(list(ATTEMPTS), list(ATTEMPTS.values()))
        systematic = self._chance("systematic")
        expression = self._random_expression(numbers)
        thought: list[str] = []
        tried: set[tuple] = set()
        failing = maximum // 2 if maximum >= LONG_SEARCH else 0
        for attempt in range(maximum):
            thought.append(speak("wait" if attempt else "try"))
            tried.add((*expression.numbers, *expression.operations))
            steps, reached = self._work(expression, speak)
            thought += steps
            if maximum == 1 and self._chance("unverified"):
                break
            yes = (reached == target) != self._chance("misjudged")
            thought += self._compare(reached, target, yes, speak)
            if yes or attempt == maximum - 1:
                break
            avoided = target if attempt + 1 < failing else None
            untried = self._untried(expression, tried, systematic, avoided)
            if untried is None:
                break
            expression = untried
        return thought, expression.words()

    def _untried(
        self, expression: Expression, tried: set[tuple], systematic: bool, avoided: int | None
    ) -> Expression | None:
        """Return the next expression that is not in `tried` and does not have the value `avoided`, or None if
        `MAX_REDRAWS` candidates contain none. If `systematic`, candidates follow each other in the order of
        `Expression.following`; otherwise they are random."""
        for _ in range(MAX_REDRAWS):
            if systematic:
                expression = expression.following()
            else:
                expression = self._random_expression(expression.numbers)
            new = (*expression.numbers, *expression.operations) not in tried
            if new and self.task.evaluate(*expression) != avoided:
                return expression
        return None

    def _work(
        self, expression: Expression, speak: Speak, word: Callable[[object], str] = str
    ) -> tuple[list[str], int]:
        """Return the words that compute an expression step by step, and the value they arrive at. In a share
        of the steps (`slip` in `CORPUS`) the result is made wrong. `word` converts the numbers and steps; for
        exercises it is `Given`, which takes them out of the loss."""
        first, *rest = expression.numbers
        total = first % self.modulus
        steps = [word(first)]
        for operation, number in zip(expression.operations, rest, strict=True):
            total = self.task.apply(total, operation, number)
            if self._chance("slip"):
                total = int(self.rng.random() * self.modulus)
            steps += [word(f"{operation}{number}"), speak("gives"), str(total)]
        return steps, total

    def _textbook(self) -> list[str]:
        """Return the words of an exercise in one skill that thoughts need: a chain of arithmetic, comparisons
        of numbers, or a systematic search."""
        speak = self._choose_words(self._language())
        kind = self.rng.random()
        if kind < 0.4:
            return self._comparisons(speak)
        if kind < 0.7:
            return self._search(speak)
        numbers = [self.rng.randint(1, self.largest) for _ in range(CHAIN + 1)]
        operations = [self.rng.choice(OPERATIONS) for _ in range(CHAIN)]
        steps, _ = self._work(Expression(numbers, operations), speak, Given)
        return steps

    def _comparisons(self, speak: Speak) -> list[str]:
        words: list[str] = []
        for _ in range(COMPARISONS):
            a = self.rng.randrange(self.modulus)
            b = a if self.rng.random() < 0.4 else self.rng.randrange(self.modulus)
            question, *answer = self._compare(a, b, a == b, speak)
            words += [speak("gives"), Given(a), Given(question), *answer]
        return words

    def _compare(self, reached: int, target: int, yes: bool, speak: Speak) -> list[str]:
        """Return the words that compare a value with the target by their difference, such as `=3 gives 0
        yes`. Through the difference, a model that can subtract can check. (To see without it that two numbers
        are equal is a separate skill, which so small a model learns late or not at all.)"""
        difference = (reached - target) % self.modulus
        return [f"={target}", speak("gives"), str(difference), speak("yes" if yes else "no")]

    def _search(self, speak: Speak) -> list[str]:
        numbers = [self.rng.randint(1, self.largest) for _ in range(self.task.settings.numbers)]
        expression = self._random_expression(numbers)
        words: list[str] = []
        for attempt in range(SEARCH):
            steps, _ = self._work(expression, speak, str if attempt else Given)
            words += [speak("wait" if attempt else "try"), *steps]
            expression = expression.following()
        return words


def encode_documents(documents: Iterator[list[str]], tokenizer: Tokenizer, tokens: int) -> list[Sample]:
    """Return the documents as training samples, until these have at least `tokens` tokens in total. Each word
    is one token, so its id is looked up directly."""
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    samples: list[Sample] = []
    total = 0
    for words in documents:
        learned = np.array([not isinstance(word, Given) for word in words])
        document = np.array([ids[word] for word in words], dtype=np.int64)
        samples.append(Sample(document, start=1, learned=learned[1:]))
        total += len(words)
        if total >= tokens:
            break
    return samples
