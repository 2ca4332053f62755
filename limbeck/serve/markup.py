"""Safe HTML from a model's Markdown and LaTeX.

Model output is treated as hostile. Only a short list of harmless tags passes. Raw HTML is shown as text.
Images are removed, because an image's address can leak data. Links tell browsers to send no referrer. The
resulting HTML is sanitized once more at the end.
"""

from __future__ import annotations

import html
import re
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from mdit_py_plugins.dollarmath import dollarmath_plugin

MATH_TAGS = {
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mfrac", "msqrt",
    "mroot", "mover", "munder", "munderover", "mtable", "mtr", "mtd", "mstyle", "mpadded",
    "mphantom", "menclose", "semantics",
}  # fmt: skip
TAGS = MATH_TAGS | {
    "p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li",
    "h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "a", "span", "div",
}  # fmt: skip
ATTRIBUTES = {
    "a": {"href", "title"}, "ol": {"start"}, "code": {"class"}, "span": {"class"}, "div": {"class"},
    "th": {"align"}, "td": {"align"}, "math": {"display"}, "mo": {"stretchy", "fence", "form", "separator"},
    "mspace": {"width"}, "mtable": {"columnalign"}, "mi": {"mathvariant"}, "mover": {"accent"},
    "mstyle": {"displaystyle", "scriptlevel"}, "munder": {"accentunder"}, "mfrac": {"linethickness"},
}  # fmt: skip
FACTOR_END = re.compile(r"[0-9A-Za-z)]")
FACTOR_BEGIN = re.compile(r"[0-9A-Za-z(]")
FENCES = ("```", "~~~")
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
BRACKETS = {"\\(": "$", "\\)": "$", "\\[": "$$", "\\]": "$$"}
MAX_FORMULA = 2000  # characters; a longer formula is shown as code
MAX_BRACES = 200  # opening braces; a formula with more is shown as code


def to_html(text: str) -> str:
    """Render Markdown to safe HTML.

    The tags `<answer>` and `</answer>`, between which verifiers look for the final answer, are not shown;
    what is between them in one paragraph gets the class `final`. LaTeX formulas may stand between dollars or
    in \\( \\) and \\[ \\].
    """
    rendered = _markdown().render(_brackets_to_dollars(text))
    return nh3.clean(
        rendered,
        tags=TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def finished_length(text: str) -> int:
    """Return how many characters at the beginning of `text` form blocks that later text cannot change.

    A blank line ends a block, unless a code fence or a displayed formula is open or an indented list may go
    on.
    """
    length = 0
    position = 0
    fence = ""
    in_math = False
    lines = text.split("\n")
    for line, following in pairwise(lines):
        bare = line.strip()
        position += len(line) + 1
        in_code = bool(fence)
        fence = fence_after(fence, line)
        if in_code or fence:
            continue
        if _toggles_math(bare):
            in_math = not in_math
        elif not bare and not in_math and following and not following[0].isspace():
            length = position
    return length


def fence_after(fence: str, line: str) -> str:
    """Return the code fence that is open after `line`, such as three backticks; empty outside code.

    `fence` is the one that was open before the line, or empty.
    """
    bare = line.strip()
    if fence:
        closes = bare.startswith(fence) and not bare.strip(fence[0])
        return "" if closes else fence
    if bare.startswith(FENCES):
        return bare[: len(bare) - len(bare.lstrip(bare[0]))]
    return ""


def _toggles_math(bare: str) -> bool:
    """True if a stripped line either opens or closes a displayed formula, but does not do both."""
    opens = bare.startswith("\\[")
    closes = bare.endswith("\\]")
    return bool(bare.count("$$") % 2) or opens != closes


@cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 20})
    parser.enable(["table", "strikethrough"])
    parser.disable("image")
    parser.inline.ruler.before("emphasis", "times", _times)
    parser.inline.ruler.before("autolink", "final_answer", _final_answer)
    return parser.use(dollarmath_plugin, allow_digits=False, double_inline=True, renderer=_formula)


def _times(state: StateInline, silent: bool) -> bool:
    """Keep a single star between two factors as a multiplication sign, so that `2*3*4` keeps its stars.

    This is an inline rule of markdown-it: True if it has consumed the star; `silent` only tests for a match.
    """
    position = state.pos
    if state.src[position] != "*":
        return False
    before = state.src[max(position - 1, 0) : position]
    after = state.src[position + 1 : position + 2]
    if not FACTOR_END.match(before) or not FACTOR_BEGIN.match(after):
        return False
    if not silent:
        state.pending += "*"
    state.pos += 1
    return True


def _final_answer(state: StateInline, silent: bool) -> bool:
    """Mark the text between the tags of a final answer, and drop the tags; a tag without its partner is
    dropped too.

    This is an inline rule of markdown-it: True if it has consumed something; `silent` only tests for a match.
    """
    begin = state.pos
    for tag in (ANSWER_OPEN, ANSWER_CLOSE):
        if state.src.startswith(tag, begin):
            break
    else:
        return False
    end = state.src.find(ANSWER_CLOSE, begin, state.posMax)
    if tag == ANSWER_CLOSE or end < 0:
        state.pos = begin + len(tag)
        return True
    if not silent:
        state.push("final_open", "span", 1).attrSet("class", "final")
        whole = state.posMax
        state.pos = begin + len(tag)
        state.posMax = end
        state.md.inline.tokenize(state)
        state.posMax = whole
        state.push("final_close", "span", -1)
    state.pos = end + len(ANSWER_CLOSE)
    return True


def _brackets_to_dollars(text: str) -> str:
    """Replace the brackets around LaTeX formulas by dollars, except in code between triple backticks."""
    parts = text.split("```")
    for i in range(0, len(parts), 2):
        for bracket, dollars in BRACKETS.items():
            parts[i] = parts[i].replace(bracket, dollars)
    return "```".join(parts)


def _formula(source: str, options: dict[str, Any]) -> str:
    """Return a LaTeX formula as MathML, or as HTML code if it is too long or cannot be parsed."""
    display = "block" if options.get("display_mode") else "inline"
    if len(source) <= MAX_FORMULA and source.count("{") < MAX_BRACES:
        with suppress(Exception):  # the parser raises errors of many types on malformed LaTeX
            return convert(source, display=display)
    return f"<code>{html.escape(source)}</code>"
