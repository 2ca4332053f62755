"""Detection of test problems in training text: copies, shared runs of words, and near-duplicates. Words are
compared exactly, without hashing.

Much training text is made from templates ("use 5 1 6 make 4 ?"): all texts of a template are similar, and
only the words in its slots distinguish problems. Therefore a phrase that several problems of a source share
does not identify any of them, and a problem with other numbers is another problem. A shingle is a run of
`SHINGLE` consecutive words, the unit of similarity.
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
    """Return the lower-case words, numbers, Chinese characters and operators of a text.

    >>> words("What is 3.5 - 4? 多少")
    ('what', 'is', '3.5', '-', '4', '多', '少')
    """
    return tuple(_TOKEN.findall(text.lower()))


class ContaminationIndex:
    """An index of the test problems of one source, with which training rows are checked by `fault`. For
    example, `ContaminationIndex({"clock/en-1-5-6-4": "use 1 5 6 make 4 ?"})`.

    `prompts` maps the id of each test problem to its prompt. `questions` maps ids to the prompts without the
    instruction that all of them share, where these are known.
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
        """Return the reason why a training row must be left out, or None. A training row is one example, with
        an id, a `prompt`, and further text such as a response (`rest`). Its prompt must not equal, contain or
        be nearly the same as a test problem, and `rest` must not contain a test problem. The part of `row_id`
        before `#` is the id of the problem."""
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
        """Return, by the numbers in their text, the problems that are long enough to be compared for
        similarity, each with its id and the shingles that no other problem has."""
        index: dict[Words, list[tuple[set[Words], str]]] = defaultdict(list)
        for content, problem_id in self._contents.items():
            own = self._own_shingles(content)
            if len(own) >= RUN:
                index[_numbers(content)].append((own, problem_id))
        return index

    def _index_runs(self) -> dict[Words, Words]:
        """Return a mapping from each run of `RUN` words that identifies one problem to the words of that
        problem, without the template's."""
        several = _in_several(self._contents, RUN)
        index: dict[Words, Words] = {}
        for content in self._contents:
            for run in _runs(content, RUN):
                if run not in several and self._is_specific(run):
                    index[run] = content
        return index

    def _find_exact(self, text: Words) -> str | None:
        """Return the reason if the text contains the words of a test problem and has the same numbers,
        whatever instruction surrounds it; else None."""
        numbers = _numbers(text)
        for length in self._lengths:
            for part in _runs(text, length):
                if part in self._exact and _numbers(part) == numbers:
                    return f"asks the same as {self._exact[part]} of the test"
        return None

    def _find_similar(self, content: Words) -> str | None:
        """Return the reason if a test problem has the same numbers as `content` and nearly the same words;
        else None. `content` is a text's words without the template's."""
        candidates = self._similar.get(_numbers(content))
        if not candidates:
            return None
        own = self._own_shingles(content)
        for other, problem_id in candidates:
            if len(own & other) >= NEAR * len(own | other):
                return f"is nearly {problem_id} of the test"
        return None

    def _find_run(self, content: Words) -> str | None:
        """Return the reason if `content` has a run of words that identifies a test problem, and that
        problem's numbers in the same order; else None."""
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
        """Return the shingles of `content`, except those that several test problems share."""
        return set(_runs(content, SHINGLE)) - self._shared

    def _is_specific(self, run: Words) -> bool:
        """Return True if at least half of the run's shingles occur in only one problem. A run with fewer may
        be a template with one slot."""
        return 2 * len(self._own_shingles(run)) >= RUN - SHINGLE + 1


def _ids_by_words(texts: Mapping[str, str]) -> dict[Words, str]:
    """Return the ids of texts, keyed by the texts' words. Of several texts with the same words, the last
    one's id is kept."""
    return {words(text): problem_id for problem_id, text in texts.items()}


def _template_words(texts: Iterable[Words]) -> set[str]:
    """Return the words of the template: those of at least two letters that occur in more than a share
    `COMMON` of the texts."""
    different = list(texts)
    frequency = Counter(word for text in different for word in set(text))
    threshold = max(2, COMMON * len(different))
    return {
        word for word, count in frequency.items() if count > threshold and len(word) > 1 and word.isalpha()
    }


def _in_several(texts: Iterable[Words], n: int) -> set[Words]:
    """Return the runs of `n` consecutive words that occur in more than one text."""
    frequency = Counter(run for text in texts for run in set(_runs(text, n)))
    return {run for run, count in frequency.items() if count > 1}


def _runs(text: Words, n: int) -> Iterator[Words]:
    return (text[i : i + n] for i in range(len(text) - n + 1))


def _numbers(text: Words) -> Words:
    return tuple(word for word in text if word[0].isdigit())


def _contains(many: Words, few: Words) -> bool:
    """Return True if `few` occurs in `many` as consecutive words."""
    return not few or few in _runs(many, len(few))
