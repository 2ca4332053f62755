"""The judging of answers to the problem generators of the library reasoning-gym, and the forms that these
answers must have. An entry is one problem of a generator, a dictionary with the keys `question`, `answer` and
`metadata`.

Several of the library's scorers pass the answer to `eval` or to sympy's parser, and others accept what is not
an answer (`0` for any probability, `NaN` for any list, any text for game_of_life_halting). So each generator
with its own scorer was audited and is listed here by name. Answers to generators in `TEXT` and
`TEXT_IN_ANY_CASE` are compared with the gold answer as text. Answers to those in `FORMS` are parsed and
judged here. Answers to those in `SCORED` are passed to the generator's own scorer, in the sandbox, if they
have the expected form. All other generators with a scorer are refused. A generator without one needs no entry
in a list: `answers.judge` compares its answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from . import grammar
from .grammar import ParseError, expression, number, numbers, polynomial, value

AUDITED = "0.1.25"  # the version of reasoning-gym whose scorers were audited

Entry = dict[str, Any]

# ---------------------------------------------------------------- compared with the gold answer

# The words of each line are compared, in TEXT with their case.
TEXT = frozenset({
    "ab", "arc_agi", "binary_matrix", "emoji_mystery", "futoshiki", "letter_jumble", "manipulate_matrix",
    "mini_sudoku", "path_star", "rearc", "self_reference", "sentence_reordering", "spiral_matrix",
    "string_insertion", "sudoku", "survo", "word_sorting",
})  # fmt: skip
TEXT_IN_ANY_CASE = frozenset({
    "calendar_arithmetic", "color_cube_rotation", "dice", "family_relationships", "figlet_font",
    "game_of_life_halting", "needle_haystack", "spell_backward", "tsumego", "zebra_puzzles",
})  # fmt: skip
# Answers to these are judged by `answers.judge`, even if they are not whole numbers.
NUMBERS = frozenset(
    {"chain_sum", "circuit_logic", "decimal_chain_sum", "gsm_symbolic", "products", "rectangle_count"}
)


def words(text: str) -> list[list[str]]:
    """Return the words of each line of a text. A comma ends a word, whether or not a space follows it."""
    return [line.replace(",", ", ").split() for line in text.strip().splitlines()]


# ---------------------------------------------------------------- parsed by a grammar


def _countdown(answer: str, entry: Entry) -> bool:
    facts = entry["metadata"]
    return _reaches(answer, facts["numbers"], facts["target"])


def _puzzle24(answer: str, entry: Entry) -> bool:
    return _reaches(answer, entry["metadata"]["numbers"], 24)


def _reaches(answer: str, numbers: Sequence[int], target: int) -> bool:
    """Return True if the answer is an expression that uses each of `numbers` once and has the value
    `target`."""
    tree = expression(answer)
    return sorted(grammar.leaves(tree)) == sorted(numbers) and grammar.evaluate(tree) == target


def _product(answer: str, entry: Entry) -> bool:
    letters = frozenset(re.findall(r"[A-Za-z]", entry["answer"]))
    wanted = expression(entry["answer"], letters, powers=True)
    given = expression(answer, letters, powers=True)
    return grammar.expanded(given) and polynomial(given) == polynomial(wanted)


def _antiderivative(answer: str, entry: Entry) -> bool:
    letter = entry["metadata"]["variable"]
    given = polynomial(expression(answer, (letter, "C"), powers=True))
    integrand = expression(entry["metadata"]["integrand"], (letter,), powers=True)
    return given.derivative(letter) == polynomial(integrand)


def elementary(answer: str, letter: str) -> grammar.Node:
    """Return the syntax tree of an elementary function of the variable `letter`, which may also contain the
    constants pi and E and the integration constant C. Raises `ParseError` for any other text."""
    return expression(answer, (letter, "C", "pi", "E"), grammar.FUNCTIONS, powers=True)


def _complex(answer: str, entry: Entry) -> bool:
    return _real_and_imaginary(answer) == _real_and_imaginary(entry["answer"])


_UNSIGNED = r"[0-9]{1,40}(?:\.[0-9]{1,40})?"
_COMPLEX = re.compile(
    rf"(?P<real>[-+]?{_UNSIGNED}(?!i|\.|[0-9]))?(?:(?P<sign>[-+]?)(?P<size>{_UNSIGNED})?i)?"
)


def _real_and_imaginary(text: str) -> tuple[Fraction, Fraction]:
    """Return the real and the imaginary part of a complex number such as `-5.0 + 20.0i`. Raises `ParseError`
    for any other text."""
    plain = re.sub(r"[ ()]", "", text).replace("j", "i")
    match = _COMPLEX.fullmatch(plain)
    if not match or not plain:
        raise ParseError("no complex number")
    if match["real"] and plain != match["real"] and not match["sign"]:
        raise ParseError("no complex number")
    real = Fraction(match["real"] or 0)
    if not plain.endswith("i"):
        return real, Fraction(0)
    imaginary = Fraction(match["size"] or 1)
    return real, -imaginary if match["sign"] == "-" else imaginary


def _probability(answer: str, entry: Entry) -> bool:
    wanted = number(entry["answer"])
    tolerance = min(Fraction(1, 10_000), wanted / 100)
    return abs(number(answer) - wanted) <= tolerance


def _sorted_numbers(answer: str, entry: Entry) -> bool:
    return numbers(answer) == numbers(entry["answer"])


def _roots(answer: str, entry: Entry) -> bool:
    return sorted(numbers(answer)) == sorted(numbers(entry["answer"]))


def _bits(answer: str, entry: Entry) -> bool:
    form = r"-?(?:0x[0-9a-fA-F]{1,64}|0b[01]{1,256}|0o[0-7]{1,90}|[1-9][0-9]{0,80}|0)"
    if not re.fullmatch(form, answer.strip()):
        raise ParseError("no whole number")
    return int(answer, 0) == int(entry["answer"], 0)


def _json(answer: str, entry: Entry) -> bool:
    gold = entry["answer"]
    if answer.strip() == gold.strip():
        return True
    return json.dumps(value(answer), sort_keys=True) == json.dumps(value(gold), sort_keys=True)


def _queens(answer: str, entry: Entry) -> bool:
    return words(answer) in [words(board) for board in entry["metadata"]["valid_answers"]]


# Judges of this package: True for a correct answer, False for a wrong one; `ParseError` for another form.
FORMS: dict[str, Callable[[str, Entry], bool]] = {
    "bitwise_arithmetic": _bits,
    "codeio": _json,
    "coin_flip": _probability,
    "complex_arithmetic": _complex,
    "countdown": _countdown,
    "game_of_life": _json,
    "n_queens": _queens,
    "number_sorting": _sorted_numbers,
    "polynomial_equations": _roots,
    "polynomial_multiplication": _product,
    "puzzle24": _puzzle24,
    "simple_integration": _antiderivative,
}


# ---------------------------------------------------------------- judged by their own scorers


def _like(pattern: str) -> Callable[[str], str]:
    """Return a parser that accepts texts which the whole regular expression `pattern` matches, with ASCII
    digits and letters only. It returns the stripped text, and raises `ParseError` for others."""
    compiled = re.compile(pattern, re.ASCII)

    def read(answer: str) -> str:
        if not compiled.fullmatch(answer.strip()):
            raise ParseError("another form")
        return answer.strip()

    return read


def _texts(depth: int) -> Callable[[str], str]:
    """Return a parser that accepts JSON lists of strings, nested `depth` deep. It returns the JSON text, and
    raises `ParseError` for others."""

    def read(answer: str) -> str:
        level = [value(answer)]
        for _ in range(depth):
            if not all(isinstance(item, list) for item in level):
                raise ParseError("no list")
            level = [inner for item in level for inner in item]
        if not all(isinstance(item, str) for item in level):
            raise ParseError("no texts")
        return json.dumps(value(answer), ensure_ascii=False)

    return read


def _names(inner: type) -> Callable[[str], str]:
    """Return a parser that accepts one JSON object, or a list of objects, whose values are all of type
    `inner`. It returns the JSON text, and raises `ParseError` for others."""

    def read(answer: str) -> str:
        parsed = value(answer)
        objects = parsed if isinstance(parsed, list) else [parsed]
        if not all(isinstance(item, dict) for item in objects):
            raise ParseError("no object")
        if not all(type(item) is inner for mapping in objects for item in mapping.values()):
            raise ParseError("another form")
        return json.dumps(parsed)

    return read


def _moves(answer: str) -> str:
    """Return an answer that is a JSON list of moves or the word "no". Raises `ParseError` for any other
    text."""
    text = answer.strip()
    return text if text.lower() == "no" else _texts(1)(answer)


_N = grammar.NUMBER
_TURN = r"[UDLRFBMESXYZudlrfbxyz]w?(?:'[1-9]?|[1-9]'?)?"
# Parsers of an answer's form; the scorer sees only their result.
SCORED: dict[str, Callable[[str], str]] = {
    "advanced_geometry": _like(rf"{_N} ?°?|\({_N}, ?{_N}\)"),
    "boxnet": _names(str),
    "cryptarithm": _like(r"[A-Z] ?= ?[0-9](?:, ?[A-Z] ?= ?[0-9]){0,25}"),
    "decimal_arithmetic": _like(_N),
    "fraction_simplification": _like(
        r"\$?(?:[0-9]{1,40} ?/ ?[0-9]{1,40}|\\d?frac ?\{ ?[0-9]{1,40} ?\} ?\{ ?[0-9]{1,40} ?\})\$?"
    ),
    "graph_color": _names(int),
    "group_anagrams": _texts(2),
    "jugs": _texts(1),
    "kakurasu": _like(r"[01](?: ?[01])*(?:\n ?[01](?: ?[01])*)*"),
    "knight_swap": _moves,
    "knights_knaves": _like(r"[A-Za-z]+(?:[ ,.]{1,3}[A-Za-z]+)*\.?"),
    "number_format": _like(rf"{_N}|[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,12}}(?:\.[0-9]{{1,40}})?"),
    "palindrome_generation": _like(r"[A-Za-z]+"),
    "palindrome_partitioning": _texts(2),
    "pool_matrix": _like(rf"{_N}(?:[ \n]+{_N})*"),
    "power_function": _like(_N),
    "prime_factorization": _like(r"[0-9]{1,20}(?: ?× ?[0-9]{1,20})*"),
    "propositional_logic": _like(r"[A-Z()¬∧∨→↔ ]+"),
    "quantum_lock": _like(r"[A-C](?:(?: ?(?:→|,|->) ?| )?[A-C])*"),
    "rubiks_cube": _like(rf"{_TURN}(?: {_TURN})*"),
    "rush_hour": _like(r"[A-Z][-+][0-9](?: [A-Z][-+][0-9])*"),
    "shortest_path": _like(r"infeasible|(?:up|down|left|right)(?: (?:up|down|left|right))*"),
    "sokoban": _like(r"[UDLR]+"),
    "time_intervals": _like(
        r"(?:-?[0-9]{1,9} days?)?(?:, )?(?:-?[0-9]{1,4}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,6})?)?)?"
    ),
    "tower_of_hanoi": _like(
        r"Move disk [0-9]{1,3} from Peg [0-9]{1,3} to Peg [0-9]{1,3}"
        r"(?:\nMove disk [0-9]{1,3} from Peg [0-9]{1,3} to Peg [0-9]{1,3})*"
    ),
    "word_ladder": _like(r"[A-Za-z]+(?:, ?[A-Za-z]+)*"),
}

# Parsed by a grammar, and judged by sympy in the sandbox.
SYMBOLIC = frozenset({"intermediate_integration"})
REFUSED = {
    "composite": "it hands the answer on to other generators; name each of them as problems of its own"
}


def compare(generator: str, answer: str, entry: Entry) -> bool | None:
    """Return True if the answer to an entry is correct, False if it is wrong, and None if it has the right
    form but must be judged in the sandbox. Raises `ParseError` if it does not have the form that the
    generator's answers need."""
    if generator in TEXT:
        return words(answer) == words(entry["answer"])
    if generator in TEXT_IN_ANY_CASE:
        return words(answer.lower()) == words(entry["answer"].lower())
    if generator in FORMS:
        return FORMS[generator](answer, entry)
    if generator in SCORED:
        SCORED[generator](answer)
    else:
        elementary(answer, entry["metadata"]["variable"])
    return None


def needs_sandbox(generator: str) -> bool:
    """Return True if answers to this generator are judged in the sandbox."""
    return generator in SCORED or generator in SYMBOLIC


def is_audited(generator: str) -> bool:
    """Return True if the scorer of this generator was audited, so that its answers can be judged."""
    return needs_sandbox(generator) or generator in FORMS or generator in TEXT | TEXT_IN_ANY_CASE | NUMBERS


# ---------------------------------------------------------------- entries for the sandbox


def pack(thing: Any) -> Any:
    """Return an entry as a JSON value that keeps the type of each container: tuples, sets, and dictionaries
    with keys of any type."""
    if isinstance(thing, list | tuple | set | frozenset):
        return {type(thing).__name__: [pack(item) for item in thing]}
    if isinstance(thing, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in thing.items()]}
    if hasattr(thing, "item"):  # numpy's scalars
        return thing.item()
    return thing


CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def unpack(thing: Any) -> Any:
    """Return the entry that `pack` converted into this JSON value."""
    if not isinstance(thing, dict):
        return thing
    [(kind, items)] = thing.items()
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    return CONTAINERS[kind](unpack(item) for item in items)
