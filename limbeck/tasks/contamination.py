"""Does a text contain a problem of the test? Copies, shared runs of words, near-duplicates; exact, no hashing.

Much of what is trained on is made from templates ("use 5 1 6 make 4 ?"), where every text is near to every other and only
the slots tell problems apart. So what several problems of a source share says nothing of any one of them, and a problem
with other numbers is another problem.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

RUN, LONG = (
    8,
    10,
)  # words in a row that two texts must not share: 10 in DeepSeek-R1 (2501.12948v2, D.1), 8 elsewhere
SHINGLE = 3  # words of which likeness is made
NEAR = 0.7  # likeness (Jaccard) from which on two texts are nearly the same
COMMON = 0.5  # a word in more of a source's problems than this is its template's
_TOKEN = re.compile(
    r"\d+(?:[.,:/]\d+)*|[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|[^\w\s.,;:!?\"'`()\[\]{}<>$\\，。？！；：、“”（）]"
)

Words = tuple[str, ...]


def words(text: str) -> Words:
    """Lower-case words, numbers, Chinese characters and operators.

    >>> words("What is 3.5 - 4? 多少")
    ('what', 'is', '3.5', '-', '4', '多', '少')
    """
    return tuple(_TOKEN.findall(text.lower()))


class Sieve:
    """The test problems of one source, by their prompts: `Sieve({"clock/en-1-5-6-4": "use 1 5 6 make 4 ?"}).fault(...)`.

    `questions` are the prompts without the instruction that all of them share, where it is known.
    """

    def __init__(self, prompts: Mapping[str, str], questions: Mapping[str, str] | None = None):
        self.ids = set(prompts)
        asked = {words(text): id for texts in (prompts, questions or {}) for id, text in texts.items()}
        self._asked = {text: id for text, id in asked.items() if text}
        self._sizes = sorted({len(text) for text in self._asked})
        texts = {id: words(prompt) for id, prompt in prompts.items()}
        different = {text: id for id, text in texts.items()}  # each text once, whatever its id
        seen = Counter(word for text in different for word in set(text))
        bar = max(2, COMMON * len(different))
        self._template = {word for word, n in seen.items() if n > bar and len(word) > 1 and word.isalpha()}
        self._contents = {self._content(text): id for text, id in different.items()}
        shared = Counter(shingle for text in self._contents for shingle in set(_runs(text, SHINGLE)))
        self._shared = {shingle for shingle, n in shared.items() if n > 1}
        self._near: dict[Words, list[tuple[set[Words], str]]] = defaultdict(list)
        for text, id in self._contents.items():
            if len(own := self._own(text)) >= RUN:  # long enough for likeness to mean something
                self._near[_numbers(text)].append((own, id))
        runs = Counter(run for text in self._contents for run in set(_runs(text, RUN)))
        self._runs = {
            run: text
            for text in self._contents
            for run in _runs(text, RUN)
            if runs[run] == 1 and self._telling(run)
        }

    def fault(self, id: str, prompt: str, rest: str = "") -> str | None:
        """Why a row may not be learned from, or None. Its prompt must be no problem of the test, nor contain one, nor be
        nearly one; the rest of it, its response, must contain none."""
        if id.partition("#")[0] in self.ids:
            return f"is {id.partition('#')[0]} of the test"
        text = words(prompt)
        content = self._content(text)
        return (
            self._asks(text)
            or self._nearly(content)
            or self._contains(content)
            or self._contains(self._content(words(rest)))
        )

    def _asks(self, text: Words) -> str | None:
        """The text asks just what a test problem asks, whatever instruction stands around it."""
        for size in self._sizes:
            for part in _runs(text, size):
                if part in self._asked and _numbers(part) == _numbers(text):
                    return f"asks the same as {self._asked[part]} of the test"
        return None

    def _nearly(self, content: Words) -> str | None:
        """The same numbers, and nearly the same words but for those of the template."""
        near = self._near.get(_numbers(content))
        own = self._own(content) if near else set()
        for other, id in near or ():
            if len(own & other) >= NEAR * len(own | other):
                return f"is nearly {id} of the test"
        return None

    def _contains(self, content: Words) -> str | None:
        """A run of words that belongs to one test problem alone, whose numbers are there as well."""
        for at, run in enumerate(_runs(content, RUN)):
            other = self._runs.get(run)
            if other and _within(_numbers(other), _numbers(content)):
                longer = content[at : at + LONG] in set(_runs(other, LONG))
                return f"shares {LONG if longer else RUN} words in a row with {self._contents[other]} of the test"
        return None

    def _content(self, text: Words) -> Words:
        return tuple(word for word in text if word not in self._template)

    def _own(self, content: Words) -> set[Words]:
        """Its shingles without those that several problems share."""
        return set(_runs(content, SHINGLE)) - self._shared

    def _telling(self, run: Words) -> bool:
        """More than a template with one of its slots: half of it nobody else says."""
        return 2 * len(self._own(run)) >= RUN - SHINGLE + 1


def _runs(text: Words, n: int) -> Iterator[Words]:
    return (text[i : i + n] for i in range(len(text) - n + 1))


def _numbers(text: Words) -> Words:
    return tuple(word for word in text if word[0].isdigit())


def _within(few: Words, many: Words) -> bool:
    return not few or few in _runs(many, len(few))
