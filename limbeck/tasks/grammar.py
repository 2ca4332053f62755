"""Parsers for answers that other libraries would evaluate as code: numbers, arithmetic expressions,
polynomials, elementary functions, and JSON.

Each parser reads the whole text or raises `ParseError`. No text is evaluated: it is split into tokens, the
tokens are parsed into a tree, and the value is computed from the tree. Length, depth, digits and exponents
are limited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

MAX_LENGTH = 4096  # characters
MAX_DEPTH = 24  # brackets and signs inside one another
MAX_DIGITS = 40  # digits of a number, before and after its point
MAX_TOKENS = 400  # tokens of an expression
MAX_EXPONENT = 99  # of a number, or of a polynomial of one term
MAX_SUM_EXPONENT = 10  # of a polynomial of several terms
MAX_TERMS = 400  # terms of a polynomial, and of a product before like ones are added up
MAX_BITS = 2000  # bits of a numerator or a denominator

NUMBER = rf"[-+]?[0-9]{{1,{MAX_DIGITS}}}(?:\.[0-9]{{1,{MAX_DIGITS}}})?(?:[eE][-+]?[0-9]{{1,3}})?"

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "abs",
})  # fmt: skip


class ParseError(ValueError):
    """Raised if a text does not have the form that a parser expects."""


def number(text: str) -> Fraction:
    """Return a number as an exact fraction: `Fraction(3, 2)` for "1.5" and for "3/2". Raises `ParseError` for
    anything else, including NaN, infinity and digits outside ASCII."""
    parts = [part.strip() for part in _limited(text).strip().split("/")]
    if len(parts) > 2 or not all(re.fullmatch(NUMBER, part) for part in parts):
        raise ParseError("no number")
    if len(parts) == 1:
        return Fraction(parts[0])
    denominator = Fraction(parts[1])
    if denominator == 0:
        raise ParseError("divided by zero")
    return Fraction(parts[0]) / denominator


def numbers(text: str) -> list[Fraction]:
    """Return the numbers in a text separated by commas, such as "1, 2.5". Square brackets around the list and
    quotes around each number are ignored. Raises `ParseError` for anything else."""
    match = re.fullmatch(r"\[(.*)\]|([^\[\]]*)", _limited(text).strip(), re.DOTALL)
    if not match:
        raise ParseError("brackets that do not match")
    inside = match[1] if match[1] is not None else match[2]
    return [number(re.sub(r"""^\s*(["'])(.*)\1\s*$""", r"\2", part)) for part in inside.split(",")]


def value(text: str) -> Any:
    """Return the value of a JSON text. Raises `ParseError` if it is invalid, contains NaN or infinity, or has
    an object with a repeated key."""
    try:
        return json.loads(
            _limited(text),
            object_pairs_hook=_parse_object,
            parse_constant=_refuse_constant,
            parse_float=_parse_float,
            parse_int=_parse_int,
        )
    except (ValueError, RecursionError):
        raise ParseError("no JSON") from None


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        raise ParseError("a name twice")
    return dict(pairs)


def _refuse_constant(constant: str) -> None:
    raise ParseError(constant)


def _parse_float(digits: str) -> float:
    if not re.fullmatch(NUMBER, digits) or abs(float(digits)) == float("inf"):
        raise ParseError("too large")
    return float(digits)


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ParseError("too large")
    return int(digits)


def _limited(text: str) -> str:
    """Return `text` unchanged. Raises `ParseError` if it is longer than `MAX_LENGTH`."""
    if len(text) > MAX_LENGTH:
        raise ParseError("too long")
    return text


# ---------------------------------------------------------------- expressions


class Node(NamedTuple):
    """A node of a syntax tree: an operation or function with its operands, or a leaf. Examples: `Node("+",
    (a, b))`, `Node("minus", (a,))`, `Node("sin", (a,))`, where a and b are nodes; `Node("number",
    (Fraction(1),))`, `Node("name", ("x",))`."""

    kind: str
    parts: tuple


_TOKEN = re.compile(
    r"[ \t\n]*(?:(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<name>[A-Za-z]+)|(?P<sign>\*\*|[-+*/()]))[ \t\n]*"
)


def expression(
    text: str, names: Iterable[str] = (), functions: Iterable[str] = (), powers: bool = False
) -> Node:
    """Return the syntax tree of an expression with + - * / and brackets, which may contain the variables or
    constants in `names`, the functions in `functions`, and, if `powers` is set, the operator **. Raises
    `ParseError` for any other text."""
    tokens = _tokens(_limited(text), powers)
    if len(tokens) > MAX_TOKENS:
        raise ParseError("too long")
    return _Parser(tokens, frozenset(names), frozenset(functions)).parse()


def _tokens(text: str, powers: bool) -> list[str]:
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise ParseError("what is no part of an expression")
        if len(match["number"] or "") > MAX_DIGITS or (match["sign"] == "**" and not powers):
            raise ParseError("what is no part of an expression")
        tokens.append(match.group().strip())
        at = match.end()
    return tokens


class _Parser:
    """A recursive-descent parser with one method per level of the grammar, from the loosest to the tightest
    binding: sum, product, sign, power, atom."""

    def __init__(self, tokens: list[str], names: frozenset[str], functions: frozenset[str]):
        self.tokens = [*tokens, ""]
        self.names = names
        self.functions = functions
        self.at = 0
        self.depth = 0

    def parse(self) -> Node:
        """Return the syntax tree of all tokens. Raises `ParseError` if they are not an expression."""
        tree = self._sum()
        if self.tokens[self.at]:
            raise ParseError("something behind the end")
        return tree

    def _take(self, *wanted: str) -> str:
        """Consume and return the next token if it is one of `wanted`, else return ""."""
        token = self.tokens[self.at]
        if token and token in wanted:
            self.at += 1
            return token
        return ""

    def _sum(self) -> Node:
        tree = self._product()
        while sign := self._take("+", "-"):
            tree = Node(sign, (tree, self._product()))
        return tree

    def _product(self) -> Node:
        tree = self._signed()
        while sign := self._take("*", "/"):
            tree = Node(sign, (tree, self._signed()))
        return tree

    def _signed(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("too deep")
        sign = self._take("-", "+")
        tree = self._signed() if sign else self._power()
        self.depth -= 1
        return Node("minus", (tree,)) if sign == "-" else tree

    def _power(self) -> Node:
        base = self._atom()
        if self._take("**"):
            return Node("**", (base, self._signed()))
        return base

    def _atom(self) -> Node:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return Node("number", (Fraction(token),))
        if token == "(":
            return self._bracketed()
        if token in self.names:
            return Node("name", (token,))
        if token in self.functions and self._take("("):
            return Node(token, (self._bracketed(),))
        raise ParseError("an unknown name" if token else "the end comes too soon")

    def _bracketed(self) -> Node:
        """Parse and return the sum that follows an opening bracket, and consume its closing bracket."""
        tree = self._sum()
        if not self._take(")"):
            raise ParseError("brackets that do not match")
        return tree


def nodes(tree: Node) -> Iterator[Node]:
    """Yield a node and all nodes below it, parents before their operands, operands from left to right."""
    yield tree
    for part in tree.parts:
        if isinstance(part, Node):
            yield from nodes(part)


def leaves(tree: Node) -> list[Fraction]:
    """Return the numbers in a tree, from left to right."""
    return [node.parts[0] for node in nodes(tree) if node.kind == "number"]


class Algebra(NamedTuple):
    """The functions with which `fold` computes the value of a tree: `constant` takes a number, `name` a
    variable's name, `power` the value of a base and the node of an exponent, and `function` a function's name
    and the value of its operand. For + - * / the operators of the values are used."""

    constant: Callable[[Fraction], Any]
    name: Callable[[str], Any]
    power: Callable[[Any, Node], Any]
    function: Callable[..., Any] | None = None


def fold(tree: Node, algebra: Algebra) -> Any:
    """Compute the value of a tree with the functions of an algebra. Raises `ParseError` for a division by
    zero."""
    try:
        return _fold(tree, algebra)
    except ZeroDivisionError:
        raise ParseError("divided by zero") from None


def _fold(node: Node, algebra: Algebra) -> Any:
    if node.kind == "number":
        return algebra.constant(node.parts[0])
    if node.kind == "name":
        return algebra.name(node.parts[0])
    if node.kind == "**":
        base, exponent = node.parts
        return algebra.power(_fold(base, algebra), exponent)
    values = [_fold(part, algebra) for part in node.parts]
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
    return algebra.function(node.kind, *values)


def _bits(fraction: Fraction) -> int:
    return max(fraction.numerator.bit_length(), fraction.denominator.bit_length())


def evaluate(tree: Node) -> Fraction:
    """Return the exact value of a tree that consists of numbers and operators only. Raises `ParseError` for a
    name, a division by zero, or too large an exponent."""
    return fold(tree, Algebra(_identity, _refuse_name, _rational_power))


def _identity(constant: Fraction) -> Fraction:
    return constant


def _refuse_name(_: str) -> Fraction:
    raise ParseError("a name")


def _rational_power(base: Fraction, exponent: Node) -> Fraction:
    power = evaluate(exponent)
    if power.denominator > 1 or abs(power) > MAX_EXPONENT or _bits(base) * abs(power) > MAX_BITS:
        raise ParseError("too large an exponent")
    return base ** int(power)


# ---------------------------------------------------------------- polynomials


class Polynomial:
    """A polynomial with rational coefficients. `terms` maps the powers of a term to its coefficient: `{(("x",
    2),): Fraction(3)}` is 3x². Equal polynomials have equal terms.

    Raises `ParseError` if it has too many terms or too large a coefficient.
    """

    def __init__(self, terms: dict[tuple, Fraction]):
        self.terms = {powers: coefficient for powers, coefficient in terms.items() if coefficient}
        large = any(_bits(coefficient) > MAX_BITS for coefficient in self.terms.values())
        if len(self.terms) > MAX_TERMS or large:
            raise ParseError("too large a polynomial")

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
        if len(self.terms) * len(other.terms) > MAX_TERMS:
            raise ParseError("too large a product")
        terms: dict[tuple, Fraction] = {}
        for left, a in self.terms.items():
            for right, b in other.terms.items():
                powers = _add_powers(left, right)
                terms[powers] = terms.get(powers, 0) + a * b
        return Polynomial(terms)

    def __truediv__(self, other: Polynomial) -> Polynomial:
        if set(other.terms) - {()}:
            raise ParseError("divided by a polynomial")
        divisor = other.terms.get((), Fraction(0))
        return self * Polynomial({(): 1 / divisor})

    def derivative(self, letter: str) -> Polynomial:
        """Return the derivative with respect to the variable `letter`."""
        terms: dict[tuple, Fraction] = {}
        for powers, coefficient in self.terms.items():
            exponents = dict(powers)
            power = exponents.get(letter, 0)
            if power:
                exponents[letter] = power - 1
                remaining = [(name, exponent) for name, exponent in exponents.items() if exponent]
                terms[tuple(sorted(remaining))] = coefficient * power
        return Polynomial(terms)


def _add_powers(left: tuple, right: tuple) -> tuple:
    """Return the powers of the product of two terms, given the powers of each: exponents of the same variable
    are added."""
    powers = dict(left)
    for letter, power in right:
        powers[letter] = powers.get(letter, 0) + power
    return tuple(sorted(powers.items()))


def polynomial(tree: Node) -> Polynomial:
    """Return the polynomial that a tree represents, multiplied out. Raises `ParseError` if it is not a
    polynomial or too large."""
    return fold(tree, Algebra(_constant_polynomial, _variable, _polynomial_power))


def _constant_polynomial(constant: Fraction) -> Polynomial:
    return Polynomial({(): constant})


def _variable(letter: str) -> Polynomial:
    return Polynomial({((letter, 1),): Fraction(1)})


def _polynomial_power(base: Polynomial, exponent: Node) -> Polynomial:
    power = evaluate(exponent)
    limit = MAX_EXPONENT if len(base.terms) < 2 else MAX_SUM_EXPONENT
    if power.denominator > 1 or not 0 <= power <= limit:
        raise ParseError("no exponent of a polynomial")
    product = _constant_polynomial(Fraction(1))
    for _ in range(int(power)):
        product = product * base
    return product


def expanded(tree: Node) -> bool:
    """Return True if the expression is multiplied out: no product, quotient or power contains a sum."""
    factors = [node for node in nodes(tree) if node.kind in ("*", "/", "**")]
    return not any(inner.kind in ("+", "-") for factor in factors for inner in nodes(factor))


# ---------------------------------------------------------------- sympy


def symbolic(tree: Node) -> Any:
    """Return the tree as an expression of sympy. It is built from sympy's classes, so that sympy's parser
    never reads the text. Raises `ParseError` for too large an exponent."""
    import sympy

    def constant(fraction: Fraction) -> Any:
        return sympy.Rational(fraction.numerator, fraction.denominator)

    def name(letter: str) -> Any:
        return {"pi": sympy.pi, "E": sympy.E}.get(letter) or sympy.Symbol(letter)

    def power(base: Any, exponent: Node) -> Any:
        value = symbolic(exponent)
        if value.is_Rational:
            bits = _bits(Fraction(base.p, base.q)) if base.is_Rational else 1
            if abs(value) > MAX_EXPONENT or bits * abs(value) > MAX_BITS:
                raise ParseError("too large an exponent")
        return base**value

    def function(name: str, inner: Any) -> Any:
        return getattr(sympy, {"ln": "log", "abs": "Abs"}.get(name, name))(inner)

    return fold(tree, Algebra(constant, name, power, function))
