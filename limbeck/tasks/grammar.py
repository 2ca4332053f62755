"""What a model may write where a library would evaluate it: numbers, sums, polynomials, elementary functions,
JSON.

Every reader takes the whole text or raises `Unread`. None of them evaluates anything: a text becomes tokens,
tokens a tree, and from the tree alone a value is made. Length, depth, digits and exponents have bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

LONGEST = 4096  # characters
DEEPEST = 24  # brackets and signs inside one another
DIGITS = 40
TOKENS = 400
EXPONENT = 99
SMALL = 10  # the largest exponent of a sum
TERMS = 400  # of a polynomial, and of a product before like ones are added up
BITS = 2000  # of a numerator or a denominator

NUMBER = rf"[-+]?[0-9]{{1,{DIGITS}}}(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][-+]?[0-9]{{1,3}})?"

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "abs",
})  # fmt: skip


class Unread(ValueError):
    """The text is not of the form that was asked for."""


def number(text: str) -> Fraction:
    """`Fraction(3, 2)` of "1.5" and of "3/2"; no NaN, no infinity, and ASCII digits only."""
    parts = _limited(text).strip().split("/")
    if len(parts) > 2 or not all(re.fullmatch(NUMBER, part.strip()) for part in parts):
        raise Unread("no number")
    try:
        return Fraction(parts[0].strip()) / (Fraction(parts[1].strip()) if len(parts) == 2 else 1)
    except ZeroDivisionError:
        raise Unread("divided by zero") from None


def numbers(text: str) -> list[Fraction]:
    """The numbers of "1, 2.5"; brackets around all of them and quotes around each are looked past."""
    inside = re.fullmatch(r"\[(.*)\]|([^\[\]]*)", _limited(text).strip(), re.DOTALL)
    if not inside:
        raise Unread("brackets that do not match")
    parts = (inside[1] if inside[1] is not None else inside[2]).split(",")
    return [number(re.sub(r"""^\s*(["'])(.*)\1\s*$""", r"\2", part)) for part in parts]


def value(text: str) -> Any:
    """What a JSON text says: no NaN, no infinity, no name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict:
        if len({name for name, _ in pairs}) < len(pairs):
            raise Unread("a name twice")
        return dict(pairs)

    def never(constant: str) -> None:
        raise Unread(constant)

    def finite(digits: str) -> float:
        if not re.fullmatch(NUMBER, digits) or abs(float(digits)) == float("inf"):
            raise Unread("too large")
        return float(digits)

    def whole(digits: str) -> int:
        if len(digits) > DIGITS:
            raise Unread("too large")
        return int(digits)

    try:
        return json.loads(
            _limited(text), object_pairs_hook=once, parse_constant=never, parse_float=finite, parse_int=whole
        )
    except (ValueError, RecursionError):
        raise Unread("no JSON") from None


def _limited(text: str) -> str:
    if len(text) > LONGEST:
        raise Unread("too long")
    return text


# ---------------------------------------------------------------- expressions


class Node(NamedTuple):
    """`Node("+", (a, b))`, `Node("number", (Fraction(1),))`, `Node("name", ("x",))`, `Node("sin", (a,))`."""

    kind: str
    parts: tuple


_TOKEN = re.compile(r"[ \t\n]*(?:([0-9]+(?:\.[0-9]+)?)|([A-Za-z]+)|(\*\*|[-+*/()]))[ \t\n]*")


def expression(
    text: str, names: Iterable[str] = (), functions: Iterable[str] = (), powers: bool = False
) -> Node:
    """The tree of an expression in + - * / and brackets, with these names and functions, and ** with
    `powers`."""
    _limited(text)
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match or (match[1] and len(match[1]) > DIGITS) or (match[3] == "**" and not powers):
            raise Unread("what is no part of an expression")
        tokens.append(match.group().strip())
        at = match.end()
    if len(tokens) > TOKENS:
        raise Unread("too long")
    return _Reader(tokens, frozenset(names), frozenset(functions)).whole()


class _Reader:
    """Recursive descent: sum, product, sign, power, atom."""

    def __init__(self, tokens: list[str], names: frozenset[str], functions: frozenset[str]):
        self.tokens, self.names, self.functions = [*tokens, ""], names, functions
        self.at = self.depth = 0

    def whole(self) -> Node:
        tree = self._sum()
        if self.tokens[self.at]:
            raise Unread("something behind the end")
        return tree

    def _next(self, *wanted: str) -> str:
        """The next token, where it is one of these; "" and no step where it is not."""
        token = self.tokens[self.at]
        if token and token in wanted:
            self.at += 1
            return token
        return ""

    def _sum(self) -> Node:
        tree = self._product()
        while sign := self._next("+", "-"):
            tree = Node(sign, (tree, self._product()))
        return tree

    def _product(self) -> Node:
        tree = self._signed()
        while sign := self._next("*", "/"):
            tree = Node(sign, (tree, self._signed()))
        return tree

    def _signed(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unread("too deep")
        sign = self._next("-", "+")
        tree = self._signed() if sign else self._power()
        self.depth -= 1
        return Node("minus", (tree,)) if sign == "-" else tree

    def _power(self) -> Node:
        base = self._atom()
        return Node("**", (base, self._signed())) if self._next("**") else base

    def _atom(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return Node("number", (Fraction(token),))
        if token == "(":
            return self._inside()
        if token in self.names:
            return Node("name", (token,))
        if token in self.functions and self._next("("):
            return Node(token, (self._inside(),))
        raise Unread("an unknown name" if token else "the end comes too soon")

    def _inside(self) -> Node:
        tree = self._sum()
        if not self._next(")"):
            raise Unread("brackets that do not match")
        return tree


def nodes(tree: Node) -> Iterator[Node]:
    """A node and all below it, in the order in which they were written."""
    yield tree
    for part in tree.parts:
        if isinstance(part, Node):
            yield from nodes(part)


def leaves(tree: Node) -> list[Fraction]:
    """The numbers of a tree."""
    return [node.parts[0] for node in nodes(tree) if node.kind == "number"]


def folded(
    tree: Node, constant: Callable, name: Callable, power: Callable, function: Callable | None = None
) -> Any:
    """A tree's value, where numbers are made by `constant`, names by `name`, and so on; + - * / are the
    values'."""

    def fold(node: Node) -> Any:
        if node.kind == "number":
            return constant(node.parts[0])
        if node.kind == "name":
            return name(node.parts[0])
        if node.kind == "**":
            return power(fold(node.parts[0]), node.parts[1])
        values = [fold(part) for part in node.parts]
        match node.kind:
            case "+":
                return values[0] + values[1]
            case "-":
                return values[0] - values[1]
            case "*":
                return values[0] * values[1]
            case "/":
                return values[0] / values[1]
            case "minus":
                return -values[0]
        return function(node.kind, *values)

    try:
        return fold(tree)
    except ZeroDivisionError:
        raise Unread("divided by zero") from None


def _bits(fraction: Fraction) -> int:
    return max(fraction.numerator.bit_length(), fraction.denominator.bit_length())


def amount(tree: Node) -> Fraction:
    """The exact value of a tree without names and functions."""

    def power(base: Fraction, exponent: Node) -> Fraction:
        wanted = amount(exponent)
        if wanted.denominator > 1 or abs(wanted) > EXPONENT or _bits(base) * abs(wanted) > BITS:
            raise Unread("too large an exponent")
        return base ** int(wanted)

    def name(_: str) -> Fraction:
        raise Unread("a name")

    return folded(tree, lambda n: n, name, power)


# ---------------------------------------------------------------- polynomials


class Polynomial:
    """Terms with rational coefficients: `{(("x", 2),): Fraction(3)}` is 3x²; equal ones have equal terms."""

    def __init__(self, terms: dict[tuple, Fraction]):
        self.terms = {powers: coefficient for powers, coefficient in terms.items() if coefficient}
        if len(self.terms) > TERMS or any(_bits(coefficient) > BITS for coefficient in self.terms.values()):
            raise Unread("too large a polynomial")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.terms == other.terms

    __hash__ = None

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for powers, coefficient in other.terms.items():
            terms[powers] = terms.get(powers, 0) + coefficient
        return Polynomial(terms)

    def __neg__(self) -> Polynomial:
        return Polynomial({powers: -coefficient for powers, coefficient in self.terms.items()})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        if len(self.terms) * len(other.terms) > TERMS:
            raise Unread("too large a product")
        terms: dict[tuple, Fraction] = {}
        for mine, a in self.terms.items():
            for theirs, b in other.terms.items():
                powers = dict(mine)
                for letter, power in theirs:
                    powers[letter] = powers.get(letter, 0) + power
                key = tuple(sorted(powers.items()))
                terms[key] = terms.get(key, 0) + a * b
        return Polynomial(terms)

    def __truediv__(self, other: Polynomial) -> Polynomial:
        if set(other.terms) - {()}:
            raise Unread("divided by a polynomial")
        return self * Polynomial({(): 1 / other.terms.get((), Fraction(0))})

    def derivative(self, letter: str) -> Polynomial:
        """With respect to `letter`."""
        terms = {}
        for powers, coefficient in self.terms.items():
            if power := dict(powers).get(letter, 0):
                rest = {**dict(powers), letter: power - 1}
                terms[tuple(sorted((name, p) for name, p in rest.items() if p))] = coefficient * power
        return Polynomial(terms)


def polynomial(tree: Node) -> Polynomial:
    """The polynomial that a tree stands for, multiplied out."""

    def power(base: Polynomial, exponent: Node) -> Polynomial:
        wanted = amount(exponent)
        if wanted.denominator > 1 or not 0 <= wanted <= (EXPONENT if len(base.terms) < 2 else SMALL):
            raise Unread("no exponent of a polynomial")
        product = Polynomial({(): Fraction(1)})
        for _ in range(int(wanted)):
            product = product * base
        return product

    return folded(
        tree, lambda n: Polynomial({(): n}), lambda letter: Polynomial({((letter, 1),): Fraction(1)}), power
    )


def expanded(tree: Node) -> bool:
    """Whether nothing is left to multiply out: no sum inside a product or a power."""
    factors = [node for node in nodes(tree) if node.kind in ("*", "/", "**")]
    return not any(inner.kind in ("+", "-") for factor in factors for inner in nodes(factor))


# ---------------------------------------------------------------- sympy


def symbolic(tree: Node) -> Any:
    """The tree as an expression of sympy, put together from its classes: no text is handed to sympy."""
    import sympy

    def power(base: Any, exponent: Node) -> Any:
        wanted = fold(exponent)
        if wanted.is_Rational:
            bits = _bits(Fraction(base.p, base.q)) if base.is_Rational else 1
            if abs(wanted) > EXPONENT or bits * abs(wanted) > BITS:
                raise Unread("too large an exponent")
        return base**wanted

    def function(name: str, inner: Any) -> Any:
        return getattr(sympy, {"ln": "log", "abs": "Abs"}.get(name, name))(inner)

    def name(letter: str) -> Any:
        return {"pi": sympy.pi, "E": sympy.E}.get(letter) or sympy.Symbol(letter)

    def fold(node: Node) -> Any:
        return folded(node, lambda n: sympy.Rational(n.numerator, n.denominator), name, power, function)

    return fold(tree)
