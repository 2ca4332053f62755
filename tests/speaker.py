"""A service in the place of the real one: its models say what a script tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, Self

from limbeck.serve.types import Delta, Usage


class Stub:
    """`script(model, question)` gives thought and answer.

    They come `size` characters at a time, `pause` seconds apart. While `held`, no stream gets beyond the
    first half of a thought.
    """

    def __init__(
        self,
        script: Callable[[str, str], tuple[str, str]],
        names=("r1", "small"),
        pause: float = 0.0,
        size: int = 4,
    ):
        self.script, self.pause, self.size = script, pause, size
        self.models = {name: SimpleNamespace(name=name) for name in names}
        self.asked: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []  # of each question, those that `asked` has not
        self.open = 0  # answers being given
        self.held = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def chat(
        self, model: str, messages: Any, temperature=0.6, thought_budget=None, **options: Any
    ) -> AsyncIterator[Delta]:
        self.options.append(options)
        self.asked.append((model, [dict(one) for one in messages], temperature, thought_budget))
        self.open += 1
        counts = {}
        try:
            for kind, text in zip(
                ("thought", "answer"), self.script(model, messages[-1]["content"]), strict=True
            ):
                for at in range(0, len(text), self.size):
                    yield Delta(kind, text[at : at + self.size], 1)
                    await asyncio.sleep(self.pause)
                    while self.held and at > len(text) / 2:
                        await asyncio.sleep(0.01)
                counts[kind] = -(-len(text) // self.size)
            used = Usage(1, 0, sum(counts.values()), counts["thought"], cost=0.00012)
            yield Delta("end", finish="stop", usage=used)
        finally:
            self.open -= 1


THOUGHT = """We need two numbers whose product is six.

Try $2 \\cdot 3$: that gives 6, and 2*3*4 = 24.

Wait, check the sum: 2 + 3 = 5. Yes."""
ANSWER = """The numbers are **2 and 3**, because

\\[ 2 \\cdot 3 = \\frac{12}{2} = 6 \\]

| a | b |
|---|---|
| 2 | 3 |

and in code:

```python
print(2 * 3)
```

That is all."""


def sums(model: str, question: str) -> tuple[str, str]:
    """A thought and an answer with most of what answers are made of."""
    return THOUGHT, f"{ANSWER}\n\nYou asked: {question} ({model})"


# Text that must never run. Each would set `window.harmed`, leave the page, or ask another machine.
HOSTILE = [
    "<script>window.harmed = 1</script>",
    "<img src=x onerror=\"window.harmed = 1\">",
    "<svg/onload=window.harmed=1>",
    "[click](javascript:window.harmed=1) <a href=\"javascript:window.harmed=1\">x</a>",
    "[click](JaVaScRiPt:window.harmed=1) [b](data:text/html,<script>parent.harmed=1</script>)",
    "![leak](http://evil.example/leak.png) ![x][y]\n\n[y]: http://evil.example/other.png",
    "</textarea><script>window.harmed = 1</script>",
    "</title><img src=x onerror=window.harmed=1>",
    "\"><img src=x onerror=window.harmed=1><input value=\"",
    "' onfocus=window.harmed=1 autofocus tabindex=0 '",
    "<iframe srcdoc=\"<script>parent.harmed = 1</script>\"></iframe>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--><img src=x onerror=window.harmed=1>\">",
    "$\\href{javascript:window.harmed=1}{x}$ \\(\\text{<img src=x onerror=window.harmed=1>}\\)",
    "```html\n<script>window.harmed = 1</script>\n```\n\n<div hx-get=\"/runs\" hx-trigger=\"load\">x</div>",
    ("<form action=/x><button formaction=javascript:window.harmed=1>go</button></form>"
     "<object data=x></object>"),
    ("<base href=http://evil.example><meta http-equiv=refresh content=0;url=http://evil.example>"
     "<style>*{display:none}</style>"),
    "{{ 7 * 7 }}${7*7}<%= 7 %> \u202e\u0000\ufffe <details open ontoggle=window.harmed=1>",
]  # fmt: skip
