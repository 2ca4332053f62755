"""Long texts in pieces: blocks that are finished as HTML, the tail that still grows as it was written, and pages.

Markdown's cost grows faster than a text's length, and a browser's with the size of a page: so no block has more than
`BLOCK` characters, and nobody is shown more than `PAGE` of a text at once.
"""

from __future__ import annotations

from functools import lru_cache

from .markup import finished, to_html

BLOCK = 6_000  # characters: 0.16 s for the worst that Markdown's readers are known to stumble over
PAGE = 24_000  # characters, some 6,000 tokens
FENCES = ("```", "~~~")


class Prose:
    """A text that grows: `add` what came, now and then `settle` what is `settled`, read `blocks` (HTML) and `tail` (as written)."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.tail = ""
        self._fence = ""  # the line that opened the code in which the last block was cut

    def add(self, text: str) -> None:
        self.tail += text

    def ready(self) -> bool:
        """Whether there is something to settle."""
        return _end(self._fence, self.tail) > 0

    def settled(self, everything: bool = False) -> tuple[list[str], str, int]:
        """What is finished: as blocks, the code they end in, and how many characters they were; `everything` when nothing
        more will come. Changes nothing, so that another thread may do it."""
        blocks, fence, tail = [], self._fence, self.tail
        whole = len(tail)
        while tail and (end := _end(fence, tail) or (len(tail) if everything else 0)):
            blocks.append(_block(fence, tail[:end]))
            fence, tail = _open_fence(fence + tail[:end]), tail[end:]
        return blocks, fence, whole - len(tail)

    def settle(self, found: tuple[list[str], str, int]) -> None:
        """Take what `settled` found; what has been added meanwhile stays in the tail."""
        blocks, self._fence, size = found
        self.blocks += blocks
        self.tail = self.tail[size:]

    def last(self, most: int = PAGE) -> int:
        """From which block on the end of the text is shown, to somebody who comes late."""
        first, size = len(self.blocks), 0
        while first and size < most:
            first -= 1
            size += len(self.blocks[first])
        return first


def pages(text: str) -> list[str]:
    """The pages of a long text, still as written but for code that was cut, which is opened again.

    >>> pages("one\\n\\ntwo")
    ['one\\n\\ntwo']
    """
    found, fence, page = [], "", ""
    while text:
        end = _end(fence, text) or len(text)
        if page and len(page) + end > PAGE:
            found.append(page)
            page = fence
        page, fence, text = page + text[:end], _open_fence(fence + text[:end]), text[end:]
    return [*found, page] if page or not found else found


def html(page: str) -> str:
    """A page as HTML, block by block."""
    prose = Prose()
    prose.add(page)
    return "".join(prose.settled(everything=True)[0])


@lru_cache(512)
def _block(fence: str, text: str) -> str:
    """One block's HTML; what was rendered lately is not rendered again."""
    rendered = to_html(fence + text)
    for wide in (
        "<pre>",
        "<table>",
        '<div class="math block">',
    ):  # these scroll sideways: keys must reach them
        rendered = rendered.replace(wide, f'{wide[:-1]} tabindex="0">')
    return f'<div class="piece">{rendered}</div>'


def _end(fence: str, text: str) -> int:
    """Where the first block of a text ends, 0 if it may go on: after finished paragraphs, or where a long one is cut."""
    window = text[:BLOCK]
    end = finished(fence + window) - len(fence)
    if end > 0:
        return end
    return _cut(window) if len(text) > BLOCK else 0


def _cut(window: str) -> int:
    """Where a paragraph without end is cut: at a line's end, or between words, or anywhere."""
    half = len(window) // 2
    return next((at + 1 for mark in ("\n", " ") if (at := window.rfind(mark, half)) > 0), len(window))


def _open_fence(text: str) -> str:
    """The line that opens the code which a text ends in, or nothing."""
    fence, line = "", ""
    for each in text.split("\n"):
        bare = each.strip()
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
        elif bare.startswith(FENCES):
            fence, line = bare[: len(bare) - len(bare.lstrip(bare[0]))], each
    return f"{line}\n" if fence else ""
