"""Numbers as people write them: typesetting taken off, exact values, units and percent signs apart."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
PLAIN = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms, as typed in Chinese
PLAIN |= {
    ord(a): b
    for a, b in {"−": "-", "–": "-", "。": ".", "π": "\\pi ", "∞": "\\infty ", "°": " degrees"}.items()
}
PLAIN |= {ord(a): f"^{b}" for a, b in zip("²³", "23", strict=True)}
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
    """One spelling for what differs in typesetting alone.

    >>> normalise("$ \\\\dfrac { 1 } {2} $."), normalise("１，２３４")
    ('\\\\frac{1}{2}', '1,234')
    """
    text = text.translate(PLAIN)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith(".") else text


_SIGNED = rf"[-+]?(?:{DIGITS})"
_RATIONALS = [
    re.compile(rf"(?P<n>{_SIGNED})\.?"),
    re.compile(rf"(?P<n>{_SIGNED})/(?P<d>{DIGITS})"),
    re.compile(rf"(?P<s>[-+]?)\\frac\{{(?P<n>{_SIGNED})\}}\{{(?P<d>{_SIGNED})\}}"),
    re.compile(r"(?P<s>[-+]?)\\frac(?P<n>[0-9])(?P<d>[0-9])"),
    re.compile(r"(?P<s>[-+]?)(?P<w>[0-9]+) (?P<n>[0-9]+)/(?P<d>[0-9]+)"),
    re.compile(r"(?P<s>[-+]?)(?P<w>[0-9]+)\\frac\{(?P<n>[0-9]+)\}\{(?P<d>[0-9]+)\}"),
    re.compile(rf"(?P<n>{_SIGNED})(?:\\times|\\cdot|×|\*) ?10\^\{{?(?P<e>[-+]?[0-9]{{1,2}})\}}?"),
]


def rational(text: str) -> Fraction | None:
    """The exact value of a normalised number, fraction, mixed number or power of ten; else None."""
    for pattern in _RATIONALS:
        if match := pattern.fullmatch(text):
            part = match.groupdict("")
            below = Fraction(part.get("d", "1").replace(",", ""))
            if below == 0:
                return None
            value = int(part.get("w", "0")) + Fraction(part["n"].replace(",", "")) / below
            return (-value if part.get("s") == "-" else value) * Fraction(10) ** int(part.get("e") or 0)
    return None


# Units an answer may add to a gold that has none. "5 million" or "5 dozen" are other numbers, not units.
UNITS = frozenset("""
    dollar cent euro pound yuan degree meter metre centimeter kilometer millimeter m cm km mm mile inch foot
    feet inches yard gram kilogram g kg liter litre l ml hour minute second h min s day week month year people
    person student apple book unit 元 个 人 米 厘米 千米 公里 克 千克 升 小时 分钟 秒 天 岁 度 本 只 块
""".split())  # fmt: skip  # noqa: SIM905
_MULTIPLIERS = frozenset("""
    hundred thousand million billion trillion dozen percent score half 百 千 万 亿 倍
""".split())  # fmt: skip  # noqa: SIM905
_WITH_UNIT = re.compile(
    r"(?P<body>.*[0-9}])(?: (?P<latin>[A-Za-z]+(?:\^\{?[23]\}?)?)| ?(?P<han>[\u4e00-\u9fff]{1,3}))"
)


class Quantity(NamedTuple):
    """`Quantity(Fraction(18), "apple", percent=False, divided=False)`; `divided` where a division is left."""

    value: Fraction
    unit: str
    percent: bool
    divided: bool


def quantity(text: str) -> Quantity | None:
    """A normalised number with at most one unit behind it."""
    percent = text.endswith("%")
    body, unit = text.removesuffix("%").rstrip(), ""
    if not percent and (match := _WITH_UNIT.fullmatch(body)):
        body, unit = match["body"], (match["latin"] or match["han"]).lower()
        unit = unit.removesuffix("s") if len(unit) > 2 else unit
    value = rational(body)
    if value is None or unit in _MULTIPLIERS:
        return None
    return Quantity(value, unit, percent, "/" in body or "frac" in body)
