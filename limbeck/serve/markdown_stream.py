"""Growing Markdown: finished blocks as HTML, the unfinished tail as plain text, and pages of long texts.

The time of Markdown rendering grows faster than a text's length, and that of a browser with the size of a
page. So no block has more than `MAX_BLOCK` characters, and a page shows no more than `MAX_PAGE` characters of
a text at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .markup import FENCES, fence_after, finished_length, to_html

MAX_BLOCK = 6_000  # characters: 0.16 s for the worst input that is known for Markdown parsers
MAX_PAGE = 24_000  # characters, some 6,000 tokens
SCROLLING = (
    "<pre>",
    "<table>",
    '<div class="math block">',
)  # these scroll sideways, so the keyboard must reach them


class RenderedBlocks(NamedTuple):
    """Finished blocks as HTML, the opening line of the code block they end in, and their length.

    The length is in characters of the text, before rendering.
    """

    blocks: list[str]
    fence: str
    length: int


class MarkdownStream:
    """A growing text: `blocks` are its finished parts as HTML, `tail` is the rest as plain text.

    `render` may run in another thread, because it changes nothing; `commit` takes its result.
    """

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.tail = ""
        self._fence = ""  # the opening line of the code block in which the last block was cut

    def add(self, text: str) -> None:
        """Append text to the tail."""
        self.tail += text

    def ready(self) -> bool:
        """True if the tail begins with a finished block."""
        return _block_length(self._fence, self.tail) > 0

    def render(self, everything: bool = False) -> RenderedBlocks:
        """The finished blocks of the tail; with `everything`, the whole tail."""
        blocks: list[str] = []
        fence = self._fence
        tail = self.tail
        total = len(tail)
        while tail:
            length = _block_length(fence, tail)
            if not length and everything:
                length = len(tail)
            if not length:
                break
            block = tail[:length]
            blocks.append(_block_html(fence, block))
            fence = _open_fence(fence + block)
            tail = tail[length:]
        return RenderedBlocks(blocks, fence, total - len(tail))

    def commit(self, rendered: RenderedBlocks) -> None:
        """Move rendered blocks from the tail to `blocks`.

        Text that was added since `render` stays in the tail.
        """
        self.blocks += rendered.blocks
        self._fence = rendered.fence
        self.tail = self.tail[rendered.length :]

    def first_recent_block(self, characters: int = MAX_PAGE) -> int:
        """The index of the first of the last blocks that together have this many characters of HTML."""
        first = len(self.blocks)
        size = 0
        while first and size < characters:
            first -= 1
            size += len(self.blocks[first])
        return first


def split_pages(text: str) -> list[str]:
    """The pages of a long text as Markdown. A code block that is cut is opened again on the next page.

    >>> split_pages("one\\n\\ntwo")
    ['one\\n\\ntwo']
    """
    pages: list[str] = []
    fence = ""
    page = ""
    while text:
        length = _block_length(fence, text) or len(text)
        if page and len(page) + length > MAX_PAGE:
            pages.append(page)
            page = fence
        block = text[:length]
        page += block
        fence = _open_fence(fence + block)
        text = text[length:]
    if page or not pages:
        pages.append(page)
    return pages


def render_page(page: str) -> str:
    """A page as HTML, block by block."""
    stream = MarkdownStream()
    stream.add(page)
    return "".join(stream.render(everything=True).blocks)


@lru_cache(512)
def _block_html(fence: str, text: str) -> str:
    """One block's HTML; recent ones are cached."""
    rendered = to_html(fence + text)
    for tag in SCROLLING:
        rendered = rendered.replace(tag, f'{tag[:-1]} tabindex="0">')
    return f'<div class="piece">{rendered}</div>'


def _block_length(fence: str, text: str) -> int:
    """The length of a text's first block: finished paragraphs, or a part of a long one; 0 if it is open."""
    window = text[:MAX_BLOCK]
    length = finished_length(fence + window) - len(fence)
    if length > 0:
        return length
    return _cut(window) if len(text) > MAX_BLOCK else 0


def _cut(window: str) -> int:
    """Where a long paragraph is cut: at the last line end or space of its second half, else at its end."""
    half = len(window) // 2
    for mark in ("\n", " "):
        index = window.rfind(mark, half)
        if index > 0:
            return index + 1
    return len(window)


def _open_fence(text: str) -> str:
    """The opening line of the code block that a text ends in; empty outside code."""
    fence = ""
    opening = ""
    for line in text.split("\n"):
        if not fence and line.strip().startswith(FENCES):
            opening = line
        fence = fence_after(fence, line)
    return f"{opening}\n" if fence else ""
