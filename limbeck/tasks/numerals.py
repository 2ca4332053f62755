"""Numbers in answers: removal of typesetting, exact values, and separation of units and percent signs."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
PLAIN = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms, as typed in Chinese
PLAIN |= str.maketrans(
    {"−": "-", "–": "-", "。": ".", "π": "\\pi ", "∞": "\\infty ", "°": " degrees", "²": "^2", "³": "^3"}
)
_REWRITES = [
    (re.compile(r"\\\$|\$|\\left(?![a-z])|\\right(?![a-z])|\\!|\\displaystyle\b"), ""),
    (re.compile(r"\\[,;: ]|~|\\quad\b"), " "),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|mathrm|mbox|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)"), " degrees"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"^\s*\(\s*([A-Za-z])\s*\)\s*$"), r"\1"),  # the letter of a choice
    (re.compile(r"\s+"), " "),
    (re.compile(r" ?([^\w\s]) ?"), r"\1"),  # spaces matter between words and digits only
]


def normalise(text: str) -> str:
    """Return the text without typesetting, so that texts which differ only in typesetting become equal.

    >>> normalise("$ \\\\dfrac { 1 } {2} $."), normalise("１，２３４")
    ('\\\\frac{1}{2}', '1,234')
    """
    text = text.translate(PLAIN)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") else text


# The groups of each form: sign, whole, numerator, denominator, exponent of ten.
_SIGNED = rf"[-+]?(?:{DIGITS})"
_RATIONALS = [
    re.compile(rf"(?P<numerator>{_SIGNED})\.?"),
    re.compile(rf"(?P<numerator>{_SIGNED})/(?P<denominator>{DIGITS})"),
    re.compile(rf"(?P<sign>[-+]?)\\frac\{{(?P<numerator>{_SIGNED})\}}\{{(?P<denominator>{_SIGNED})\}}"),
    re.compile(r"(?P<sign>[-+]?)\\frac(?P<numerator>[0-9])(?P<denominator>[0-9])"),
    re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]+) (?P<numerator>[0-9]+)/(?P<denominator>[0-9]+)"),
    re.compile(r"(?P<sign>[-+]?)(?P<whole>[0-9]+)\\frac\{(?P<numerator>[0-9]+)\}\{(?P<denominator>[0-9]+)\}"),
    re.compile(
        rf"(?P<numerator>{_SIGNED})(?:\\times|\\cdot|×|\*) ?10\^\{{?(?P<exponent>[-+]?[0-9]{{1,2}})\}}?"
    ),
]


def rational(text: str) -> Fraction | None:
    """Return the exact value of a normalised text that is a number, a fraction, a mixed number or a multiple
    of a power of ten; None for any other text."""
    for pattern in _RATIONALS:
        match = pattern.fullmatch(text)
        if match:
            return _value(match.groupdict(""))
    return None


def _value(groups: dict[str, str]) -> Fraction | None:
    """Return the number that the groups of a regular expression's match represent, or None if its denominator
    is 0."""
    denominator = Fraction(groups.get("denominator", "1").replace(",", ""))
    if denominator == 0:
        return None
    numerator = Fraction(groups["numerator"].replace(",", ""))
    value = int(groups.get("whole", "0")) + numerator / denominator
    if groups.get("sign") == "-":
        value = -value
    return value * Fraction(10) ** int(groups.get("exponent") or 0)


# Units that an answer may add to a gold without one. "5 million" or "5 dozen" are other numbers, not units.
UNITS = frozenset("""
    dollar cent euro pound yuan degree meter metre centimeter kilometer millimeter m cm km mm mile inch foot
    feet inches yard gram kilogram g kg liter litre l ml hour minute second h min s day week month year people
    person student apple book unit 元 个 人 米 厘米 千米 公里 克 千克 升 小时 分钟 秒 天 岁 度 本 只 块
""".split())  # fmt: skip  # noqa: SIM905
_MULTIPLIERS = frozenset("""
    hundred thousand million billion trillion dozen percent score half 百 千 万 亿 倍
""".split())  # fmt: skip  # noqa: SIM905
_WITH_UNIT = re.compile(
    r"(?P<number>.*[0-9}])(?: (?P<latin>[A-Za-z]+(?:\^\{?[23]\}?)?)| ?(?P<han>[\u4e00-\u9fff]{1,3}))"
)


class Quantity(NamedTuple):
    """A number with its unit, such as `Quantity(Fraction(18), "apple", percent=False, divided=False)`. `unit`
    is "" if there is none; `percent` is True if a percent sign follows, `divided` if the number is written as
    a division."""

    value: Fraction
    unit: str
    percent: bool
    divided: bool


def quantity(text: str) -> Quantity | None:
    """Return the quantity in a normalised text: a number that is followed by a percent sign, a unit or
    nothing. None for any other text."""
    percent = text.endswith("%")
    number = text.removesuffix("%").rstrip()
    unit = ""
    match = None if percent else _WITH_UNIT.fullmatch(number)
    if match:
        number = match["number"]
        unit = (match["latin"] or match["han"]).lower()
        if len(unit) > 2:
            unit = unit.removesuffix("s")
    value = rational(number)
    if value is None or unit in _MULTIPLIERS:
        return None
    return Quantity(value, unit, percent, "/" in number or "frac" in number)
