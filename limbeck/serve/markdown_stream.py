"""Growing Markdown texts as HTML, and long texts in pages.

The finished blocks at the beginning of a growing text are rendered to HTML; the unfinished rest, called the
tail, stays plain text. The time of Markdown rendering grows faster than the length of a text, and the time
that a browser needs grows with the size of a page. So no block has more than `MAX_BLOCK` characters, and a
page shows no more than `MAX_PAGE` characters of a text at once.
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
    """Finished blocks as HTML, with what is needed to go on after them.

    `fence` is the opening line of the code block inside which the last block was cut, empty if it was not cut
    inside code. `length` is the number of characters of Markdown that were rendered.
    """

    blocks: list[str]
    fence: str
    length: int


class MarkdownStream:
    """A growing text: `blocks` are its finished parts as HTML, `tail` is the rest as plain text.

    `render` changes nothing, so it may run in another thread; pass its result to `commit`.
    """

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.tail = ""
        self._fence = ""  # the opening line of the code block in which the last block was cut

    def add(self, text: str) -> None:
        """Append text to the tail."""
        self.tail += text

    def ready(self) -> bool:
        """True if the tail begins with a finished block, so that `render` has something to do."""
        return _block_length(self._fence, self.tail) > 0

    def render(self, everything: bool = False) -> RenderedBlocks:
        """Render the finished blocks of the tail, or with `everything` the whole tail.

        Changes nothing; the result is meant for `commit`.
        """
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

        Text that was added after the call of `render` stays in the tail.
        """
        self.blocks += rendered.blocks
        self._fence = rendered.fence
        self.tail = self.tail[rendered.length :]

    def first_recent_block(self, characters: int = MAX_PAGE) -> int:
        """Return the index of the block from which a newly opened page begins.

        The blocks from this index on have together at least `characters` characters of HTML, or are all
        blocks.
        """
        first = len(self.blocks)
        size = 0
        while first and size < characters:
            first -= 1
            size += len(self.blocks[first])
        return first


def split_pages(text: str) -> list[str]:
    """Split a long Markdown text into pages of about `MAX_PAGE` characters at most.

    A code block that is cut between two pages is opened again on the second one.

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
    """Render one page of Markdown, as made by `split_pages`, to HTML."""
    stream = MarkdownStream()
    stream.add(page)
    return "".join(stream.render(everything=True).blocks)


@lru_cache(512)
def _block_html(fence: str, text: str) -> str:
    """Render one block to HTML; results are cached.

    `fence` is the opening line of the code block that the text continues, or empty.
    """
    rendered = to_html(fence + text)
    for tag in SCROLLING:
        rendered = rendered.replace(tag, f'{tag[:-1]} tabindex="0">')
    return f'<div class="piece">{rendered}</div>'


def _block_length(fence: str, text: str) -> int:
    """Return the length in characters of the first block of `text`, 0 if that block is unfinished.

    A block consists of finished paragraphs, or of a part of a paragraph longer than `MAX_BLOCK`. `fence` is
    the opening line of the code block that the text continues, or empty.
    """
    window = text[:MAX_BLOCK]
    length = finished_length(fence + window) - len(fence)
    if length > 0:
        return length
    return _cut(window) if len(text) > MAX_BLOCK else 0


def _cut(window: str) -> int:
    """Return the index at which a long paragraph is cut.

    It is after the last line end in the second half of `window`, else after the last space there, else at the
    end of `window`.
    """
    half = len(window) // 2
    for mark in ("\n", " "):
        index = window.rfind(mark, half)
        if index > 0:
            return index + 1
    return len(window)


def _open_fence(text: str) -> str:
    """Return the opening line of the code block in which a text ends; empty if it ends outside code."""
    fence = ""
    opening = ""
    for line in text.split("\n"):
        if not fence and line.strip().startswith(FENCES):
            opening = line
        fence = fence_after(fence, line)
    return f"{opening}\n" if fence else ""
