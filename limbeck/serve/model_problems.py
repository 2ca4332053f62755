"""The problems that a served model was trained on: examples for the chat, and a rule that tells whether a
question is unlike all of them.

They are known for a model that is a stage of a run in the folder of runs: the manifest of its artifact names
the sources of problems, the recipe of the run has their settings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config.load import load
from ..pipeline.provenance.lineage import indexes, lineage_of
from ..pipeline.store import MANIFEST, Store
from ..tasks.registry import open_task
from ..types import LimbeckError, Problem

MAX_EXAMPLES = 4  # example questions of one model
MAX_READ = 2000  # training problems of each source whose words are collected
RECIPE = "recipe.yaml"
# A word, a Chinese character, a number (as one word, whichever it is), or a sign.
WORDS = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+|[^\w\s]")


@dataclass(frozen=True)
class ModelProblems:
    """What a model was trained on: `ModelProblems(("use 5 1 6 make 4 ?",), frozenset({"use", "0"}), False)`.

    `examples` are held-out problems. `words` are those of the training problems, as `words_of` returns them.
    `pretrained` is True if the first weights came from elsewhere, so that the model may know more than these
    problems.
    """

    examples: tuple[str, ...]
    words: frozenset[str]
    pretrained: bool

    def unknown_words(self, question: str) -> list[str]:
        """Return the words of a question that is unlike all training problems; empty if it is like them.

        A question is unlike them if half of its different words, or more, are in no training problem. These
        are the words that are returned, in the order of the question.
        """
        words = words_of(question)
        unknown = [word for word in words if word not in self.words]
        return unknown if 2 * len(unknown) >= len(words) else []


def words_of(text: str) -> list[str]:
    """Return the different words of a text in their order, in lower case; signs are words, and every number
    is the word "0".

    >>> words_of("Use 5 1, make 4?")
    ['use', '0', ',', 'make', '?']
    """
    words = ("0" if word.isdecimal() else word for word in WORDS.findall(text.lower()))
    return list(dict.fromkeys(words))


@lru_cache(64)
def problems_of(folder: Path, runs: Path) -> ModelProblems | None:
    """Return what the model in `folder` was trained on. None where it is not known: the model is no artifact
    of a run in the folder `runs`, its recipe cannot be read any more, or a source of problems is gone."""
    artifact_folder = folder.resolve().parent
    if not (artifact_folder / MANIFEST).is_file():
        return None
    try:
        return _problems_of_artifact(artifact_folder, runs)
    except (LimbeckError, OSError):  # OSError: a file of problems that was deleted
        return None


def _problems_of_artifact(folder: Path, runs: Path) -> ModelProblems | None:
    store = Store(folder.parent)
    artifact = store.open(folder)
    run = next((name for name, stages in indexes(runs).items() if folder.name in stages.values()), None)
    if run is None:
        return None
    recipe = load(runs / run / RECIPE)
    sources = [source.partition(" (")[0] for source in artifact.manifest["sources"]["problems"]]
    examples: list[list[Problem]] = []
    words: set[str] = set()
    for name in sources:
        if name not in recipe.problems:
            continue
        task = open_task(name, recipe.problems[name], runs / run)
        examples.append(list(task.problems("test")[:MAX_EXAMPLES]))
        for problem in task.problems("train")[:MAX_READ]:
            words.update(words_of(problem.prompt))
    if not words:
        return None
    pretrained = any(entry["kind"] == "load" for entry in lineage_of(artifact, store).entries.values())
    return ModelProblems(_one_of_each(examples), frozenset(words), pretrained)


def _one_of_each(examples: list[list[Problem]]) -> tuple[str, ...]:
    """Return at most `MAX_EXAMPLES` different prompts, the first of each source before the second of any."""
    in_turn = [some[i].prompt for i in range(MAX_EXAMPLES) for some in examples if i < len(some)]
    return tuple(dict.fromkeys(in_turn))[:MAX_EXAMPLES]
