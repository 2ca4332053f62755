"""Contamination of training text by test problems: copies, shared runs of words, near-duplicates; exact,
without hashing.

Much training text is made from templates ("use 5 1 6 make 4 ?"), where every text is close to every other and
only the slots tell problems apart. So a phrase that several problems of a source share identifies none of
them, and a problem with other numbers is another problem.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

# A run of words that two texts must not share: 10 in DeepSeek-R1 (arXiv 2501.12948v2, D.1), 8 elsewhere.
RUN = 8  # words
LONG = 10  # words
SHINGLE = 3  # words of a shingle, the unit of similarity
NEAR = 0.7  # Jaccard similarity from which two texts are near-duplicates
COMMON = 0.5  # share of a source's problems: a word in more of them belongs to the template
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


class ContaminationIndex:
    """An index of one source's test problems: `ContaminationIndex({"clock/en-1-5-6-4": "use 1 5 6 make 4 ?"}).fault(...)`.

    `prompts` has the prompt of each id, `questions` the prompts without the instruction that they share,
    where known.
    """

    def __init__(self, prompts: Mapping[str, str], questions: Mapping[str, str] | None = None):
        self.ids = set(prompts)
        self._exact = _ids_by_words(prompts) | _ids_by_words(questions or {})
        self._exact.pop((), None)
        self._lengths = sorted({len(text) for text in self._exact})
        texts = _ids_by_words(prompts)
        self._template = _template_words(texts)
        self._contents = {self._without_template(text): problem_id for text, problem_id in texts.items()}
        self._shared = _in_several(self._contents, SHINGLE)
        self._similar = self._index_similar()
        self._runs = self._index_runs()

    def fault(self, row_id: str, prompt: str, rest: str = "") -> str | None:
        """The reason to leave out a row, or None. Its prompt must not be, contain or nearly be a test
        problem; the rest of the row, its response, must not contain one."""
        problem = row_id.partition("#")[0]
        if problem in self.ids:
            return f"is {problem} of the test"
        text = words(prompt)
        content = self._without_template(text)
        return (
            self._find_exact(text)
            or self._find_similar(content)
            or self._find_run(content)
            or self._find_run(self._without_template(words(rest)))
        )

    def _index_similar(self) -> dict[Words, list[tuple[set[Words], str]]]:
        """By their numbers, the problems that are long enough to be similar: their own shingles, and ids."""
        index: dict[Words, list[tuple[set[Words], str]]] = defaultdict(list)
        for content, problem_id in self._contents.items():
            own = self._own_shingles(content)
            if len(own) >= RUN:
                index[_numbers(content)].append((own, problem_id))
        return index

    def _index_runs(self) -> dict[Words, Words]:
        """The runs of words that identify one problem, with its content."""
        several = _in_several(self._contents, RUN)
        index: dict[Words, Words] = {}
        for content in self._contents:
            for run in _runs(content, RUN):
                if run not in several and self._is_specific(run):
                    index[run] = content
        return index

    def _find_exact(self, text: Words) -> str | None:
        """The reason if the text asks what a test problem asks, whatever instruction surrounds it."""
        numbers = _numbers(text)
        for length in self._lengths:
            for part in _runs(text, length):
                if part in self._exact and _numbers(part) == numbers:
                    return f"asks the same as {self._exact[part]} of the test"
        return None

    def _find_similar(self, content: Words) -> str | None:
        """The reason if a test problem has the same numbers and nearly the same words."""
        candidates = self._similar.get(_numbers(content))
        if not candidates:
            return None
        own = self._own_shingles(content)
        for other, problem_id in candidates:
            if len(own & other) >= NEAR * len(own | other):
                return f"is nearly {problem_id} of the test"
        return None

    def _find_run(self, content: Words) -> str | None:
        """The reason if the content has a run of words of one test problem, and that problem's numbers."""
        numbers = _numbers(content)
        for at, run in enumerate(_runs(content, RUN)):
            problem = self._runs.get(run)
            if problem is None or not _contains(numbers, _numbers(problem)):
                continue
            longer = content[at : at + LONG] in set(_runs(problem, LONG))
            length = LONG if longer else RUN
            return f"shares {length} words in a row with {self._contents[problem]} of the test"
        return None

    def _without_template(self, text: Words) -> Words:
        return tuple(word for word in text if word not in self._template)

    def _own_shingles(self, content: Words) -> set[Words]:
        """The shingles of a content without those that several problems share."""
        return set(_runs(content, SHINGLE)) - self._shared

    def _is_specific(self, run: Words) -> bool:
        """True if at least half of a run's shingles are its problem's own: more than a template with one
        slot."""
        return 2 * len(self._own_shingles(run)) >= RUN - SHINGLE + 1


def _ids_by_words(texts: Mapping[str, str]) -> dict[Words, str]:
    """Each different text with an id: the last one that has it."""
    return {words(text): problem_id for problem_id, text in texts.items()}


def _template_words(texts: Iterable[Words]) -> set[str]:
    """The words of more than one letter that most texts have."""
    different = list(texts)
    frequency = Counter(word for text in different for word in set(text))
    threshold = max(2, COMMON * len(different))
    return {
        word for word, count in frequency.items() if count > threshold and len(word) > 1 and word.isalpha()
    }


def _in_several(texts: Iterable[Words], n: int) -> set[Words]:
    """The runs of `n` words that are in more than one text."""
    frequency = Counter(run for text in texts for run in set(_runs(text, n)))
    return {run for run, count in frequency.items() if count > 1}


def _runs(text: Words, n: int) -> Iterator[Words]:
    return (text[i : i + n] for i in range(len(text) - n + 1))


def _numbers(text: Words) -> Words:
    return tuple(word for word in text if word[0].isdigit())


def _contains(many: Words, few: Words) -> bool:
    """True if `few` is a run of `many`."""
    return not few or few in _runs(many, len(few))
