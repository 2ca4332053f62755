"""What a model wrote, as HTML that can do nothing: Markdown and LaTeX in, a short list of harmless tags out.

Model output is hostile until shown otherwise. Raw HTML is text, images are gone (a picture's address can carry a secret
away), links say where they go and open nothing by themselves; what is left is cleaned once more at the very end.
"""

from __future__ import annotations

import html
import re
from contextlib import suppress
from functools import cache
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from mdit_py_plugins.dollarmath import dollarmath_plugin

MATH_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mfrac", "msqrt", "mroot", "mover",
    "munder", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded", "mphantom", "menclose", "semantics",
}  # fmt: skip
TAGS = MATH_TAGS | {
    "p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6",
    "table", "thead", "tbody", "tr", "th", "td", "a", "span", "div",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "title"}, "ol": {"start"}, "code": {"class"}, "span": {"class"}, "div": {"class"}, "math": {"display"},
    "th": {"align"}, "td": {"align"}, "mo": {"stretchy", "fence", "form", "separator"}, "mspace": {"width"},
    "mtable": {"columnalign"}, "mi": {"mathvariant"}, "mstyle": {"displaystyle", "scriptlevel"}, "mover": {"accent"},
    "munder": {"accentunder"}, "mfrac": {"linethickness"},
}  # fmt: skip
FACTOR_ENDS, FACTOR_BEGINS = re.compile(r"[0-9A-Za-z)]"), re.compile(r"[0-9A-Za-z(]")
LONGEST_FORMULA = 2000  # characters; beyond it a formula is shown as it was written


def to_html(text: str) -> str:
    """Safe HTML of Markdown with LaTeX between dollars or in \\( \\) and \\[ \\]."""
    dirty = _markdown().render(_bracketed(text))
    return nh3.clean(
        dirty,
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def finished(text: str) -> int:
    """How many characters, from the beginning, are blocks that nothing written later can change.

    A blank line ends a block, unless a code fence or a displayed formula is open or an indented list may go on.
    """
    end, fence, math = 0, "", False
    position = 0
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1]):
        bare = line.strip()
        position += len(line) + 1
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
        elif bare.startswith(("```", "~~~")):
            fence = bare[: len(bare) - len(bare.lstrip(bare[0]))]
        elif bare.count("$$") % 2 or (bare.startswith("\\[")) != (bare.endswith("\\]")):
            math = not math
        elif not bare and not math and lines[number + 1] and not lines[number + 1][0].isspace():
            end = position
    return end


@cache
def _markdown() -> MarkdownIt:
    reader = (
        MarkdownIt("commonmark", {"html": False, "maxNesting": 20})
        .enable(["table", "strikethrough"])
        .disable("image")
    )
    reader.inline.ruler.before("emphasis", "times", _times)
    return reader.use(dollarmath_plugin, allow_digits=False, double_inline=True, renderer=_formula)


def _times(state: StateInline, silent: bool) -> bool:
    """A lone star between two numbers or names multiplies them: `2*3*4` loses no sign."""
    before, here, after = (
        state.src[max(state.pos - 1, 0) : state.pos],
        state.src[state.pos],
        state.src[state.pos + 1 : state.pos + 2],
    )
    if here != "*" or not FACTOR_ENDS.match(before) or not FACTOR_BEGINS.match(after):
        return False
    if not silent:
        state.pending += here
    state.pos += 1
    return True


def _bracketed(text: str) -> str:
    """LaTeX's own brackets as dollars, outside code."""
    pieces = text.split("```")
    for i in range(0, len(pieces), 2):
        for mark, dollars in (("\\(", "$"), ("\\)", "$"), ("\\[", "$$"), ("\\]", "$$")):
            pieces[i] = pieces[i].replace(mark, dollars)
    return "```".join(pieces)


def _formula(source: str, options: dict[str, Any]) -> str:
    """MathML, which browsers draw by themselves; what cannot be read is shown as written."""
    display = "block" if options.get("display_mode") else "inline"
    if len(source) <= LONGEST_FORMULA and source.count("{") < 200:
        with suppress(Exception):  # model output: whatever the reader stumbles over is not ours to mend
            return convert(source, display=display)
    return f"<code>{html.escape(source)}</code>"
